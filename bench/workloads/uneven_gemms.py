"""Eight experts with loads as uneven as routers make them: independent products of many sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import finish

ROWS = (200, 120, 72, 48, 32, 20, 12, 8)


class UnevenExperts(nn.Module):
    """Gives the first rows of ``[512, 256]`` to the first expert, the next to the second, ..."""

    def __init__(self, hidden: int = 256, wide: int = 512) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, wide), nn.ReLU(), nn.Linear(wide, hidden)) for _ in ROWS
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, ROWS)
        return torch.cat([e(p) for e, p in zip(self.experts, parts, strict=True)])


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Both sizes are the same."""
    del size
    x = torch.randn(sum(ROWS), 256, generator=torch.Generator().manual_seed(0))
    return finish(UnevenExperts(), x), (x,)
