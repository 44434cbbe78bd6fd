"""Which loops a pointwise kernel runs over.

The output's dimensions are ordered by how the output lies in memory, split where a reshape or an
even join inside the group changes what is adjacent, and merged where every memory access of the
group walks on in equal steps. Any choice is right; the aim is a long, contiguous innermost loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
import tvm
import tvm.tirx as tir

from ..abi import Dim, TensorArg, product
from ..emit import Emitter, Expr
from ..group import Group
from ..ops.common import dims_of
from ..ops.views import reshape_groups

_LIKELY = 97  # what a symbol counts for where only an order is wanted


@dataclass(frozen=True)
class Axis:
    """A loop over ``extent`` values; ``parts`` are the output dimensions it runs through.

    A merged axis has several parts, (dimension, extent) outermost first. A split dimension is a
    part of several axes, whose indices combine row-major in the order of the axes list.
    """

    extent: Dim
    parts: tuple[tuple[int, Dim], ...]


def estimate(dim: Dim) -> int:
    """A likely value of a dimension."""
    return dim if isinstance(dim, int) else int(dim.subs(dict.fromkeys(dim.free_symbols, _LIKELY)))


def initial_axes(group: Group, out: TensorArg) -> list[Axis]:
    """One axis per dimension above 1, or per piece of one, largest output stride first."""
    order = sorted(range(len(out.shape)), key=lambda d: -estimate(out.strides[d]))
    splits = _splits(group)
    axes: list[Axis] = []
    for d in order:
        for extent in splits.get(out.shape[d], (out.shape[d],)):
            if extent != 1:
                axes.append(Axis(extent, ((d, extent),)))
    return axes


def _splits(group: Group) -> dict[Dim, tuple[Dim, ...]]:
    """Sizes of dimensions that some reshape or even join in the group sees as several."""
    found: dict[Dim, tuple[Dim, ...]] = {}
    for node in group.nodes:
        for whole, pieces in _node_splits(node):
            if len(pieces) > len(found.get(whole, ())):
                found[whole] = pieces
    return found


def _node_splits(node: fx.Node) -> list[tuple[Dim, tuple[Dim, ...]]]:
    name = str(node.target)
    source: Any = node.args[0] if node.args else None
    if "view" in name or "reshape" in name or "flatten" in name:
        have, want = dims_of(source), dims_of(node)
        return [
            (want[b[0]], tuple(have[i] for i in a))
            for a, b in reshape_groups(have, want)
            if len(b) == 1 and len(a) > 1
        ]
    if name in ("aten.cat.default", "aten.concat.default") and isinstance(source, (list, tuple)):
        dims = [dims_of(t) for t in source]  # type: ignore[arg-type]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if len(set(dims)) == 1 and isinstance(dim, int) and dims[0]:
            return [(dims_of(node)[dim], (len(dims), dims[0][dim]))]
    return []


@dataclass(frozen=True)
class Accesses:
    """What a group does at an index: the offsets of all loads and stores, the conditions of guarded
    loads, and the values that are bound, positions among them.
    """

    offsets: list[Any]
    conditions: list[Any]
    bound: list[Any]


class Probe:
    """Looks at the memory accesses of a group for given index expressions.

    ``accesses(index)`` tells them for an index of the output.
    """

    def __init__(self, emitter: Emitter, accesses: Callable[[Sequence[Expr]], Accesses]) -> None:
        self._emitter, self._accesses = emitter, accesses
        self._analyzer: Any = tvm.sym.Analyzer()

    def _at(self, axes: Sequence[Axis], variables: Sequence[Expr]) -> Accesses:
        found = self._accesses(output_index(axes, variables, self._emitter))
        offsets = [self.simplify(o) for o in found.offsets]
        return Accesses(offsets, [self.simplify(c) for c in found.conditions], found.bound)

    def simplify(self, offset: Expr) -> Expr:
        """``offset`` as simple as the ranges of the `variables` made so far allow."""
        return self._analyzer.simplify(offset)

    def variables(self, axes: Sequence[Axis]) -> list[Expr]:
        """A new variable for each axis, known to lie within it."""
        variables = []
        for i, axis in enumerate(axes):
            var = tir.Var(f"axis{i}", "int64")
            extent = self._emitter.dim(axis.extent)
            self._analyzer.bind(var, tvm.ir.Range.from_min_extent(tir.IntImm("int64", 0), extent))
            variables.append(var)
        return variables

    def merged(self, axes: list[Axis]) -> list[Axis]:
        """Adjacent axes joined, from the innermost on, where no access gets harder by it."""
        done = False
        while not done:
            done = True
            plain = _complexity(self._at(axes, self.variables(axes)))
            for i in reversed(range(len(axes) - 1)):
                joined = _join(axes, i)
                variables = self.variables(joined)
                found = self._at(joined, variables)
                depends = any(_mentions(c, variables[i]) for c in found.conditions)
                if not depends and _complexity(found) <= plain:
                    axes, done = joined, False
                    break
        return axes

    def tiled(self, axes: list[Axis], tile: int) -> list[Axis] | None:
        """The axes with ``tile`` steps of another one right around the innermost, if something that
        is read lies along that other axis instead: cache lines of it are used as wholes.

        None where there is no such axis.
        """
        variables = self.variables(axes)
        here = self._at(axes, variables).offsets

        def steps(i: int) -> list[Any]:
            moved = [v + 1 if k == i else v for k, v in enumerate(variables)]
            ahead = self._at(axes, moved).offsets
            found = [self.simplify(b - a) for a, b in zip(here, ahead, strict=True)]
            return [int(s) if isinstance(s, tir.IntImm) else None for s in found]

        inward = steps(len(axes) - 1)
        if all(step in (0, 1) for step in inward):
            return None
        for i, axis in enumerate(axes[:-1]):
            *whole, (dim, extent) = axis.parts
            if not isinstance(extent, int) or extent % tile:
                continue
            if any(s == 1 and t not in (0, 1) for s, t in zip(steps(i), inward, strict=True)):
                parts = (*whole, (dim, extent // tile))
                outer = Axis(product([size for _, size in parts]), parts)
                tiles = Axis(tile, ((dim, tile),))
                return [*axes[:i], outer, *axes[i + 1 : -1], tiles, axes[-1]]
        return None

    def lanes_differ(self, axes: Sequence[Axis]) -> bool:
        """Whether a guarded load's condition depends on the innermost axis."""
        variables = self.variables(axes)
        return any(_mentions(c, variables[-1]) for c in self._at(axes, variables).conditions)


