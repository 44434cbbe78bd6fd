"""Objects that a call is given and the program changes: the caches of transformers.

Such an object is opened into its attributes, wherever it stands among the arguments: the tensors in
it are inputs of the program, everything else is part of the call's key. What a run changes in it
comes back in two ways: tensors written in place are mutated inputs like any others, and attributes
that were set (a cache that grows, or is filled for the first time) are an `Update`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .tree import Tree, build, flatten, is_state, parts, resolve


@dataclass(frozen=True)
class Given:
    """Stands for what the call was given: object number ``number``, or tensor with ``tensor``."""

    number: int
    tensor: bool = False


@dataclass(frozen=True)
class Update:
    """After a run, object number ``number`` of the call has this structure.

    ``leaves`` are as in `Captured.out_leaves`; a tensor may also be one that was given.
    """

    number: int
    tree: Tree
    leaves: list[Any]


def states_of(value: Any) -> list[Any]:
    """The outermost state objects in ``value``, from left to right."""
    if is_state(value):
        return [value]
    opened = parts(value)
    return [] if opened is None else [s for child in opened[2] for s in states_of(child)]


class Tracked:
    """State objects of one traced call, to notice what the program changes in them."""

    def __init__(self, value: Any) -> None:
        self.objects = states_of(value)
        self._before = [flatten(o) for o in self.objects]
        self.given = {id(o): Given(i) for i, o in enumerate(self.objects)}

    def changes(self) -> Iterator[tuple[int, list[Any], Tree]]:
        """(object number, leaves, structure) of now, for each object that is not what it was."""
        for number, (value, (before, old)) in enumerate(
            zip(self.objects, self._before, strict=True)
        ):
            leaves, tree = flatten(value)
            if tree != old or not all(map(_unchanged, leaves, before)):
                yield number, leaves, tree


def _unchanged(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if isinstance(now, torch.Tensor) or isinstance(before, torch.Tensor):
        return False
    return type(now) is type(before) and bool(now == before)


def apply(update: Update, value: Any, leaf: Callable[[Any], Any]) -> None:
    """Gives ``value`` the state that ``update`` tells; ``leaf`` finds the leaves of this run.

    Objects and lists inside stay the same ones where they can: others may hold them.
    """
    _assign(value, update.tree, iter([leaf(x) for x in update.leaves]))


def _assign(value: Any, tree: Tree, leaves: Iterator[Any]) -> Any:
    if tree.kind == "object" and is_state(value) and type(value) is resolve(tree):
        own = vars(value)
        pairs = zip(tree.keys, tree.children, strict=True)
        after = {key: _assign(own.get(key), child, leaves) for key, child in pairs}
        own.clear()
        own.update(after)
        return value
    if tree.kind == "list" and type(value) is list:
        held: Sequence[Any] = [*value, *[None] * (len(tree.children) - len(value))]
        value[:] = [_assign(v, c, leaves) for v, c in zip(held, tree.children, strict=False)]
        return value
    return build(tree, leaves)
