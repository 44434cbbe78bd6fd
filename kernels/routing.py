"""Operators of routed computation: which rows go to which branch, and products with its weights.

`route` sorts slots by branch; `routed_linear` multiplies each row with the matrix of its branch. A
mixture of experts is a `route`, a `routed_linear` that gathers tokens, whatever pointwise operators
the model puts between (they stay visible in the graph), and a `routed_linear` that scatters back to
slots. How many rows a branch gets is known only at run time; all shapes are known before.

`routing_experts` has all of that as one operator, for who writes such a model by hand. Where
branches are not all one product, `scatter` and `gather` (`routing_cells`) carry cells to any
operators and back.

Importing this module defines the operators; each has a reference implementation for torch to run,
a fake one for tracing and a backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .routes import by_branch, show
from .routing_cells import gather, scatter

__all__ = ["gather", "route", "routed_linear", "scatter"]

WAITING = frozenset({"plait.routed_linear.default", "plait.routed_outer.default"})
"""Operators whose references read on the host how many rows each branch has."""


@torch.library.custom_op("plait::route", mutates_args=())
def route(index: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """Slots sorted by branch.

    ``index`` (int64, any shape, S elements) names the branch of each slot. Returns ``offsets``
    ``[branches + 1]`` and ``order`` ``[S]`` (int64): the slots of branch b, in ascending order, are
    ``order[offsets[b] : offsets[b + 1]]``. Slots whose index names no branch come last, behind
    ``offsets[branches]``.
    """
    show(index, branches)
    return by_branch(index, branches)


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
    slots: Tensor | None = None,
) -> Tensor:
    """Rows of ``x`` times the matrix of their branch: ``[S, N]``.

    ``weight`` is ``[branches, N, K]``, or ``[branches, K, N]`` if ``transposed``; ``bias``
    ``[branches, N]``; ``offsets`` and ``order`` come from `route`. Position r of the order reads
    row ``order[r] // share`` of ``x`` (``share`` slots belong to one row), or row r itself where
    ``share`` is 0. It is written to row ``order[r]`` with ``scatter``, else to row r. Positions of
    no branch give zeros.

    With ``slots`` (int32 ``[branches]``) the matrix of branch b is ``weight[slots[b]]``, and
    ``weight`` may have any number of them; a branch whose slot is negative is left out: what its
    rows of the result hold means nothing.
    """
    matrices = weight if transposed else weight.transpose(1, 2)
    result = x.new_zeros(order.shape[0], matrices.shape[2])
    bounds = offsets.tolist()
    places = list(range(weight.shape[0])) if slots is None else slots.tolist()
    for branch, place in enumerate(places):
        begin, end = bounds[branch], bounds[branch + 1]
        if begin == end or place < 0:
            continue
        slots = order[begin:end]
        rows = x[slots // share] if share else x[begin:end]
        product = rows @ matrices[place]
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
    slots: Tensor | None = None,
) -> Tensor:
    return x.new_empty(order.shape[0], weight.shape[2 if transposed else 1])


@torch.library.custom_op("plait::routed_outer", mutates_args=())
def routed_outer(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    order: Tensor,
    transposed: bool,
    share: int,
    scatter: bool,
) -> tuple[Tensor, Tensor]:
    """What `routed_linear`'s ``weight`` and ``bias`` get when its result gets ``grad`` ``[S, N]``.

    Returns ``[branches, N, K]`` (``[branches, K, N]`` if ``transposed``) and ``[branches, N]``:
    zeros for branches without a row.
    """
    branches = offsets.shape[0] - 1
    n, k = grad.shape[1], x.shape[1]
    weight_grad = grad.new_zeros(branches, *((k, n) if transposed else (n, k)))
    bias_grad = grad.new_zeros(branches, n)
    bounds = offsets.tolist()
    for branch in range(branches):
        begin, end = bounds[branch], bounds[branch + 1]
        slots = order[begin:end]
        rows = x[slots // share] if share else x[begin:end]
        part = grad[slots] if scatter else grad[begin:end]
        weight_grad[branch] = rows.T @ part if transposed else part.T @ rows
        bias_grad[branch] = part.sum(0)
    return weight_grad, bias_grad


@routed_outer.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    order: Tensor,
    transposed: bool,
    share: int,
    scatter: bool,
) -> tuple[Tensor, Tensor]:
    branches, n, k = offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    weight_grad = grad.new_empty(branches, *((k, n) if transposed else (n, k)))
    return weight_grad, grad.new_empty(branches, n)


# -- gradients -------------------------------------------------------------------------------------


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _route_backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
    return None, None


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, order, weight, _, *ctx.options, slots = inputs
    if slots is not None:
        raise NotImplementedError("matrices that lie in slots have no gradients")
    ctx.save_for_backward(x, offsets, order, weight)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, offsets, order, weight = ctx.saved_tensors
    transposed, share, scattered = ctx.options
    x_grad = weight_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        # The product with the other side of each matrix; what was read by slot is written by slot.
        x_grad = routed_linear(
            grad, offsets, order, weight, None, not transposed, int(scattered), share > 0
        )
        if share > 1:
            x_grad = x_grad.view(x.shape[0], share, x.shape[1]).sum(1)
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        weight_grad, bias_grad = routed_outer(grad, x, offsets, order, transposed, share, scattered)
    if not ctx.needs_input_grad[4]:
        bias_grad = None
    return x_grad, None, None, weight_grad, bias_grad, None, None, None, None


route.register_autograd(_route_backward, setup_context=_route_setup)
routed_linear.register_autograd(_linear_backward, setup_context=_linear_setup)
