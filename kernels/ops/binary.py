"""Converters of two-argument pointwise operators: arithmetic, comparison, logic, bits."""

from __future__ import annotations

import math as pymath
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir

from .. import math
from ..emit import Expr, expr_dtype
from ..value import Context, Value
from . import converter
from .common import Promotion, dtype_of, elementwise, negate, number, opmath, promoted, scalar
from .scope import bind, opaque
from .table import argument
from .unary import is_float, like

Function = Callable[[Expr, Expr], Expr]


def _arithmetic(*names: str, kind: Promotion = Promotion.DEFAULT, picks: bool = False) -> Callable:
    """Registers an operator that computes in its arguments' promoted dtype."""

    def register(function: Function) -> Function:
        @converter(*names)
        def convert(node: fx.Node, ctx: Context) -> Value:
            args = node.args[:2]
            compute = opmath(promoted(args, kind))
            return elementwise(node, ctx, args, function, compute, picks=picks)

        return function

    return register


def _scaled(*names: str) -> Callable:
    """Registers an operator with a factor ``alpha`` for its second argument."""

    def register(function: Function) -> Function:
        @converter(*names)
        def convert(node: fx.Node, ctx: Context) -> Value:
            alpha = number(argument(node, "alpha", 1))
            compute = opmath(promoted(node.args[:2]))
            if dtype_of(node) == torch.bool:
                alpha = int(bool(alpha))

            def scaled(a: Expr, b: Expr) -> Expr:
                if isinstance(alpha, (int, float)) and alpha == 1:
                    return function(a, b)
                return function(a, b * scalar(alpha, compute, ctx))

            return elementwise(node, ctx, node.args[:2], scaled, compute)

        return function

    return register


@_scaled("add.Tensor", "add.Scalar")
def _add(a: Expr, b: Expr) -> Expr:
    return a + b


@_scaled("sub.Tensor", "sub.Scalar")
def _sub(a: Expr, b: Expr) -> Expr:
    return (opaque(a) if is_float(a) else a) - b


@converter("rsub.Tensor", "rsub.Scalar")
def _rsub(node: fx.Node, ctx: Context) -> Value:
    compute = opmath(promoted(node.args[:2]))
    alpha = number(argument(node, "alpha", 1))

    def function(a: Expr, b: Expr) -> Expr:
        return _sub(b, a if alpha == 1 else a * like(a, alpha))

    return elementwise(node, ctx, node.args[:2], function, compute)


_arithmetic("mul.Tensor", "mul.Scalar")(lambda a, b: a * b)
_arithmetic("maximum", picks=True)(lambda a, b: extreme(a, b, above=True))
_arithmetic("minimum", picks=True)(lambda a, b: extreme(a, b, above=False))


def extreme(a: Expr, b: Expr, *, above: bool) -> Expr:
    """torch.maximum or minimum: NaN in either argument wins."""
    a, b = bind(a), bind(b)
    first = a > b if above else a < b
    if is_float(a):
        first = tir.Or(first, math.is_nan(a))
    return tir.Select(first, a, b)


def _extreme_number(a: Expr, b: Expr, *, above: bool) -> Expr:
    """torch.fmax or fmin: NaN loses."""
    a, b = bind(a), bind(b)
    first = a >= b if above else a <= b
    if is_float(a):
        first = tir.Or(first, math.is_nan(b))
    return tir.Select(first, a, b)


_arithmetic("fmax", picks=True)(lambda a, b: _extreme_number(a, b, above=True))
_arithmetic("fmin", picks=True)(lambda a, b: _extreme_number(a, b, above=False))


def floor_divide(a: Expr, b: Expr) -> Expr:
    """Division rounded down, as torch does it; integer division by zero gives 0."""
    if not is_float(a):
        return _safely(tir.floordiv, a, b)
    a, b = bind(a), bind(b)
    mod = bind(_fmod(a, b))
    negative = tir.Or(
        tir.And(b < like(b, 0), mod > like(a, 0)), tir.And(b > like(b, 0), mod < like(a, 0))
    )
    quotient = (opaque(a) - mod) / b
    quotient = bind(quotient - tir.Select(negative, like(a, 1.0), like(a, 0.0)))
    floor = bind(tir.floor(quotient))
    rounded = floor + tir.Select(
        opaque(quotient) - floor > like(a, 0.5), like(a, 1.0), like(a, 0.0)
    )
    return tir.Select(b == like(b, 0), a / b, rounded)


