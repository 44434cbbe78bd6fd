"""Children made by `os.fork`: of all threads they have only the one that forked.

What another thread held or was to do there is never given back or done. So locks are made anew, and
launches, whose OpenMP team is gone while OpenMP still counts on it, run on the calling thread.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

_methods: set[weakref.WeakMethod[Callable[[], None]]] = set()


def in_child(method: Callable[[], None]) -> None:
    """Has a bound method called in every forked child, as long as its object lives."""
    _methods.add(weakref.WeakMethod(method, _methods.discard))


def _mend() -> None:
    for reference in list(_methods):
        method = reference()
        if method is not None:
            method()


def at_fork(
    before: Callable[[], object] = lambda: None,
    parent: Callable[[], object] = lambda: None,
    child: Callable[[], object] = lambda: None,
) -> None:
    """`os.register_at_fork`, where there is such a thing."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=parent, after_in_child=child)


at_fork(child=_mend)
