"""Converters of operators that put elements elsewhere: joins, padding, flips, repeats, resizing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir

from ..abi import Dim
from ..emit import Expr, plain
from ..value import Context, Value
from . import converter
from .common import (
    axis,
    convert_expr,
    dims_of,
    dtype_of,
    i64,
    number,
    operand,
    opmath,
    packed,
    shape_of,
    size,
    unpacked,
    unravel,
)
from .common import linear as position_of
from .scope import bind, guarded
from .table import argument
from .views import first_index, remap

Index = Sequence[Expr]


def concat(parts: Sequence[Value], shape: Sequence[Any], dim: int, dtype: torch.dtype) -> Value:
    """Values joined along ``dim``; each element is read from the one part that has it."""
    parts = [packed(p) for p in parts]

    def load(index: Index) -> Expr:
        starts: list[Expr] = [i64(0)]
        for part in parts[:-1]:
            starts.append(starts[-1] + part.shape[dim])

        def pick(number: int) -> Expr:
            def here() -> Expr:
                own = list(index)
                own[dim] = index[dim] - starts[number]
                return parts[number].load(own)

            if number == len(parts) - 1:
                return here()
            return guarded(index[dim] < starts[number + 1], here, lambda: pick(number + 1))

        return unpacked(pick(0), dtype)

    return Value(tuple(shape), dtype, load)


@converter("cat", "concat")
def _cat(node: fx.Node, ctx: Context) -> Value:
    dtype, tensors = dtype_of(node), node.args[0]
    rank = len(dims_of(node))
    # torch lets 1-d tensors of no element join with any shape.
    parts: Any = [t for t in tensors if dims_of(t) != (0,) or rank == 1]  # type: ignore
    parts = [t for t in parts if 0 not in dims_of(t)] or parts[:1]
    values = [operand(t, dtype, ctx) for t in parts]
    return concat(values, shape_of(node, ctx), axis(number(argument(node, "dim")), rank), dtype)


@converter("stack")
def _stack(node: fx.Node, ctx: Context) -> Value:
    dtype, shape = dtype_of(node), shape_of(node, ctx)
    dim = axis(argument(node, "dim"), len(shape))

    def layer(value: Value) -> Value:
        return Value(
            (*value.shape[:dim], 1, *value.shape[dim:]),
            dtype,
            lambda index: value.load([*index[:dim], *index[dim + 1 :]]),
        )

    tensors: Any = node.args[0]
    return concat([layer(operand(t, dtype, ctx)) for t in tensors], shape, dim, dtype)


@converter("flip")
def _flip(node: fx.Node, ctx: Context) -> Value:
    shape = shape_of(node, ctx)
    dims: Any = node.args[1]
    flipped = {axis(d, len(shape)) for d in dims}

    def where(index: Index) -> Index:
        return [shape[d] - 1 - i if d in flipped else i for d, i in enumerate(index)]

    return remap(node, ctx, where)


@converter("roll")
def _roll(node: fx.Node, ctx: Context) -> Value:
    shape = shape_of(node, ctx)
    as_list = lambda a: [a] if isinstance(a, (int, fx.Node)) else list(a)  # noqa: E731
    shifts, dims = as_list(argument(node, "shifts")), as_list(argument(node, "dims"))
    amounts = [ctx.emitter.dim(size(s)) for s in shifts]

    def back(index: Expr, extent: Expr, amount: Expr) -> Expr:
        # floormod of a value that may be negative is slow and rarely needed: shift at most once.
        start = tir.floormod(i64(0) - amount, tir.max(extent, i64(1)))
        moved = index + start
        return tir.Select(moved >= extent, moved - extent, moved)

    def where(index: Index) -> Index:
        if not dims:
            total: Expr = i64(1)
            for extent in shape:
                total = total * extent
            return unravel(back(position_of(index, shape), total, amounts[0]), shape)
        own = list(index)
        for d, amount in zip(dims, amounts, strict=True):
            d = axis(d, len(shape))
            own[d] = back(own[d], shape[d], amount)
        return own

    return remap(node, ctx, where)


@converter("repeat", "tile")
def _repeat(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    dims = dims_of(source)
    have = [ctx.emitter.dim(d) for d in dims]
    missing = len(shape_of(node, ctx)) - len(have)
    want = dims_of(node)[missing:]

    def where(index: Index) -> Index:
        return [
            i if a == b else tir.floormod(i, n)
            for i, n, a, b in zip(index[missing:], have, dims, want, strict=True)
        ]

    return remap(node, ctx, where)


@converter("repeat_interleave.self_int")
def _repeat_interleave(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    count = ctx.emitter.dim(size(node.args[1]))
    dim = argument(node, "dim")
    shape = [ctx.emitter.dim(d) for d in dims_of(source)]

    def where(index: Index) -> Index:
        if dim is None:
            return unravel(tir.floordiv(index[0], count), shape)
        own = list(index)
        d = axis(dim, len(shape))
        own[d] = tir.floordiv(index[d], count)
        return own

    return remap(node, ctx, where)


def _paddings(node: fx.Node, rank: int) -> list[tuple[Dim, Dim]]:
    """(before, after) of each dimension; torch lists the last dimension first."""
    given: Any = argument(node, "pad") if argument(node, "pad") else argument(node, "padding", [])
    pairs = [(size(a), size(b)) for a, b in zip(given[::2], given[1::2], strict=True)]
    return [(0, 0)] * (rank - len(pairs)) + pairs[::-1]


@converter("constant_pad_nd", "pad")
def _pad(node: fx.Node, ctx: Context) -> Value:
    mode = argument(node, "mode", "constant") or "constant"
    if mode != "constant":
        return _reflected(node, ctx, mode)
    source: Any = node.args[0]
    have, dtype = dims_of(source), dtype_of(node)
    value, shape = packed(ctx.env[source]), shape_of(node, ctx)
    padding = _paddings(node, len(have))
    fill = packed(operand(argument(node, "value") or 0, dtype, ctx))

    def load(index: Index) -> Expr:
        own, inside = list(index), None
        for d, (before, after) in enumerate(padding):
            if (before, after) == (0, 0):
                continue
            own[d] = index[d] - ctx.emitter.dim(before)
            for needed, test in (
                (before, own[d] >= i64(0)),
                (after, own[d] < value.shape[d]),
            ):
                if not isinstance(needed, int) or needed > 0:
                    inside = test if inside is None else tir.And(inside, test)
        if inside is None:
            return unpacked(value.load(own), dtype)
        return unpacked(guarded(inside, lambda: value.load(own), lambda: fill.load([])), dtype)

    return Value(shape, dtype, load)


@converter("reflection_pad1d", "reflection_pad2d")
def _reflection_pad(node: fx.Node, ctx: Context) -> Value:
    return _reflected(node, ctx, "reflect")


@converter("replication_pad1d", "replication_pad2d")
def _replication_pad(node: fx.Node, ctx: Context) -> Value:
    return _reflected(node, ctx, "replicate")


def _reflected(node: fx.Node, ctx: Context, mode: str) -> Value:
    """Padding whose border repeats the inside: "reflect", "replicate" or "circular"."""
    source: Any = node.args[0]
    have = dims_of(source)
    padding = _paddings(node, len(have))

    def where(index: Index) -> Index:
        own = list(index)
        for d, (before, after) in enumerate(padding):
            if (before, after) == (0, 0):
                continue
            i, extent = index[d] - ctx.emitter.dim(before), ctx.emitter.dim(have[d])
            if mode == "reflect":
                i = tir.Select(i < i64(0), i64(0) - i, i)
                i = tir.Select(i >= extent, (extent - 1) * i64(2) - i, i)
            elif mode == "replicate":
                i = tir.max(tir.min(i, extent - 1), i64(0))
            else:  # wraps around what cropping (negative padding) leaves
                crop, cropped = (ctx.emitter.dim(_negative_part(p)) for p in (before, after))
                i, extent = i - crop, extent - crop - cropped
                i = tir.Select(i < i64(0), i + extent, i)
                i = tir.Select(i >= extent, i - extent, i) + crop
            own[d] = i
        return own

    return remap(node, ctx, where)


def _negative_part(padding: Dim) -> Dim:
    """How much a padding crops."""
    return max(-padding, 0) if isinstance(padding, int) else 0


def _triangle(name: str, keeps: Callable[[Expr, Expr], Expr]) -> None:
    @converter(name)
    def convert(node: fx.Node, ctx: Context) -> Value:
        dtype = dtype_of(node)
        value = packed(operand(node.args[0], dtype, ctx))
        zero = packed(operand(0, dtype, ctx))
        diagonal = ctx.emitter.dim(size(argument(node, "diagonal")))

        def load(index: Index) -> Expr:
            kept = keeps(index[-1] - index[-2], diagonal)
            return unpacked(tir.Select(kept, value.load(index), zero.load([])), dtype)

        return Value(shape_of(node, ctx), dtype, load)


_triangle("tril", lambda offset, diagonal: offset <= diagonal)
_triangle("triu", lambda offset, diagonal: offset >= diagonal)


@converter("select_scatter")
def _select_scatter(node: fx.Node, ctx: Context) -> Value:
    dtype, shape = dtype_of(node), shape_of(node, ctx)
    base, source = packed(ctx.env[node.args[0]]), packed(ctx.env[node.args[1]])
    dim = axis(argument(node, "dim"), len(shape))
    at = first_index(argument(node, "index"), dims_of(node)[dim], ctx)

    def load(index: Index) -> Expr:
        rest = [*index[:dim], *index[dim + 1 :]]
        here = plain(index[dim] == at)
        return unpacked(guarded(here, lambda: source.load(rest), lambda: base.load(index)), dtype)

    return Value(shape, dtype, load)


@converter("slice_scatter")
def _slice_scatter(node: fx.Node, ctx: Context) -> Value:
    dtype, shape = dtype_of(node), shape_of(node, ctx)
    base, source = packed(ctx.env[node.args[0]]), packed(ctx.env[node.args[1]])
    dim = axis(argument(node, "dim"), len(shape))
    start = first_index(argument(node, "start"), dims_of(node)[dim], ctx)
    step = i64(argument(node, "step"))

    def load(index: Index) -> Expr:
        offset = index[dim] - start
        own = [*index[:dim], tir.floordiv(offset, step), *index[dim + 1 :]]
        hit = tir.And(offset >= i64(0), offset < source.shape[dim] * step)
        hit = tir.And(hit, plain(tir.floormod(offset, step) == i64(0)))
        return unpacked(guarded(hit, lambda: source.load(own), lambda: base.load(index)), dtype)

    return Value(shape, dtype, load)


def _scales(node: fx.Node, rank: int) -> list[float | None]:
    """The scale factors an upsampling node was given, per spatial dimension."""
    if str(node.target).endswith(".vec"):
        given: Any = argument(node, "scale_factors")
        return list(given) if given else [None] * rank
    if rank == 1:
        return [argument(node, "scales")]
    return [argument(node, "scales_h"), argument(node, "scales_w")]


def _ratio(scale: float | None, have: Dim, want: Dim, ctx: Context) -> Expr:
    """Input elements per output element as float32, as torch computes it."""
    if scale is not None and scale > 0:
        return tir.FloatImm("float32", 1.0 / scale)
    return tir.Cast("float32", ctx.emitter.dim(have)) / tir.Cast("float32", ctx.emitter.dim(want))


@converter(
    *("upsample_nearest1d", "upsample_nearest1d.vec"),
    *("upsample_nearest2d", "upsample_nearest2d.vec"),
)
def _nearest(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    have, want = dims_of(source), dims_of(node)
    rank = len(want) - 2
    scales = _scales(node, rank)

    def where(index: Index) -> Index:
        own = list(index)
        for d, scale in enumerate(scales, 2):
            small, large = have[d], want[d]
            if isinstance(small, int) and isinstance(large, int) and large % small == 0:
                if scale is None or scale == large // small:
                    own[d] = tir.floordiv(index[d], i64(large // small))
                    continue
            ratio = _ratio(scale, small, large, ctx)
            at = tir.Cast("int64", tir.floor(tir.Cast("float32", index[d]) * ratio))
            own[d] = tir.min(at, ctx.emitter.dim(small) - 1)
        return own

    return remap(node, ctx, where)


@converter("upsample_bilinear2d", "upsample_bilinear2d.vec")
def _bilinear(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    have, want = dims_of(source), dims_of(node)
    dtype = dtype_of(node)
    compute = opmath(dtype)
    value = operand(source, compute, ctx)
    corners = argument(node, "align_corners")
    scales = _scales(node, 2)
    unit = tir.FloatImm("float32", 1.0)

    def taps(index: Expr, d: int) -> tuple[Expr, Expr, Expr]:
        """(lower position, upper position, weight of the upper)."""
        small, large = have[d], want[d]
        place = tir.Cast("float32", index)
        if corners:
            span = tir.Cast("float32", ctx.emitter.dim(small) - 1)
            steps = tir.Cast("float32", tir.max(ctx.emitter.dim(large) - 1, i64(1)))
            at = place * (span / steps)
        else:
            half = tir.FloatImm("float32", 0.5)
            at = (place + half) * _ratio(scales[d - 2], small, large, ctx) - half
            at = tir.max(at, tir.FloatImm("float32", 0.0))
        at = bind(at)
        last = ctx.emitter.dim(small) - 1
        low = bind(tir.min(tir.Cast("int64", tir.floor(at)), last))
        return low, tir.min(low + 1, last), bind(at - tir.Cast("float32", low))

    def load(index: Index) -> Expr:
        top, bottom, down = taps(index[2], 2)
        left, right, across = taps(index[3], 3)
        down, across = (convert_expr(w, torch.float32, compute) for w in (down, across))
        one = convert_expr(unit, torch.float32, compute)
        at = lambda y, x: value.load([index[0], index[1], y, x])  # noqa: E731
        upper = at(top, left) * (one - across) + at(top, right) * across
        lower = at(bottom, left) * (one - across) + at(bottom, right) * across
        return convert_expr(upper * (one - down) + lower * down, compute, dtype)

    return Value(shape_of(node, ctx), dtype, load)
