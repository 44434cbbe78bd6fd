"""In which order dimensions lie in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten

Int = Any  # int or torch.SymInt
Halo = tuple[tuple[int, int], ...]
Order = tuple[int, ...]
"""Dimensions from the outermost in memory to the innermost."""


def fake(node: fx.Node) -> torch.Tensor:
    return node.meta["val"]


def is_dense(value: torch.Tensor) -> bool:
    """Whether torch's strides for an output leave no gaps or overlaps (static sizes only)."""
    if not are_known((*value.shape, *value.stride())):
        return False
    reach = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1 and stride != reach:
            return False
        reach *= size
    return True


def channels_last(rank: int) -> Order:
    """The order of N(spatial)C."""
    return (0, *range(2, rank), 1)


def spread(shape: Sequence[Int], halo: Halo, order: Order) -> tuple[tuple[Int, ...], Int, Int]:
    """Strides, offset of element 0, and element count of dimensions in ``order`` with a halo."""
    strides: list[Int] = [0] * len(shape)
    reach: Int = 1
    offset: Int = 0
    for axis in reversed(order):
        strides[axis] = reach
        offset = offset + halo[axis][0] * reach
        reach = reach * (shape[axis] + sum(halo[axis]))
    return tuple(strides), offset, reach


def are_known(sizes: Sequence[Int]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def natural(value: torch.Tensor) -> Order:
    """The order of a contiguous tensor; dimensions of 1 are first, for they have no stride."""
    return tuple(sorted(range(value.dim()), key=lambda d: value.shape[d] != 1))


def torchs_order(value: torch.Tensor) -> Order | None:
    """`natural` of a tensor that torch lays out; None if it has gaps or its sizes are open."""
    if not is_dense(value):
        return None
    return tuple(sorted(natural(value), key=lambda d: (value.shape[d] != 1, -value.stride(d))))


def followed(node: fx.Node, orders: Mapping[fx.Node, Order]) -> Order | None:
    """The order in which ``node`` lies if it does as the first of its arguments of known order."""
    rank = fake(node).dim()
    of = next((orders[x] for x in node.all_input_nodes if len(orders.get(x, ())) == rank), None)
    if of is not None and node.target is aten.permute.default:
        dims = [d % rank for d in node.args[1]]  # type: ignore[union-attr, operator]
        return tuple(dims.index(d) for d in of)
    return of
