"""Notices cheaply that the tensors a compiled program was prepared from have changed.

Weights change in three ways: in place (the version counter counts, or else `samples` differ), by
``.data`` (address, sizes or strides differ) and by replacing the tensor in its module (the object
differs). Full checks ask every object, at 0.2 to 0.5 microseconds each; `quick` spares nearly all
calls that.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import samples
from .layout import dict_tag
from .quick import quick, readable, table
from .settings import Settings

_version = operator.attrgetter("_version")
_is, _getitem = operator.is_, operator.getitem
_TRAINING = itertools.repeat("training")


def _alteration(tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """A function that tells whether one of ``tensors`` holds other values, or others of its memory,
    than now; where torch counts nothing, `samples` tell.
    """
    counted = [t for t in tensors if not t.is_inference()]
    versions = sum(map(_version, counted))  # each only grows, so the sum tells
    aspects = Tensor.data_ptr, Tensor.size, Tensor.stride
    states = [list(map(aspect, tensors)) for aspect in aspects]
    sampled = samples.rows(tensors)

    def altered() -> bool:
        return (
            sum(map(_version, counted)) != versions
            or any(
                list(map(aspect, tensors)) != state
                for aspect, state in zip(aspects, states, strict=True)
            )
            or any(samples.word(place) != content for place, content in sampled)
        )

    return altered


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
        altered = _alteration(tensors)
        self.uncounted = any(t.is_inference() for t in tensors)
        """Whether there are tensors of which not all changes are noticed."""
        plain = [t for t in tensors if readable(t)]
        odd = [t for t in tensors if not readable(t)]

        def replaced() -> bool:
            try:
                return not all(map(_is, map(_getitem, owners, keys), tensors))
            except KeyError:
                return True

        def full() -> bool:
            """Whether any tensor is not what it was at the last snapshot."""
            return replaced() or altered()

        aside = [_alteration(odd)] if odd else []
        tables = owners
        if dict_tag() is None:
            tables = []
            aside.append(replaced)
        self.full = full
        self.changed = quick(full, lambda: table(tables, plain), aside)
        """What `full` says, in a fraction of its time."""

    def expire(self) -> None:
        """There was a change that no snapshot has."""
        self.full = self.changed = lambda: True

    def now(self) -> dict[str, Any]:
        """What is at each place at this moment; None where nothing is left."""
        places = zip(self.names, self._owners, self._keys, strict=True)
        return {name: owner.get(key) for name, owner, key in places}


class Stamps:
    """Versions of tensors at one moment, such as the one before they are read; those that have no
    shape yet have none.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._versions = {id(t): (t, _counted(t)) for t in tensors if not is_lazy(t)}

    def outdated(self, tensor: Any) -> bool:
        """Whether ``tensor`` was written to since, or is a parameter that has come since."""
        if id(tensor) not in self._versions:
            return isinstance(tensor, nn.Parameter)
        return self._versions[id(tensor)][1] != _counted(tensor)


def _counted(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


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


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS]


_PLACES = ("_parameters", "_buffers", "_modules", *_HOOKS)


