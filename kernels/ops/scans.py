"""Converters of running totals and products along a dimension.

As in torch, they run from the first element to the last one in a wider type: float64 for float32,
float32 for half types, int64 for whole numbers.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from ..value import Context, Value
from . import converter
from .common import cast, dtype_of
from .rows import add, fold_dtype, multiply, rows_of


@converter("cumsum", "cumprod")
def _running(node: fx.Node, ctx: Context) -> Value:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dtype = dtype_of(node)
    value = cast(ctx.env[source], dtype)
    wide = torch.float64 if dtype == torch.float32 else fold_dtype(dtype)
    monoid = (add if "cumsum" in str(node.target) else multiply)(wide)
    return cast(rows_of(ctx).scan(monoid, cast(value, wide)), dtype)
