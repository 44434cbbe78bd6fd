"""Outputs that models of transformers record (hidden states, attentions) while one is captured.

The first call that asks for such outputs puts hooks on the model's parts and a mark on the model.
A trace is not to leave them behind: it would be a change of the model, and the mark without the
hooks, or the other way round, makes every later call record nothing or everything twice.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from torch import nn

LIBRARY = "transformers.utils.output_capturing"
MARK = "_output_capturing_hooks_installed"


@contextlib.contextmanager
def unhooked(roots: Sequence[nn.Module]) -> Iterator[None]:
    """Takes off, when left, the hooks and marks that models in ``roots`` got within it."""
    if LIBRARY not in sys.modules:
        yield
        return
    parts = list(dict.fromkeys(m for root in roots for m in root.modules()))
    unmarked = [vars(p) for p in parts if MARK not in vars(p)]
    before = [(p._forward_hooks, set(p._forward_hooks)) for p in parts]
    try:
        yield
    finally:
        marked = [attributes for attributes in unmarked if MARK in attributes]
        for attributes in marked:
            del attributes[MARK]
        if marked:
            for hooks, old in before:
                for key in hooks.keys() - old:
                    if getattr(hooks[key], "__module__", None) == LIBRARY:
                        del hooks[key]
