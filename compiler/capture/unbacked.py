"""Tracing of what runs on a number of cells that is known only at run time."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def traceable() -> contextlib.AbstractContextManager[Any]:
    """Within it, `torch.export` can trace modules on tensors whose first size is unknown.

    torch's batch normalization asks whether its input is empty, which then has no answer, although
    with running statistics nothing depends on it. Outside of tracing this does nothing.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return _BatchNorm()
    return contextlib.nullcontext()


class _BatchNorm(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            result = _normalized(*args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


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
