"""Converters of normalisations: softmax and its kin, layer, RMS, group and instance norm.

All compute in float32 (float64 for float64), whatever the operands' type. Means and variances are
those of `reductions`.
"""

from __future__ import annotations

import math as pymath
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir

from .. import math
from ..emit import Expr
from ..value import Context, Value
from . import converter
from .common import cast, convert_expr, dim_of, dtype_of, is_tensor, opmath
from .reductions import mean_of, number_of, pointwise, result, results, squares_about
from .rows import add, constant, extreme, rows_of
from .table import argument


def softmax_operand(node: fx.Node, ctx: Context) -> Value:
    """The operand of a softmax, converted to its ``dtype`` argument first, as a wide float."""
    source: Any = node.args[0]
    value = ctx.env[source]
    wanted = argument(node, "dtype")
    if wanted is not None:
        value = cast(value, wanted)
    return cast(value, opmath(value.dtype))


def _shifted(value: Value, ctx: Context) -> tuple[Value, Value]:
    """(largest element of the row, exp(x - largest))."""
    rows, dtype = rows_of(ctx), value.dtype
    peak = rows.fold(extreme(dtype, largest=True, propagate_nan=False), value)
    # NaN need not survive in the peak: its own exponential is NaN, and so is the row's sum.
    power = pointwise(value, dtype, lambda x: math.exp(x - peak.load(())))
    return peak, power


@converter("softmax.int", "_softmax")
def _softmax(node: fx.Node, ctx: Context) -> Value:
    return _normalised(node, ctx, safe=False)


@converter("_safe_softmax")
def _safe_softmax(node: fx.Node, ctx: Context) -> Value:
    return _normalised(node, ctx, safe=True)


def _normalised(node: fx.Node, ctx: Context, safe: bool) -> Value:
    """Softmax; rows of minus infinities give zeros if ``safe``, NaN otherwise."""
    rows = rows_of(ctx)
    value = softmax_operand(node, ctx)
    dtype = value.dtype
    peak, power = _shifted(value, ctx)
    power = rows.keep(power)
    total = rows.fold(add(dtype), power)
    scale = rows.define(dtype, lambda: constant(1, dtype) / total.load(()))

    def load(index: Sequence[Expr]) -> Expr:
        x = power.load(index) * scale.load(())
        if safe:
            masked = peak.load(()) == constant(-pymath.inf, dtype)
            x = tir.Select(masked, constant(0, dtype), x)
        return convert_expr(x, dtype, dtype_of(node))

    return Value(value.shape, dtype_of(node), load)


@converter("log_softmax.int", "_log_softmax")
def _log_softmax(node: fx.Node, ctx: Context) -> Value:
    rows = rows_of(ctx)
    value = softmax_operand(node, ctx)
    dtype = value.dtype
    peak, power = _shifted(value, ctx)
    total = rows.fold(add(dtype), power)
    log = rows.define(dtype, lambda: math.log(total.load(())))

    def load(index: Sequence[Expr]) -> Expr:
        x = (value.load(index) - peak.load(())) - log.load(())
        return convert_expr(x, dtype, dtype_of(node))

    return Value(value.shape, dtype_of(node), load)


@converter("logsumexp")
def _logsumexp(node: fx.Node, ctx: Context) -> Value:
    rows = rows_of(ctx)
    source: Any = node.args[0]
    value = cast(cast(ctx.env[source], dtype_of(node)), opmath(dtype_of(node)))
    dtype = value.dtype
    largest = rows.fold(extreme(dtype, largest=True), value)

    def finite() -> Expr:
        x = largest.load(())
        return tir.Select(math.is_inf(x), constant(0, dtype), x)

    peak = rows.define(dtype, finite)
    power = pointwise(value, dtype, lambda x: math.exp(x - peak.load(())))
    total = rows.fold(add(dtype), power)
    log = rows.define(dtype, lambda: math.log(total.load(())) + peak.load(()))
    return result(node, ctx, log)


def _rsqrt(value: Value, count: Expr, eps: float, ctx: Context) -> Value:
    """1 / sqrt(value / count + eps), once per row."""
    dtype = value.dtype

    def compute() -> Expr:
        variance = value.load(()) / count + constant(eps, dtype)
        return constant(1, dtype) / tir.sqrt(variance)

    return rows_of(ctx).define(dtype, compute)


