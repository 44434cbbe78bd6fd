"""Size expressions: ints, or text in Python's integer syntax over symbol names."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping

Size = int | str

_ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.IfExp, ast.Call,
    ast.Name, ast.Constant, ast.Load, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow,
    ast.USub, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq, ast.And, ast.Or, ast.Not,
)  # fmt: skip
_FUNCTIONS = {"min": min, "max": max}


_TRIES = 8


@functools.lru_cache(maxsize=65536)
def _compile(text: str):
    """CPython 3.11 keeps the depth of trees in one place for all threads, and raises SystemError
    where two of them meet in the midst of one: that has nothing to do with ``text``.
    """
    for left in reversed(range(_TRIES)):
        try:
            return _compile_once(text)
        except SystemError:
            if not left:
                raise
    raise AssertionError


def _compile_once(text: str):
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise ValueError(f"size expression {text!r}: {type(node).__name__} is not allowed")
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        ):
            raise ValueError(f"size expression {text!r}: only min and max may be called")
    return compile(tree, "<size>", "eval")


def evaluate(size: Size, values: Mapping[str, int]) -> int:
    """The integer that ``size`` stands for. Raises ValueError for anything but integer
    arithmetic.
    """
    if isinstance(size, int):
        return size
    try:
        return int(eval(_compile(size), {"__builtins__": {}, **_FUNCTIONS}, dict(values)))
    except NameError as error:
        raise ValueError(f"size expression {size!r}: {error}") from error
