"""Converters of operators that read where an index tensor says.

`bounds` keeps indices out of range, an error in torch, from getting here. Should one, it reads the
nearest element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir

from ..emit import Expr, expr_dtype
from ..value import Context, Value
from . import converter
from .common import axis, convert_expr, dims_of, dtype_of, i64, operand, opmath, shape_of
from .scope import bind
from .table import argument

Index = Sequence[Expr]


def within(position: Expr, extent: Expr) -> Expr:
    """A position wrapped if it is negative, then held inside a dimension."""
    position = bind(position)
    wrapped = tir.Select(position < i64(0), position + extent, position)
    return tir.max(tir.min(wrapped, extent - 1), i64(0))


@converter("embedding")
def _embedding(node: fx.Node, ctx: Context) -> Value:
    weight = ctx.env[node.args[0]]
    indices = operand(node.args[1], torch.int64, ctx)

    def load(index: Index) -> Expr:
        row = within(indices.load(index[:-1]), weight.shape[0])
        return weight.load([row, index[-1]])

    return Value(shape_of(node, ctx), weight.dtype, load)


@converter("index_select")
def _index_select(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    value = ctx.env[source]
    dim = axis(argument(node, "dim"), len(dims_of(source)))
    indices = operand(argument(node, "index"), torch.int64, ctx)

    def load(index: Index) -> Expr:
        if not value.shape:
            return value.load([])
        at = [index[dim]] if indices.shape else []
        own = list(index)
        own[dim] = within(indices.load(at), value.shape[dim])
        return value.load(own)

    return Value(shape_of(node, ctx), value.dtype, load)


@converter("gather", "take_along_dim")
def _gather(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    shape = shape_of(node, ctx)
    value = ctx.env[source]
    named = "index" if str(node.target).startswith("aten.gather") else "indices"
    indices = operand(argument(node, named), torch.int64, ctx)
    dim = axis(argument(node, "dim"), len(shape))
    if named == "indices":  # all dimensions but one broadcast
        indices = indices.broadcast(shape)
        value = value.broadcast([*shape[:dim], value.shape[dim], *shape[dim + 1 :]])

    def load(index: Index) -> Expr:
        if not value.shape:
            return value.load([])
        own = list(index)
        own[dim] = within(indices.load(index if indices.shape else []), value.shape[dim])
        return value.load(own)

    return Value(shape, value.dtype, load)


@converter("index.Tensor", "_unsafe_index.Tensor")
def _index(node: fx.Node, ctx: Context) -> Value:
    source: Any = node.args[0]
    given: Any = node.args[1]
    value = ctx.env[source]
    dims = [d for d, tensor in enumerate(given) if tensor is not None]
    tensors = [operand(given[d], torch.int64, ctx) for d in dims]
    rank = max(len(t.shape) for t in tensors)
    adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
    first = dims[0] if adjacent else 0  # torch puts split index dimensions in front

    shape = shape_of(node, ctx)
    tensors = [t.broadcast(shape[first : first + rank]) for t in tensors]

    def load(index: Index) -> Expr:
        at = index[first : first + rank]
        rest = iter([*index[:first], *index[first + rank :]])
        found = {d: within(t.load(at), value.shape[d]) for d, t in zip(dims, tensors, strict=True)}
        return value.load([found[d] if d in found else next(rest) for d in range(len(value.shape))])

    return Value(shape, value.dtype, load)


@converter("scatter.value", "scatter.src", "scatter_add")
def _scatter(node: fx.Node, ctx: Context) -> Value:
    """Each element asks whether it is written to; of several writes the last one counts."""
    shape, dtype = shape_of(node, ctx), dtype_of(node)
    old = operand(node.args[0], dtype, ctx)
    adds = str(node.target).startswith("aten.scatter_add")
    index_node: Any = argument(node, "index")
    given = dims_of(index_node)
    dim = axis(argument(node, "dim"), len(shape))
    indices = operand(index_node, torch.int64, ctx)
    name = "value" if str(node.target).endswith("value") else "src"
    new = operand(argument(node, name), dtype, ctx)
    compute = opmath(dtype)

    def load(index: Index) -> Expr:
        here = index[dim]
        result = convert_expr(old.load(index), dtype, compute)
        for k in range(given[dim]):  # type: ignore[arg-type]
            at = [*index[:dim], i64(k), *index[dim + 1 :]]
            hit = indices.load(at) == here
            value = convert_expr(new.load(at if new.shape else []), dtype, compute)
            result = tir.Select(hit, result + value if adds else value, result)
        return convert_expr(result, compute, dtype)

    return Value(shape, dtype, load)


@converter("plait.take.default")
def _take(node: fx.Node, ctx: Context) -> Value:
    cells = ctx.env[node.args[0]]
    order = operand(node.args[1], torch.int64, ctx)
    share = argument(node, "share")

    def load(index: Index) -> Expr:
        cell = bind(tir.truncdiv(order.load(index[:1]), i64(share)))
        return cells.load([cell, *index[1:]])

    return Value(shape_of(node, ctx), cells.dtype, load)


@converter("plait.combine.default")
def _combine(node: fx.Node, ctx: Context) -> Value:
    dtype, share = dtype_of(node), argument(node, "share")
    rows = ctx.env[argument(node, "rows")]
    place = operand(argument(node, "place"), torch.int64, ctx)
    offsets_node: Any = argument(node, "offsets")
    offsets, last = ctx.env[offsets_node], dims_of(offsets_node)[0] - 1
    weight_node = argument(node, "weight")
    weight = None if weight_node is None else operand(weight_node, dtype, ctx)
    compute = opmath(dtype)

    def load(index: Index) -> Expr:
        total: Expr | None = None
        end = bind(offsets.load([i64(last)]))
        for slot in range(share):
            row = bind(place.load([index[0] * share + slot]))
            value = convert_expr(rows.load([row, *index[1:]]), dtype, compute)
            if weight is not None:
                at = [index[0], i64(slot)][: len(weight.shape)]
                value = value * convert_expr(weight.load(at), dtype, compute)
            value = tir.Select(row < end, value, tir.Cast(expr_dtype(value), i64(0)))
            total = value if total is None else total + value
        return convert_expr(total, compute, dtype)

    return Value(shape_of(node, ctx), dtype, load)
