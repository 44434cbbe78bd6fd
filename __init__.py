"""plait: a graph-level deep-learning compiler for PyTorch.

    compiled = plait.compile(model)     # compiled(*inputs) gives model(*inputs)

Importing the package is cheap; torch is loaded when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler.api import compile, load
    from .compiler.compiled import Compiled
    from .compiler.early_exit import EarlyExit
    from .compiler.errors import CaptureError, FileError, InputError, OptionError, PlaitError
    from .compiler.options import Options
    from .compiler.route_profile import Profile, profile
    from .compiler.router import Router
    from .passes.remarks import Remark

__version__ = "0.1.0"

_EXPORTS = {
    "CaptureError": "compiler.errors",
    "Compiled": "compiler.compiled",
    "EarlyExit": "compiler.early_exit",
    "FileError": "compiler.errors",
    "InputError": "compiler.errors",
    "OptionError": "compiler.errors",
    "Options": "compiler.options",
    "PlaitError": "compiler.errors",
    "Profile": "compiler.route_profile",
    "Remark": "passes.remarks",
    "Router": "compiler.router",
    "compile": "compiler.api",
    "load": "compiler.api",
    "profile": "compiler.route_profile",
}

__all__ = [
    "CaptureError",
    "Compiled",
    "EarlyExit",
    "FileError",
    "InputError",
    "OptionError",
    "Options",
    "PlaitError",
    "Profile",
    "Remark",
    "Router",
    "compile",
    "load",
    "profile",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
