"""`scatter` cells to branches of any kind, and `gather` what the branches made of them.

How many cells a branch gets is known only at run time: each result of `scatter` has a first size
of its own, an unbacked symbol while tracing. Whatever lies between the two operators stays in the
graph as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .routes import by_branch, names_branch, show

__all__ = ["Taken", "gather", "scatter"]


class Taken:
    """What a trace takes for granted of branches: whether they get cells; and if there were any."""

    def __init__(self, cells: bool) -> None:
        self.cells = cells
        self.scattered = False

    @contextlib.contextmanager
    def within(self) -> Iterator[Taken]:
        """Traces within it follow this."""
        token = _TAKEN.set(self)
        try:
            yield self
        finally:
            _TAKEN.reset(token)


_TAKEN: ContextVar[Taken | None] = ContextVar("taken", default=None)


@torch.library.custom_op("plait::scatter", mutates_args=())
def scatter(cells: Tensor, index: Tensor, branches: int) -> list[Tensor]:
    """The cells of each branch: ``branches`` new tensors ``[u_b, *cells.shape[1:]]``.

    ``index`` (int64, ``[cells, k]``, or ``[cells]`` for k = 1) names the branch of each slot; slot
    s belongs to cell ``s // k``. Branch b gets the cells of its slots, slots in ascending order: a
    cell that names it twice comes twice. An index outside ``[0, branches)`` names no branch;
    ``branches`` is the usual way to write that. Raises ValueError or RuntimeError where the
    arguments do not fit each other.
    """
    slots = _slots_per_cell(cells.shape[0], index)
    show(index, branches)
    return _split(cells, index, branches, slots)


@scatter.register_fake
def _(cells: Tensor, index: Tensor, branches: int) -> list[Tensor]:
    _slots_per_cell(cells.shape[0], index)
    context = torch.library.get_ctx()
    taken = _TAKEN.get() or Taken(False)
    taken.scattered = True
    sizes = [context.new_dynamic_size(min=int(taken.cells)) for _ in range(branches)]
    return [cells.new_empty(size, *cells.shape[1:]) for size in sizes]


@torch.library.custom_op("plait::gather", mutates_args=())
def gather(outs: Sequence[Tensor], index: Tensor, weight: Tensor | None) -> Tensor:
    """For each cell the sum over its slots of what their branches returned: ``[cells, *rest]``.

    ``outs[b]`` ``[u_b, *rest]`` holds branch b's rows in the order in which `scatter` gave it the
    cells for the same ``index`` (int64, ``[cells, k]`` or ``[cells]``). With ``weight`` (the shape
    of ``index``, cast to the dtype of ``outs``) a slot's row is multiplied by its weight. Slots of
    no branch add nothing, whatever their weight; a cell without a branch is zero. Sums are taken
    in the dtype of ``outs``, slot 0 first.

    Raises ValueError or RuntimeError, naming the branch, where branches return different dtypes or
    shapes, or another number of rows than they were given.
    """
    slots = _slots_per_cell(index.shape[0], index)
    _check_outs(outs, index, weight)
    offsets, order = by_branch(index, len(outs))
    bounds = offsets.tolist()
    rest = outs[0].shape[1:]
    rows = outs[0].new_zeros(index.numel(), *rest)
    for branch, out in enumerate(outs):
        begin, end = bounds[branch], bounds[branch + 1]
        if out.shape[0] != end - begin:
            raise ValueError(
                f"branch {branch} returned {out.shape[0]} rows for {end - begin} cells; a branch "
                "keeps its first dimension"
            )
        rows.index_copy_(0, order[begin:end], out)
    if weight is not None:
        rows = rows * _factors(weight, index, len(outs), rows)
    if not slots:
        return rows.new_zeros(index.shape[0], *rest)
    rows = rows.view(index.shape[0], slots, *rest)
    total = rows[:, 0]
    for slot in range(1, slots):
        total = total + rows[:, slot]
    return total.contiguous()


@gather.register_fake
def _(outs: Sequence[Tensor], index: Tensor, weight: Tensor | None) -> Tensor:
    _slots_per_cell(index.shape[0], index)
    _check_outs(outs, index, weight)
    return outs[0].new_empty(index.shape[0], *outs[0].shape[1:])


@torch.library.custom_op("plait::scatter_sized", mutates_args=())
def scatter_sized(cells: Tensor, index: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """`scatter` where the size of each branch's part is known: the backward pass of `gather`."""
    parts = _split(cells, index, len(sizes), _slots_per_cell(cells.shape[0], index))
    if any(p.shape[0] != size for p, size in zip(parts, sizes, strict=True)):
        raise ValueError(f"sizes {list(sizes)} do not fit {[p.shape[0] for p in parts]}")
    return parts


