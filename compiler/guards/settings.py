"""Plain attributes that a program has read: numbers, texts, tuples of such.

A program is made for what they were. `reads_of` notes during a trace which ones those are, in
modules and in objects that hold settings for them, such as a configuration; `Settings` tells
whether one was changed. That is asked only when something was stored in one of them (`quick`
tells), or at every call where that cannot be read.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Read = tuple[int, str]
"""Where a setting is, as the ``id`` of the dictionary, and its name."""

_PLAIN = (int, float, complex, bool, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)
_GONE, _OTHER = object(), object()  # nothing is there; what is no setting, and not kept alive
_HEAP = 1 << 9  # of a type's flags: its attributes can be set
_LIBRARIES = ("torch", "logging", "threading", "weakref")
_DEPTH = 2
"""How deep objects of settings lie in others: parts of a model's configuration have their own."""


class Settings:
    """The plain attributes of ``modules``, and of the objects in them, that programs have read.

    ``tables`` are the dictionaries that they are in.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.tables = [vars(x) for x in _objects_of(modules)]
        self._at = {id(table): table for table in self.tables}
        self._read: dict[int, dict[str, Any]] = {}

    def read(self, reads: Iterable[Read]) -> None:
        """A program has read these; from now on they count, as they are now."""
        for place, name in reads:
            table = self._at.get(place)
            if table is None or name == "training":
                continue
            known = self._read.setdefault(place, {})
            if name not in known:
                value = table.get(name, _GONE)
                keep = value is None or _is_plain(value) or _holds_settings(value)
                known[name] = value if keep or value is _GONE else _OTHER

    def changed(self) -> bool:
        """Whether a setting that was read is another one."""
        for place, known in list(self._read.items()):  # another thread may add some
            table = self._at[place]
            for name, old in list(known.items()):
                new = table.get(name, _GONE)
                try:
                    if old is not new and _differs(old, new):
                        return True
                except (RuntimeError, ValueError):  # arrays among what is compared
                    return True
        return False


@contextmanager
def reads_of(modules: Iterable[nn.Module]) -> Iterator[set[Read]]:
    """What is read of the attributes of ``modules``, and of objects in them, within it.

    Dynamo, which traces the sides of a `torch.cond`, does not look through attributes that are
    asked for in another way: while it works all of them count as read.
    """
    from torch._dynamo.callback import callback_handler

    objects = _objects_of(modules)
    tables = {id(x): vars(x) for x in objects}
    kinds = {nn.Module, *(type(x) for x in objects if not isinstance(x, nn.Module))}
    kinds.discard(SimpleNamespace)  # does not tell, so all of it counts
    plain = [vars(x) for x in objects if type(x) is SimpleNamespace]
    found = {(id(table), name) for table in plain for name in table}
    own = {kind: (kind.__getattribute__, "__getattribute__" in vars(kind)) for kind in kinds}

    def noting(get: Any) -> Any:
        def noted(self: Any, name: str) -> Any:
            table = tables.get(id(self))
            if table is not None:
                found.add((id(table), name))
            return get(self, name)

        return noted

    def begin(*given: Any) -> None:
        for kind, (get, _) in own.items():
            kind.__getattribute__ = noting(get)

    def end(*given: Any) -> None:
        for kind, (get, is_own) in own.items():
            if is_own:
                kind.__getattribute__ = get
            elif "__getattribute__" in vars(kind):
                del kind.__getattribute__

    def compiling(*given: Any) -> None:
        end()
        found.update((id(table), name) for table in tables.values() for name in table)

    callback_handler.register_start_callback(compiling)
    callback_handler.register_end_callback(begin)
    begin()
    try:
        yield found
    finally:
        end()
        callback_handler.remove_start_callback(compiling)
        callback_handler.remove_end_callback(begin)


def _objects_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The modules, and the objects of the user's or a library's classes among their attributes."""
    found: dict[int, Any] = {}

    def visit(value: Any, depth: int) -> None:
        if id(value) in found:
            return
        found[id(value)] = value
        for inner in list(vars(value).values()) if depth else ():
            if _holds_settings(inner):
                visit(inner, depth - 1)

    for module in modules:
        visit(module, _DEPTH)
    return list(found.values())


def _holds_settings(value: Any) -> bool:
    kind = type(value)
    if kind is SimpleNamespace:
        return True
    if not kind.__flags__ & _HEAP or not kind.__dictoffset__:
        return False
    if isinstance(value, nn.Module | Tensor | type | enum.Enum) or callable(value):
        return False
    return kind.__module__.partition(".")[0] not in _LIBRARIES


def _differs(before: Any, now: Any) -> bool:
    """Whether a setting is another one. Tensors are none, nor is what comes where there was nothing
    but is no number, text or list of such.
    """
    if _is_plain(before) and _is_plain(now):
        return type(before) is not type(now) or before != now
    return _is_plain(before) or _is_plain(now) or _holds_settings(before)


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
