"""Sizes that are padded up to a multiple, as torch.export can reason about them.

Of ``(q - n % q) % q``, and of ``q - n % q``, torch knows little: that a length so padded is a
multiple of ``q`` it proves by minutes of search, if at all. While `padded_sizes` holds, the same
numbers are written as ``q*((n + q - 1)//q) - n`` and ``q*(n//q + 1) - n``: with ``n`` added and
``q`` divided out, a whole number of chunks is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

NAMES = ("__mod__", "__rsub__")
"""The operators of sizes that such padding is computed with."""


@contextlib.contextmanager
def padded_sizes() -> Iterator[None]:
    """Within it, sizes compute what fills up a multiple by divisions, not by remainders.

    Whoever else computes with sizes meanwhile gets the same numbers.
    """
    kind: Any = torch.SymInt
    mod, rsub = (getattr(kind, name) for name in NAMES)
    filling = _Filling(mod, rsub)
    kind.__mod__ = lambda size, other: filling.mod(size, other)
    kind.__rsub__ = lambda size, other: filling.rsub(size, other)
    try:
        yield
    finally:
        kind.__mod__, kind.__rsub__ = mod, rsub


class _Filling:
    """The operators, given torch's own."""

    def __init__(self, mod: Callable[..., Any], rsub: Callable[..., Any]) -> None:
        self._mod, self._rsub = mod, rsub
        self._rests: dict[Any, torch.SymInt] = {}  # x % q, q -> x
        self._fills: dict[Any, torch.SymInt] = {}  # q - x % q, q -> x

    def mod(self, size: torch.SymInt, by: Any) -> Any:
        if type(by) is not int or by < 2:
            return self._mod(size, by)
        filled = self._fills.get(_key(size, by))
        if filled is None and _is_negated(size):
            filled = -size
        if filled is not None:
            return by * ((filled + (by - 1)) // by) - filled
        rest = self._mod(size, by)
        if isinstance(rest, torch.SymInt):
            self._rests[_key(rest, by)] = size
        return rest

    def rsub(self, size: torch.SymInt, number: Any) -> Any:
        whole = self._rests.get(_key(size, number)) if type(number) is int else None
        if whole is None:
            return self._rsub(size, number)
        fill = number * (whole // number + 1) - whole
        if isinstance(fill, torch.SymInt):
            self._fills[_key(fill, number)] = whole
        return fill


def _key(size: torch.SymInt, by: int) -> Any:
    """What a size is known by: names of symbols are those of one trace."""
    return id(size.node.shape_env), size.node.expr, by


def _is_negated(size: torch.SymInt) -> bool:
    expr = size.node.expr
    return expr.is_Mul and bool(expr.args[0].is_Integer) and int(expr.args[0]) < 0
