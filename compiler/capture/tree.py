"""Nested Python values as a flat list of leaves and a tree that can put them back.

`torch.utils._pytree` knows only registered types and its specs hold classes. Captured programs
must also take and return unregistered dataclasses, model outputs and plain objects (caches), and
must be saved as JSON and loaded where the classes may be missing; hence this small module.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_ATOMS = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device)
_ATOMS += (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, torch.nn.Module, type)
_ATOMS += (torch.layout, torch.memory_format, torch.Generator)


@dataclass(frozen=True)
class Tree:
    """The structure around leaves.

    ``kind`` is "leaf", "tuple", "list", "dict", "namedtuple", "fields" (a dataclass or a model
    output: rebuilt by its constructor), "items" (a model output with items that its constructor
    does not take, or in another order), "object" (rebuilt by setting attributes) or "count" (a
    number, which is a size of the tensor that is its leaf; see `flatten_call`). ``keys`` are
    dictionary keys or attribute names, ``children`` the parts in the same order, ``cls`` the class
    (a string "module:qualname" once loaded from a file).
    """

    kind: str
    keys: tuple[Any, ...] = ()
    children: tuple[Tree, ...] = ()
    cls: Any = None

    @property
    def count(self) -> int:
        """How many leaves the tree has."""
        return 1 if self.kind == "leaf" else sum(c.count for c in self.children)


LEAF = Tree("leaf")
COUNT = Tree("count", children=(LEAF,))


def flatten(
    value: Any, objects: bool = False, marks: Mapping[int, Any] | None = None
) -> tuple[list[Any], Tree]:
    """Leaves of ``value`` from left to right, and the tree around them.

    With ``objects``, instances of ordinary classes are opened through their attributes; without,
    only state is (`is_state`) and others are leaves. Instances whose ``id`` is in ``marks`` become
    the leaf given there. Raises ValueError for a structure that contains itself.
    """
    leaves: list[Any] = []
    tree = _flatten(value, leaves, objects, marks or {}, ())
    return leaves, tree


def flatten_call(value: Any) -> tuple[list[Any], Tree]:
    """As `flatten`, for arguments; numbers by which state objects count (`COUNTERS`) are sizes.

    A program is made for its numbers, and a cache that counts its tokens has another one at every
    call. Sizes are left open where they differ between calls, and what depends on them is guarded.
    So a number n becomes an empty tensor of n + 2 rows: sizes 0 and 1 are never left open.
    """
    leaves: list[Any] = []
    tree = _flatten(value, leaves, False, {}, (), counted=True)
    return leaves, tree


def unflatten(tree: Tree, leaves: list[Any]) -> Any:
    """The value whose leaves are ``leaves``: the inverse of `flatten`."""
    return build(tree, iter(leaves))


def leaf_names(tree: Tree, prefix: str = "") -> list[str]:
    """A readable path for every leaf, such as ``batch['mask']`` or ``states[0].keys``."""
    if tree.kind == "leaf":
        return [prefix]
    names: list[str] = []
    for i, child in enumerate(tree.children):
        names += leaf_names(child, prefix if tree.kind == "count" else prefix + _step(tree, i))
    return names


def _step(tree: Tree, i: int) -> str:
    if tree.kind == "dict":
        return f"[{tree.keys[i]!r}]"
    return f".{tree.keys[i]}" if tree.keys else f"[{i}]"


def parts(value: Any, objects: bool = False) -> tuple[str, tuple[Any, ...], list[Any], Any] | None:
    """One level of `flatten`: (kind, keys, children, class), or None for a leaf."""
    if isinstance(value, _ATOMS):
        return None
    cls = type(value)
    if isinstance(value, tuple):
        if hasattr(cls, "_fields"):
            return "namedtuple", tuple(cls._fields), list(value), cls
        return ("tuple", (), list(value), None if cls is tuple else cls)
    if cls is list:
        return "list", (), value, None
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if f.init and hasattr(value, f.name)]
        items = list(value) if isinstance(value, OrderedDict) else []
        if items and items != [n for n in names if n in value]:
            rest = [n for n in names if n not in value]
            children = [*value.values(), *(getattr(value, n) for n in rest)]
            return "items", (*items, *rest), children, cls
        return "fields", tuple(names), [getattr(value, n) for n in names], cls
    if isinstance(value, Mapping):
        return "dict", tuple(value), list(value.values()), None if cls is dict else cls
    opens = is_state(value) or (objects and not callable(value))
    if opens and type(getattr(value, "__dict__", None)) is dict:
        return "object", tuple(vars(value)), list(vars(value).values()), cls
    return None


_STATE = frozenset(
    ("transformers.cache_utils", name)
    for name in ("Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin")
)
COUNTERS = frozenset({"cumulative_length", "cumulative_length_int", "max_cache_len"})
"""Attributes of state objects: how many tokens a window has seen, or a cache has room for."""
_is_state: dict[type, bool] = {}


def is_state(value: Any) -> bool:
    """Whether ``value`` is of a class whose instances are what their attributes are."""
    cls = type(value)
    found = _is_state.get(cls)
    if found is None:
        names = ((c.__module__, c.__qualname__) for c in cls.__mro__)
        found = _is_state[cls] = not _STATE.isdisjoint(names)
    return found


def _flatten(
    value: Any,
    leaves: list[Any],
    objects: bool,
    marks: Mapping[int, Any],
    path: tuple[int, ...],
    counted: bool = False,
) -> Tree:
    if id(value) in marks:
        leaves.append(marks[id(value)])
        return LEAF
    opened = parts(value, objects)
    if opened is None:
        leaves.append(value)
        return LEAF
    if id(value) in path:
        raise ValueError(f"a {type(value).__name__} contains itself")
    kind, keys, children, cls = opened
    path = (*path, id(value))
    counts = frozenset(keys) & COUNTERS if counted and kind == "object" else ()
    inner = []
    for key, child in zip(keys or children, children, strict=True):
        if counts and key in counts and type(child) is int and child >= 0:
            leaves.append(torch.empty((child + 2, 0), dtype=torch.uint8, device="cpu"))
            inner.append(COUNT)
        else:
            inner.append(_flatten(child, leaves, objects, marks, path, counted))
    return Tree(kind, keys, tuple(inner), cls)


def build(tree: Tree, leaves: Iterator[Any]) -> Any:
    """As `unflatten`, taking from ``leaves`` what ``tree`` needs."""
    if tree.kind == "leaf":
        return next(leaves)
    children = [build(c, leaves) for c in tree.children]
    if tree.kind == "count":
        return children[0].shape[0] - 2
    cls = resolve(tree)
    if tree.kind == "list":
        return children
    if tree.kind == "tuple":
        return tuple(children) if cls is None else cls(children)
    pairs = dict(zip(tree.keys, children, strict=True))
    if tree.kind == "dict":
        return pairs if cls is None else _mapping(cls, pairs)
    if tree.kind == "namedtuple":
        return Record(pairs) if cls is None else cls(*children)
    if cls is None:
        return Record(pairs)
    if tree.kind == "fields":
        return cls(**pairs)
    if tree.kind == "items":
        return _items(cls, pairs)
    value: Any = object.__new__(cls)
    vars(value).update(pairs)
    return value


def _mapping(cls: Any, pairs: dict[Any, Any]) -> Any:
    value: Any = cls.__new__(cls)
    value.__init__()
    for key, item in pairs.items():
        value[key] = item
    return value


def _items(cls: Any, pairs: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    value: Any = cls(**{k: v for k, v in pairs.items() if k in names})
    for key, item in pairs.items():
        if key in value:
            value.move_to_end(key)
        elif key not in names:
            value[key] = item
    return value


class Record(dict[str, Any]):
    """Stands for a class that is missing where a saved program was loaded: fields by name.

    Read fields as attributes or as items.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def resolve(tree: Tree) -> Any:
    """The class of ``tree``, or None when a loaded program's class is not there.

    A file names classes only; nothing is imported for it, and a name counts only if it is a class
    of the right kind in a module that the process has already imported.
    """
    if not isinstance(tree.cls, str):
        return tree.cls
    module, _, name = tree.cls.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        return None
    fits = {
        "tuple": issubclass(found, tuple),
        "namedtuple": issubclass(found, tuple) and hasattr(found, "_fields"),
        "dict": issubclass(found, Mapping),
        "fields": dataclasses.is_dataclass(found),
        "items": dataclasses.is_dataclass(found) and issubclass(found, OrderedDict),
        "object": True,
    }
    return found if fits.get(tree.kind) else None


def to_json(tree: Tree) -> Any:
    """``tree`` as plain JSON values; classes become "module:qualname"."""
    if tree.kind == "leaf":
        return None
    cls = tree.cls
    if isinstance(cls, type):
        cls = f"{cls.__module__}:{cls.__qualname__}"
    keys = [[type(k).__name__, k] for k in tree.keys]
    if any(t not in ("str", "int", "bool") for t, _ in keys):
        raise ValueError("only text and whole numbers can be dictionary keys in a saved program")
    children = [to_json(c) for c in tree.children]
    return {"kind": tree.kind, "keys": keys, "cls": cls, "parts": children}


def from_json(data: Any) -> Tree:
    """The inverse of `to_json`. Classes are looked up when a value is built."""
    if data is None:
        return LEAF
    casts: dict[str, Callable[[Any], Any]] = {"str": str, "int": int, "bool": bool}
    keys = tuple(casts[t](k) for t, k in data["keys"])
    return Tree(data["kind"], keys, tuple(from_json(p) for p in data["parts"]), data["cls"])
