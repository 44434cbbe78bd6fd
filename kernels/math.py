"""Elementary functions as vectorisable TIR expressions.

TVM lowers ``exp`` and its kin to one libm call per element. The functions here are polynomials and
bit operations on float32 that stay vector code inside ``T.vectorized``: no branches, and right for
infinities, NaN, overflow and denormals. Errors are at most about two units in the last place
(``tests/kernels/test_math.py`` sweeps them). float16 and bfloat16 compute in float32; float64, and
what is rarely needed, calls libm.

Polynomials: exp, log, sin, cos from Cephes (S. Moshier); erf from N. Juffa's erff. Range reduction
by Cody and Waite, rounding by adding and subtracting 1.5 * 2^(mantissa bits).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import tvm.tirx as tir

from .emit import Expr, expr_dtype
from .ops.scope import bind, define_operator, opaque

INF = float("inf")
_SIGN = -(1 << 31)


def f32(value: float) -> Expr:
    """A float32 constant."""
    return tir.FloatImm("float32", value)


def f64(value: float) -> Expr:
    """A float64 constant."""
    return tir.FloatImm("float64", value)


def i32(value: int) -> Expr:
    """An int32 constant."""
    return tir.IntImm("int32", value)


def horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """A polynomial in ``x``, highest power first, in ``x``'s dtype."""
    dtype = expr_dtype(x)
    total: Expr = tir.FloatImm(dtype, coefficients[0])
    for c in coefficients[1:]:
        total = total * x + tir.FloatImm(dtype, c)
    return total


def bits(x: Expr) -> Expr:
    """A float32's bits as int32."""
    return tir.reinterpret("int32", x)


def from_bits(x: Expr) -> Expr:
    """The float32 with the given int32 bits."""
    return tir.reinterpret("float32", x)


def is_nan(x: Expr) -> Expr:
    """Whether a float is NaN. (``x != x`` would be simplified to False.)"""
    if expr_dtype(x) == "float64":
        magnitude = tir.reinterpret("int64", x) & tir.IntImm("int64", (1 << 63) - 1)
        return magnitude > tir.IntImm("int64", 0x7FF0000000000000)
    return (bits(tir.Cast("float32", x)) & i32(0x7FFFFFFF)) > i32(0x7F800000)


def is_inf(x: Expr) -> Expr:
    """Whether a float is +inf or -inf."""
    return absolute(x) == tir.FloatImm(expr_dtype(x), INF)


def absolute(x: Expr) -> Expr:
    """|x| of a float."""
    return tir.abs(x)


def copysign(magnitude: Expr, sign: Expr) -> Expr:
    """``magnitude`` (float32 or float64) with the sign bit of ``sign`` (the same dtype)."""
    if expr_dtype(magnitude) == "float64":
        low = tir.IntImm("int64", (1 << 63) - 1)
        top = tir.reinterpret("int64", sign) & tir.IntImm("int64", -(1 << 63))
        return tir.reinterpret("float64", (tir.reinterpret("int64", magnitude) & low) | top)
    return from_bits((bits(magnitude) & i32(0x7FFFFFFF)) | (bits(sign) & i32(_SIGN)))


def clamp(x: Expr, low: float, high: float) -> Expr:
    """``x`` within [low, high]; NaN stays NaN. ``x`` is to be cheap (bound)."""
    dtype = expr_dtype(x)
    lo, hi = tir.FloatImm(dtype, low), tir.FloatImm(dtype, high)
    capped = tir.Select(x > hi, hi, x)
    return bind(tir.Select(x < lo, lo, capped))


def libm(name: str, *args: Expr) -> Expr:
    """A call of the C library's function for the arguments' dtype (float32 or float64)."""
    dtype = expr_dtype(args[0])
    operator = _libm_operator(name if dtype == "float64" else name + "f")
    return tir.call_intrin(dtype, operator, *(bind(a) for a in args))


