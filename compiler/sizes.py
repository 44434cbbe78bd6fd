"""Sizes across layers: torch SymInts, sympy expressions, and the Plan's text."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.utils._sympy import functions as F

from ..kernels.abi import Dim

MAX_NESTING = 3
"""Divisions and remainders within each other in a size, beyond which torch's reasoning about the
sizes of a graph takes minutes (a length that is padded to pairs and halved, again and again)."""
_DIVISIONS = (F.FloorDiv, F.CleanDiv, F.CeilDiv, F.Mod, F.PythonMod, sympy.Mod)


def check(size: torch.SymInt) -> None:
    """Raises NotImplementedError for a size that no plan can hold, such as 1.5 times another, or
    that torch would be busy with for minutes.
    """
    text(size)
    if _nesting(size.node.expr) > MAX_NESTING:
        raise NotImplementedError(f"size {size} divides more than {MAX_NESTING} times over")


def _nesting(expr: Any) -> int:
    inner = max(map(_nesting, expr.args), default=0)
    return inner + (isinstance(expr, _DIVISIONS) and not _continues(expr))


def _continues(expr: Any) -> bool:
    """Whether a division is one with that within it: ``(a//b + c)//d`` is ``(a + b*c)//(b*d)``, as
    with the sizes of images that are pooled again and again.
    """
    if not isinstance(expr, F.FloorDiv) or not expr.args[1].is_Integer or expr.args[1] <= 0:
        return False
    inner = [term for term in sympy.Add.make_args(expr.args[0]) if not term.is_Integer]
    return len(inner) == 1 and isinstance(inner[0], F.FloorDiv) and inner[0].args[1].is_Integer


def dim(value: int | torch.SymInt) -> Dim:
    """A torch size as an int or a sympy expression."""
    if isinstance(value, int):
        return value
    expr = value.node.expr
    return int(expr) if expr.is_Integer else expr


def text(value: Dim | torch.SymInt) -> int | str:
    """A size for the Plan. Raises NotImplementedError for functions outside integer arithmetic."""
    if isinstance(value, torch.SymInt):
        value = dim(value)
    if isinstance(value, int):
        return value
    if value.is_Integer:
        return int(value)
    return _print(value)


def _print(e: Any) -> str:
    if e.is_Integer:
        return str(int(e)) if int(e) >= 0 else f"({int(e)})"
    if e.is_Symbol:
        return e.name
    args = [_print(a) for a in e.args]
    if e.is_Add:
        return "(" + " + ".join(args) + ")"
    if e.is_Mul:
        return "(" + "*".join(args) + ")"
    if isinstance(e, sympy.Pow) and e.args[1].is_Integer and e.args[1] > 0:
        return f"({args[0]}**{args[1]})"
    if isinstance(e, (F.FloorDiv, F.CleanDiv)):
        return f"({args[0]}//{args[1]})"
    if isinstance(e, F.CeilDiv):
        return f"(-(-{args[0]}//{args[1]}))"
    if isinstance(e, (F.Mod, F.PythonMod, sympy.Mod)):
        return f"({args[0]}%{args[1]})"
    if isinstance(e, (sympy.Max, F.Max)):
        return f"max({', '.join(args)})"
    if isinstance(e, (sympy.Min, F.Min)):
        return f"min({', '.join(args)})"
    raise NotImplementedError(f"size {e} uses {type(e).__name__}, which plans cannot hold")


def symbols(value: Dim) -> set[str]:
    """Names of the symbols in a size."""
    return set() if isinstance(value, int) else {str(s) for s in value.free_symbols}


def is_backed(value: Any) -> bool:
    """Whether a size is known before the call runs (no data-dependent symbol in it)."""
    if not isinstance(value, torch.SymInt):
        return True
    return not any(str(s).startswith(("u", "zuf")) for s in value.node.expr.free_symbols)