def _safely(function: Function, a: Expr, b: Expr) -> Expr:
    """An integer division that cannot trap: dividing by zero gives 0, the least by -1 itself."""
    a, b = bind(a), bind(b)
    zero, one = like(b, 0), like(b, 1)
    divisor = bind(tir.Select(b == zero, one, b))
    if expr_dtype(a)[0] == "u":
        return tir.Select(b == zero, zero, function(a, divisor))
    plain = bind(tir.Select(divisor == like(b, -1), one, divisor))
    result = function(a, plain)
    negated = like(a, 0) - a if function in (tir.floordiv, tir.truncdiv) else zero
    result = tir.Select(b == like(b, -1), negated, result)
    return tir.Select(b == zero, zero, result)


def _fmod(a: Expr, b: Expr) -> Expr:
    """C's fmod: the remainder with the dividend's sign."""
    return math.libm("fmod", a, b)


def remainder(a: Expr, b: Expr) -> Expr:
    """torch.remainder: the remainder with the divisor's sign."""
    if not is_float(a):
        return _safely(tir.floormod, a, b)
    a, b = bind(a), bind(b)
    mod = bind(_fmod(a, b))
    zero = like(a, 0)
    differs = tir.Or(tir.And(mod > zero, b < zero), tir.And(mod < zero, b > zero))
    return tir.Select(differs, mod + b, mod)


_arithmetic("floor_divide", "floor_divide.Scalar")(floor_divide)
_arithmetic("remainder.Tensor", "remainder.Scalar")(remainder)
_arithmetic("fmod.Tensor", "fmod.Scalar")(
    lambda a, b: _fmod(a, b) if is_float(a) else _safely(tir.truncmod, a, b)
)
_arithmetic("div.Tensor", "div.Scalar", "true_divide.Tensor", kind=Promotion.INT_TO_FLOAT)(
    lambda a, b: a / b
)


@converter("div.Tensor_mode", "div.Scalar_mode")
def _div_mode(node: fx.Node, ctx: Context) -> Value:
    mode = argument(node, "rounding_mode")
    if mode is None:
        compute = opmath(promoted(node.args[:2], Promotion.INT_TO_FLOAT))
        return elementwise(node, ctx, node.args[:2], lambda a, b: a / b, compute)

    def truncated(a: Expr, b: Expr) -> Expr:
        return tir.trunc(a / b) if is_float(a) else _safely(tir.truncdiv, a, b)

    function = floor_divide if mode == "floor" else truncated
    return elementwise(node, ctx, node.args[:2], function, opmath(promoted(node.args[:2])))


def _integer_power(x: Expr, exponent: int) -> Expr:
    """x^exponent for an int exponent >= 0 by repeated squaring."""
    result: Expr | None = None
    base = bind(x)
    while exponent:
        if exponent & 1:
            result = base if result is None else bind(result * base)
        exponent >>= 1
        if exponent:
            base = bind(base * base)
    return like(x, 1) if result is None else result


def power(x: Expr, exponent: Any) -> Expr:
    """x to a Python number, with torch's short cuts."""
    if not is_float(x):
        if exponent >= 0:
            return _integer_power(x, int(exponent))
        x = bind(x)  # only 1 and -1 have integer inverses
        odd = like(x, -1) if int(exponent) % 2 else like(x, 1)
        zero = like(x, 0)
        negative = tir.Select(x == like(x, -1), odd, zero) if expr_dtype(x)[0] != "u" else zero
        return tir.Select(x == like(x, 1), like(x, 1), negative)
    x = bind(x)
    one = like(x, 1.0)
    short = {
        0.0: lambda: one,
        0.5: lambda: tir.sqrt(x),
        1.0: lambda: x,
        2.0: lambda: x * x,
        3.0: lambda: x * x * x,
        -0.5: lambda: one / tir.sqrt(x),
        -1.0: lambda: one / x,
        -2.0: lambda: one / (x * x),
    }.get(float(exponent))
    return short() if short else math.pow(x, like(x, float(exponent)))


@converter("pow.Tensor_Scalar", "float_power.Tensor_Scalar")
def _pow_scalar(node: fx.Node, ctx: Context) -> Value:
    exponent = number(node.args[1])
    compute = opmath(dtype_of(node))
    if not isinstance(exponent, (int, float)):
        return elementwise(node, ctx, node.args[:2], _pow, compute)
    return elementwise(node, ctx, [node.args[0]], lambda x: power(x, exponent), compute)


def _pow(a: Expr, b: Expr) -> Expr:
    if is_float(a):
        return math.pow(a, b)
    raise NotImplementedError("integer powers of integer tensors")


@converter("pow.Tensor_Tensor", "pow.Scalar")
def _pow_tensor(node: fx.Node, ctx: Context) -> Value:
    return elementwise(node, ctx, node.args[:2], _pow, opmath(dtype_of(node)))


