"""What programs are looked up by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..capture.tree import Tree

FLOATS = (float, complex)
"""Kinds of numbers that a key holds as text: 0.0 and -0.0 differ, and nan equals itself."""
MAX_VALUES = ((FLOATS, 8), ((int, *FLOATS), 32))
"""Values that numbers of such kinds have programs for: a scale or a time varies without end, a
position or the number of a layer has an end."""


def structure_key(leaves: Sequence[Any], tree: Tree, modes: bool) -> tuple[Any, ...]:
    """What programs of one bucket share: everything of a call but sizes.

    With ``modes``, also whether autocast is on, which a capture bakes in.
    """
    key: list[Any] = [_plain(tree)]
    for leaf in leaves:
        if hasattr(leaf, "dtype"):
            key.append((leaf.dtype, leaf.device, len(leaf.shape)))
        else:
            key.append((type(leaf), repr(leaf) if isinstance(leaf, FLOATS) else leaf))
    if modes and torch._C._is_any_autocast_enabled():
        key.append(autocast_key())
    return tuple(key)


def crowded(structure: tuple[Any, ...], served: Sequence[tuple[Any, ...]]) -> bool:
    """Whether structures that are ``served`` already differ from one, and from each other, in the
    values of numbers only, and are as many as `MAX_VALUES`.
    """
    for kinds, most in MAX_VALUES:
        if len(served) >= most:
            alike = _without_values(structure, kinds)
            if sum(_without_values(key, kinds) == alike for key in served) >= most:
                return True
    return False


def _without_values(structure: tuple[Any, ...], kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """A structure that does not tell numbers of ``kinds`` from others of their kind."""
    return tuple(x[:1] if isinstance(x, tuple) and x[0] in kinds else x for x in structure)


def _plain(tree: Tree) -> Tree:
    """The tree with classes by name, as a saved program knows them."""
    cls = tree.cls
    if isinstance(cls, type):
        cls = f"{cls.__module__}:{cls.__qualname__}"
    return Tree(tree.kind, tree.keys, tuple(_plain(c) for c in tree.children), cls)


def autocast_key() -> tuple[Any, ...]:
    """Which devices have autocast on, and to what."""
    return tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in ("cpu", "cuda")
    )
