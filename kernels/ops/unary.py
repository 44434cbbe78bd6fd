"""Converters of one-argument pointwise operators and activations."""

from __future__ import annotations

import functools
import math as pymath
from collections.abc import Callable

import torch
import torch.fx as fx
import tvm.tirx as tir

from .. import math
from ..emit import Expr, expr_dtype
from ..value import Context, Value
from . import converter
from .common import (
    Promotion,
    cast,
    dtype_of,
    elementwise,
    is_exact,
    negate,
    number,
    operand,
    opmath,
    promoted,
    shape_of,
)
from .scope import bind, opaque
from .table import argument

Function = Callable[[Expr], Expr]


def like(x: Expr, value: float) -> Expr:
    """A constant of ``x``'s dtype."""
    dtype = expr_dtype(x)
    return tir.FloatImm(dtype, value) if "float" in dtype else tir.IntImm(dtype, int(value))


def _float_unary(*names: str) -> Callable[[Function], Function]:
    """Registers an operator that computes in floats, integers being promoted to float."""

    def register(function: Function) -> Function:
        @converter(*names)
        def convert(node: fx.Node, ctx: Context) -> Value:
            compute = opmath(promoted([node.args[0]], Promotion.INT_TO_FLOAT))
            return elementwise(node, ctx, [node.args[0]], function, compute)

        return function

    return register


def _same_unary(*names: str, picks: bool = False) -> Callable[[Function], Function]:
    """Registers an operator that keeps its argument's dtype, and its value if it ``picks``."""

    def register(function: Function) -> Function:
        @converter(*names)
        def convert(node: fx.Node, ctx: Context) -> Value:
            arg = node.args[0]
            compute = opmath(ctx.env[arg].dtype)
            return elementwise(node, ctx, [arg], function, compute, picks=picks)

        return function

    return register


def _predicate(*names: str) -> Callable[[Function], Function]:
    """Registers an operator from any dtype to bool."""

    def register(function: Function) -> Function:
        @converter(*names)
        def convert(node: fx.Node, ctx: Context) -> Value:
            arg = node.args[0]
            compute = opmath(ctx.env[arg].dtype)
            return elementwise(node, ctx, [arg], function, compute, torch.bool)

        return function

    return register


def is_float(x: Expr) -> bool:
    """Whether an expression is of a floating-point dtype."""
    return "float" in expr_dtype(x)


for _name, _function in {
    "exp": math.exp,
    "exp2": math.exp2,
    "expm1": math.expm1,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "log1p": math.log1p,
    "tanh": math.tanh,
    "erf": math.erf,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "sigmoid": math.sigmoid,
    "sqrt": tir.sqrt,
}.items():
    _float_unary(_name)(_function)
for _name in ("exp2", "expm1", "log1p", "erf"):
    _float_unary(f"special_{_name}")(getattr(math, _name))
_float_unary("special_expit")(math.sigmoid)
for _name in ("acos", "acosh", "asin", "asinh", "atan", "atanh", "cosh", "sinh", "erfc"):
    _float_unary(_name)(functools.partial(math.libm, _name))


@_float_unary("rsqrt")
def _rsqrt(x: Expr) -> Expr:
    return like(x, 1.0) / tir.sqrt(x)


@_float_unary("reciprocal")
def _reciprocal(x: Expr) -> Expr:
    return like(x, 1.0) / x


@_float_unary("sinc", "special_sinc")
def _sinc(x: Expr) -> Expr:
    x = bind(x)
    angle = bind(x * like(x, pymath.pi))
    return tir.Select(x == like(x, 0.0), like(x, 1.0), math.sin(angle) / angle)


@_float_unary("deg2rad")
def _deg2rad(x: Expr) -> Expr:
    return x * like(x, pymath.pi / 180.0)


@_float_unary("rad2deg")
def _rad2deg(x: Expr) -> Expr:
    return x * like(x, 180.0 / pymath.pi)


@_same_unary("neg", picks=True)
def _neg(x: Expr) -> Expr:
    return -x if is_float(x) else like(x, 0) - x


