"""Values of a fused group as functions from an index to a scalar expression.

A `Value` knows its logical shape and how to compute one element. Pointwise operators and views
compose such functions, so a chain of them costs no memory; a reduction or an expensive value that
is read more than once is *materialised* by the template that lowers the group. Converters
(`kernels.ops`) turn one FX node into one `Value`; templates evaluate values inside their loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm.tirx as tir

from .abi import Dim
from .emit import Emitter, Expr, Ref, compute_dtype


@dataclass(frozen=True)
class Value:
    """A tensor (or 0-d scalar) during lowering.

    ``shape`` holds int64 TIR expressions or Python ints; ``load(index)`` returns the element at a
    logical index as a TIR expression of ``compute_dtype(dtype)``. It must be pure. ``strides`` are
    those of a tensor that is read as it lies, whatever its index: where dimensions follow each
    other in memory, the last one's may go on into the others.
    """

    shape: tuple[Any, ...]
    dtype: torch.dtype
    load: Callable[[Sequence[Expr]], Expr]
    strides: tuple[Dim, ...] | None = None

    @staticmethod
    def of(ref: Ref) -> Value:
        """The value that reads a tensor argument."""
        return Value(tuple(ref.shape), ref.arg.dtype, ref.load)

    @staticmethod
    def scalar(value: float | int | bool, dtype: torch.dtype) -> Value:
        """A 0-d constant."""
        return Value((), dtype, lambda _: tir.const(value, compute_dtype(dtype)))

    def broadcast(self, shape: Sequence[Any]) -> Value:
        """This value read through numpy's broadcasting rules as ``shape``."""
        pad = len(shape) - len(self.shape)

        def load(index: Sequence[Expr]) -> Expr:
            own = index[pad:]
            return self.load(
                [_zero() if _is_one(d) else i for i, d in zip(own, self.shape, strict=True)]
            )

        return Value(tuple(shape), self.dtype, load)

    def cast(self, dtype: torch.dtype) -> Value:
        """This value converted element by element, with torch's rules."""
        if dtype == self.dtype:
            return self
        return Value(self.shape, dtype, lambda i: cast_expr(self.load(i), self.dtype, dtype))


def cast_expr(value: Expr, source: torch.dtype, dest: torch.dtype) -> Expr:
    """A scalar conversion with torch's meaning (anything non-zero is True)."""
    if source == dest:
        return value
    if dest == torch.bool:
        return value != tir.const(0, compute_dtype(source))
    return tir.Cast(compute_dtype(dest), value)


def _zero() -> Expr:
    return tir.IntImm("int64", 0)


def _is_one(dim: Any) -> bool:
    return (isinstance(dim, int) and dim == 1) or (isinstance(dim, tir.IntImm) and int(dim) == 1)


@dataclass
class Context:
    """What converters may ask for while a group is lowered."""

    emitter: Emitter
    env: dict[Any, Value]
