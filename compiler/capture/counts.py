"""Tensors that torch's functions make of sizes alone, as sizes.

``torch.div(length, 4, rounding_mode="floor")`` is a tensor without dimensions, also where the
length is a plain number. A program that lets it tell other sizes would ask it for its value, which
no trace knows. Within `Counts` what it was computed from is kept beside it, and taken where a size
is needed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode

from .decisions import SIZED

Number = int | SymInt

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("add", "radd"), operator.add),
    **dict.fromkeys(("sub", "subtract"), operator.sub),
    "rsub": lambda a, b: b - a,
    **dict.fromkeys(("mul", "multiply", "rmul"), operator.mul),
}
"""Names of torch's functions of two numbers, without underscores, and what they compute."""
DIVISIONS = ("div", "divide", "floor_divide", "floordiv")
MAKERS = frozenset("zeros ones empty full arange new_zeros new_ones new_empty new_full".split())
"""Functions whose sizes come first, or behind the tensor that they are methods of."""
VALUES = frozenset(("item", "__int__", "__index__"))


class Counts(TorchFunctionMode):
    """Within it, sizes that such tensors tell are those that they were computed from."""

    def __init__(self) -> None:
        super().__init__()
        # Tensors (kept alive), their versions then, and what they were computed from.
        self._known: dict[int, tuple[Tensor, int, SymInt]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self._known:
            if name in VALUES and (number := self._number(args[0])) is not args[0]:
                return number if name == "item" else int(number)
            if name in SIZED or name in MAKERS or name in ("__getitem__", "__setitem__"):
                args, kwargs = self._sized(name, args), self._number(kwargs)
        count = self._count(name, args, kwargs) if len(args) == 2 else None
        result = func(*args, **kwargs)
        if isinstance(count, SymInt) and _is_count(result):
            self._known[id(result)] = result, result._version, count
        return result

    def _sized(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments in which numbers stand for tensors where sizes are meant."""
        if name in ("__getitem__", "__setitem__"):
            whole = isinstance(args[1], tuple)
            parts = (
                slice(*map(self._number, (x.start, x.stop, x.step))) if isinstance(x, slice) else x
                for x in (args[1] if whole else (args[1],))
            )
            return (args[0], tuple(parts) if whole else next(parts), *args[2:])
        first = 0 if name in MAKERS and not name.startswith("new_") else 1
        return (*args[:first], *self._number(args[first:]))

    def _number(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self._known.get(id(value))
            return value if known is None or value._version != known[1] else known[2]
        if isinstance(value, dict):
            return {k: self._number(v) for k, v in value.items()}
        if type(value) in (tuple, list, torch.Size):
            return tuple(map(self._number, value))
        return value

    def _count(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function of two sizes gives; None where they are none, or it is no other."""
        if name.strip("_") in DIVISIONS:
            rounding = "floor" if "floor" in name else kwargs.get("rounding_mode")
            compute = _division(rounding)
            kwargs = {k: v for k, v in kwargs.items() if k != "rounding_mode"}
        else:
            compute = OPERATORS.get(name.strip("_"))
        if compute is None or kwargs:
            return None
        a, b = map(self._number, args)
        if type(a) not in (int, SymInt) or type(b) not in (int, SymInt):
            return None
        return compute(a, b)


def _division(rounding: Any) -> Callable[[Number, Number], Any] | None:
    if rounding == "floor":
        return lambda a, b: a // b if _is_above(b) else None
    if rounding == "trunc":
        return lambda a, b: a // b if _is_above(b) and a >= 0 else None
    return None


def _is_above(number: Number) -> bool:
    """Whether it is a constant above 0: what may be 0 divides otherwise in a tensor."""
    return type(number) is int and number > 0


def _is_count(value: Any) -> bool:
    """Whether it may stand for a size, and torch counts what is written to it."""
    whole = isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point()
    return whole and not value.is_inference()
