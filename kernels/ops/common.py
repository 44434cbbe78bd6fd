"""What converters share: shapes, operands, conversion between dtypes, the elementwise pattern."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes

from ..abi import Dim
from ..emit import Expr, compute_dtype, plain
from ..group import HALF
from ..value import Context, Value
from .rounding import cut, rounded
from .scope import opaque

Promotion = ELEMENTWISE_TYPE_PROMOTION_KIND


def i64(value: int) -> Expr:
    """An int64 constant."""
    return tir.IntImm("int64", value)


def dim_of(size: Any) -> Dim:
    """A size from ``meta["val"]`` as an int, or a sympy expression when it is symbolic."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_Integer else expr


def dims_of(node: fx.Node) -> tuple[Dim, ...]:
    """The shape of a tensor-valued node."""
    return tuple(dim_of(s) for s in node.meta["val"].shape)


def shape_of(node: fx.Node, ctx: Context) -> tuple[Expr, ...]:
    """The shape of a tensor-valued node as int64 expressions."""
    return tuple(ctx.emitter.dim(d) for d in dims_of(node))


def dtype_of(node: fx.Node) -> torch.dtype:
    """The element type of a tensor-valued node."""
    return node.meta["val"].dtype


def is_tensor(arg: Any) -> bool:
    """Whether an argument is a tensor-valued node."""
    return isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), torch.Tensor)


def number(arg: Any) -> Any:
    """A scalar argument: a Python number, or the SymInt, SymFloat or SymBool of its node."""
    return arg.meta["val"] if isinstance(arg, fx.Node) else arg


def size(arg: Any) -> Dim:
    """An integer argument as an int or sympy expression."""
    return dim_of(number(arg))


def axis(dim: int, rank: int) -> int:
    """A possibly negative dimension number, wrapped."""
    return dim % rank if rank else 0


def scalar(arg: Any, dtype: torch.dtype, ctx: Context) -> Expr:
    """A scalar argument as an expression of ``compute_dtype(dtype)``.

    A float zero is hidden from TVM, which would take ``x * 0`` for 0 whatever ``x`` is.
    """
    value = number(arg)
    if isinstance(value, torch.SymInt):
        return convert_expr(ctx.emitter.dim(dim_of(value)), torch.int64, dtype)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        raise NotImplementedError(f"scalar {value} known only at run time")
    if dtype == torch.bfloat16:  # TVM's lowering of this type trips over its constants
        return rounded(tir.FloatImm("float32", float(value)))
    if dtype.is_floating_point:
        const = tir.FloatImm(compute_dtype(dtype), float(value))
        return opaque(const) if float(value) == 0.0 else const
    if dtype == torch.bool:
        return tir.const(bool(value), "bool")
    return tir.IntImm(compute_dtype(dtype), wrap_int(int(value), dtype))


def wrap_int(value: int, dtype: torch.dtype) -> int:
    """``value`` modulo the range of an integer dtype."""
    info = torch.iinfo(dtype)
    return (value - info.min) % (1 << info.bits) + info.min


def convert_expr(value: Expr, source: torch.dtype, dest: torch.dtype) -> Expr:
    """An element converted with torch's meaning; half types go through float32."""
    value = plain(value)
    if source == dest:
        return value
    if source in HALF and dest != torch.float32:
        return convert_expr(convert_expr(value, source, torch.float32), torch.float32, dest)
    if dest == torch.bool:
        zero = tir.const(0, compute_dtype(source))
        if source.is_floating_point:  # NaN is True; TVM's ``!=`` is False for it
            return negate(plain(value == zero))
        return plain(value != zero)
    if dest in HALF and source != torch.float32:
        return convert_expr(convert_expr(value, source, torch.float32), torch.float32, dest)
    if source == torch.bfloat16:
        return widened(value)
    if dest == torch.bfloat16:
        return rounded(value)
    if source.is_floating_point and dest in (torch.uint8, torch.int8, torch.int16):
        value = tir.Cast("int64", value)  # wraps as torch does, for what fits 64 bits
    return tir.Cast(compute_dtype(dest), value)


def widened(value: Expr) -> Expr:
    """A bfloat16 as float32. (TVM's own cast becomes one of integers where a name is bound.)"""
    bits = tir.Cast("uint32", tir.reinterpret("uint16", value))
    return tir.reinterpret("float32", bits << tir.IntImm("uint32", 16))


def convert_products(value: Expr, dest: torch.dtype) -> Expr:
    """A sum of products in float32, converted."""
    if dest == torch.bfloat16:
        return rounded(value, products=True)
    return convert_expr(value, torch.float32, dest)