@functools.cache
def _libm_operator(symbol: str) -> object:
    """An operator that calls a C function once per lane."""

    def lower(call: Expr) -> Expr:
        dtype = expr_dtype(call)
        lanes = int((str(call.ty.dtype).split("x") + ["1"])[1])
        if lanes == 1:
            return tir.call_pure_extern(dtype, symbol, *call.args)
        each = [
            tir.call_pure_extern(dtype, symbol, *(tir.Shuffle([a], [i]) for a in call.args))
            for i in range(lanes)
        ]
        return tir.Shuffle(each, list(range(lanes)))

    return define_operator(f"plait.libm.{symbol}", lower, pure=True)


def _elementary(function: Callable[..., Expr]) -> Callable[..., Expr]:
    """Gives a float32 function its other dtypes: half types through float32, float64 by libm.

    Arguments are named first, so the function may use them as often as it likes.
    """

    @functools.wraps(function)
    def wrapped(*args: Expr) -> Expr:
        dtype = expr_dtype(args[0])
        if dtype == "float64":
            return libm(function.__name__, *args)
        if dtype != "float32":
            return tir.Cast(dtype, wrapped(*(tir.Cast("float32", a) for a in args)))
        return function(*(bind(a) for a in args))

    return wrapped


_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LN2_HI, _LN2_LO = 0.693359375, -2.12194440e-4
_LOG2E = 1.4426950408889634
_MAGIC = 12582912.0
_MAGIC_BITS = 0x4B400000


def _power_of_two(n: Expr) -> Expr:
    """2^n as float32 for an int32 -126 <= n <= 127."""
    return from_bits((n + i32(127)) << i32(23))


def _scale(value: Expr, n: Expr) -> Expr:
    """value * 2^n for an int32 -252 <= n <= 254, rounded once (overflow and denormals too)."""
    half = n >> i32(1)
    return value * _power_of_two(half) * _power_of_two(n - half)


def _expm1_reduced(r: Expr) -> Expr:
    """exp(r) - 1 for |r| <= ln(2) / 2."""
    return r * r * horner(r, _EXP) + r


def _split_exp(x: Expr) -> tuple[Expr, Expr]:
    """(r, n) with x = n * ln(2) + r, n int32 and |r| <= ln(2) / 2."""
    shifted = bind(x * f32(_LOG2E) + f32(_MAGIC))
    n = bind(opaque(shifted) - f32(_MAGIC))
    r = bind(x - n * f32(_LN2_HI) - n * f32(_LN2_LO))
    return r, bits(shifted) - i32(_MAGIC_BITS)


@_elementary
def exp(x: Expr) -> Expr:
    """e^x."""
    r, n = _split_exp(clamp(x, -104.0, 89.0))
    return _scale(_expm1_reduced(r) + f32(1.0), n)


@_elementary
def exp2(x: Expr) -> Expr:
    """2^x."""
    x = clamp(x, -151.0, 129.0)
    shifted = bind(x + f32(_MAGIC))
    r = bind((x - (opaque(shifted) - f32(_MAGIC))) * f32(math.log(2.0)))
    return _scale(_expm1_reduced(r) + f32(1.0), bits(shifted) - i32(_MAGIC_BITS))


@_elementary
def expm1(x: Expr) -> Expr:
    """e^x - 1, accurate near zero."""
    r, n = _split_exp(clamp(x, -30.0, 89.0))
    # One power of two less, then doubled: 2^128 would overflow where the result does not.
    half = bind(_power_of_two(n - i32(1)))
    return (half * _expm1_reduced(r) + (half - f32(0.5))) * f32(2.0)


_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SQRT_HALF_BITS = 0x3F3504F3


