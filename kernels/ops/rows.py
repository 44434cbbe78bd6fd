"""Folding over a row: the vocabulary in which reductions and normalisations are written.

A *row* is the set of elements that one reduction result depends on. A template walks over rows and
gives converters a `Rows`; converters (`reductions`, `norms`) say what to fold, what to keep and
what to compute from folded values, and never see loops. Folded values are rank-0 `Value`s that
belong to the row being computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import tvm.tirx as tir

from ..abi import Dim
from ..emit import Expr, compute_dtype
from ..math import is_nan
from ..value import Context, Value


@dataclass(frozen=True)
class Monoid:
    """An associative way to combine elements of ``dtype``.

    ``identity`` is its neutral element. Elements may be folded more than once if ``idempotent``;
    ``long`` marks sums of floats, which lose digits when they run over many elements at a stretch.
    """

    dtype: torch.dtype
    identity: float | int
    combine: Callable[[Expr, Expr], Expr]
    idempotent: bool = False
    long: bool = False

    def neutral(self) -> Expr:
        """The neutral element as an expression."""
        return constant(self.identity, self.dtype)


class Rows(Protocol):
    """The row being computed, as converters see it.

    Values given to it have the shape of the reduction's operand.
    """

    count: Dim
    """Elements in a row."""

    def fold(self, monoid: Monoid, value: Value) -> Value:
        """All elements of the row combined; ``value`` has the monoid's dtype."""
        ...

    def find(self, value: Value, largest: bool) -> tuple[Value, Value]:
        """The extreme element and its position (int64) in the row; the first of equal ones.

        NaN is more extreme than any number. ``value`` is float32, float64 or int64.
        """
        ...

    def scan(self, monoid: Monoid, value: Value) -> Value:
        """Each element combined with those before it; ``value`` has the monoid's dtype."""
        ...

    def keep(self, value: Value) -> Value:
        """``value``, computed once per element and remembered where there is room for it."""
        ...

    def define(self, dtype: torch.dtype, compute: Callable[[], Expr]) -> Value:
        """``compute()``, evaluated once per row."""
        ...


@dataclass
class RowContext(Context):
    """A `Context` for groups with reductions."""

    rows: Rows


def rows_of(ctx: Context) -> Rows:
    """The rows a template folds over. Raises NotImplementedError in templates that have none."""
    if not isinstance(ctx, RowContext):
        raise NotImplementedError("a reduction in a kernel without rows")
    return ctx.rows


def constant(value: float | int, dtype: torch.dtype) -> Expr:
    """A constant of a float or integer dtype."""
    if dtype.is_floating_point:
        return tir.FloatImm(compute_dtype(dtype), float(value))
    return tir.IntImm(compute_dtype(dtype), int(value))


def fold_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to fold elements of ``dtype`` in: float32 for half types, int64 for integers."""
    if dtype.is_floating_point:
        return torch.float64 if dtype == torch.float64 else torch.float32
    return torch.int64


def add(dtype: torch.dtype) -> Monoid:
    """Sums."""
    return Monoid(dtype, 0, lambda a, b: a + b, long=dtype.is_floating_point)


def multiply(dtype: torch.dtype) -> Monoid:
    """Products."""
    return Monoid(dtype, 1, lambda a, b: a * b)


def extreme(dtype: torch.dtype, largest: bool, propagate_nan: bool = True) -> Monoid:
    """Maxima or minima. NaN wins as in torch; unless asked for, a NaN may also get lost."""
    if dtype.is_floating_point:
        identity: Any = -math.inf if largest else math.inf
    else:
        info = torch.iinfo(dtype)
        identity = info.min if largest else info.max

    def combine(a: Expr, b: Expr) -> Expr:
        result = tir.Select(a > b, a, b) if largest else tir.Select(a < b, a, b)
        if dtype.is_floating_point and propagate_nan:  # a comparison with NaN chose b
            result = tir.Select(is_nan(a), a, result)
        return result

    return Monoid(dtype, identity, combine, idempotent=True)


def better(value: Expr, index: Expr, best: Expr, best_index: Expr, largest: bool) -> Expr:
    """Whether an element comes before the best so far: more extreme, or equal and earlier."""
    beyond = value > best if largest else value < best
    if "float" not in str(value.ty.dtype):
        return tir.Or(beyond, tir.And(value == best, index < best_index))
    first = is_nan(value)
    old = is_nan(best)
    wins = tir.Or(beyond, tir.And(first, tir.Not(old)))
    ties = tir.Or(value == best, tir.And(first, old))
    return tir.Or(wins, tir.And(ties, index < best_index))
