"""Sizes as expressions of kernels."""

from __future__ import annotations

import sympy
from torch.utils._sympy.functions import FloorDiv
from tvm import tirx as tir

from plait.kernels.emit import sympy_to_tir


def test_open_sizes_that_divide_are_not_written_once_for_every_sign() -> None:
    """LLVM took minutes for a view of such a size in a view of another."""
    s, t = (sympy.Symbol(name, integer=True, positive=True) for name in "st")
    u = sympy.Symbol("u", integer=True)
    variables = {name: tir.Var(name, "int64") for name in "stu"}
    assert isinstance(sympy_to_tir(FloorDiv(4 * s, t), variables), tir.Div)
    for rounded_down in (FloorDiv(-s, t), FloorDiv(u, t), FloorDiv(s, u), FloorDiv(s, 8)):
        assert isinstance(sympy_to_tir(rounded_down, variables), tir.FloorDiv)