def _join(axes: Sequence[Axis], i: int) -> list[Axis]:
    a, b = axes[i], axes[i + 1]
    both = Axis(product([a.extent, b.extent]), a.parts + b.parts)
    return [*axes[:i], both, *axes[i + 2 :]]


def _complexity(found: Accesses) -> int:
    """How many divisions and remainders the offsets and what they come from contain."""
    texts = map(str, (*found.offsets, *found.bound))
    return sum(text.count("//") + text.count("%") for text in texts)


def _mentions(expr: Expr, var: Expr) -> bool:
    return str(var.name) in str(expr)


def output_index(axes: Sequence[Axis], values: Sequence[Expr], emitter: Emitter) -> list[Expr]:
    """The index of the output at given values of the axes, outermost first."""
    rank = 1 + max((d for a in axes for d, _ in a.parts), default=-1)
    index: list[Any] = [None] * rank
    for axis, value in zip(axes, values, strict=True):
        pieces: list[Expr] = []
        for _, extent in reversed(axis.parts[1:]):
            size = emitter.dim(extent)
            pieces.append(tir.floormod(value, size))
            value = tir.floordiv(value, size)
        for (d, extent), piece in zip(axis.parts, [value, *reversed(pieces)], strict=False):
            before = index[d]
            index[d] = piece if before is None else before * emitter.dim(extent) + piece
    zero = tir.IntImm("int64", 0)
    return [zero if i is None else i for i in index]
