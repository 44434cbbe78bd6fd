"""Naming intermediate values, and computing what several nodes read only once per element.

Values compose as functions, so a value with two readers would be written out twice, and a chain of
such values exponentially often. `bind` names an expression by a variable of the innermost open
loop. Inside ``with sharing():`` the first load of a shared value at an index binds it and later
loads at that index reuse the variable. What is computed under a condition (`guarded`) is bound
under it too, never hoisted above it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.fx as fx
import tvm
import tvm.tirx as tir
import tvm_ffi
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx.analysis import undefined_vars
from tvm.tirx.buffer import BufferType
from tvm.tirx.script.builder.frame import ForFrame

from ..emit import Emitter, Expr, expr_dtype, plain
from ..value import Value

_FLOATS = ("float32", "float64")


def define_operator(name: str, lower: Callable[[Expr], Expr], *, pure: bool) -> Any:
    """A TVM operator that vectorises lane by lane and becomes ``lower(call)`` just before LLVM."""
    tvm.ir._ffi_api.RegisterOp(name, "See plait.kernels.ops.scope.")  # type: ignore[attr-defined]
    effect = tir.CallEffectKind.Pure if pure else tir.CallEffectKind.UpdateState
    tvm.ir.register_op_attr(name, "TVectorizable", True)
    tvm.ir.register_op_attr(name, "TScriptPrinterName", name)
    tvm.ir.register_op_attr(name, "TCallEffectKind", int(effect.value))
    tir.register_intrin_lowering(name, "default", f=lower)
    return tvm.ir.Op.get(name)


def _fence(call: Expr) -> Expr:
    return tir.call_llvm_intrin(str(call.ty.dtype), "llvm.arithmetic.fence", call.args[0])


# Returns its argument. TVM's simplifiers copy a pure value back into every use of its variable,
# which makes exponentially much code of a long chain, so this operator claims to have effects, and
# becomes an LLVM intrinsic that claims so too and costs no instruction.
_named = define_operator("plait.named", _fence, pure=False)


def named(value: Expr) -> Expr:
    """A variable for a scalar or a vector of numbers, whose value TVM does not copy into its uses.

    What is computed from one another, such as positions, becomes exponentially long where it is
    copied, and TVM's simplifier, which its code generator asks about every variable too, spends
    seconds to minutes on that. So the value passes through memory on the stack, which LLVM turns
    into a register again.
    """
    emitter = Emitter.active()
    assert emitter is not None
    dtype = value.ty.dtype
    lanes = dtype.lanes
    kept = emitter.scratch(lanes, str(dtype.with_lanes(1)))
    zero = tir.IntImm("int64", 0)
    where = zero if lanes == 1 else tir.Ramp(zero, tir.IntImm("int64", 1), lanes)
    T.buffer_store(kept, value, [where])
    return T.bind(kept[where])


class _Scope:
    """What is bound so far: by statements, or (``lets`` given) by a chain of Let expressions."""

    def __init__(
        self, outer: _Scope | None, lets: list[tuple[Expr, Expr]] | None, same: Sequence[Expr] = ()
    ) -> None:
        self.outer, self.lets, self.same = outer, lets, set(same)
        self.memo: dict[tuple[Any, int], list[tuple[list[Expr], Expr]]] = {}

    def find(self, key: tuple[Any, int], index: list[Expr]) -> Expr | None:
        scope: _Scope | None = self
        while scope is not None:
            for other, value in scope.memo.get(key, ()):
                if all(tvm_ffi.structural_equal(a, b) for a, b in zip(index, other, strict=True)):
                    return value
            scope = scope.outer
        return None

    def is_same(self, value: Expr, emitter: Emitter) -> bool:
        """Whether ``value`` is known to be the same in all lanes.

        Its variables then are those told to be, sizes, and buffers: the index of one that differs
        between lanes mentions the lane.
        """
        return bool(self.same) and all(
            v in self.same or isinstance(v.ty, BufferType) or emitter.is_size(v)
            for v in undefined_vars(value)
        )


_stack: list[_Scope] = []
_conditions: list[list[Expr]] = []


def opaque(value: Expr) -> Expr:
    """``value``, hidden from TVM's simplifier.

    The simplifier applies the algebra of real numbers to floats: ``(x + c) - c`` becomes ``x`` and
    ``x - x`` becomes 0, which is wrong for rounding tricks, infinities and NaN. LLVM sees through
    this and keeps to IEEE 754.
    """
    dtype = expr_dtype(value)
    return tir.reinterpret(dtype, tir.reinterpret(_BITS[dtype], value))


_BITS = {"float32": "int32", "float64": "int64", "float16": "int16", "bfloat16": "int16"}


def bind(value: Expr) -> Expr:
    """A cheap expression equal to ``value``, which is evaluated once, here.

    It is kept in memory on the stack, which LLVM turns into registers: one element per lane of the
    innermost loop, or a single one that is known to be the same in all of them, so that addresses
    computed from it stay those of neighbours. (Variables would do, but TVM's analyzers write their
    values out in full, which takes exponential time in a long chain, and fail on vectors of truth
    values.)
    """
    value = plain(value)
    if _stack and _stack[-1].lets is not None:
        return _bind_below(value, _stack[-1].lets)
    emitter = Emitter.active()
    if emitter is None:
        return _bind_below(value, None)
    lanes, lane = _innermost()
    if lanes > 1 and _stack and _stack[-1].is_same(value, emitter):
        lanes, lane = 1, tir.IntImm("int64", 0)
    dtype = expr_dtype(value)
    if dtype == "bfloat16":  # TVM's lowering fails on temporaries of this type
        buffer = emitter.scratch(lanes, "uint16")
        T.buffer_store(buffer, tir.reinterpret("uint16", value), [lane])
        return tir.reinterpret(dtype, buffer[lane])
    kept = "int8" if dtype == "bool" else dtype
    buffer = emitter.scratch(lanes, kept)
    T.buffer_store(buffer, tir.Cast(kept, value) if dtype == "bool" else value, [lane])
    return plain(buffer[lane] != tir.IntImm("int8", 0)) if dtype == "bool" else buffer[lane]


_MOST_LANES = 64


def _innermost() -> tuple[int, Expr]:
    """The trip count and the variable of the innermost open loop; (1, 0) if it is no short one."""
    frame: Any = IRBuilder.current().frames[-1]
    if isinstance(frame, ForFrame) and len(frame.vars) == 1:
        extent, first = frame.doms[0].extent, frame.doms[0].min
        if isinstance(extent, tir.IntImm) and 1 <= int(extent) <= _MOST_LANES:
            return int(extent), frame.vars[0] - first
    return 1, tir.IntImm("int64", 0)


def _bind_below(value: Expr, lets: list[tuple[Expr, Expr]] | None) -> Expr:
    """Binds as a variable: in ``lets``, or else by a statement.

    TVM's code generator fails on variables that are integer vectors made from comparisons, so all
    is bound as floats of the same bits.
    """
    dtype = expr_dtype(value)
    if dtype in _FLOATS:
        fenced = tir.call_intrin(dtype, _named, value)
        if lets is None:
            return T.bind(fenced)
        var = tir.Var("v", dtype)
        lets.append((var, fenced))
        return var
    if dtype == "bool":
        flags = _bind_below(tir.reinterpret("float32", tir.Cast("int32", value)), lets)
        return plain(tir.reinterpret("int32", flags) != tir.IntImm("int32", 0))
    if dtype in _BITS:
        return tir.reinterpret(dtype, _bind_below(tir.reinterpret("int16", value), lets))
    wide = "64" if dtype.endswith("64") else "32"
    bits = _bind_below(tir.reinterpret(f"float{wide}", _cast(f"int{wide}", value)), lets)
    return _cast(dtype, tir.reinterpret(f"int{wide}", bits))


def _cast(dtype: str, value: Expr) -> Expr:
    return value if expr_dtype(value) == dtype else tir.Cast(dtype, value)


@contextlib.contextmanager
def sharing(same: Sequence[Expr] = ()) -> Iterator[None]:
    """Within it, shared values are bound once per index, in the innermost open loop. Variables
    ``same`` do not differ between its lanes.
    """
    _stack.append(_Scope(None, None, same))
    try:
        yield
    finally:
        _stack.pop()


def guarded(condition: Expr, then: Callable[[], Expr], otherwise: Callable[[], Expr]) -> Expr:
    """``then()`` where ``condition`` holds, else ``otherwise()``; only that one is evaluated.

    A condition that differs between the lanes of a vectorised loop makes TVM's vectoriser emit
    wrong code around `bind`: such a loop must be a serial one (`rehearsal` finds the conditions).
    """
    for seen in _conditions:
        seen.append(condition)
    return tir.if_then_else(condition, _nested(then), _nested(otherwise))


@contextlib.contextmanager
def rehearsal() -> Iterator[tuple[list[Expr], list[tuple[Expr, Expr]]]]:
    """Lets values be loaded only to look at them: nothing is emitted.

    Yields the lists that receive the conditions of `guarded` loads, and what is bound.
    """
    seen: list[Expr] = []
    lets: list[tuple[Expr, Expr]] = []
    _stack.append(_Scope(None, lets))
    _conditions.append(seen)
    try:
        yield seen, lets
    finally:
        _conditions.pop()
        _stack.pop()


def _nested(load: Callable[[], Expr]) -> Expr:
    lets: list[tuple[Expr, Expr]] = []
    _stack.append(_Scope(_stack[-1] if _stack else None, lets))
    try:
        value = load()
    finally:
        _stack.pop()
    for var, bound in reversed(lets):
        value = tir.Let(var, bound, value)
    return value


def share(node: fx.Node, value: Any) -> Any:
    """``value``, bound once per index while `sharing` if ``node`` has several readers."""
    if isinstance(value, (tuple, list)) or len(node.users) < 2:
        return value

    def load(index: Sequence[Expr]) -> Expr:
        if not _stack:
            return value.load(index)
        own = [tir.IntImm("int64", i) if isinstance(i, int) else i for i in index]
        key = (node, hash(tuple(tvm_ffi.structural_hash(i) for i in own)))
        found = _stack[-1].find(key, own)
        if found is None:
            found = bind(value.load(own))
            _stack[-1].memo.setdefault(key, []).append((own, found))
        return found

    return Value(value.shape, value.dtype, load)
