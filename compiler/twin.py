"""A compiled module's methods: they call the compiled program, where they call the module."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def twin_of(original: nn.Module, call: Callable[..., Any]) -> nn.Module | None:
    """A second object that shares the attributes of ``original`` but answers calls by ``call``.

    It is an instance of a subclass, so that methods find themselves where they expect to be; copies
    and pickles of it are the original's. None if the class cannot have subclasses.
    """
    cls: Any = type(original)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    body = {
        "__call__": __call__,
        "forward": functools.wraps(cls.forward)(__call__),
        "__deepcopy__": lambda _, memo: copy.deepcopy(original, memo),
        "__reduce_ex__": lambda _, protocol: original.__reduce_ex__(protocol),
        **{name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    try:
        twin: Any = object.__new__(type(cls)(cls.__name__, (cls,), body))
        object.__setattr__(twin, "__dict__", vars(original))
    except Exception:  # whatever a class does when it gets a subclass
        return None
    return twin


def rebound(value: Any, original: Any, twin: nn.Module, compiled: nn.Module) -> Any:
    """``value``, an attribute of ``original``, bound to ``twin`` if it is a method.

    Where the method returns its own object, ``compiled`` is returned.
    """
    if not inspect.ismethod(value) or value.__self__ is not original:
        return value

    @functools.wraps(value)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = value.__func__(twin, *args, **kwargs)
        return compiled if result is twin or result is original else result

    method.__self__ = compiled  # type: ignore[attr-defined]
    return method
