"""What a group with reductions iterates over: its space, the axes that are folded, its rows.

The *space* is the shape of the reductions' operand (channels split into groups for group norm). A
*row* is what one folded value depends on: all elements that differ in the folded axes only.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils._sympy.functions import FloorDiv

from ..abi import Dim, TensorArg, product
from ..emit import Expr
from ..group import IO, Group, Unsupported
from ..ops import argument, category
from ..ops.common import dims_of, i64
from ..ops.norms import groups_of
from ..ops.reductions import reduced_axes
from .pointwise_axes import estimate

HEAVY = ("rows", "reduce", "scan")


@dataclass(frozen=True)
class RowSpace:
    """The iteration space of a group.

    ``dims`` are its sizes, ``axes`` the folded ones (ascending). ``shape`` is the operand's shape,
    which differs from ``dims`` if ``grouped``: then dims 1 and 2 are the channels. ``order`` lists
    the dimensions by falling stride of the largest tensor, symbols taken for likely sizes.
    """

    dims: tuple[Dim, ...]
    axes: tuple[int, ...]
    shape: tuple[Dim, ...]
    grouped: bool
    order: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that are not folded."""
        return tuple(i for i in range(len(self.dims)) if i not in self.axes)

    @property
    def count(self) -> Dim:
        """Elements of a row."""
        return product([self.dims[i] for i in self.axes])

    @property
    def rows(self) -> Dim:
        """How many rows there are."""
        return product([self.dims[i] for i in self.kept])

    def operand_index(self, index: Sequence[Expr], dims: Sequence[Expr]) -> list[Expr]:
        """The index into ``shape`` of a point of the space; ``dims`` are sizes as expressions."""
        if not self.grouped:
            return list(index)[: len(self.shape)]
        n, g, c, *rest = index
        return [n, g * dims[2] + c, *rest]

    def is_row_shape(self, shape: Sequence[Dim]) -> bool:
        """Whether a value of this shape has one element per row, folded axes being 1 or gone."""
        without = tuple(self.dims[i] for i in self.kept)
        ones = tuple(1 if i in self.axes else d for i, d in enumerate(self.dims))
        return tuple(shape) in (without, ones)

    def row_index(self, index: Sequence[Expr], rank: int) -> list[Expr]:
        """The index of this point's row in a value of ``rank`` dimensions with a row's shape."""
        if rank == len(self.dims):
            return [i64(0) if i in self.axes else x for i, x in enumerate(index)]
        return [index[i] for i in self.kept]


def is_heavy(node: fx.Node) -> bool:
    """Whether a node folds rows (the parts of its tuple do not)."""
    return category(node) in HEAVY and node.target is not operator.getitem


def row_space(group: Group, io: IO) -> RowSpace:
    """The space that all reductions of a group share.

    Raises `Unsupported` if they differ, and for other nodes that do not work element by element on
    the space or on its rows.
    """
    heavy = [n for n in group.nodes if is_heavy(n)]
    if not heavy:
        raise Unsupported("PLT-ROW-001", "the group has no reduction")
    shape, axes, groups = _folds(heavy[0])
    for node in heavy[1:]:
        if _folds(node) != (shape, axes, groups):
            raise Unsupported("PLT-ROW-002", f"{heavy[0]} and {node} fold different rows")
    dims = shape
    if groups is not None:
        channels: Any = shape[1]
        each = channels // groups if isinstance(channels, int) else FloorDiv(channels, groups)
        dims = (shape[0], groups, each, *shape[2:])
        axes = tuple(range(2, len(dims)))
    if not shape:  # a single element is a row of one
        dims, axes = (1,), (0,)
    order = _order(group, io, shape) or (0,)
    if groups is not None:
        order = tuple(j for i in order for j in ((1, 2) if i == 1 else (i + (i > 1),)))
    space = RowSpace(dims, axes, shape, groups is not None, order)
    bound = row_bound(group)
    for node in group.nodes:
        _check(node, space, group, bound)
    return space


def row_bound(group: Group) -> set[fx.Node]:
    """The nodes whose values depend on folded ones, and so on the row that is being computed."""
    found: set[fx.Node] = set()
    for node in group.nodes:
        if is_heavy(node) or any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _folds(node: fx.Node) -> tuple[tuple[Dim, ...], tuple[int, ...], int | None]:
    """(operand shape, folded axes, groups of channels) of a heavy node."""
    source: Any = node.args[0]
    shape = dims_of(source)
    groups = groups_of(node)
    if groups is not None:
        if str(node.target) == "aten.instance_norm.default":
            running = argument(node, "running_mean") is not None
            if not argument(node, "use_input_stats") or running:
                raise Unsupported("PLT-ROW-003", "instance norm with running statistics")
        return shape, (), groups
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if "normalized_shape" in names:
        k = len(argument(node, "normalized_shape"))
        return shape, tuple(range(len(shape) - k, len(shape))), None
    return shape, reduced_axes(node), None


def _check(node: fx.Node, space: RowSpace, group: Group, bound: set[fx.Node]) -> None:
    if is_heavy(node) or node.target is operator.getitem or category(node) == "symbolic":
        return
    if category(node) != "pointwise":
        raise Unsupported("PLT-ROW-004", f"{node} is a view in a group with reductions")
    shape = dims_of(node)
    whole, row = shape == space.shape, space.is_row_shape(shape)
    if not (whole or row) and (node in bound or node in group.outputs):
        raise Unsupported("PLT-ROW-005", f"{node} has neither the rows' shape nor the space's")
    for source in node.all_input_nodes:
        if source not in bound or not _is_tensor(source):
            continue  # computed from its index, whatever row that is in
        have = dims_of(source)
        spread = whole and space.is_row_shape(have) and len(have) == len(space.shape)
        if have != shape and (not spread or space.grouped):
            raise Unsupported("PLT-ROW-006", f"{node} reads other rows of {source}")


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _order(group: Group, io: IO, shape: tuple[Dim, ...]) -> tuple[int, ...]:
    """Dimensions by falling stride of the first input (else output) that spans the space."""
    args: list[TensorArg] = [io[n] for n in (*group.inputs, *group.outputs) if n in io]
    for arg in args:
        if arg.shape == shape:
            sizes = [size(d) for d in shape]
            key = [
                (0 if sizes[i] == 1 else -abs(estimate(arg.strides[i])), i)
                for i in range(len(shape))
            ]
            # A dimension of 1 has no stride to speak of: it goes first.
            return tuple(sorted(range(len(shape)), key=lambda i: (sizes[i] != 1, key[i][0], i)))
    return tuple(range(len(shape)))


def size(dim: Dim) -> int:
    """A dimension's size, or a large one where it is not known."""
    return dim if isinstance(dim, int) else 1 << 20