def _split_log(x: Expr) -> tuple[Expr, Expr, Expr]:
    """(f, y, e) with log(x) = (f + y) + e * log(2) where x > 0 is finite; e is a float32."""
    tiny = x < f32(2.0**-126)
    ix = bits(tir.Select(tiny, x * f32(2.0**23), x)) - i32(_SQRT_HALF_BITS)
    f = bind(from_bits((ix & i32(0x7FFFFF)) + i32(_SQRT_HALF_BITS)) - f32(1.0))
    e = bind(tir.Cast("float32", ix >> i32(23)) + tir.Select(tiny, f32(-23.0), f32(0.0)))
    z = bind(f * f)
    return f, bind(horner(f, _LOG) * (f * z) - f32(0.5) * z), e


def _log_special(x: Expr, finite: Expr) -> Expr:
    """``finite`` where 0 < x < inf, and log's limits elsewhere."""
    special = tir.Select(x == f32(0.0), f32(-INF), tir.Select(x == f32(INF), x, f32(math.nan)))
    return tir.Select(tir.And(x > f32(0.0), x < f32(INF)), finite, special)


@_elementary
def log(x: Expr) -> Expr:
    """Natural logarithm."""
    f, y, e = _split_log(x)
    return _log_special(x, (f + (y + e * f32(_LN2_LO))) + e * f32(_LN2_HI))


@_elementary
def log2(x: Expr) -> Expr:
    """Logarithm to base 2; exact for powers of two."""
    f, y, e = _split_log(x)
    return _log_special(x, (f + y) * f32(_LOG2E) + e)


@_elementary
def log10(x: Expr) -> Expr:
    """Logarithm to base 10."""
    hi, lo = 3.0078125e-1, 2.48745663981195213739e-4
    f, y, e = _split_log(x)
    return _log_special(x, ((f + y) * f32(1.0 / math.log(10.0)) + e * f32(lo)) + e * f32(hi))


@_elementary
def log1p(x: Expr) -> Expr:
    """log(1 + x), accurate near zero: log of the rounded sum, corrected by what rounding lost."""
    u = bind(x + f32(1.0))
    lost = (x - (u - f32(1.0))) / u
    return log(u) + tir.Select(tir.And(u > f32(0.0), u < f32(INF)), lost, f32(0.0))


@_elementary
def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent."""
    e = bind(expm1(tir.abs(x) * f32(-2.0)))
    return copysign(-e / (e + f32(2.0)), x)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x), in ``x``'s dtype."""
    dtype = expr_dtype(x)
    if dtype in ("float16", "bfloat16"):
        return tir.Cast(dtype, sigmoid(tir.Cast("float32", x)))
    one = tir.FloatImm(dtype, 1.0)
    return one / (one + exp(-x))


_ERF_FAR = (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1)
_ERF_NEAR = (
    -5.96761703e-4,
    4.99119423e-3,
    -2.67681349e-2,
    1.12819925e-1,
    -3.76125336e-1,
    1.28379166e-1,
)


@_elementary
def erf(x: Expr) -> Expr:
    """The error function."""
    t = clamp(tir.abs(x), 0.0, 10.0)
    r = horner(t, (-1.72853470e-5, 3.83197126e-4)) * (t * t)
    r = r + horner(t, (-3.88396438e-3, 2.42546219e-2))
    for c in _ERF_FAR:
        r = r * t + f32(c)
    far = copysign(f32(1.0) - exp(r * t - t), x)
    near = horner(bind(x * x), _ERF_NEAR) * x + x
    return tir.Select(t > f32(0.927734375), far, near)


_TAIL = (
    4.64545167e-6,
    -4.3234142e-5,
    2.18984578e-4,
    -4.89977143e-4,
    1.169321e-3,
    8.68824303e-4,
    6.90369702e-3,
    3.11147178e-2,
    1.18312976e-1,
    2.37211497e-1,
    1.18920712,
)
"""Fitted so that 1 / p(a)^4 = erfc(a / sqrt(2)) / 2 for a >= 0, to 2.5e-8 everywhere."""