class Structure:
    """The submodules below some modules, their hooks and settings: whether they are the same, and
    whether any module trains.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self.roots = list(roots)
        self.snapshot()

    def snapshot(self) -> None:
        """Take the present submodules and settings as unchanged."""
        self.modules = list(dict.fromkeys(m for root in self.roots for m in root.modules()))
        places: list[tuple[dict[str, Any], str, Any]] = []
        tables: list[Mapping[Any, Any]] = list(_GLOBAL_HOOKS)
        # Those of torch.jit keep parts and flags elsewhere, and wrappers ask what they wrap.
        flags = [vars(m) for m in self.modules if "training" in vars(m)]
        others = [m for m in self.modules if "training" not in vars(m)]
        for module in self.modules:
            attributes = vars(module)
            found = (getattr(module, name) for name in ("_modules", *_HOOKS))
            tables += [table for table in found if isinstance(table, dict)]
            if not isinstance(module._modules, dict):
                continue
            places += [(attributes, t, attributes[t]) for t in _PLACES if t in attributes]
            places += [(module._modules, key, part) for key, part in module._modules.items()]
        owners, keys, parts = map(list, zip(*places, strict=True)) if places else ([], [], [])
        empty = [t for t in tables if not t]  # most are, and truth is the quickest to ask for
        filled = [t for t in tables if t]
        entries = list(map(list, filled))
        ordered = [t for t in filled if isinstance(t, OrderedDict)]
        orders = list(map(list, ordered))

        def reordered() -> bool:
            return list(map(list, ordered)) != orders

        def trains() -> bool:
            return any(map(_getitem, flags, _TRAINING)) or any(m.training for m in others)

        self.settings = settings = Settings(self.modules)

        def full() -> bool:
            """Whether a submodule, a hook or a setting was added, replaced or removed since the
            snapshot.
            """
            try:
                self.trains = trains()
                return bool(
                    any(empty)
                    or (entries and list(map(list, filled)) != entries)
                    or not all(map(_is, map(_getitem, owners, keys), parts))
                    or settings.changed()
                )
            except KeyError:
                return True

        self.trains = trains()
        """Whether any module was in training mode when `changed` was last asked."""
        self.full = full
        # Moving an entry of an ordered dictionary to its end changes nothing that the table holds.
        aside = [reordered] if ordered else []
        if others:
            aside.append(lambda: trains() != self.trains)
        self.changed = quick(full, lambda: table([*settings.tables, *tables], ()), aside)
        """What `full` says, in a fraction of its time."""


class Attributes:
    """Plain attributes of modules, to notice that tracing a program changed one, and to undo it."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self._before = [(vars(m), {k: _kept(v) for k, v in vars(m).items()}) for m in modules]
        self._derived = list(map(_derived, modules))
        self._weights: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._held: list[dict[str, Tensor | list[Tensor]]] = []

    def begin(self) -> None:
        """Notes the weights: to be called where tracing has put its own in their places."""
        tables = (now[name] for now, _ in self._before for name in ("_parameters", "_buffers"))
        self._weights = [(table, dict(table)) for table in tables]
        self._held = [
            {k: v for k, v in now.items() if isinstance(v, Tensor) or is_list(v)}
            for now, _ in self._before
        ]

    def changed(self) -> tuple[str, bool] | None:
        """The name of an attribute, or a weight, that is not what it was, and whether a `Watch` of
        programs that read it notices that; or None.
        """
        for held, weights in self._weights:
            for name in held.keys() | weights.keys():
                if held.get(name, self) is not weights.get(name, self):
                    return name, True  # export would lose it below the outermost module
        noticed: tuple[str, bool] | None = None
        for (now, before), derived in zip(self._before, self._derived, strict=True):
            for name in now.keys() | before.keys():
                if name in _TABLES or name in derived:
                    continue
                if name not in now or name not in before:
                    return name, False
                if not _same(now[name], before[name][1]):
                    if not isinstance(now[name], Tensor) or not isinstance(before[name][0], Tensor):
                        return name, False
                    noticed = name, True
        return noticed

    def replaced(self) -> Iterator[tuple[int, str, Tensor | list[Tensor]]]:
        """(number of the module, name, value) of every plain attribute that held another tensor, or
        another list of as many tensors, when tracing began.
        """
        weights = [weight for _, held in self._weights for weight in held.values()]
        for i, ((now, before), held) in enumerate(zip(self._before, self._held, strict=True)):
            for name, old in held.items():
                new = now.get(name)
                if new is old or name not in before:
                    continue
                if isinstance(old, list) and (not is_list(new) or len(new) != len(old)):
                    continue
                if isinstance(old, Tensor) and not isinstance(new, Tensor):
                    continue
                if not any(t is weight for t in _tensors(new) for weight in weights):
                    yield i, name, new

    def held(self) -> Iterator[Tensor]:
        """Tensors that were plain attributes, or in lists that were, when tracing began."""
        for attributes in self._held:
            for value in attributes.values():
                yield from _tensors(value)

    def put_back(self, number: int, name: str) -> None:
        """Undoes a change of one attribute."""
        now, before = self._before[number]
        now[name] = before[name][0]

    def restore(self) -> None:
        """Puts everything back that is not what it was."""
        for now, before in self._before:
            for name in [n for n in now if n not in before and n not in _TABLES]:
                del now[name]
            for name, (value, content) in before.items():
                if name in _TABLES or (name in now and _same(now[name], content)):
                    continue
                now[name] = value
                if isinstance(value, list):
                    value[:] = content
                elif isinstance(value, dict | set):
                    value.clear()
                    value.update(content)


def is_list(value: Any) -> bool:
    """Whether a value is a list of tensors, and of nothing else."""
    return type(value) is list and bool(value) and all(isinstance(v, Tensor) for v in value)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else value


_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_DICTS = (dict, OrderedDict)  # hooks are in ordered ones


def _derived(module: nn.Module) -> frozenset[str]:
    """Attributes that each call makes of the weights before it reads them."""
    if isinstance(module, nn.RNNBase):
        return frozenset({"_flat_weights", "_flat_weight_refs"})
    hooks = module._forward_pre_hooks.values()
    return frozenset(h.name for h in hooks if isinstance(h, WeightNorm | SpectralNorm))


def _kept(value: Any) -> tuple[Any, Any]:
    """A value, and a copy of the containers in it that share its leaves."""
    return value, _copied(value, 8)


def _copied(value: Any, depth: int) -> Any:
    if depth and type(value) in (list, tuple):
        return type(value)(_copied(v, depth - 1) for v in value)
    if depth and type(value) in _DICTS:
        return type(value)((k, _copied(v, depth - 1)) for k, v in value.items())
    return set(value) if type(value) is set else value


def _same(now: Any, content: Any, depth: int = 8) -> bool:
    """Whether a value is what `_copied` gave; export puts equal containers in place of others."""
    kind = type(now)
    if kind is not type(content):
        return False
    if depth and kind in (list, tuple):
        pairs = zip(now, content, strict=False)
        return len(now) == len(content) and all(_same(a, b, depth - 1) for a, b in pairs)
    if depth and kind in _DICTS:
        pairs = ((now[k], v) for k, v in content.items() if k in now)
        return now.keys() == content.keys() and all(_same(a, b, depth - 1) for a, b in pairs)
    scalar = kind in (int, float, bool, str, set)
    return now is content or (scalar and now == content)


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
            wrapped = vars(value).get("_original")  # a compiled one, perhaps of a function
            found.append(value) if wrapped is None else visit(wrapped, depth)
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
