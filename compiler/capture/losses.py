"""A loss that torch cannot trace: that of connectionist temporal classification.

Its operator makes, beside the loss, a table as wide as the longest target, and has no rule for
sizes. Where the lengths are known, the loss alone is an operator of ours that runs torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

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