def gelu(x: Expr, approximate: str = "none") -> Expr:
    """torch's gelu of a float32 or float64 expression; ``approximate`` is "none" or "tanh".

    In float32 the normal distribution comes from a polynomial for its smaller side, in half the
    operations of erf: the error is at most 5e-7, half of torch's (which subtracts from 1).
    """
    const = functools.partial(tir.FloatImm, expr_dtype(x))
    x = bind(x)
    if approximate == "tanh":
        twice = const(math.sqrt(8.0 / math.pi)) * (x + const(0.044715) * x * x * x)
        return x * sigmoid(twice)  # (1 + tanh(y)) / 2 = sigmoid(2 y), without tanh's care near zero
    if expr_dtype(x) != "float32":
        return const(0.5) * x * (const(1.0) + erf(x * const(math.sqrt(0.5))))
    p = bind(horner(bind(tir.abs(x)), _TAIL))
    square = bind(p * p)
    tail = bind(f32(1.0) / (square * square))
    return x * tir.Select(x > f32(0.0), f32(1.0) - tail, tail)


_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_PIO2_HI, _PIO2_LO = 1.5707963267948966, 6.123233995736766e-17
_MAGIC64 = 6755399441055744.0
_TWO_OVER_PI = (0xA2F9836E4E441529, 0xFC2757D1F534DDC0, 0xDB6295993C439041)
"""The first 192 binary digits of 2 / pi."""


def _circle(x: Expr) -> tuple[Expr, Expr, Expr]:
    """(sin r, cos r, q mod 4) with x = q * pi/2 + r and |r| <= pi/4; NaN for NaN and infinities.

    The reduction runs in float64: Cody and Waite's up to 2^28, from there `_far_quarters`.
    """
    wide = bind(tir.Cast("float64", x))
    size = bind(bits(x) & i32(0x7FFFFFFF))
    far = bind(tir.And(size >= i32((127 + 28) << 23), size < i32(0x7F800000)))
    whole = bind(_far_quarters(size))
    turned = bind(tir.Select(x < f32(0.0), -whole, whole))
    shifted = bind(tir.Select(far, turned, wide * f64(2.0 / math.pi)) + f64(_MAGIC64))
    n = bind(shifted - f64(_MAGIC64))
    first = tir.call_llvm_pure_intrin("float64", "llvm.fma", -n, f64(_PIO2_HI), wide)
    rest = tir.Select(far, (turned - n) * f64(_PIO2_HI), first - n * f64(_PIO2_LO))
    r = bind(tir.Cast("float32", rest))
    q = tir.Cast("int32", tir.reinterpret("int64", shifted) & tir.IntImm("int64", 3))
    s = bind(r * r)
    sine = bind(horner(s, _SIN) * s * r + r)
    cosine = bind(horner(s, _COS) * (s * s) - f32(0.5) * s + f32(1.0))
    return sine, cosine, bind(q)


def _far_quarters(size: Expr) -> Expr:
    """x over pi/2 (float64), less a multiple of 4, for the float32 x of at least 2^28 whose bits
    are ``size`` (Payne and Hanek, 1983).

    x is a whole number of 24 bits times 2^e. Of 2/pi those bits that 2^e makes multiples of 4 are
    left out, and the next 64 are taken, so the error is below 2^-38.
    """
    k = bind(tir.Cast("int64", tir.max((size >> i32(23)) - i32(127 + 25), i32(3))))
    low = tir.IntImm("int64", 63)
    later = bind(k > low)
    a, b = (tir.IntImm("int64", w - (w >> 63 << 64)) for w in _TWO_OVER_PI[:2])
    halved_b, halved_c = (tir.IntImm("int64", w >> 1) for w in _TWO_OVER_PI[1:])
    shift = bind(k & low)
    window = bind(
        (tir.Select(later, b, a) << shift)
        | (tir.Select(later, halved_c, halved_b) >> (low - shift))
    )
    word = tir.IntImm("int64", 0xFFFFFFFF)
    m = bind(tir.Cast("int64", (size & i32(0x7FFFFF)) | i32(0x800000)))
    upper = m * ((window >> tir.IntImm("int64", 32)) & word) & word  # more would be multiples of 4
    lower = m * (window & word)
    return tir.Cast("float64", upper) * f64(2.0**-30) + tir.Cast("float64", lower) * f64(2.0**-62)


