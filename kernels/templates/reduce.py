"""Reductions over any dimensions, with pointwise operators before and after them.

Where the contiguous dimension is folded, lanes run along it; where it is kept (a mean over height
and width in NHWC, a sum over a leading dimension), each lane folds a row of its own. All of this is
the rows template's work; a reduce group is one whose results are single values per row.
"""

from __future__ import annotations

from .rows import candidates, lower

__all__ = ["candidates", "lower"]
