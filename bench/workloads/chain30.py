"""Thirty elementwise operators in a row on a tiny tensor: what remains is the cost of a call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import SEED


class Chain(nn.Module):
    """Ten times scale, shift, tanh on ``[4, 16]``."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(10):
            x = torch.tanh(x * (1.0 + 0.05 * i) + 0.1)
        return x


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Both sizes are the same."""
    del size
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(SEED))
    return Chain().eval(), (x,)
