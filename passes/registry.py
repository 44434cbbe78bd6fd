"""Names of passes, and where they live; a pass is imported when it is first asked for.

A package joins by the entry point group ``plait.passes`` (name = "module:Class") or by calling
`register`. Built-in names cannot be taken over by a plugin's entry point; `register` may replace
any name when told to.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

from .base import Pass
from .suggest import did_you_mean

_BUILT_IN: dict[str, str] = {
    "normalize": "normalize:Normalize",
    "outline-branches": "outline_branches:OutlineBranches",
    "speculate-routes": "speculate_routes:SpeculateRoutes",
    "merge-parallel-ops": "merge_parallel:MergeParallelOps",
    "prefetch-weights": "prefetch_weights:PrefetchWeights",
    "fuse-vertical": "fuse_vertical:FuseVertical",
    "schedule": "schedule:SchedulePass",
    "fuse-horizontal": "fuse_horizontal:FuseHorizontal",
    "streams": "streams:StreamsPass",
}
_ALWAYS = ("plan-memory",)
_registered: dict[str, str | type[Pass]] = {}


class UnknownPass(LookupError):
    """No pass has this name."""


class BrokenPass(ImportError):
    """A registered pass cannot be imported or is not a pass."""


@functools.cache
def _plugins() -> dict[str, str]:
    found = {}
    for entry in importlib.metadata.entry_points(group="plait.passes"):
        found.setdefault(entry.name, entry.value)
    return found


def names() -> tuple[str, ...]:
    """Every known pass name, sorted. Imports no pass."""
    return tuple(sorted({*_BUILT_IN, *_plugins(), *_registered}))


def register(name: str, target: str | type[Pass], *, replace: bool = False) -> None:
    """Make a pass known by ``name``.

    Args:
        name: lower case words joined by hyphens.
        target: the class, or "module:Class" to import on first use.
        replace: allow taking over a name that exists.

    Raises:
        ValueError: the name is malformed, the target is not "module:Class", or the name is taken.
    """
    if not all(word.isalnum() and word == word.lower() for word in name.split("-")):
        raise ValueError(f"pass name {name!r} is not lower case words joined by hyphens")
    if isinstance(target, str) and target.count(":") != 1:
        raise ValueError(f"target {target!r} of pass {name} is not of the form 'module:Class'")
    if name in names() and not replace:
        raise ValueError(f"pass {name!r} exists; pass replace=True to take its place")
    _registered[name] = target


def unregister(name: str) -> None:
    """Undo `register`; does nothing for a name that was not registered."""
    _registered.pop(name, None)


def lookup(name: str) -> type[Pass]:
    """The class of the pass called ``name``.

    Raises:
        UnknownPass: there is no such pass; the message proposes the nearest names.
        BrokenPass: its module cannot be imported, or holds no such pass class.
    """
    if name in _ALWAYS:
        raise UnknownPass(f"{name} always runs, after all that can be named here: leave it out")
    if name in _registered:
        target = _registered[name]
    elif name in _BUILT_IN:
        target = f"{__package__}.{_BUILT_IN[name]}"
    elif name in _plugins():
        target = _plugins()[name]
    else:
        raise UnknownPass(f"unknown pass {name!r}{did_you_mean(name, names())}")
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        try:
            target = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise BrokenPass(f"pass {name!r} cannot be imported from {module}: {error}") from error
    if not (isinstance(target, type) and issubclass(target, Pass)):
        raise BrokenPass(f"pass {name!r} is {target!r}, not a subclass of plait.passes.Pass")
    return target
