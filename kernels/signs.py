"""Divisions of what is known not to be negative, written so that TVM need not ask.

Sizes, positions and loop variables are never negative, which TVM cannot tell of a function's
arguments. It therefore lowers a whole division that rounds down by comparing the signs of quotient,
remainder and divisor, and repeats each operand several times for that. One division within the
other (the number of pieces of a padded length, say) becomes exponentially long, and the simplifier
that its code generator asks about every variable spends minutes on it.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
import tvm_ffi

from .emit import Expr

_ALL = (tir.Add, tir.Mul, tir.Min, tir.FloorDiv, tir.Div)


def divide_plainly() -> Any:
    """A pass: where no operand is negative, ``floordiv`` and ``floormod`` become the processor's
    own division. Integer arguments of a function count as not negative.
    """

    def rewrite(func: Any, module: Any, context: Any) -> Any:
        del module, context
        return _rewritten(func)

    return tvm.tirx.transform.prim_func_pass(rewrite, opt_level=0, name="plait.divide_plainly")


def _rewritten(func: Any) -> Any:
    known = {p for p in func.params if _is_integer(p)}

    def positive(value: Expr) -> bool:
        return _is_positive(value, known)

    def loop(stmt: Any, mutator: Any) -> Any:
        if positive(stmt.min):
            known.add(stmt.loop_var)
        return mutator.default_mutate(stmt)

    def bind(stmt: Any, mutator: Any) -> Any:
        if _is_integer(stmt.var) and positive(stmt.value):
            known.add(stmt.var)
        return mutator.default_mutate(stmt)

    def divide(value: Any, mutator: Any) -> Any:
        if _is_shift(value.b) or not (positive(value.a) and positive(value.b)):
            return mutator.default_mutate(value)
        operation = tir.truncdiv if isinstance(value, tir.FloorDiv) else tir.truncmod
        return operation(mutator.mutate(value.a), mutator.mutate(value.b))

    callbacks = [(tir.For, loop), (tir.Bind, bind), ((tir.FloorDiv, tir.FloorMod), divide)]
    return func.with_body(tvm_ffi.structural_mutate(func.body, callbacks))


def _is_shift(divisor: Expr) -> bool:
    """Whether TVM shifts or masks instead of dividing, whatever the sign."""
    if isinstance(divisor, tir.Broadcast):
        divisor = divisor.value
    return isinstance(divisor, tir.IntImm) and int(divisor).bit_count() == 1 and int(divisor) > 0


def _is_integer(var: Expr) -> bool:
    return str(getattr(var.ty, "dtype", "")) in ("int32", "int64")


def _is_positive(value: Expr, known: set[Expr]) -> bool:
    """Whether ``value`` certainly is not negative, given that ``known`` variables are not."""
    if isinstance(value, tir.IntImm):
        return int(value) >= 0
    if isinstance(value, tir.Var):
        return value in known
    if isinstance(value, _ALL):
        return _is_positive(value.a, known) and _is_positive(value.b, known)
    if isinstance(value, tir.FloorMod):
        return _is_positive(value.b, known)
    if isinstance(value, tir.Max):
        return _is_positive(value.a, known) or _is_positive(value.b, known)
    if isinstance(value, tir.Broadcast):
        return _is_positive(value.value, known)
    if isinstance(value, tir.Ramp):
        return _is_positive(value.base, known) and _is_positive(value.stride, known)
    return False