@_same_unary("positive")
def _positive(x: Expr) -> Expr:
    return x


@_same_unary("abs", picks=True)
def _abs(x: Expr) -> Expr:
    if is_float(x):
        return tir.abs(x)
    if expr_dtype(x).startswith("u"):
        return x
    x = bind(x)
    return tir.Select(x < like(x, 0), like(x, 0) - x, x)


@_same_unary("square")
def _square(x: Expr) -> Expr:
    x = bind(x)
    return x * x


def _rounding(function: Function) -> Function:
    return lambda x: function(x) if is_float(x) else x


_same_unary("ceil")(_rounding(tir.ceil))
_same_unary("floor")(_rounding(tir.floor))
_same_unary("trunc", "fix")(_rounding(tir.trunc))
_same_unary("round")(_rounding(tir.round))


@_same_unary("frac")
def _frac(x: Expr) -> Expr:
    x = bind(x)
    return opaque(x) - tir.trunc(x)


@_same_unary("sign", "sgn")
def _sign(x: Expr) -> Expr:
    x = bind(x)
    zero = like(x, 0)
    below = tir.Select(x < zero, like(x, -1), zero) if expr_dtype(x)[0] != "u" else zero
    return tir.Select(x > zero, like(x, 1), below)


@_same_unary("relu", picks=True)
def _relu(x: Expr) -> Expr:
    x = bind(x)
    return tir.Select(x < like(x, 0), like(x, 0), x)


@_same_unary("relu6", picks=True)
def _relu6(x: Expr) -> Expr:
    return bounded(x, like(x, 0), like(x, 6))


def bounded(x: Expr, low: Expr | None, high: Expr | None) -> Expr:
    """``x`` held within limits as torch does: NaN stays NaN, ``high`` wins over ``low``."""
    x = bind(x)
    if low is not None:
        x = tir.Select(x < low, low, x)
        x = bind(x) if high is not None else x
    return x if high is None else tir.Select(x > high, high, x)


@_same_unary("silu")
def _silu(x: Expr) -> Expr:
    x = bind(x)
    return x / (like(x, 1.0) + math.exp(-x))


@_same_unary("mish")
def _mish(x: Expr) -> Expr:
    x = bind(x)
    return x * math.tanh(math.log1p(math.exp(x)))


@_same_unary("hardsigmoid")
def _hardsigmoid(x: Expr) -> Expr:
    return bounded(x + like(x, 3.0), like(x, 0.0), like(x, 6.0)) / like(x, 6.0)


@_same_unary("hardswish")
def _hardswish(x: Expr) -> Expr:
    x = bind(x)
    return x * bounded(x + like(x, 3.0), like(x, 0.0), like(x, 6.0)) / like(x, 6.0)


def _logsigmoid(x: Expr) -> Expr:
    x = bind(x)
    low = tir.Select(x < like(x, 0.0), x, like(x, 0.0))
    return low - math.log1p(math.exp(-tir.abs(x)))


_same_unary("log_sigmoid")(_logsigmoid)


@converter("selu")
def _selu(node: fx.Node, ctx: Context) -> Value:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return _elu_like(node, ctx, alpha, scale, 1.0)


@converter("elu")
def _elu(node: fx.Node, ctx: Context) -> Value:
    alpha, scale = number(argument(node, "alpha")), number(argument(node, "scale"))
    return _elu_like(node, ctx, alpha, scale, number(argument(node, "input_scale")))


@converter("celu")
def _celu(node: fx.Node, ctx: Context) -> Value:
    alpha = number(argument(node, "alpha"))
    return _elu_like(node, ctx, alpha, 1.0, 1.0 / alpha)


def _elu_like(node: fx.Node, ctx: Context, alpha: float, scale: float, inner: float) -> Value:
    def function(x: Expr) -> Expr:
        x = bind(x)
        negative = math.expm1(x * like(x, inner)) * like(x, alpha * scale)
        return tir.Select(x > like(x, 0.0), x * like(x, scale), negative)

    return elementwise(node, ctx, [node.args[0]], function, opmath(dtype_of(node)))


