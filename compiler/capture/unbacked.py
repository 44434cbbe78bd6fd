"""Tracing of what runs on a number of cells that is known only at run time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def traceable() -> contextlib.AbstractContextManager[Any]:
    """Within it, `torch.export` can trace modules on tensors whose first size is unknown.

    Some of torch's functions ask for that size where nothing, or nothing but speed and rounding,
    depends on it: batch normalization with running statistics whether its input is empty, distances
    whether there are many. Outside of tracing this does nothing.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return _Unasked()
    return contextlib.nullcontext()


class _Unasked(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _INSTEAD:
            result = _INSTEAD[func](*args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def _distances(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor | None:
    """The operator that asks when it runs, not when it is traced."""
    if compute_mode != "use_mm_for_euclid_dist_if_necessary":
        return None
    return torch.ops.aten._cdist_forward(x1, x2, p, None)


def _normalized(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None:
        return None
    return torch.ops.aten._native_batch_norm_legit_no_training(
        input, weight, bias, running_mean, running_var, momentum, eps
    )[0]


_INSTEAD: dict[Any, Callable[..., Tensor | None]] = {
    F.batch_norm: _normalized,
    torch.cdist: _distances,
}
"""By function, what gives its result without such a question; None where that does not do."""
