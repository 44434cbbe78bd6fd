"""NASNet-A mobile (4 @ 1056): Zoph et al., "Learning Transferable Architectures", 2018, figure 4.

0.56 GMAC and 5.3 million parameters at 224x224. Cells follow the released model: a cell reads the
two previous outputs, ``cur`` and ``prev``; blocks pair two operations by addition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import finish, image


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001)


def separable(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A separable convolution applied twice, ReLU first; the first one carries the stride."""
    pad = kernel // 2
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(cin, cin, kernel, stride, pad, groups=cin, bias=False),
        nn.Conv2d(cin, cout, 1, bias=False),
        norm(cout),
        nn.ReLU(),
        nn.Conv2d(cout, cout, kernel, 1, pad, groups=cout, bias=False),
        nn.Conv2d(cout, cout, 1, bias=False),
        norm(cout),
    )


def project(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(cin, cout, 1, bias=False), norm(cout))


def average(stride: int = 1) -> nn.AvgPool2d:
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False)


class FactorizedReduction(nn.Module):
    """Halves the grid: every second pixel, and the pixels one down and right, side by side."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(cin, cout // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(cin, cout - cout // 2, 1, 2, bias=False)
        self.norm = norm(cout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], 1))


class Cell(nn.Module):
    """Brings ``cur`` and ``prev`` to ``filters`` channels on one grid before the blocks."""

    def __init__(self, cur: int, prev: int, filters: int, halve_prev: bool) -> None:
        super().__init__()
        self.cur = project(cur, filters)
        self.prev = FactorizedReduction(prev, filters) if halve_prev else project(prev, filters)


class NormalCell(Cell):
    """Keeps the grid; ``6 * filters`` output channels."""

    def __init__(self, cur: int, prev: int, filters: int, halve_prev: bool) -> None:
        super().__init__(cur, prev, filters, halve_prev)
        f = filters
        self.cur5, self.prev3 = separable(f, f, 5), separable(f, f, 3)
        self.prev5, self.prev3b = separable(f, f, 5), separable(f, f, 3)
        self.cur3 = separable(f, f, 3)
        self.pool = average()

    def forward(self, cur: Tensor, prev: Tensor) -> Tensor:
        h, p = self.cur(cur), self.prev(prev)
        return torch.cat(
            [
                p,
                self.cur5(h) + self.prev3(p),
                self.prev5(p) + self.prev3b(p),
                self.pool(h) + p,
                self.pool(p) + self.pool(p),
                self.cur3(h) + h,
            ],
            1,
        )


class ReductionCell(Cell):
    """Halves the grid; ``4 * filters`` output channels."""

    def __init__(self, cur: int, prev: int, filters: int, halve_prev: bool) -> None:
        super().__init__(cur, prev, filters, halve_prev)
        f = filters
        self.cur5, self.prev7 = separable(f, f, 5, 2), separable(f, f, 7, 2)
        self.prev7b, self.prev5 = separable(f, f, 7, 2), separable(f, f, 5, 2)
        self.inner3 = separable(f, f, 3)
        self.max = nn.MaxPool2d(3, 2, 1)
        self.halve, self.pool = average(2), average()

    def forward(self, cur: Tensor, prev: Tensor) -> Tensor:
        h, p = self.cur(cur), self.prev(prev)
        first = self.cur5(h) + self.prev7(p)
        second = self.max(h) + self.prev7b(p)
        third = self.halve(h) + self.prev5(p)
        fourth = self.pool(first) + second
        fifth = self.inner3(first) + self.max(h)
        return torch.cat([second, third, fourth, fifth], 1)


class NASNetAMobile(nn.Module):
    """Maps ``[N, 3, H, W]`` images to ``[N, 1000]`` logits."""

    def __init__(self, classes: int = 1000, repeats: int = 4, filters: int = 44) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, bias=False), norm(32))
        self.cells = nn.ModuleList()
        cur = prev = 32
        halved = False  # whether the last cell halved the grid, so that prev lies on a larger one

        def add(kind: type[NormalCell] | type[ReductionCell], width: int) -> None:
            nonlocal cur, prev, halved
            self.cells.append(kind(cur, prev, width, halved))
            reduces = kind is ReductionCell
            cur, prev, halved = width * (4 if reduces else 6), cur, reduces

        add(ReductionCell, filters // 4)
        add(ReductionCell, filters // 2)
        for stage in range(3):
            if stage:
                add(ReductionCell, filters << stage)
            for _ in range(repeats):
                add(NormalCell, filters << stage)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cur, classes)

    def forward(self, x: Tensor) -> Tensor:
        cur = prev = self.stem(x)
        for cell in self.cells:
            cur, prev = cell(cur, prev), cur
        return self.fc(torch.flatten(self.pool(torch.relu(cur)), 1))


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Both sizes are the paper's: batch 1 at 224x224."""
    del size
    x = image(224)
    return finish(NASNetAMobile(), x), (x,)
