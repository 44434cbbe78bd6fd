"""Rounding float32 to bfloat16: one instruction where the CPU has it, arithmetic on bits elsewhere.

The instruction of AVX512-BF16 takes numbers below the least normal one for zero, which PyTorch does
not, except in sums of products, where it uses this instruction itself. Elsewhere vectors that hold
such a number, hardly any, take the other way.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir

from ..emit import Expr
from .scope import bind, define_operator

FEATURE = "+avx512bf16"
_NAME, _PRODUCTS = "plait_rounded_bf16", "plait_rounded_products_bf16"
_LANES = 16
_WIDEST = 64


def rounded(value: Expr, *, products: bool = False) -> Expr:
    """A float32 as the nearest bfloat16, ties to even; NaN stays NaN.

    Sums of ``products`` below the least normal number may become zero.
    """
    if isinstance(value, tir.FloatImm):
        return tir.reinterpret("bfloat16", _nearest(bind(value)))  # LLVM computes it
    operator = _rounded_products if products else _rounded
    return tir.reinterpret("bfloat16", tir.call_intrin("uint16", operator, bind(value)))


def cut(value: Expr) -> Expr:
    """A float32 that is a bfloat16 already, as one."""
    bits = tir.reinterpret("uint32", value)
    return tir.reinterpret("bfloat16", tir.Cast("uint16", bits >> tir.IntImm("uint32", 16)))


def _lowered(call: Expr, name: str) -> Expr:
    value, lanes = call.args[0], _lanes(call)
    target = tvm.target.Target.current(allow_none=True)
    features = target.attrs.get("mattr", ()) if target is not None else ()
    if FEATURE not in features or lanes % _LANES or lanes > _WIDEST or lanes & (lanes - 1):
        return _nearest(value)
    return tir.call_pure_extern(f"uint16x{lanes}", f"{name}_{lanes}", value)


_rounded = define_operator("plait.rounded", lambda call: _lowered(call, _NAME), pure=True)
_rounded_products = define_operator(
    "plait.rounded_products", lambda call: _lowered(call, _PRODUCTS), pure=True
)


def _nearest(value: Expr) -> Expr:
    """The bits of the bfloat16 nearest to ``value``, which is written out several times."""
    lanes = _lanes(value)

    def same(dtype: str) -> str:
        return f"{dtype}x{lanes}" if lanes > 1 else dtype

    def const(number: int) -> Expr:
        scalar = tir.IntImm("uint32", number)
        return tir.Broadcast(scalar, lanes) if lanes > 1 else scalar

    bits = tir.reinterpret(same("uint32"), value)
    top = bits >> const(16)
    nearest = (bits + const(0x7FFF) + (top & const(1))) >> const(16)
    is_nan = (bits & const(0x7FFFFFFF)) > const(0x7F800000)
    return tir.Cast(same("uint16"), tir.Select(is_nan, top | const(0x40), nearest))


def _lanes(value: Expr) -> int:
    return int(str(value.ty.dtype).partition("x")[2] or 1)


def with_instruction(function: Any) -> Any:
    """``function`` with what calls the instruction: in each module one function must have it."""
    zero, code = tir.IntImm("int32", 0), tvm.ir.StringImm(_LLVM)
    return function.with_body(tir.AttrStmt(zero, "pragma_import_llvm", code, function.body))


def _splat(number: int) -> str:
    return f"splat (i32 {number})"


def _halves(name: str, lanes: int) -> str:
    """The function for a vector that takes several registers."""
    half = lanes // 2
    every = ", ".join(f"i32 {i}" for i in range(lanes))
    low = ", ".join(f"i32 {i}" for i in range(half))
    high = ", ".join(f"i32 {i}" for i in range(half, lanes))
    whole, part, of, to = f"<{lanes} x float>", f"<{half} x float>", f"<{half} x i32>", "i16"
    return f"""
define linkonce_odr <{lanes} x {to}> @{name}_{lanes}({whole} %x)
    alwaysinline nounwind memory(none) {{
  %low = shufflevector {whole} %x, {whole} poison, {of} <{low}>
  %high = shufflevector {whole} %x, {whole} poison, {of} <{high}>
  %first = call <{half} x {to}> @{name}_{half}({part} %low)
  %second = call <{half} x {to}> @{name}_{half}({part} %high)
  %all = shufflevector <{half} x {to}> %first, <{half} x {to}> %second, <{lanes} x i32> <{every}>
  ret <{lanes} x {to}> %all
}}
"""


_LLVM = f"""
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
declare <16 x i1> @llvm.x86.avx512.fpclass.ps.512(<16 x float>, i32 immarg)
define linkonce_odr <16 x i16> @{_NAME}_16(<16 x float> %x) alwaysinline nounwind memory(none) {{
  %few = call <16 x i1> @llvm.x86.avx512.fpclass.ps.512(<16 x float> %x, i32 32)
  %flags = bitcast <16 x i1> %few to i16
  %none = icmp eq i16 %flags, 0
  br i1 %none, label %normal, label %subnormal, !prof !0
normal:
  %short = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %nearest = bitcast <16 x bfloat> %short to <16 x i16>
  ret <16 x i16> %nearest
subnormal:
  %bits = bitcast <16 x float> %x to <16 x i32>
  %top = lshr <16 x i32> %bits, {_splat(16)}
  %odd = and <16 x i32> %top, {_splat(1)}
  %up = add <16 x i32> %bits, {_splat(0x7FFF)}
  %sum = add <16 x i32> %up, %odd
  %even = lshr <16 x i32> %sum, {_splat(16)}
  %nan = fcmp uno <16 x float> %x, zeroinitializer
  %quiet = or <16 x i32> %top, {_splat(0x40)}
  %wide = select <16 x i1> %nan, <16 x i32> %quiet, <16 x i32> %even
  %exact = trunc <16 x i32> %wide to <16 x i16>
  ret <16 x i16> %exact
}}
define linkonce_odr <16 x i16> @{_PRODUCTS}_16(<16 x float> %x)
    alwaysinline nounwind memory(none) {{
  %short = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %nearest = bitcast <16 x bfloat> %short to <16 x i16>
  ret <16 x i16> %nearest
}}
{"".join(_halves(name, lanes) for lanes in (32, 64) for name in (_NAME, _PRODUCTS))}
!0 = !{{!"branch_weights", i32 1000000, i32 1}}
"""
