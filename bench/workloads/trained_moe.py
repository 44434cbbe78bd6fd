"""The language model of `bench.trained_moe`, whose router was trained: hot and cold experts."""

from __future__ import annotations

from torch import Tensor, nn

from ..trained_moe import trained
from .common import select_experts


def build(size: str = "cpu", steps: int | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """128 bytes of held-out text ``[1, 128]``; both sizes are the same.

    The first call on a machine trains for a minute or two.
    """
    del size
    model, _, held_out = trained(steps)
    return model, (held_out[0][:1],)


def build_plain(
    size: str = "cpu", steps: int | None = None, form: str = "loop"
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with transformers' own loop over experts, or its batched product."""
    model, inputs = build(size, steps)
    select_experts(model, form)
    return model, inputs
