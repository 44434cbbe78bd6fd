"""Operators of routed computation: which rows go to which branch, and products with its weights.

`route` sorts slots by branch; `routed_linear` multiplies each row with the matrix of its branch. A
mixture of experts is a `route`, a `routed_linear` that gathers tokens, whatever pointwise operators
the model puts between (they stay visible in the graph), and a `routed_linear` that scatters back to
slots. How many rows a branch gets is known only at run time; all shapes are known before.

Importing this module defines the operators; each has a reference implementation for torch to run
and a fake one for tracing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["route", "routed_linear"]


@torch.library.custom_op("plait::route", mutates_args=())
def route(index: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """Slots sorted by branch.

    ``index`` (int64, any shape, S elements) names the branch of each slot. Returns ``offsets``
    ``[branches + 1]`` and ``order`` ``[S]`` (int64): the slots of branch b, in ascending order, are
    ``order[offsets[b] : offsets[b + 1]]``. Slots whose index names no branch come last, behind
    ``offsets[branches]``.
    """
    flat = index.reshape(-1)
    known = (flat >= 0) & (flat < branches)
    branch = torch.where(known, flat, branches)
    offsets = torch.zeros(branches + 1, dtype=torch.int64, device=index.device)
    offsets[1:] = torch.bincount(branch, minlength=branches + 1)[:branches].cumsum(0)
    return offsets, torch.sort(branch, stable=True).indices


@route.register_fake
def _(index: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    return (
        index.new_empty(branches + 1, dtype=torch.int64),
        index.new_empty(index.numel(), dtype=torch.int64),
    )


@torch.library.custom_op("plait::routed_linear", mutates_args=())
def routed_linear(
    x: Tensor,
    offsets: Tensor,
    order: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    share: int,
    scatter: bool,
) -> Tensor:
    """Rows of ``x`` times the matrix of their branch: ``[S, N]``.

    ``weight`` is ``[branches, N, K]``, or ``[branches, K, N]`` if ``transposed``; ``bias``
    ``[branches, N]``; ``offsets`` and ``order`` come from `route`. Position r of the order reads
    row ``order[r] // share`` of ``x`` (``share`` slots belong to one row), or row r itself where
    ``share`` is 0. It is written to row ``order[r]`` with ``scatter``, else to row r. Positions of
    no branch give zeros.
    """
    matrices = weight if transposed else weight.transpose(1, 2)
    result = x.new_zeros(order.shape[0], matrices.shape[2])
    bounds = offsets.tolist()
    for branch in range(weight.shape[0]):
        begin, end = bounds[branch], bounds[branch + 1]
        if begin == end:
            continue
        slots = order[begin:end]
        rows = x[slots // share] if share else x[begin:end]
        product = rows @ matrices[branch]
        if bias is not None:
            product = product + bias[branch]
        if scatter:
            result[slots] = product
        else:
            result[begin:end] = product
    return result


@routed_linear.register_fake
def _(
    x: Tensor,
    offsets: Tensor,
    order: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    share: int,
    scatter: bool,
) -> Tensor:
    return x.new_empty(order.shape[0], weight.shape[2 if transposed else 1])
