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
    from .compiler.errors import CaptureError, FileError, InputError, OptionError, PlaitError
    from .compiler.options import Options
    from .compiler.placed.capture import empty_weights
    from .compiler.placed.device import Device
    from .compiler.placed.experts import place_experts
    from .compiler.placed.options import PlacementOptions
    from .compiler.placed.part import DistributedError
    from .compiler.placed.place import place
    from .compiler.placed.placed import Placed
    from .compiler.routing.early_exit import EarlyExit
    from .compiler.routing.profile import Profile, profile
    from .compiler.routing.router import Router
    from .kernels.routing_experts import experts
    from .passes.placement.errors import InfeasibleError, PlacementError
    from .passes.placement.experts import ExpertPlacement, ExpertTraffic
    from .passes.placement.placement import Placement
    from .passes.placement.problem import Problem
    from .passes.remarks import Remark

__version__ = "0.1.0"

_EXPORTS = {
    "CaptureError": "compiler.errors",
    "Compiled": "compiler.compiled",
    "Device": "compiler.placed.device",
    "DistributedError": "compiler.placed.part",
    "EarlyExit": "compiler.routing.early_exit",
    "ExpertPlacement": "passes.placement.experts",
    "ExpertTraffic": "passes.placement.experts",
    "FileError": "compiler.errors",
    "InfeasibleError": "passes.placement.errors",
    "InputError": "compiler.errors",
    "OptionError": "compiler.errors",
    "Options": "compiler.options",
    "Placement": "passes.placement.placement",
    "Placed": "compiler.placed.placed",
    "PlacementError": "passes.placement.errors",
    "PlacementOptions": "compiler.placed.options",
    "PlaitError": "compiler.errors",
    "Problem": "passes.placement.problem",
    "Profile": "compiler.routing.profile",
    "Remark": "passes.remarks",
    "Router": "compiler.routing.router",
    "compile": "compiler.api",
    "empty_weights": "compiler.placed.capture",
    "experts": "kernels.routing_experts",
    "load": "compiler.api",
    "place": "compiler.placed.place",
    "place_experts": "compiler.placed.experts",
    "profile": "compiler.routing.profile",
}

__all__ = [
    "CaptureError",
    "Compiled",
    "Device",
    "DistributedError",
    "EarlyExit",
    "ExpertPlacement",
    "ExpertTraffic",
    "FileError",
    "InfeasibleError",
    "InputError",
    "OptionError",
    "Options",
    "Placed",
    "Placement",
    "PlacementError",
    "PlacementOptions",
    "PlaitError",
    "Problem",
    "Profile",
    "Remark",
    "Router",
    "compile",
    "empty_weights",
    "experts",
    "load",
    "place",
    "place_experts",
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
