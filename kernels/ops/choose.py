"""Converters of pointwise operators with three arguments or more: choices, limits, mixtures."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir

from ..emit import Expr
from ..value import Context, Value
from . import converter
from .binary import extreme
from .common import (
    convert_expr,
    dtype_of,
    elementwise,
    number,
    operand,
    opmath,
    packed,
    shape_of,
    unpacked,
)
from .scope import bind, opaque
from .table import argument
from .unary import bounded, like


def _choice(node: fx.Node, ctx: Context, condition: Any, yes: Any, no: Any) -> Value:
    """``yes`` where ``condition`` holds, else ``no``; never mixing dtypes."""
    shape, dtype = shape_of(node, ctx), dtype_of(node)
    test = operand(condition, torch.bool, ctx).broadcast(shape)
    first = packed(operand(yes, dtype, ctx).broadcast(shape))
    second = packed(operand(no, dtype, ctx).broadcast(shape))

    def load(index):
        chosen = tir.Select(test.load(index), first.load(index), second.load(index))
        return unpacked(chosen, dtype)

    return Value(shape, dtype, load)


@converter("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(node: fx.Node, ctx: Context) -> Value:
    return _choice(node, ctx, *node.args[:3])


@converter("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(node: fx.Node, ctx: Context) -> Value:
    x, mask, value = node.args[:3]
    return _choice(node, ctx, mask, value, x)


@converter("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(node: fx.Node, ctx: Context) -> Value:
    low, high = argument(node, "min"), argument(node, "max")
    compute = opmath(dtype_of(node))
    limits = [a for a in (low, high) if a is not None]

    def function(x: Expr, *given: Expr) -> Expr:
        values = list(given)
        least = values.pop(0) if low is not None else None
        return bounded(x, least, values.pop(0) if high is not None else None)

    return elementwise(node, ctx, [node.args[0], *limits], function, compute, picks=True)


@converter("clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor")
def _clamp_tensor(node: fx.Node, ctx: Context) -> Value:
    low, high = argument(node, "min"), argument(node, "max")
    compute = opmath(dtype_of(node))
    limits = [a for a in (low, high) if a is not None]

    def function(x: Expr, *given: Expr) -> Expr:
        values = list(given)
        if low is not None:
            x = extreme(x, values.pop(0), above=True)
        return extreme(x, values.pop(0), above=False) if high is not None else x

    return elementwise(node, ctx, [node.args[0], *limits], function, compute, picks=True)


@converter("lerp.Scalar", "lerp.Tensor")
def _lerp(node: fx.Node, ctx: Context) -> Value:
    def function(start: Expr, end: Expr, weight: Expr) -> Expr:
        start, end, weight = bind(start), bind(end), bind(weight)
        span = bind(opaque(end) - start)
        near = start + weight * span
        far = end - span * (like(weight, 1.0) - weight)
        return tir.Select(tir.abs(weight) < like(weight, 0.5), near, far)

    return elementwise(node, ctx, node.args[:3], function, opmath(dtype_of(node)))


@converter("addcmul")
def _addcmul(node: fx.Node, ctx: Context) -> Value:
    args = [*node.args[:3], argument(node, "value")]
    compute = opmath(dtype_of(node))
    return elementwise(node, ctx, args, lambda x, a, b, s: x + s * a * b, compute)


@converter("addcdiv")
def _addcdiv(node: fx.Node, ctx: Context) -> Value:
    args = [*node.args[:3], argument(node, "value")]
    compute = opmath(dtype_of(node))
    return elementwise(node, ctx, args, lambda x, a, b, s: x + s * a / b, compute)


@converter("batch_norm")
def _batch_norm(node: fx.Node, ctx: Context) -> Value:
    return _normalized(node, ctx, dtype_of(node), shape_of(node, ctx))


@converter("native_batch_norm", "_native_batch_norm_legit_no_training")
def _native_batch_norm(node: fx.Node, ctx: Context) -> tuple[Value, Value, Value]:
    out = node.meta["val"][0]
    x = ctx.env[node.args[0]]
    # Inference saves no statistics: torch returns two empty tensors.
    empty = Value((0,), torch.float32, lambda _: tir.FloatImm("float32", 0.0))
    return _normalized(node, ctx, out.dtype, x.shape), empty, empty


def _normalized(node: fx.Node, ctx: Context, dtype: torch.dtype, shape: tuple[Any, ...]) -> Value:
    """Batch normalisation by running statistics: x * scale + shift per channel, as torch does."""
    compute = opmath(dtype)
    x = operand(node.args[0], compute, ctx)

    def channel(name: str) -> Value | None:
        arg = argument(node, name)
        return None if arg is None else operand(arg, compute, ctx)

    mean, variance = channel("running_mean"), channel("running_var")
    weight, bias = channel("weight"), channel("bias")
    eps = number(argument(node, "eps", 0.0))
    assert mean is not None and variance is not None

    def load(index):
        c = [index[1]]
        spread = variance.load(c)
        scale = like(spread, 1.0) / tir.sqrt(spread + like(spread, eps))
        scale = bind(scale if weight is None else scale * weight.load(c))
        shift = -(mean.load(c) * scale)
        if bias is not None:
            shift = bias.load(c) + shift
        return convert_expr(x.load(index) * scale + shift, compute, dtype)

    return Value(shape, dtype, load)
