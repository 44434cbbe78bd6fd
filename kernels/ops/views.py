"""Converters of views: operators that only say which element of their argument to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch.fx as fx
import tvm.tirx as tir

from ..abi import Dim, product
from ..emit import Expr
from ..value import Context, Value
from . import converter
from .common import axis, dim_of, dims_of, i64, linear, number, shape_of, size, unravel
from .table import argument

Index = Sequence[Expr]


def remap(node: fx.Node, ctx: Context, where: Callable[[Index], Index]) -> Value:
    """The node's first argument read at ``where(index)``."""
    source = ctx.env[node.args[0]]
    return Value(shape_of(node, ctx), source.dtype, lambda index: source.load(where(index)))


def reshape_groups(source: Sequence[Dim], dest: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Pairs of dimension lists with equal element counts that a reshape maps onto each other.

    Dimensions of 1 are in no group. The finest grouping is returned, so that an unchanged
    dimension is a group of its own and its index passes through untouched.
    """
    left = [i for i, d in enumerate(source) if d != 1]
    right = [i for i, d in enumerate(dest) if d != 1]
    groups: list[tuple[list[int], list[int]]] = []
    a: list[int] = []
    b: list[int] = []
    while left or right or a or b:
        have, want = product([source[i] for i in a]), product([dest[i] for i in b])
        if a and b and _same(have, want):
            groups.append((a, b))
            a, b = [], []
        elif not a and left:
            a.append(left.pop(0))
        elif not b and right:
            b.append(right.pop(0))
        elif left and (not right or not _is_larger(have, want)):
            a.append(left.pop(0))
        elif right:
            b.append(right.pop(0))
        else:
            groups.append((a, b))
            break
    return groups


def _same(a: Dim, b: Dim) -> bool:
    return a == b or (not isinstance(a, int) or not isinstance(b, int)) and sympy.expand(a - b) == 0


def _is_larger(a: Dim, b: Dim) -> bool:
    """Whether a > b, symbols standing for large numbers."""
    difference = sympy.expand(a - b)
    if isinstance(difference, sympy.Expr) and difference.free_symbols:
        difference = difference.subs(dict.fromkeys(difference.free_symbols, 1 << 20))
    return bool(difference > 0)


def reshape(source: Value, have: Sequence[Dim], want: Sequence[Dim], ctx: Context) -> Value:
    """``source`` of shape ``have`` in row-major order as shape ``want``."""
    groups = reshape_groups(have, want)
    old = [ctx.emitter.dim(d) for d in have]
    new = [ctx.emitter.dim(d) for d in want]

    def load(index: Index) -> Expr:
        own: list[Expr] = [i64(0)] * len(old)
        for a, b in groups:
            position = linear([index[i] for i in b], [new[i] for i in b])
            if _is_dense([have[i] for i in a], source.strides and [source.strides[i] for i in a]):
                own[a[-1]] = position
                continue
            for i, part in zip(a, unravel(position, [old[i] for i in a]), strict=True):
                own[i] = part
        return source.load(own)

    return Value(tuple(new), source.dtype, load)


def _is_dense(dims: Sequence[Dim], strides: Sequence[Dim] | None) -> bool:
    """Whether dimensions, some of which are known at run time only, are one in memory. (Of those
    that are known TVM can tell.)
    """
    if strides is None or all(isinstance(d, int) for d in dims):
        return False
    steps = zip(strides, strides[1:], dims[1:], strict=False)
    return all(_same(outer, inner * dim) for outer, inner, dim in steps)


@converter(
    *("view", "reshape", "_unsafe_view", "_reshape_alias", "view_as", "reshape_as"),
    *("flatten.using_ints", "unflatten.int", "squeeze", "squeeze.dim", "squeeze.dims"),
    "unsqueeze",
)
def _reshape(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    return reshape(ctx.env[source], dims_of(source), dims_of(node), ctx)


def permuted(node: fx.Node, ctx: Context, order: Sequence[int]) -> Value:
    """Dimension ``i`` of the node is dimension ``order[i]`` of its argument."""

    def where(index: Index) -> Index:
        own: list[Expr] = [i64(0)] * len(order)
        for i, j in zip(index, order, strict=True):
            own[j] = i
        return own

    return remap(node, ctx, where)


@converter("permute")
def _permute(node: fx.Node, ctx: Context) -> Value:
    rank = len(dims_of(node))
    dims: Any = node.args[1]
    return permuted(node, ctx, [axis(d, rank) for d in dims])


@converter("transpose.int", "swapaxes")
def _transpose(node: fx.Node, ctx: Context) -> Value:
    rank = len(dims_of(node))
    order = list(range(rank))
    if rank:
        a, b = (axis(number(d), rank) for d in node.args[1:3])
        order[a], order[b] = b, a
    return permuted(node, ctx, order)


@converter("t", "numpy_T")
def _t(node: fx.Node, ctx: Context) -> Value:
    return permuted(node, ctx, list(reversed(range(len(dims_of(node))))))


@converter("movedim.int", "movedim.intlist")
def _movedim(node: fx.Node, ctx: Context) -> Value:
    rank = len(dims_of(node))
    source, dest = ([a] if isinstance(a, int) else a for a in node.args[1:3])  # type: ignore
    source, dest = ([axis(d, rank) for d in dims] for dims in (source, dest))  # type: ignore
    rest = iter(d for d in range(rank) if d not in source)
    moved = dict(zip(dest, source, strict=True))
    return permuted(node, ctx, [moved[i] if i in moved else next(rest) for i in range(rank)])


@converter("expand", "expand_as", "expand_copy", "broadcast_to")
def _expand(node: fx.Node, ctx: Context) -> Value:
    return ctx.env[node.args[0]].broadcast(shape_of(node, ctx))


def first_index(start: Any, extent: Dim, ctx: Context) -> Expr:
    """A possibly negative or missing start within a dimension as an index from its beginning."""
    if start is None:
        return i64(0)
    value = size(start)
    if isinstance(value, int) and isinstance(extent, int):
        return i64(min(max(value + extent if value < 0 else value, 0), extent))
    expr, total = ctx.emitter.dim(value), ctx.emitter.dim(extent)
    if isinstance(value, int):
        return expr if value >= 0 else tir.max(total + expr, i64(0))
    if value.is_nonnegative:
        return expr
    return tir.max(tir.Select(expr < i64(0), expr + total, expr), i64(0))


def shifted(source: Value, shape: Sequence[Any], dim: int, start: Expr, step: int = 1) -> Value:
    """``source`` from ``start`` on in one dimension, every ``step``-th element."""

    def load(index: Index) -> Expr:
        own = list(index)
        own[dim] = start + (index[dim] if step == 1 else index[dim] * i64(step))
        return source.load(own)

    return Value(tuple(shape), source.dtype, load)


@converter("slice.Tensor", "narrow")
def _slice(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    dims = dims_of(source)
    dim = axis(argument(node, "dim"), len(dims))
    start = first_index(argument(node, "start"), dims[dim], ctx)
    step = size(argument(node, "step", 1))  # narrow has none
    assert isinstance(step, int)
    return shifted(ctx.env[source], shape_of(node, ctx), dim, start, step)


@converter("select.int")
def _select(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    dims = dims_of(source)
    dim = axis(argument(node, "dim"), len(dims))
    at = first_index(argument(node, "index"), dims[dim], ctx)
    return remap(node, ctx, lambda index: [*index[:dim], at, *index[dim:]])


@converter(
    *("split.Tensor", "split.sizes", "split_with_sizes", "unsafe_split.Tensor"),
    *("chunk", "unsafe_chunk"),
)
def _split(node: fx.Node, ctx: Context) -> tuple[Value, ...]:
    source = ctx.env[node.args[0]]
    parts = node.meta["val"]
    dim = axis(argument(node, "dim", 0), len(source.shape))
    values, start = [], 0
    for part in parts:
        dims = [dim_of(s) for s in part.shape]
        shape = [ctx.emitter.dim(d) for d in dims]
        values.append(shifted(source, shape, dim, ctx.emitter.dim(start)))
        start = start + dims[dim]
    return tuple(values)


@converter("unbind.int")
def _unbind(node: fx.Node, ctx: Context) -> tuple[Value, ...]:
    source = ctx.env[node.args[0]]
    dim = axis(argument(node, "dim", 0), len(source.shape))
    shape = (*source.shape[:dim], *source.shape[dim + 1 :])

    def part(at: int) -> Value:
        return Value(
            shape,
            source.dtype,
            lambda index: source.load([*index[:dim], i64(at), *index[dim:]]),
        )

    return tuple(part(i) for i in range(len(node.meta["val"])))


@converter("diagonal")
def _diagonal(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    rank = len(dims_of(source))
    offset = argument(node, "offset")
    first, second = (axis(argument(node, f"dim{i}"), rank) for i in (1, 2))

    def where(index: Index) -> Index:
        rest = iter(index[:-1])
        own = {first: index[-1] + max(-offset, 0), second: index[-1] + max(offset, 0)}
        return [own[i] if i in own else next(rest) for i in range(rank)]

    return remap(node, ctx, where)


@converter("unfold")
def _unfold(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    dim = axis(argument(node, "dimension"), len(dims_of(source)))
    step = argument(node, "step")

    def where(index: Index) -> Index:
        own = list(index[:-1]) if dims_of(source) else []
        if own:
            own[dim] = index[dim] * i64(step) + index[-1]
        return own

    return remap(node, ctx, where)


@converter("pixel_shuffle")
def _pixel_shuffle(node: fx.Node, ctx: Context) -> Value:
    r = i64(argument(node, "upscale_factor"))

    def where(index: Index) -> Index:
        *batch, c, h, w = index
        channel = (c * r + tir.floormod(h, r)) * r + tir.floormod(w, r)
        return [*batch, channel, tir.floordiv(h, r), tir.floordiv(w, r)]

    return remap(node, ctx, where)


@converter("pixel_unshuffle")
def _pixel_unshuffle(node: fx.Node, ctx: Context) -> Value:
    r = i64(argument(node, "downscale_factor"))

    def where(index: Index) -> Index:
        *batch, c, h, w = index
        row, column = tir.floormod(tir.floordiv(c, r), r), tir.floormod(c, r)
        return [*batch, tir.floordiv(c, r * r), h * r + row, w * r + column]

    return remap(node, ctx, where)


@converter("channel_shuffle")
def _channel_shuffle(node: fx.Node, ctx: Context) -> Value:
    groups = i64(argument(node, "groups"))
    channels = tir.floordiv(shape_of(node, ctx)[1], groups)

    def where(index: Index) -> Index:
        c = index[1]
        own = tir.floormod(c, groups) * channels + tir.floordiv(c, groups)
        return [index[0], own, *index[2:]]

    return remap(node, ctx, where)
