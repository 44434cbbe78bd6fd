"""What vertical fusion must know of single nodes: index spaces of operators, and kinds of views.

An operator's *space* is the shape that a kernel iterates over to compute it. Operators with one
space can share a kernel. Sizes are compared as symbolic expressions, so everything here holds for
every input, and nothing here adds a guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from ..kernels import ops
from .ir import aten

Space = tuple[Any, ...]
"""Sizes as ints and sympy expressions."""

STRIDED_VIEWS = frozenset(
    {
        aten.alias.default,
        aten.broadcast_to.default,
        aten.chunk.default,
        aten.detach.default,
        aten.diagonal.default,
        aten.dropout.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.lift_fresh.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.narrow.default,
        aten.numpy_T.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.swapaxes.default,
        aten.t.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.unfold.default,
        aten.unsqueeze.default,
    }
)
"""Views that are another offset and other strides of the same memory, whatever its strides are."""

RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten._reshape_alias.default,
        aten.view_as.default,
        aten.reshape_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    }
)
"""Views that strides can express for some strides of the source, and a copy otherwise."""

ONE_TO_ONE = RESHAPES | {
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.flip.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.numpy_T.default,
    aten.permute.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.roll.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.stack.default,
    aten.swapaxes.default,
    aten.t.default,
    aten.transpose.int,
    aten.tril.default,
    aten.triu.default,
    aten.unsqueeze.default,
}
"""Views that read each element of their source at most once: fusing the source repeats no work."""

FILLS = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.full.default,
        aten.ones.default,
        aten.scalar_tensor.default,
        aten.zeros.default,
    }
)
"""Operators without tensor inputs: cheaper computed by every reader than read from memory."""

ROW_REDUCTIONS = frozenset(
    {
        aten.amax.default,
        aten.amin.default,
        aten.mean.dim,
        aten.sum.dim_IntList,
    }
)
"""Reductions with one result that the rows template evaluates beside other operators."""

_ROW_NORMS: dict[Any, str] = {
    aten._log_softmax.default: "dim",
    aten._safe_softmax.default: "dim",
    aten._softmax.default: "dim",
    aten.layer_norm.default: "shape",
    aten.log_softmax.int: "dim",
    aten.rms_norm.default: "shape",
    aten.softmax.int: "dim",
}


def size(value: Any) -> Any:
    """A size as an int or a sympy expression, which compare and hash without guards."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return int(expr) if expr.is_Integer else expr
    return value


def space_of(node: fx.Node) -> Space | None:
    """The shape of a tensor-valued node; None for tuples and everything else."""
    value = node.meta.get("val")
    return tuple(map(size, value.shape)) if isinstance(value, torch.Tensor) else None


def row_space(node: fx.Node) -> tuple[Space, int] | None:
    """Space of a row operator and the number of trailing dimensions that make a row, or None.

    Row operators normalise, or reduce, the trailing dimensions of their first argument.
    """
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or isinstance(node.meta.get("val"), tuple | list):
        return None
    space = space_of(source)
    if not space:
        return None
    rank = len(space)
    if node.target in ROW_REDUCTIONS:
        dims = reduced_dims(node, rank)
        k = len(dims)
        return (space, k) if dims == tuple(range(rank - k, rank)) else None
    rule = _ROW_NORMS.get(node.target)
    if rule == "dim":
        return (space, 1) if ops.argument(node, "dim") % rank == rank - 1 else None
    if rule == "shape":
        return space, len(ops.argument(node, "normalized_shape"))
    return None


def reduced_dims(node: fx.Node, rank: int) -> tuple[int, ...]:
    """The dimensions that a reduction removes or keeps as ones, ascending."""
    dims = ops.argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return tuple(range(rank))
    return tuple(sorted({dim % max(rank, 1) for dim in dims}))


def kept(space: Space, k: int) -> Space:
    """The shape of a row's reduction with ``keepdim=True``."""
    return space[: len(space) - k] + (1,) * k


def is_strided_view(node: fx.Node, mode: FakeTensorMode) -> bool:
    """Whether ``node`` is only another way to address the memory behind it.

    What it views, through any number of views, is taken to be contiguous.
    """
    if node.target in STRIDED_VIEWS:
        return True
    if node.target not in RESHAPES:
        return False
    chain = [node]
    while isinstance(source := chain[-1].args[0], fx.Node) and _is_view(source):
        chain.append(source)
    if len(chain) == 1:
        return True
    base = chain[-1].args[0]
    assert isinstance(base, fx.Node)
    value = base.meta["val"]
    try:
        with mode, torch.no_grad():
            value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            for view in reversed(chain):
                value = _apply(view, value)
    except (RuntimeError, ValueError):
        return False  # torch refuses the view, or cannot tell for every size
    return True


def _is_view(node: fx.Node) -> bool:
    single = isinstance(node.meta.get("val"), torch.Tensor)
    return single and (node.target in STRIDED_VIEWS or node.target in RESHAPES)


def _apply(node: fx.Node, source: torch.Tensor) -> torch.Tensor:
    if node.target in RESHAPES:
        return source.view(node.meta["val"].shape)
    args, kwargs = fx.map_arg((node.args[1:], dict(node.kwargs)), lambda n: n.meta["val"])
    return node.target(source, *args, **kwargs)  # type: ignore[operator]


def reads_one_to_one(node: fx.Node, source: fx.Node) -> bool:
    """Whether computing ``source`` inside a kernel that evaluates ``node`` repeats no work.

    Pointwise operators must not broadcast ``source``; views must read each element at most once.
    """
    kind = ops.category(node)
    a, b = space_of(node), space_of(source)
    if a is None or b is None:
        return False
    if kind == "pointwise":
        return a == b
    if kind != "view" or node.target not in ONE_TO_ONE:
        return False
    operands: list[fx.Node] = []
    fx.map_arg(node.args, operands.append)
    return operands.count(source) == 1


def halves(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two halves of a product's columns, if these are all that is read of it; else nothing.

    A half is a run of columns, or every other column.
    """
    found = ops.column_halves(node, list(node.users))
    return () if found is None else found[0]


def parts(node: fx.Node) -> Sequence[fx.Node]:
    """The nodes that hold the results of ``node``: itself, or the parts of its tuple."""
    if isinstance(node.meta.get("val"), tuple | list):
        return list(node.users)
    return [node]
