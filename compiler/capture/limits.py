"""What is noticed while a program is traced: sizes not worth tracing on, tensors it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .. import sizes


class SizeError(NotImplementedError):
    """A size that is not worth tracing on.

    ``places``: the sizes that it comes from, as numbers of a tensor and of a dimension.
    """

    def __init__(self, text: str, places: Iterable[tuple[int, int]]) -> None:
        super().__init__(text)
        self.places = frozenset(places)


class CheckedSizes(TorchFunctionMode):
    """Within it, a result of torch's functions whose size `sizes.check` refuses raises SizeError.
    ``given`` are the tensors that sizes come from. Sizes that only data tell are not asked.
    """

    def __init__(self, given: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self._given = given
        self._known: set[Any] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            for size in part.shape if isinstance(part, torch.Tensor) else ():
                if isinstance(size, torch.SymInt) and size.node.expr not in self._known:
                    self._known.add(size.node.expr)
                    if sizes.is_backed(size):
                        self._check(size)
        return result

    def _check(self, size: torch.SymInt) -> None:
        try:
            sizes.check(size)
        except NotImplementedError as error:
            symbols = size.node.expr.free_symbols
            places = (
                (i, d)
                for i, tensor in enumerate(self._given)
                for d, x in enumerate(tensor.shape)
                if isinstance(x, torch.SymInt) and x.node.expr.free_symbols & symbols
            )
            raise SizeError(str(error), places) from None


class Untouched(TorchFunctionMode):
    """Within it, ``touched`` tells whether a function of torch was given one of some tensors, or
    they were in what `look` was shown."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = list(tensors)
        self.touched = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._tensors and not self.touched:
            self.look((args, kwargs))
        return func(*args, **(kwargs or {}))

    def look(self, value: Any) -> None:
        """Looks for the tensors in ``value``."""
        if isinstance(value, torch.Tensor):
            self.touched |= any(value is t for t in self._tensors)
        elif isinstance(value, (tuple, list)):
            for part in value:
                self.look(part)
        elif isinstance(value, dict):
            self.look(list(value.values()))
