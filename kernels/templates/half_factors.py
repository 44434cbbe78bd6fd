"""Factors of 16 bits in products that sum in float32.

Where the machine multiplies pairs of bfloat16 (``Target.bf16_pairs``), a step of the inner loop is
two elements of the left factor as one word, times a vector of words of the packed right factor, one
a column: twice the work of a float32 multiply-add. A left factor whose words do not lie at even
distances is copied first. Elsewhere, and in float16, the left factor is copied as float32 once a
tile, and the right factor's vectors become float32 as they are read, once for all rows of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Dim
from ..emit import Emitter, Expr, Ref
from ..group import Unsupported
from ..target import Target
from .vectors import bits_of, ramp

_DOT = "plait_dot_bf16_pairs"
_INTRINSIC = "@llvm.x86.avx512bf16.dpbf16ps.512"
_TYPES = "<16 x float>", "<32 x bfloat>"
_LLVM = f"""
declare {_TYPES[0]} {_INTRINSIC}({_TYPES[0]}, {_TYPES[1]}, {_TYPES[1]})
define linkonce_odr <16 x float> @{_DOT}(<16 x float> %sums, <16 x i32> %a, <16 x i32> %b)
    alwaysinline nounwind memory(none) {{
  %left = bitcast <16 x i32> %a to {_TYPES[1]}
  %right = bitcast <16 x i32> %b to {_TYPES[1]}
  %total = call {_TYPES[0]} {_INTRINSIC}({_TYPES[0]} %sums, {_TYPES[1]} %left, {_TYPES[1]} %right)
  ret <16 x float> %total
}}
"""
LANES = 16
"""Columns of one multiplication of pairs."""


def leave_to_tiles(target: Target, dtype: torch.dtype, flops: Dim) -> None:
    """Raises `Unsupported` where the library has AMX and no race can tell who is faster."""
    if target.tiles and dtype == torch.bfloat16 and not isinstance(flops, int):
        raise Unsupported(
            "PLT-HLF-001",
            "the library multiplies bfloat16 by tiles (AMX); with a size that is known only at run"
            " time no race can tell whether a kernel is faster",
            "compile for the sizes that matter as static ones",
        )


def dot(em: Emitter, sums: Expr, a: Expr, b: Expr) -> Expr:
    """``sums + a[0] * b[0] + a[1] * b[1]`` for vectors of words; ``a`` is one word for all lanes.

    TVM types the intrinsic's operands as vectors of integers, which LLVM refuses; so the call is
    written in LLVM's language.
    """
    em.import_llvm(_LLVM)
    return tir.call_pure_extern(f"float32x{LANES}", _DOT, sums, tir.Broadcast(a, LANES), b)


def words(ref: Ref) -> Any:
    """A buffer over a tensor's memory as words of two 16-bit elements."""
    return T.decl_buffer(ref.buffer.shape, "int32", data=ref.buffer.data)


def words_at_even(strides: Sequence[Dim], depth: Dim) -> bool:
    """Whether pairs of steps can be read where they lie: steps are neighbours (the last stride is
    theirs), rows start at even distances, and there is no step without a partner.
    """
    return strides[-1] == 1 and all(even(d) for d in (*strides[:-1], depth))


def even(dim: Dim) -> bool:
    """Whether a size is even for every value of its symbols."""
    if isinstance(dim, int):
        return dim % 2 == 0
    return all(c.is_Integer and c % 2 == 0 for c in dim.as_coefficients_dict().values())


class Wide:
    """A tensor read as float32."""

    def __init__(self, ref: Ref) -> None:
        self.ref = ref
        self.bits = bits_of(ref)

    def element(self, offset: Expr) -> Expr:
        """The element at an offset."""
        return self._read(offset, 1)

    def vector(self, offset: Expr, lanes: int) -> Expr:
        """``lanes`` neighbours from an element on; at least two."""
        return self._read(ramp(offset, lanes), lanes)

    def _read(self, at: Expr, lanes: int) -> Expr:
        if self.bits is None:
            value = self.ref.load_flat(at)
            half = self.ref.arg.dtype == torch.float16
            return tir.Cast(_vector("float32", lanes), value) if half else value
        shift = tir.IntImm("uint32", 16)
        wide = tir.Cast(_vector("uint32", lanes), self.bits[at])
        shift = tir.Broadcast(shift, lanes) if lanes > 1 else shift
        return tir.reinterpret(_vector("float32", lanes), wide << shift)


def _vector(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


class Left:
    """Rows of a left factor, copied for one block of steps.

    ``pairs`` keeps bfloat16 as it is, to be read as words; otherwise rows become float32.
    """

    def __init__(self, em: Emitter, source: Ref, rows: int, depth: int, pairs: bool) -> None:
        self.em, self.pairs = em, pairs
        self.pitch = -(-depth // LANES) * LANES * (2 if pairs else 1)  # elements of a row
        self._copy: Any = em.local(rows * self.pitch, "uint16" if pairs else "float32")
        data = self._copy.data
        self._words = (
            T.decl_buffer((rows * self.pitch // 2,), "int32", data=data) if pairs else None
        )
        self._source = Wide(source)

    def fill(self, starts: Sequence[Expr], stride: Expr, count: Expr) -> None:
        """Copies ``count`` elements of each row; with ``pairs``, a missing partner is zero."""
        for row, start in enumerate(starts):
            base = row * self.pitch

            def put(k: Expr, start: Expr = start, base: int = base) -> None:
                at = start + k * stride
                value = self._source.bits[at] if self.pairs else self._source.element(at)
                T.buffer_store(self._copy, value, [base + k])

            whole = tir.truncdiv(count, LANES)
            with T.serial(whole) as v, T.vectorized(self.em.i64(LANES)) as j:
                put(v * LANES + j)
            with T.serial(whole * LANES, count) as k:
                put(k)
            if self.pairs:
                with T.If(tir.truncmod(count, 2) == 1), T.Then():
                    T.buffer_store(self._copy, tir.IntImm("uint16", 0), [base + count])

    def load(self, row: int, step: Expr) -> Expr:
        """One step of a row: a float32, or a word of two elements."""
        if self._words is not None:
            return self._words[row * (self.pitch // 2) + step]
        return self._copy[row * self.pitch + step]
