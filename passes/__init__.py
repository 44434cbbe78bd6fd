"""Passes: FX graph in, FX graph and remarks out; the function stays the same for every input.

To add one, subclass `Pass` and make it known by `register` or an entry point "plait.passes".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Pass, PassResult
    from .registry import register
    from .remarks import Remark

__all__ = ["Pass", "PassResult", "Remark", "register"]

_HOMES = {"Pass": "base", "PassResult": "base", "Remark": "remarks", "register": "registry"}


def __getattr__(name: str) -> Any:
    # Imported on first use: reading remarks or printing help must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