@scatter_sized.register_fake
def _(cells: Tensor, index: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [cells.new_empty(size, *cells.shape[1:]) for size in sizes]


def _split(cells: Tensor, index: Tensor, branches: int, slots: int) -> list[Tensor]:
    offsets, order = by_branch(index, branches)
    bounds = offsets.tolist()
    rows = order // max(slots, 1)
    # A copy each: results of an operator may not share memory.
    return [cells.index_select(0, rows[bounds[b] : bounds[b + 1]]) for b in range(branches)]


def _slots_per_cell(cells: Any, index: Tensor) -> int:
    """k for an index ``[cells, k]``. Raises ValueError or RuntimeError where it does not fit."""
    if index.dtype != torch.int64:
        raise ValueError(f"index is {index.dtype}; branches are named by int64")
    if index.dim() not in (1, 2):
        raise ValueError(f"index has {index.dim()} dimensions; it must be [cells] or [cells, k]")
    torch._check(
        index.shape[0] == cells,
        lambda: f"index names the branches of {index.shape[0]} cells, but there are {cells}",
    )
    return index.shape[1] if index.dim() == 2 else 1


def _check_outs(outs: Sequence[Tensor], index: Tensor, weight: Tensor | None) -> None:
    if not outs:
        raise ValueError("gather needs the results of at least one branch")
    first = outs[0]
    for branch, out in enumerate(outs):
        if out.dtype != first.dtype:
            raise ValueError(f"branch {branch} returned {out.dtype}, branch 0 {first.dtype}")
        if out.dim() != first.dim() or not out.dim():
            raise ValueError(
                f"branch {branch} returned {out.dim()} dimensions, branch 0 {first.dim()}; all "
                "must return [cells, ...] of one shape"
            )
        for have, want in zip(out.shape[1:], first.shape[1:], strict=True):
            torch._check(
                have == want,
                lambda b=branch, o=out: (
                    f"branch {b} returned cells of shape {tuple(o.shape[1:])}, "
                    f"branch 0 {tuple(first.shape[1:])}"
                ),
            )
    if weight is None:
        return
    if weight.dim() != index.dim():
        raise ValueError(f"weight {tuple(weight.shape)} must have the shape of index")
    for have, want in zip(weight.shape, index.shape, strict=True):
        torch._check(
            have == want,
            lambda: f"weight {tuple(weight.shape)} must have index's shape {tuple(index.shape)}",
        )


def _factors(weight: Tensor, index: Tensor, branches: int, rows: Tensor) -> Tensor:
    """What each of the ``rows`` is multiplied by; 0 for slots of no branch: NaN may be there."""
    known = names_branch(index, branches).reshape(-1)
    factors = torch.where(known, weight.reshape(-1).to(rows.dtype), 0)
    return factors.view(-1, *[1] * (rows.dim() - 1))


# -- gradients -------------------------------------------------------------------------------------


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return gather(list(grads), index, None), None, None


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    outs, index, weight = inputs
    ctx.sizes = [out.shape[0] for out in outs]
    ctx.weighted = weight is not None
    ctx.save_for_backward(index, *([weight, *outs] if ctx.weighted else ()))


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    index, *saved = ctx.saved_tensors
    branches = len(ctx.sizes)
    cells, slots = index.shape[0], index.shape[1] if index.dim() == 2 else 1
    rest = grad.shape[1:]
    per_slot = grad.unsqueeze(1).expand(cells, slots, *rest).reshape(cells * slots, *rest)
    weight_grad, flat = None, index.reshape(-1)
    scaled = per_slot
    if ctx.weighted:
        weight, *outs = saved
        scaled = per_slot * _factors(weight, index, branches, per_slot)
        if ctx.needs_input_grad[2]:
            products = gather(outs, flat, None) * per_slot
            if rest:
                products = products.sum(tuple(range(1, products.dim())))
            products = torch.where(names_branch(flat, branches), products, 0)
            weight_grad = products.view(index.shape).to(weight.dtype)
    return scatter_sized(scaled, flat, ctx.sizes), None, weight_grad


scatter.register_autograd(_scatter_backward, setup_context=_scatter_setup)
scatter_sized.register_autograd(_scatter_backward, setup_context=_scatter_setup)
gather.register_autograd(_gather_backward, setup_context=_gather_setup)
