"""Ten tiny layers of three operators that do not fuse into one loop: the cost of each kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import SEED, finish

WIDTH = 32


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Both sizes are the same: ten times linear, GELU, layer norm on ``[4, 32]``."""
    del size
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(SEED))
    layers = [(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)) for _ in range(10)]
    return finish(nn.Sequential(*[m for layer in layers for m in layer]), x), (x,)
