"""Inception-v3: Szegedy et al., "Rethinking the Inception Architecture", 2016, table 1.

The inference network (no auxiliary classifier) with the layer sizes of the released model:
5.7 GMAC and 23.8 million parameters at 299x299.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import finish, image


class Conv(nn.Sequential):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__(
            nn.Conv2d(cin, cout, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(cout, eps=0.001),
            nn.ReLU(),
        )


class Branches(nn.Module):
    """Applies every branch to the input and concatenates the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def pooled(cin: int, cout: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(3, 1, 1), Conv(cin, cout, 1))


def block35(cin: int, pool: int) -> nn.Module:
    """Figure 5: the 5x5 branch beside two 3x3 in a row, on the 35x35 grid."""
    return Branches(
        Conv(cin, 64, 1),
        nn.Sequential(Conv(cin, 48, 1), Conv(48, 64, 5, padding=2)),
        nn.Sequential(Conv(cin, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, padding=1)),
        pooled(cin, pool),
    )


def reduce35(cin: int) -> nn.Module:
    return Branches(
        Conv(cin, 384, 3, 2),
        nn.Sequential(Conv(cin, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, 2)),
        nn.MaxPool2d(3, 2),
    )


def block17(cin: int, mid: int) -> nn.Module:
    """Figure 6: 7x7 factorised into 1x7 and 7x1, on the 17x17 grid."""
    wide, tall = (0, 3), (3, 0)
    return Branches(
        Conv(cin, 192, 1),
        nn.Sequential(
            Conv(cin, mid, 1), Conv(mid, mid, (1, 7), 1, wide), Conv(mid, 192, (7, 1), 1, tall)
        ),
        nn.Sequential(
            Conv(cin, mid, 1),
            Conv(mid, mid, (7, 1), 1, tall),
            Conv(mid, mid, (1, 7), 1, wide),
            Conv(mid, mid, (7, 1), 1, tall),
            Conv(mid, 192, (1, 7), 1, wide),
        ),
        pooled(cin, 192),
    )


def reduce17(cin: int) -> nn.Module:
    return Branches(
        nn.Sequential(Conv(cin, 192, 1), Conv(192, 320, 3, 2)),
        nn.Sequential(
            Conv(cin, 192, 1),
            Conv(192, 192, (1, 7), 1, (0, 3)),
            Conv(192, 192, (7, 1), 1, (3, 0)),
            Conv(192, 192, 3, 2),
        ),
        nn.MaxPool2d(3, 2),
    )


def split3(cin: int) -> nn.Module:
    return Branches(Conv(cin, 384, (1, 3), 1, (0, 1)), Conv(cin, 384, (3, 1), 1, (1, 0)))


def block8(cin: int) -> nn.Module:
    """Figure 7: expanded filter banks on the 8x8 grid."""
    return Branches(
        Conv(cin, 320, 1),
        nn.Sequential(Conv(cin, 384, 1), split3(384)),
        nn.Sequential(Conv(cin, 448, 1), Conv(448, 384, 3, padding=1), split3(384)),
        pooled(cin, 192),
    )


class InceptionV3(nn.Module):
    """Maps ``[N, 3, H, W]`` images to ``[N, 1000]`` logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Conv(3, 32, 3, 2),
            Conv(32, 32, 3),
            Conv(32, 64, 3, padding=1),
            nn.MaxPool2d(3, 2),
            Conv(64, 80, 1),
            Conv(80, 192, 3),
            nn.MaxPool2d(3, 2),
            block35(192, 32),
            block35(256, 64),
            block35(288, 64),
            reduce35(288),
            block17(768, 128),
            block17(768, 160),
            block17(768, 160),
            block17(768, 192),
            reduce17(768),
            block8(1280),
            block8(2048),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.features(x)), 1))


def build(size: str = "cpu", part: str = "whole") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Both sizes are the paper's: batch 1 at 299x299. ``part`` "8x8" is the last two blocks alone,
    whose maps are too small to keep many threads busy one kernel at a time.
    """
    del size
    if part == "8x8":
        x = torch.randn(1, 1280, 8, 8, generator=torch.Generator().manual_seed(0))
        return finish(nn.Sequential(block8(1280), block8(2048)), x), (x,)
    x = image(299)
    return finish(InceptionV3(), x), (x,)