def _standardised(value: Value, eps: float, ctx: Context) -> tuple[Value, Value, Value]:
    """((x - mean) * rstd, mean, rstd)."""
    mean = mean_of(value, ctx)
    squares = squares_about(value, mean, ctx)
    rstd = _rsqrt(squares, number_of(rows_of(ctx).count, ctx, value.dtype), eps, ctx)
    normal = pointwise(value, value.dtype, lambda x: (x - mean.load(())) * rstd.load(()))
    return normal, mean, rstd


def _affine(
    normal: Value,
    dtype: torch.dtype,
    weight: Any,
    bias: Any,
    where: Callable[[Sequence[Expr]], Sequence[Expr]],
    ctx: Context,
) -> Value:
    """``normal * weight + bias`` as ``dtype``; ``where`` maps an index to the parameters' one."""
    scale = cast(ctx.env[weight], normal.dtype) if is_tensor(weight) else None
    shift = cast(ctx.env[bias], normal.dtype) if is_tensor(bias) else None

    def load(index: Sequence[Expr]) -> Expr:
        x = normal.load(index)
        x = x * scale.load(where(index)) if scale else x
        x = x + shift.load(where(index)) if shift else x
        return convert_expr(x, normal.dtype, dtype)

    return Value(normal.shape, dtype, load)


def _wide(node: fx.Node, ctx: Context) -> Value:
    """The operand of a norm as float32 or float64."""
    source: Any = node.args[0]
    return cast(ctx.env[source], opmath(ctx.env[source].dtype))


def _eps(node: fx.Node, dtype: torch.dtype) -> float:
    """The ``eps`` argument; RMS norm's default is the machine epsilon of its operand."""
    eps = argument(node, "eps")
    return torch.finfo(dtype).eps if eps is None else float(eps)


def _trailing(node: fx.Node) -> Callable[[Sequence[Expr]], Sequence[Expr]]:
    """From an index to the index of the parameters of a norm over trailing dimensions."""
    k = len(argument(node, "normalized_shape"))
    return lambda index: list(index)[len(index) - k :]


@converter("layer_norm", "native_layer_norm")
def _layer_norm(node: fx.Node, ctx: Context) -> Any:
    normal, mean, rstd = _standardised(_wide(node, ctx), _eps(node, torch.float32), ctx)
    weight, bias = argument(node, "weight"), argument(node, "bias")
    several = isinstance(node.meta["val"], (tuple, list))
    out = node.meta["val"][0] if several else node.meta["val"]
    value = _affine(normal, out.dtype, weight, bias, _trailing(node), ctx)
    if not several:
        return value
    _, *statistics = results(node, ctx, [value, mean, rstd])
    return (value, *statistics)


@converter("rms_norm", "_fused_rms_norm")
def _rms_norm(node: fx.Node, ctx: Context) -> Any:
    source: Any = node.args[0]
    value = _wide(node, ctx)

    def square(x: Expr) -> Expr:
        x = math.bind(x)
        return x * x

    squares = rows_of(ctx).fold(add(value.dtype), pointwise(value, value.dtype, square))
    count = number_of(rows_of(ctx).count, ctx, value.dtype)
    rstd = _rsqrt(squares, count, _eps(node, source.meta["val"].dtype), ctx)
    normal = pointwise(value, value.dtype, lambda x: x * rstd.load(()))
    several = isinstance(node.meta["val"], (tuple, list))
    out = node.meta["val"][0] if several else node.meta["val"]
    weight = argument(node, "weight")
    value = _affine(normal, out.dtype, weight, None, _trailing(node), ctx)
    return (value, results(node, ctx, [value, rstd])[1]) if several else value


@converter("group_norm", "native_group_norm", "instance_norm")
def _group_norm(node: fx.Node, ctx: Context) -> Any:
    normal, mean, rstd = _standardised(_wide(node, ctx), _eps(node, torch.float32), ctx)
    weight, bias = argument(node, "weight"), argument(node, "bias")
    several = isinstance(node.meta["val"], (tuple, list))
    out = node.meta["val"][0] if several else node.meta["val"]
    value = _affine(normal, out.dtype, weight, bias, lambda index: [index[1]], ctx)
    if not several:
        return value
    _, *statistics = results(node, ctx, [value, mean, rstd])
    return (value, *statistics)


def groups_of(node: fx.Node) -> int | None:
    """Groups of channels that a node normalises apart; None if it does not group channels."""
    name = str(node.target)
    if name == "aten.group_norm.default":
        return int(argument(node, "num_groups"))
    if name == "aten.native_group_norm.default":
        return int(argument(node, "group"))
    if name == "aten.instance_norm.default":
        source: Any = node.args[0]
        return int(dim_of(source.meta["val"].shape[1]))
    return None