@converter("gelu")
def _gelu(node: fx.Node, ctx: Context) -> Value:
    how = argument(node, "approximate")
    compute = opmath(dtype_of(node))
    return elementwise(node, ctx, [node.args[0]], lambda x: math.gelu(x, how), compute)


@converter("leaky_relu")
def _leaky_relu(node: fx.Node, ctx: Context) -> Value:
    slope = float(number(argument(node, "negative_slope")))

    def function(x: Expr) -> Expr:
        x = bind(x)
        return tir.Select(x > like(x, 0.0), x, x * opaque(like(x, slope)))

    return elementwise(node, ctx, [node.args[0]], function, opmath(dtype_of(node)))


@converter("hardtanh")
def _hardtanh(node: fx.Node, ctx: Context) -> Value:
    low, high = number(argument(node, "min_val")), number(argument(node, "max_val"))
    compute = opmath(dtype_of(node))
    picks = all(is_exact(limit, torch.bfloat16) for limit in (low, high))

    def function(x: Expr) -> Expr:
        return bounded(x, like(x, low), like(x, high))

    return elementwise(node, ctx, [node.args[0]], function, compute, picks=picks)


@converter("softplus")
def _softplus(node: fx.Node, ctx: Context) -> Value:
    beta, threshold = number(argument(node, "beta")), number(argument(node, "threshold"))

    def function(x: Expr) -> Expr:
        x = bind(x)
        scaled = bind(x * like(x, beta))
        return tir.Select(
            scaled > like(x, threshold), x, math.log1p(math.exp(scaled)) / like(x, beta)
        )

    return elementwise(node, ctx, [node.args[0]], function, opmath(dtype_of(node)))


@converter("softshrink")
def _softshrink(node: fx.Node, ctx: Context) -> Value:
    limit = float(number(argument(node, "lambd")))

    def function(x: Expr) -> Expr:
        x = bind(x)
        above = tir.Select(x > like(x, limit), x - like(x, limit), x * opaque(like(x, 0.0)))
        return tir.Select(x < like(x, -limit), x + like(x, limit), above)

    return elementwise(node, ctx, [node.args[0]], function, opmath(dtype_of(node)))


@converter("hardshrink")
def _hardshrink(node: fx.Node, ctx: Context) -> Value:
    limit = float(number(argument(node, "lambd")))

    def function(x: Expr) -> Expr:
        x = bind(x)
        inside = tir.And(x >= like(x, -limit), x <= like(x, limit))
        return tir.Select(inside, like(x, 0.0), x)

    return elementwise(node, ctx, [node.args[0]], function, opmath(dtype_of(node)))


@converter("threshold")
def _threshold(node: fx.Node, ctx: Context) -> Value:
    limit, other = number(argument(node, "threshold")), number(argument(node, "value"))

    def function(x: Expr) -> Expr:
        x = bind(x)
        return tir.Select(x <= like(x, limit), like(x, other), x)

    return elementwise(node, ctx, [node.args[0]], function, opmath(dtype_of(node)))


@converter("prelu", "_prelu_kernel")
def _prelu(node: fx.Node, ctx: Context) -> Value:
    x, weight = node.args[:2]
    rank = len(shape_of(node, ctx))
    slope = operand(weight, opmath(dtype_of(node)), ctx)
    if len(slope.shape) == 1 and rank > 1 and str(node.target) == "aten.prelu.default":
        channels = slope
        one = [1] * (rank - 2)
        slope = Value((1, *channels.shape, *one), channels.dtype, lambda i: channels.load([i[1]]))
    slope = slope.broadcast(shape_of(node, ctx))
    value = operand(x, slope.dtype, ctx)

    def load(index):
        item = bind(value.load(index))
        return tir.Select(item > like(item, 0.0), item, item * slope.load(index))

    out = Value(shape_of(node, ctx), slope.dtype, load)
    return cast(out, dtype_of(node))


