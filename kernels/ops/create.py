"""Converters of operators that make tensors from scalars, and of copies and casts."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir

from ..emit import Expr, compute_dtype
from ..value import Context, Value
from . import converter
from .common import (
    cast,
    convert_expr,
    dim_of,
    dtype_of,
    number,
    operand,
    opmath,
    scalar,
    shape_of,
)
from .scope import opaque
from .table import argument


def constant(node: fx.Node, ctx: Context, value: Any) -> Value:
    """A tensor of the node's shape filled with a scalar."""
    dtype = dtype_of(node)
    return Value(shape_of(node, ctx), dtype, lambda _: scalar(value, dtype, ctx))


@converter("full", "full_like", "new_full")
def _full(node: fx.Node, ctx: Context) -> Value:
    return constant(node, ctx, argument(node, "fill_value"))


@converter("fill.Scalar", "fill.Tensor")
def _fill(node: fx.Node, ctx: Context) -> Value:
    dtype, shape = dtype_of(node), shape_of(node, ctx)
    return operand(node.args[1], dtype, ctx).broadcast(shape)


@converter(
    # What is in an "empty" tensor is unspecified; zeros make every run the same.
    *("zeros", "zeros_like", "new_zeros", "empty.memory_format", "empty_like", "new_empty")
)
def _zeros(node: fx.Node, ctx: Context) -> Value:
    return constant(node, ctx, 0)


@converter("ones", "ones_like", "new_ones")
def _ones(node: fx.Node, ctx: Context) -> Value:
    return constant(node, ctx, 1)


@converter("scalar_tensor")
def _scalar_tensor(node: fx.Node, ctx: Context) -> Value:
    return constant(node, ctx, node.args[0])


@converter("arange", "arange.start", "arange.start_step")
def _arange(node: fx.Node, ctx: Context) -> Value:
    dtype = dtype_of(node)
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    wide = torch.float64 if dtype.is_floating_point else torch.int64

    def load(index):
        position = convert_expr(index[0], torch.int64, wide)
        value = scalar(start, wide, ctx) + position * scalar(step, wide, ctx)
        return convert_expr(value, wide, dtype)

    return Value(shape_of(node, ctx), dtype, load)


@converter("linspace")
def _linspace(node: fx.Node, ctx: Context) -> Value:
    dtype, steps = dtype_of(node), dim_of(number(argument(node, "steps")))
    wide = torch.float64
    start, end = number(node.args[0]), number(node.args[1])
    assert isinstance(steps, int)
    step = (end - start) / max(steps - 1, 1)

    def load(index):
        position = tir.Cast("float64", index[0])
        up = opaque(scalar(start, wide, ctx)) + position * scalar(step, wide, ctx)
        down = opaque(scalar(end, wide, ctx)) - (scalar(steps - 1, wide, ctx) - position) * scalar(
            step, wide, ctx
        )
        half = tir.IntImm("int64", max(steps // 2, 1))
        return convert_expr(tir.Select(index[0] < half, up, down), wide, dtype)

    return Value(shape_of(node, ctx), dtype, load)


@converter("eye")
def _eye(node: fx.Node, ctx: Context) -> Value:
    dtype = dtype_of(node)

    def load(index):
        return convert_expr(index[0] == index[1], torch.bool, dtype)

    return Value(shape_of(node, ctx), dtype, load)


@converter("one_hot")
def _one_hot(node: fx.Node, ctx: Context) -> Value:
    labels = operand(node.args[0], torch.int64, ctx)

    def load(index):
        return tir.Cast("int64", labels.load(index[:-1]) == index[-1])

    return Value(shape_of(node, ctx), torch.int64, load)


@converter(
    *("_to_copy", "to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as", "clone"),
    *("contiguous", "alias", "detach", "detach_", "lift", "lift_fresh", "lift_fresh_copy"),
    *("conj", "resolve_conj", "resolve_neg"),
    *("dropout", "feature_dropout", "alpha_dropout"),
)
def _copy(node: fx.Node, ctx: Context) -> Value:
    return cast(ctx.env[node.args[0]], dtype_of(node))


@converter("copy")
def _overwritten(node: fx.Node, ctx: Context) -> Value:
    source = operand(node.args[1], dtype_of(node), ctx)
    return source.broadcast(shape_of(node, ctx))


@converter("view.dtype")
def _bitcast(node: fx.Node, ctx: Context) -> Value:
    value, dtype = ctx.env[node.args[0]], dtype_of(node)

    def load(index) -> Expr:
        bits = convert_expr(value.load(index), value.dtype, opmath_int(value.dtype))
        return convert_expr(
            tir.reinterpret(compute_dtype(opmath_int(dtype)), bits), opmath_int(dtype), dtype
        )

    return Value(value.shape, dtype, load)


def opmath_int(dtype: torch.dtype) -> torch.dtype:
    """int8 for bool (the type of its byte), any other dtype itself."""
    return opmath(dtype) if dtype == torch.bool else dtype