def packed(value: Value) -> Value:
    """A value in the dtype that may be chosen between: bool as int8, bfloat16 as its bits.

    TVM's vectoriser and its lowering of bfloat16 fail on a choice between such elements themselves.
    """
    if value.dtype == torch.bool:
        return cast(value, torch.int8)
    if value.dtype != torch.bfloat16:
        return value
    return Value(value.shape, torch.int16, lambda i: tir.reinterpret("int16", value.load(i)))


def unpacked(expr: Expr, dtype: torch.dtype) -> Expr:
    """An element of ``dtype`` from what `packed` made of it."""
    if dtype == torch.bool:
        return convert_expr(expr, torch.int8, dtype)
    return tir.reinterpret("bfloat16", expr) if dtype == torch.bfloat16 else expr


def cast(value: Value, dtype: torch.dtype) -> Value:
    """`Value.cast` for every pair of dtypes that kernels handle."""
    if value.dtype == dtype != torch.bool:
        return value
    return Value(value.shape, dtype, lambda i: convert_expr(value.load(i), value.dtype, dtype))


def operand(arg: Any, dtype: torch.dtype, ctx: Context) -> Value:
    """A tensor or scalar argument as a value of ``dtype``."""
    if is_tensor(arg):
        return cast(ctx.env[arg], dtype)
    return Value((), dtype, lambda _: scalar(arg, dtype, ctx))


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The type torch computes in: float32 for half types; here int8 for bool."""
    if dtype == torch.bool:
        return torch.int8
    return torch.float32 if dtype in HALF else dtype


def promoted(args: Sequence[Any], kind: Promotion = Promotion.DEFAULT) -> torch.dtype:
    """The dtype torch promotes tensor and scalar arguments to."""
    plain = {torch.SymInt: 1, torch.SymFloat: 1.0, torch.SymBool: True}
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    values = [plain.get(type(v), v) for v in values]
    return elementwise_dtypes(*values, type_promotion_kind=kind)[1]


def elementwise(
    node: fx.Node,
    ctx: Context,
    args: Sequence[Any],
    function: Callable[..., Expr],
    compute: torch.dtype,
    produces: torch.dtype | None = None,
    picks: bool = False,
) -> Value:
    """The value ``function(*args)`` of a node, broadcast to the node's shape.

    Arguments arrive as expressions of dtype ``compute``; the function returns one of dtype
    ``produces`` (``compute`` unless given), which is converted to the node's dtype. A function that
    ``picks`` returns an argument as it is, or with another sign.
    """
    shape, dtype = shape_of(node, ctx), dtype_of(node)
    values = [operand(a, compute, ctx).broadcast(shape) for a in args]
    exact = picks and dtype == torch.bfloat16 and all(is_exact(a, dtype) for a in args)

    def load(index: Sequence[Expr]) -> Expr:
        result = function(*(v.load(index) for v in values))
        if exact:
            return cut(result)
        return convert_expr(result, produces or compute, dtype)

    return Value(shape, dtype, load)


def is_exact(arg: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor or scalar argument needs no rounding to ``dtype``."""
    if is_tensor(arg):
        return dtype_of(arg) == dtype
    value = number(arg)
    if not isinstance(value, (int, float)):
        return False
    return float(torch.tensor(float(value), dtype=dtype)) == value


def negate(condition: Expr) -> Expr:
    """``not condition``.

    (TVM would turn ``not a < b`` into ``b <= a``; and its ``a != b`` is false for NaN.)
    """
    return plain((tir.Cast("int32", condition) ^ tir.IntImm("int32", 1)) != tir.IntImm("int32", 0))


def linear(index: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """The row-major position of an index."""
    total: Expr = i64(0)
    for i, extent in zip(index, shape, strict=True):
        total = total * extent + i
    return total


def unravel(position: Expr, shape: Sequence[Expr], shift: int = 0) -> list[Expr]:
    """The index of the row-major position ``position + shift``.

    A constant apart from the rest is divided here: TVM sees that quotients and remainders add up to
    the position only where no constant in them is as large as what they are divided by.
    """
    index: list[Expr] = []
    for extent in reversed(shape[1:]):
        shift, part = divmod(shift, int(extent)) if isinstance(extent, tir.IntImm) else (0, shift)
        position = position + part if part else position
        index.append(tir.floormod(position, extent))
        position = tir.floordiv(position, extent)
    return [position + shift if shift else position, *reversed(index)] if shape else []
