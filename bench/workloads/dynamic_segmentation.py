"""Dynamic routing: Li et al., "Learning Dynamic Routing for Semantic Segmentation", 2020.

A grid of cells, layers by scales. Each cell has three paths, to the finer, the same and the coarser
scale, each with a gate per sample: ``max(0, tanh(g(x)))`` weighs the path, zero closes it. Here
each path has a separable convolution of its own (the paper's cells share one), and the path to the
same scale is residual: a cell whose gates are all closed passes its input on. The gates' biases are
such that each is open for a random number of the samples.

CPU size: 6 layers, 3 scales, batch 4 at 64x64; paper size: 16 layers, 4 scales, batch 2 at 512x512.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import SEED, finish, image
from .loops import LoopRouter, balance_gates

CLASSES = 19
KEEP = 0  # change of scale: -1 is finer, 1 coarser


class Gate(nn.Module):
    """A score per sample, ``[N, 1]``, of features ``[N, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(channels, channels // 4, 1), nn.Linear(channels // 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.out(F.relu(self.conv(x)).mean((2, 3))))


class Path(nn.Module):
    """Separable convolution, then to another scale: half or twice the channels."""

    def __init__(self, channels: int, change: int) -> None:
        super().__init__()
        self.change = change
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        wide = channels * 2 if change > 0 else channels // 2
        self.resample: nn.Module = nn.Identity()
        if change != KEEP:
            self.resample = nn.Conv2d(channels, wide, 1, 2 if change > 0 else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resample(self.body(x))
        if self.change < 0:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return x


class Cell(nn.ModuleDict):
    """A router with one branch for each path; keys are the scales that paths lead to."""

    def __init__(
        self, router: Callable[..., nn.Module], channels: int, scale: int, scales: int
    ) -> None:
        super().__init__()
        for target in range(max(0, scale - 1), min(scales, scale + 2)):
            path = Path(channels, target - scale)
            self[str(target)] = router([path], Gate(channels), threshold=0.0, combine="weighted")


class Network(nn.Module):
    """Images ``[N, 3, H, W]`` to class scores ``[N, 19, H, W]``."""

    def __init__(self, router: Callable[..., nn.Module], size: str) -> None:
        super().__init__()
        layers, self.scales, width, halvings = (16, 4, 64, 2) if size == "paper" else (6, 3, 16, 1)
        self.widths = [width << s for s in range(self.scales)]
        stem: list[nn.Module] = []
        for number in range(2):
            channels = width if number else 3
            stride = 2 if number < halvings else 1
            stem += [nn.Conv2d(channels, width, 3, stride, 1, bias=False)]
            stem += [nn.BatchNorm2d(width), nn.ReLU()]
        self.stem, self.upscale = nn.Sequential(*stem), float(2**halvings)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                Cell(router, self.widths[s], s, self.scales)
                for s in range(min(number + 1, self.scales))
            )
            for number in range(layers)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(w, width, 1) for w in self.widths)
        self.out = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = [self.stem(x)]
        for layer in self.layers:
            arriving: list[Tensor | None] = [*state, None][: self.scales]  # the residual paths
            for scale, cell in enumerate(layer):  # type: ignore[arg-type]
                for target, path in cell.items():
                    self._add(arriving, int(target), path(state[scale]), state[scale])
            state = [a for a in arriving if a is not None]
        total = self.lateral[0](state[0])
        for scale in range(1, len(state)):
            y = self.lateral[scale](state[scale])
            factor = float(2**scale)
            total = total + F.interpolate(y, scale_factor=factor, mode="bilinear")
        return F.interpolate(self.out(total), scale_factor=self.upscale, mode="bilinear")

    def _add(self, sums: list[Tensor | None], scale: int, out: Tensor | None, x: Tensor) -> None:
        """``out`` is None where a Python loop found no sample to run the path for."""
        have = sums[scale]
        if out is not None:
            sums[scale] = out if have is None else have + out
        elif have is None:  # only on the way to a coarser scale
            side = (x.shape[2] // 2, x.shape[3] // 2)
            sums[scale] = x.new_zeros(x.shape[0], self.widths[scale], *side)


def _batch(size: str) -> Tensor:
    """Images of different strength, that gates can tell apart."""
    x = image(512, 2) if size == "paper" else image(64, 4)
    generator = torch.Generator().manual_seed(SEED)
    return x * (0.5 + torch.rand(len(x), 1, 1, 1, generator=generator))


def build_plain(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with an index_select and index_add for each path that any sample takes."""
    x, model = _batch(size), Network(LoopRouter, size)
    for module in model.modules():  # all gates open: every batch norm sees every sample
        if isinstance(module, LoopRouter):
            module.threshold = -2.0
    finish(model, x)
    gates: list[Any] = []
    for module in model.modules():
        if isinstance(module, LoopRouter):
            module.threshold = 0.0
            gates.append(module.scorer.out)  # type: ignore[union-attr]
    balance_gates(model, gates, x, seed=SEED)
    return model, (x,)


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Images ``[4, 3, 64, 64]`` to class scores of the same height and width."""
    from ... import Router

    plain, inputs = build_plain(size)
    model = Network(Router, size)
    model.load_state_dict(plain.state_dict())
    return model.eval(), inputs
