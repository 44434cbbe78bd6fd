"""What `scatter` and `gather` are made of once a graph is compiled.

`take` copies the cells of all branches into one tensor, branch after branch; `branches` runs each
branch on its rows of it; `combine` adds up, for each cell, the rows that came of it. All shapes but
those inside a branch are known before the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

__all__ = ["branches", "combine", "places", "take"]


@torch.library.custom_op("plait::take", mutates_args=())
def take(cells: Tensor, order: Tensor, share: int) -> Tensor:
    """Row r is ``cells[order[r] // share]``: ``[S, *cell]`` for ``order`` ``[S]`` of `route`."""
    return cells[order // share]


@take.register_fake
def _(cells: Tensor, order: Tensor, share: int) -> Tensor:
    return cells.new_empty(order.shape[0], *cells.shape[1:])


@torch.library.custom_op("plait::places", mutates_args=())
def places(order: Tensor) -> Tensor:
    """The inverse of a permutation: ``places[order[r]] = r`` (int64 ``[S]``)."""
    result = torch.empty_like(order)
    result[order] = torch.arange(order.shape[0], device=order.device)
    return result


@places.register_fake
def _(order: Tensor) -> Tensor:
    return torch.empty_like(order)


@torch.library.custom_op("plait::combine", mutates_args=())
def combine(
    rows: Tensor, place: Tensor, offsets: Tensor, weight: Tensor | None, share: int
) -> Tensor:
    """For each cell the sum of its rows: ``[S / share, *rest]`` from ``rows`` ``[S, *rest]``.

    Slot s of cell ``s // share`` is row ``place[s]``, times ``weight`` ``[cells, share]`` if given.
    Rows from ``offsets[-1]`` on belong to no branch: they may hold anything and add nothing.
    Sums are taken in the dtype of ``rows``, slot 0 first.
    """
    known = (place < offsets[-1]).view(-1, *[1] * (rows.dim() - 1))
    found = rows[place]
    if weight is not None:
        factors = weight.reshape(-1).to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
        found = found * factors
    found = torch.where(known, found, 0).view(-1, share, *rows.shape[1:])
    total = found[:, 0].clone()
    for slot in range(1, share):
        total = total + found[:, slot]
    return total


@combine.register_fake
def _(rows: Tensor, place: Tensor, offsets: Tensor, weight: Tensor | None, share: int) -> Tensor:
    return rows.new_empty(place.shape[0] // share, *rows.shape[1:])


class Branches(HigherOrderOperator):
    """``branches(graphs, rows, offsets, operands) -> [S, *rest]``.

    Graph b gets its rows ``rows[offsets[b] : offsets[b + 1]]`` and the operands, and returns as
    many rows. A branch without rows does not run. Rows of no branch are left as they are.
    """

    def __init__(self) -> None:
        super().__init__("plait_branches")

    def __call__(
        self, graphs: Sequence[Any], rows: Tensor, offsets: Tensor, operands: Sequence[Tensor]
    ) -> Tensor:
        begin, *ends = offsets.tolist()
        parts = []
        for graph, end in zip(graphs, ends, strict=True):
            if begin < end:
                parts += graph(rows[begin:end].contiguous(), *operands)
            begin = end
        if not parts:  # no cell has a branch: only the shape matters
            parts = graphs[0](rows[:0], *operands)
        return torch.cat([*parts, parts[0].new_zeros(rows.shape[0] - begin, *parts[0].shape[1:])])


branches = Branches()
