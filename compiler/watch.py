"""Notices cheaply that the tensors a compiled program was prepared from have changed.

Weights change in three ways: in place (the version counter counts), by ``.data`` (the address
differs) and by replacing the tensor in its module (the object differs). Everything runs in C loops:
about 0.15 microseconds for a tensor.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

_version = operator.attrgetter("_version")
_address = torch.Tensor.data_ptr
_is, _getitem = operator.is_, operator.getitem
_TRAINING = itertools.repeat("training")


class Watch:
    """A snapshot of tensors. ``where`` maps a name to the tensor's (owning dictionary, key)."""

    def __init__(self, where: Mapping[str, tuple[dict[str, Any], str]]) -> None:
        self.names = list(where)
        self._owners = [owner for owner, _ in where.values()]
        self._keys = [key for _, key in where.values()]
        self.snapshot()

    def snapshot(self) -> None:
        """Take the present state as unchanged."""
        owners, keys = self._owners, self._keys
        tensors = [o[k] for o, k in zip(owners, keys, strict=True)]
        counted = [t for t in tensors if not t.is_inference()]
        versions = sum(map(_version, counted))  # each only grows, so the sum tells
        addresses = list(map(_address, tensors))

        def changed() -> bool:
            """Whether any tensor is not what it was at the last snapshot."""
            try:
                return not (
                    sum(map(_version, counted)) == versions
                    and all(map(_is, map(_getitem, owners, keys), tensors))
                    and list(map(_address, tensors)) == addresses
                )
            except KeyError:
                return True

        self.changed = changed

    def now(self) -> dict[str, Any]:
        """What is at each place at this moment; None where nothing is left."""
        places = zip(self.names, self._owners, self._keys, strict=True)
        return {name: owner.get(key) for name, owner, key in places}


def locate(module: nn.Module, name: str) -> tuple[dict[str, Any], str] | None:
    """Where the tensor with the dotted ``name`` lives below ``module``; None if it does not."""
    path, _, key = name.rpartition(".")
    try:
        owner: Any = module.get_submodule(path)
    except AttributeError:
        return None
    for place in (owner._parameters, owner._buffers, vars(owner)):
        if isinstance(place.get(key), torch.Tensor):
            return place, key
    return None


class Structure:
    """The submodules below some modules: whether they are the same, and whether any trains."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self.roots = list(roots)
        self.snapshot()

    def snapshot(self) -> None:
        """Take the present submodules as unchanged."""
        self.modules: list[nn.Module] = []
        owners: list[dict[str, Any]] = []
        keys: list[str] = []
        parts: list[Any] = []
        for module in dict.fromkeys(m for root in self.roots for m in root.modules()):
            self.modules.append(module)
            for key, part in module._modules.items():
                owners.append(module._modules)
                keys.append(key)
                parts.append(part)
        flags = [vars(m) for m in self.modules]

        def training() -> bool:
            """Whether any module is in training mode."""
            return any(map(_getitem, flags, _TRAINING))

        def changed() -> bool:
            """Whether a submodule was replaced or removed since the last snapshot."""
            try:
                return not all(map(_is, map(_getitem, owners, keys), parts))
            except KeyError:
                return True

        self.training, self.changed = training, changed


def modules_of(target: Any) -> list[nn.Module]:
    """The modules that calling ``target`` may use: itself, its owner, what its closure holds."""
    if isinstance(target, nn.Module):
        return [target]
    found: list[nn.Module] = []
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen or depth > 4:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item, depth + 1)
        elif isinstance(value, dict):
            visit(list(value.values()), depth)
        elif inspect.ismethod(value):
            visit(value.__self__, depth)
            visit(value.__func__, depth)
        elif inspect.isfunction(value):
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # a cell may still be empty
                    visit(cell.cell_contents, depth + 1)
            for name in value.__code__.co_names:
                visit(value.__globals__.get(name), depth + 1)
        elif hasattr(value, "func") and hasattr(value, "keywords"):
            visit([value.func, value.args, value.keywords], depth)

    visit(target, 0)
    return found