@converter("glu")
def _glu(node: fx.Node, ctx: Context) -> Value:
    compute = opmath(dtype_of(node))
    value = operand(node.args[0], compute, ctx)
    shape = shape_of(node, ctx)
    dim = number(argument(node, "dim")) % len(shape)

    def load(index):
        other = list(index)
        other[dim] = index[dim] + shape[dim]
        return value.load(index) * math.sigmoid(value.load(other))

    out = Value(shape, compute, load)
    return cast(out, dtype_of(node))


@converter("logit")
def _logit(node: fx.Node, ctx: Context) -> Value:
    eps = number(argument(node, "eps"))

    def function(x: Expr) -> Expr:
        if eps is not None:
            x = bounded(x, like(x, eps), like(x, 1.0 - eps))
        x = bind(x)
        return math.log(x / (like(x, 1.0) - x))

    compute = opmath(promoted([node.args[0]], Promotion.INT_TO_FLOAT))
    return elementwise(node, ctx, [node.args[0]], function, compute)


@converter("round.decimals")
def _round_decimals(node: fx.Node, ctx: Context) -> Value:
    decimals = number(argument(node, "decimals"))

    def function(x: Expr) -> Expr:
        if not is_float(x):
            return x
        scale = like(x, 10.0 ** abs(decimals))
        return tir.round(x * scale) / scale if decimals >= 0 else tir.round(x / scale) * scale

    return elementwise(node, ctx, [node.args[0]], function, opmath(dtype_of(node)))


@_predicate("logical_not")
def _logical_not(x: Expr) -> Expr:
    return x == like(x, 0)


@converter("bitwise_not")
def _bitwise_not(node: fx.Node, ctx: Context) -> Value:
    dtype = dtype_of(node)
    function: Function = negate if dtype == torch.bool else _invert
    return elementwise(node, ctx, [node.args[0]], function, dtype)


def _invert(x: Expr) -> Expr:
    ones = -1 if expr_dtype(x)[0] != "u" else 255
    return x ^ tir.IntImm(expr_dtype(x), ones)


def _never(x: Expr) -> Expr:
    return tir.const(False, "bool")


@_predicate("isnan")
def _isnan(x: Expr) -> Expr:
    return math.is_nan(x) if is_float(x) else _never(x)


@_predicate("isinf")
def _isinf(x: Expr) -> Expr:
    return math.is_inf(x) if is_float(x) else _never(x)


@_predicate("isposinf")
def _isposinf(x: Expr) -> Expr:
    return x == like(x, pymath.inf) if is_float(x) else _never(x)


@_predicate("isneginf")
def _isneginf(x: Expr) -> Expr:
    return x == like(x, -pymath.inf) if is_float(x) else _never(x)


@_predicate("isfinite")
def _isfinite(x: Expr) -> Expr:
    return tir.abs(x) < like(x, pymath.inf) if is_float(x) else tir.const(True, "bool")


@_predicate("signbit")
def _signbit(x: Expr) -> Expr:
    dtype = expr_dtype(x)
    if dtype == "float64":
        return tir.reinterpret("int64", x) < tir.IntImm("int64", 0)
    if dtype == "float32":
        return math.bits(x) < tir.IntImm("int32", 0)
    return x < like(x, 0) if dtype[0] != "u" else _never(x)


@converter("nan_to_num")
def _nan_to_num(node: fx.Node, ctx: Context) -> Value:
    dtype = dtype_of(node)
    given = [number(argument(node, name)) for name in ("nan", "posinf", "neginf")]

    def function(x: Expr) -> Expr:
        if not is_float(x):
            return x
        info = torch.finfo(dtype)
        nan, high, low = (
            default if value is None else value
            for value, default in zip(given, (0.0, info.max, info.min), strict=True)
        )
        x = bind(x)
        finite = tir.Select(x == like(x, pymath.inf), like(x, high), x)
        finite = tir.Select(x == like(x, -pymath.inf), like(x, low), finite)
        return tir.Select(math.is_nan(x), like(x, nan), finite)

    return elementwise(node, ctx, [node.args[0]], function, opmath(dtype))
