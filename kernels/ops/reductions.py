"""Converters of reductions: sums, products, extremes, moments, norms and their positions.

Half types fold in float32, integers and bool in int64. Variances take two passes, the second one
over the deviations from the mean (Chan, Golub and LeVeque, "Algorithms for computing the sample
variance", 1983), so that a large mean costs no digits.
"""

from __future__ import annotations

import math as pymath
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir

from .. import math
from ..abi import Dim
from ..emit import Expr, compute_dtype
from ..value import Context, Value
from . import converter
from .common import cast, convert_expr, dim_of, dtype_of, shape_of
from .rows import add, constant, extreme, fold_dtype, multiply, rows_of
from .scope import opaque
from .table import argument


def reduced_axes(node: fx.Node) -> tuple[int, ...]:
    """The dimensions of its first argument that a reduction folds, ascending."""
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    dims = argument(node, "dim") if "dim" in names else None
    dims = [dims] if isinstance(dims, int) else dims
    if not dims and (dims is None or str(node.target) not in _EMPTY_MEANS_NONE):
        return tuple(range(rank))
    return tuple(sorted({d % rank for d in dims})) if rank else ()


_EMPTY_MEANS_NONE = ("aten.any.dims", "aten.all.dims")


def pointwise(value: Value, dtype: torch.dtype, function: Callable[[Expr], Expr]) -> Value:
    """``function`` of each element of ``value``."""
    return Value(value.shape, dtype, lambda index: function(value.load(index)))


def result(node: fx.Node, ctx: Context, value: Value) -> Value:
    """A folded value as the value of ``node``."""
    dtype, shape = dtype_of(node), shape_of(node, ctx)
    return Value(shape, dtype, lambda _: convert_expr(value.load(()), value.dtype, dtype))


def results(node: fx.Node, ctx: Context, values: Sequence[Value]) -> tuple[Value, ...]:
    """Folded values as the parts of a node with several results."""
    parts = []
    for meta, value in zip(node.meta["val"], values, strict=True):
        shape = tuple(ctx.emitter.dim(dim_of(s)) for s in meta.shape)
        parts.append(_converted(value, shape, meta.dtype))
    return tuple(parts)


def _converted(value: Value, shape: tuple[Expr, ...], dtype: torch.dtype) -> Value:
    return Value(shape, dtype, lambda _: convert_expr(value.load(()), value.dtype, dtype))


def number_of(count: Dim, ctx: Context, dtype: torch.dtype) -> Expr:
    """A count as a float, hidden from TVM, which would refuse to divide by a constant zero."""
    if isinstance(count, int):
        return opaque(constant(count, dtype))
    return tir.Cast(compute_dtype(dtype), ctx.emitter.dim(count))


def mean_of(value: Value, ctx: Context) -> Value:
    """The mean of a row of float32 or float64 elements."""
    rows = rows_of(ctx)
    total = rows.fold(add(value.dtype), value)
    count = number_of(rows.count, ctx, value.dtype)
    return rows.define(value.dtype, lambda: total.load(()) / count)


def squares_about(value: Value, centre: Value, ctx: Context) -> Value:
    """The sum of squared deviations from a row's ``centre``."""

    def square(x: Expr) -> Expr:
        deviation = math.bind(x - centre.load(()))
        return deviation * deviation

    return rows_of(ctx).fold(add(value.dtype), pointwise(value, value.dtype, square))


def folded(node: fx.Node, ctx: Context) -> Value:
    """The operand of a reduction in the type to fold in."""
    source: Any = node.args[0]
    value = ctx.env[source]
    wanted = argument(node, "dtype") if "dtype" in _names(node) else None
    if wanted is not None:
        value = cast(value, wanted)
    return cast(value, fold_dtype(value.dtype))


def _names(node: fx.Node) -> list[str]:
    return [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]


@converter("sum", "sum.dim_IntList")
def _sum(node: fx.Node, ctx: Context) -> Value:
    value = folded(node, ctx)
    return result(node, ctx, rows_of(ctx).fold(add(value.dtype), value))


@converter("prod", "prod.dim_int")
def _prod(node: fx.Node, ctx: Context) -> Value:
    value = folded(node, ctx)
    return result(node, ctx, rows_of(ctx).fold(multiply(value.dtype), value))


@converter("mean", "mean.dim")
def _mean(node: fx.Node, ctx: Context) -> Value:
    return result(node, ctx, mean_of(folded(node, ctx), ctx))


def _extreme(largest: bool) -> Callable[[fx.Node, Context], Value]:
    def convert(node: fx.Node, ctx: Context) -> Value:
        value = folded(node, ctx)
        return result(node, ctx, rows_of(ctx).fold(extreme(value.dtype, largest), value))

    return convert


converter("amax", "max")(_extreme(True))
converter("amin", "min")(_extreme(False))


