"""Sizes as expressions of kernels."""

from __future__ import annotations

import sympy
import torch
import tvm
import tvm_ffi
from torch.utils._sympy.functions import FloorDiv
from tvm import tirx as tir

from plait.kernels.abi import TensorArg
from plait.kernels.build import _pipeline
from plait.kernels.emit import Emitter, Expr, sympy_to_tir
from plait.kernels.signs import divide_plainly
from plait.kernels.target import host


def test_open_sizes_that_divide_are_not_written_once_for_every_sign() -> None:
    """LLVM took minutes for a view of such a size in a view of another."""
    s, t = (sympy.Symbol(name, integer=True, positive=True) for name in "st")
    u = sympy.Symbol("u", integer=True)
    variables = {name: tir.Var(name, "int64") for name in "stu"}
    assert isinstance(sympy_to_tir(FloorDiv(4 * s, t), variables), tir.Div)
    for rounded_down in (FloorDiv(-s, t), FloorDiv(u, t), FloorDiv(s, u), FloorDiv(s, 8)):
        assert isinstance(sympy_to_tir(rounded_down, variables), tir.FloorDiv)


def divisions(value: Expr, size: Expr, task: Expr) -> list[Expr]:
    """Divisions of what is never negative, and after them some of what may be."""
    pieces = tir.floordiv(size + 339, 340)
    never = [tir.floormod(task, pieces), tir.floordiv(tir.floordiv(task, pieces), size * 3)]
    return [*never, tir.floordiv(task, 8), tir.floordiv(value, size), tir.floordiv(size - 9, 3)]


def test_divisions_of_positions_and_sizes_are_plain() -> None:
    """TVM writes the others once for every sign, which took minutes for the pieces of a padding."""
    arg = TensorArg(torch.int64, (8,), (1,))
    em = Emitter("divide", [arg], [arg], ["s"])
    with em.function() as task:
        total = em.i64(0)
        for value in divisions(em.inputs[0].load([task]), em.dim(sympy.Symbol("s")), task):
            total = total + value
        em.outputs[0].store(total, [task])
    target = host().tvm()
    module = tvm.tirx.transform.BindTarget(target.with_host(target))(
        tvm.IRModule({"divide": em.finish()})
    )

    def kinds(module: tvm.IRModule) -> list[str]:
        found: list[str] = []
        known = (tir.FloorDiv, tir.FloorMod, tir.Div, tir.Mod)
        tvm_ffi.structural_walk(
            module["divide"].body, (known, lambda value: found.append(type(value).__name__))
        )
        return sorted(found)

    # The size that is 9 less, the loaded value, and the shift round down; the number of pieces is
    # written out twice.
    assert kinds(divide_plainly()(module)) == ["Div"] * 4 + ["FloorDiv"] * 3 + ["Mod"]
    assert len(kinds(_pipeline(True)(module))) <= 8