def _signed(value: Expr, q: Expr) -> Expr:
    """``value``, negated if bit 1 of ``q`` is set."""
    return from_bits(bits(value) ^ ((q & i32(2)) << i32(30)))


@_elementary
def sin(x: Expr) -> Expr:
    """Sine."""
    s, c, q = _circle(x)
    return _signed(tir.Select((q & i32(1)) == i32(0), s, c), q)


@_elementary
def cos(x: Expr) -> Expr:
    """Cosine."""
    s, c, q = _circle(x)
    return _signed(tir.Select((q & i32(1)) == i32(0), c, s), q + i32(1))


@_elementary
def tan(x: Expr) -> Expr:
    """Tangent."""
    s, c, q = _circle(x)
    even = (q & i32(1)) == i32(0)
    return tir.Select(even, s, -c) / tir.Select(even, c, s)


_LOG2_SERIES = tuple(2.0 / math.log(2.0) / (2 * k + 1) for k in range(7, -1, -1))
_EXP2_SERIES = tuple(math.log(2.0) ** k / math.factorial(k) for k in range(9, -1, -1))


def _log2_wide(x: Expr) -> Expr:
    """log2 of a float32 0 < x < inf as float64, relative error about 2^-36."""
    tiny = x < f32(2.0**-126)
    ix = bits(tir.Select(tiny, x * f32(2.0**23), x)) - i32(_SQRT_HALF_BITS)
    e = tir.Cast("float32", ix >> i32(23)) + tir.Select(tiny, f32(-23.0), f32(0.0))
    m = bind(tir.Cast("float64", from_bits((ix & i32(0x7FFFFF)) + i32(_SQRT_HALF_BITS))))
    s = bind((m - f64(1.0)) / (m + f64(1.0)))
    return horner(bind(s * s), _LOG2_SERIES) * s + tir.Cast("float64", e)


def _exp2_wide(t: Expr) -> Expr:
    """2^t of a float64 as float32, rounded once; NaN stays NaN."""
    t = clamp(bind(t), -200.0, 200.0)
    shifted = bind(t + f64(_MAGIC64))
    n = tir.reinterpret("int64", shifted) - tir.IntImm("int64", 0x4338000000000000)
    scale = tir.reinterpret("float64", (n + tir.IntImm("int64", 1023)) << tir.IntImm("int64", 52))
    return tir.Cast("float32", horner(bind(t - (shifted - f64(_MAGIC64))), _EXP2_SERIES) * scale)


@_elementary
def pow(x: Expr, y: Expr) -> Expr:
    """x^y with C99's special cases, computed through float64 logarithms."""
    zero, one, inf = f32(0.0), f32(1.0), f32(INF)
    a = bind(tir.abs(x))
    limits = tir.Select(a == zero, f32(-INF), tir.Select(a == inf, inf, f32(math.nan)))
    logarithm = tir.Select(tir.And(a > zero, a < inf), _log2_wide(a), tir.Cast("float64", limits))
    magnitude = bind(_exp2_wide(logarithm * tir.Cast("float64", y)))
    whole = tir.trunc(y) == y
    odd = tir.And(whole, tir.trunc(y * f32(0.5)) != y * f32(0.5))
    signed = tir.Select(tir.And(odd, bits(x) < i32(0)), -magnitude, magnitude)
    defined = tir.Or(tir.Or(x >= zero, whole), tir.Or(x == f32(-INF), is_nan(x)))
    sure = tir.Or(tir.Or(y == zero, x == one), tir.And(x == f32(-1.0), tir.abs(y) == inf))
    return tir.Select(sure, one, tir.Select(defined, signed, f32(math.nan)))
