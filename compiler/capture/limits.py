"""Ends the tracing of a program as soon as it makes a size that is not worth tracing on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .. import sizes


class CheckedSizes(TorchFunctionMode):
    """Within it, a result of torch's functions whose size `sizes.check` refuses raises
    NotImplementedError. Sizes that only data tell are not asked.
    """

    def __init__(self) -> None:
        super().__init__()
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
                        sizes.check(size)
        return result
