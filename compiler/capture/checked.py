"""Distributions that check what they are given, while a program is traced.

The checks of `torch.distributions` ask numbers that a trace does not have: parameters that are
computed from weights. Where they hold, they do nothing. So the program asserts that they do, and
goes on; when an assertion fails, the original is run, which raises the distribution's own error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_TORCH: Any = torch
INVALID = "a distribution was given invalid values"
"""What failing assertions say."""
PLACE = "torch.distributions.distribution"
"""Module whose questions are checks: it raises where the answer is no."""


class CheckedValues(TorchFunctionMode):
    """Within it, what distributions ask of tensors on the CPU becomes assertions of the program."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _TORCH._is_all_true and args[0].device.type == "cpu" and _asks() == PLACE:
            _TORCH._assert_async(args[0].all(), INVALID)
            return True
        return func(*args, **(kwargs or {}))


def _asks() -> str:
    """The module that called a function of torch, which modes have handed on since."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "")