def _extreme_dim(largest: bool) -> Callable[[fx.Node, Context], tuple[Value, ...]]:
    def convert(node: fx.Node, ctx: Context) -> tuple[Value, ...]:
        return results(node, ctx, rows_of(ctx).find(folded(node, ctx), largest))

    return convert


converter("max.dim")(_extreme_dim(True))
converter("min.dim")(_extreme_dim(False))


def _position(largest: bool) -> Callable[[fx.Node, Context], Value]:
    def convert(node: fx.Node, ctx: Context) -> Value:
        return result(node, ctx, rows_of(ctx).find(folded(node, ctx), largest)[1])

    return convert


converter("argmax")(_position(True))
converter("argmin")(_position(False))


def _truth(node: fx.Node, ctx: Context) -> Value:
    """The operand's elements as 0 or 1."""
    source: Any = node.args[0]
    return cast(cast(ctx.env[source], torch.bool), torch.int64)


@converter("any", "any.dim", "any.dims")
def _any(node: fx.Node, ctx: Context) -> Value:
    either = replace(extreme(torch.int64, largest=True), identity=0)  # nothing is False
    return result(node, ctx, rows_of(ctx).fold(either, _truth(node, ctx)))


@converter("all", "all.dim", "all.dims")
def _all(node: fx.Node, ctx: Context) -> Value:
    both = replace(extreme(torch.int64, largest=False), identity=1)  # nothing is True
    return result(node, ctx, rows_of(ctx).fold(both, _truth(node, ctx)))


@converter("count_nonzero", "count_nonzero.dim_IntList")
def _count_nonzero(node: fx.Node, ctx: Context) -> Value:
    return result(node, ctx, rows_of(ctx).fold(add(torch.int64), _truth(node, ctx)))


def _correction(node: fx.Node) -> float:
    if "correction" in _names(node):
        value = argument(node, "correction")
        return 1.0 if value is None else float(value)
    return 1.0 if argument(node, "unbiased") else 0.0


def _moments(node: fx.Node, ctx: Context) -> tuple[Value, Value]:
    """(variance, mean) of the operand's rows."""
    rows, value = rows_of(ctx), folded(node, ctx)
    mean = mean_of(value, ctx)
    squares = squares_about(value, mean, ctx)
    count, correction = rows.count, _correction(node)
    if isinstance(count, int):
        freedom = opaque(constant(max(0.0, count - correction), value.dtype))
    else:
        freedom = number_of(count, ctx, value.dtype) - constant(correction, value.dtype)
        freedom = tir.max(freedom, constant(0, value.dtype))
    return rows.define(value.dtype, lambda: squares.load(()) / freedom), mean


@converter("var.correction", "var.dim")
def _var(node: fx.Node, ctx: Context) -> Value:
    return result(node, ctx, _moments(node, ctx)[0])


@converter("var_mean.correction")
def _var_mean(node: fx.Node, ctx: Context) -> tuple[Value, ...]:
    return results(node, ctx, _moments(node, ctx))


@converter("std.correction", "std.dim")
def _std(node: fx.Node, ctx: Context) -> Value:
    variance = _moments(node, ctx)[0]
    return result(node, ctx, pointwise(variance, variance.dtype, tir.sqrt))


@converter("linalg_vector_norm")
def _vector_norm(node: fx.Node, ctx: Context) -> Value:
    return _norm(node, ctx, float(argument(node, "ord")))


@converter("norm.ScalarOpt_dim")
def _norm_dim(node: fx.Node, ctx: Context) -> Value:
    order = argument(node, "p")
    return _norm(node, ctx, 2.0 if order is None else float(order))


def _norm(node: fx.Node, ctx: Context, order: float) -> Value:
    rows, value = rows_of(ctx), folded(node, ctx)
    dtype = value.dtype
    if pymath.isinf(order):
        size = pointwise(value, dtype, tir.abs)
        return result(node, ctx, rows.fold(extreme(dtype, order > 0), size))
    if order == 0.0:
        one = cast(cast(value, torch.bool), dtype)
        return result(node, ctx, rows.fold(add(dtype), one))
    if order == 1.0:
        return result(node, ctx, rows.fold(add(dtype), pointwise(value, dtype, tir.abs)))
    if order == 2.0:

        def square(x: Expr) -> Expr:
            x = math.bind(x)
            return x * x

        total = rows.fold(add(dtype), pointwise(value, dtype, square))
        return result(node, ctx, pointwise(total, dtype, tir.sqrt))

    def power(x: Expr) -> Expr:
        return math.pow(tir.abs(x), constant(order, dtype))

    total = rows.fold(add(dtype), pointwise(value, dtype, power))
    root = rows.define(dtype, lambda: math.pow(total.load(()), constant(1.0 / order, dtype)))
    return result(node, ctx, root)
