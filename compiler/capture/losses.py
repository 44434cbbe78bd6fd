"""A loss that torch cannot trace: that of connectionist temporal classification.

Its operator makes, beside the loss, a table as wide as the longest target, and has no rule for
sizes. Where the lengths are known, the loss alone is an operator of ours that runs torch's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("plait::ctc_loss", mutates_args=())
def ctc_loss(
    log_probs: Tensor, targets: Tensor, input_lengths: Sequence[int], target_lengths: Sequence[int],
    blank: int = 0, reduction: str = "mean", zero_infinity: bool = False,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.ctc_loss` of a batch ``[T, N, C]`` with lengths that are numbers."""
    lengths = torch.tensor(input_lengths), torch.tensor(target_lengths)
    return F.ctc_loss(log_probs, targets, *lengths, blank, reduction, zero_infinity)


@ctc_loss.register_fake
def _(
    log_probs: Tensor, targets: Tensor, input_lengths: Sequence[int], target_lengths: Sequence[int],
    blank: int = 0, reduction: str = "mean", zero_infinity: bool = False,
) -> Tensor:  # fmt: skip
    return log_probs.new_empty(len(input_lengths) if reduction == "none" else ())


FUNCTIONS = (F.ctc_loss, torch.ctc_loss)
"""Functions of the loss, which count its reductions by name and by number."""
_SIGNATURE = inspect.signature(F.ctc_loss)
_REDUCTIONS = ("none", "mean", "sum")


def ctc_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
    """Arguments of ``func`` of `FUNCTIONS` in their order, those left out included.

    None where they are not those of a loss.
    """
    try:
        bound = _SIGNATURE.bind(*args, **kwargs)
    except TypeError:
        return None
    if func is not F.ctc_loss:  # torch.ctc_loss reduces nothing unless told to, whatever it says
        bound.arguments.setdefault("reduction", 0)
    bound.apply_defaults()
    given = [bound.arguments[name] for name in _SIGNATURE.parameters]
    if isinstance(given[5], int):
        given[5] = _REDUCTIONS[given[5]]
    return given


def ctc_loss_of_numbers(
    log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any,
    blank: int, reduction: str, zero_infinity: bool,
) -> Tensor:  # fmt: skip
    """`ctc_loss`, also of one sequence ``[T, C]``."""
    more = blank, reduction, zero_infinity
    if log_probs.dim() == 3:
        return ctc_loss(log_probs, targets, input_lengths, target_lengths, *more)
    lengths = (x if isinstance(x, Sequence) else [x] for x in (input_lengths, target_lengths))
    loss = ctc_loss(log_probs.unsqueeze(1), targets, *lengths, *more)
    return loss.squeeze(0) if reduction == "none" else loss