_arithmetic("atan2", kind=Promotion.INT_TO_FLOAT)(lambda a, b: math.libm("atan2", a, b))
_arithmetic("hypot")(lambda a, b: math.libm("hypot", a, b))
_arithmetic("copysign.Tensor", "copysign.Scalar", kind=Promotion.INT_TO_FLOAT)(math.copysign)


@_arithmetic("logaddexp")
def _logaddexp(a: Expr, b: Expr) -> Expr:
    a, b = bind(a), bind(b)
    high = bind(tir.Select(a > b, a, b))
    same = tir.And(math.is_inf(a), opaque(a) == b)
    return tir.Select(same, a, high + math.log1p(math.exp(-tir.abs(opaque(a) - b))))


@_arithmetic("xlogy.Tensor", kind=Promotion.INT_TO_FLOAT)
def _xlogy(a: Expr, b: Expr) -> Expr:
    a, b = bind(a), bind(b)
    product = tir.Select(a == like(a, 0), like(a, 0), a * math.log(b))
    return tir.Select(math.is_nan(b), b, product)


def _comparison(name: str, function: Function) -> None:
    @converter(f"{name}.Tensor", f"{name}.Scalar")
    def convert(node: fx.Node, ctx: Context) -> Value:
        compute = opmath(promoted(node.args[:2]))

        def compare(a: Expr, b: Expr) -> Expr:
            return function(opaque(a) if is_float(a) else a, b)

        return elementwise(node, ctx, node.args[:2], compare, compute, torch.bool)


for _name, _function in {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: negate(a == b) if is_float(a) else a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}.items():
    _comparison(_name, _function)


def _logical(name: str, function: Function) -> None:
    @converter(name)
    def convert(node: fx.Node, ctx: Context) -> Value:
        return elementwise(node, ctx, node.args[:2], function, torch.bool)


_logical("logical_and", tir.And)
_logical("logical_or", tir.Or)
_logical("logical_xor", lambda a, b: tir.Cast("int8", a) != tir.Cast("int8", b))


def _bits(name: str, function: Function, *extra: str) -> None:
    _arithmetic(f"{name}.Tensor", f"{name}.Scalar", *extra)(function)


_bits("bitwise_and", lambda a, b: a & b, "__and__.Tensor", "__and__.Scalar")
_bits("bitwise_or", lambda a, b: a | b, "__or__.Tensor", "__or__.Scalar")
_bits("bitwise_xor", lambda a, b: a ^ b, "__xor__.Tensor", "__xor__.Scalar")


def _shift(a: Expr, b: Expr, *, left: bool) -> Expr:
    """A shift by any amount: too far gives 0 (or the sign, to the right), as torch does."""
    dtype = expr_dtype(a)
    width = int("".join(c for c in dtype if c.isdigit()))
    a, b = bind(a), bind(b)
    wild = b >= like(b, width)
    if dtype[0] != "u":
        wild = tir.Or(wild, b < like(b, 0))
    amount = bind(tir.Select(wild, like(b, width - 1), b))
    if left:
        return tir.Select(wild, like(a, 0), a << amount)
    shifted = a >> amount
    return shifted if dtype[0] != "u" else tir.Select(wild, like(a, 0), shifted)


_arithmetic("bitwise_left_shift.Tensor", "bitwise_left_shift.Tensor_Scalar", "__lshift__.Scalar")(
    lambda a, b: _shift(a, b, left=True)
)
_arithmetic("bitwise_right_shift.Tensor", "bitwise_right_shift.Tensor_Scalar", "__rshift__.Scalar")(
    lambda a, b: _shift(a, b, left=False)
)


@converter("isclose")
def _isclose(node: fx.Node, ctx: Context) -> Value:
    rtol, atol = number(argument(node, "rtol")), number(argument(node, "atol"))
    equal_nan = argument(node, "equal_nan")
    compute = opmath(promoted(node.args[:2]))

    def function(a: Expr, b: Expr) -> Expr:
        a, b = bind(a), bind(b)
        close = opaque(a) == b
        if is_float(a):
            distance = tir.abs(opaque(a) - b)
            bound = like(a, atol) + tir.abs(like(a, rtol) * b)
            finite = tir.abs(distance) < like(a, pymath.inf)
            close = tir.Or(close, tir.And(finite, distance <= bound))
            if equal_nan:
                close = tir.Or(close, tir.And(math.is_nan(a), math.is_nan(b)))
        return close

    return elementwise(node, ctx, node.args[:2], function, compute, torch.bool)
