"""LiveSR's super-resolution of a frame's crops by ten subnets of their own sizes.

The dynamic network of Cui et al., "Optimizing Dynamic Neural Networks with Brainstorm", OSDI 2023:
a small classifier sends each crop to one of ten networks in the style of NAS-MDSR (convolution,
residual blocks, pixel shuffle), each of its own width and depth; hard crops get the large ones.
Easy crops are frequent: the loads of the subnets follow Zipf's law. 48 crops of 32x32, doubled in
size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..routes import zipf_shares
from .common import SEED, finish
from .loops import LoopRouter, balance_labels

CROPS, SIDE = 48, 32
SUBNETS = ((8, 1), (8, 2), (12, 1), (12, 2), (16, 2), (16, 3), (20, 3), (24, 3), (24, 4), (32, 4))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x))) * 0.1


class Subnet(nn.Sequential):
    """Maps crops ``[u, 3, H, W]`` to ``[u, 3, 2H, 2W]``."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1),
            *[Residual(width) for _ in range(depth)],
            nn.Conv2d(width, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )


class Classifier(nn.Module):
    """Which subnet a crop needs: labels ``[u]`` for crops ``[u, 3, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.conv2 = nn.Conv2d(8, 16, 3, 2, 1)
        self.out = nn.Linear(16, len(SUBNETS))

    def logits(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).argmax(1)


def _network(router: Callable[..., nn.Module], factor: int) -> nn.Module:
    branches: Iterable[nn.Module] = [Subnet(w * factor, d * factor) for w, d in SUBNETS]
    return router(branches, Classifier(), combine="select")


def _crops(generator: torch.Generator) -> Tensor:
    """From smooth and faint to rough and strong."""
    parts = []
    for number in range(CROPS):
        grain = (2, 4, 8, 16, 32)[number % 5]
        noise = torch.randn(1, 3, grain, grain, generator=generator)
        strength = 0.3 + torch.rand(1, generator=generator)
        parts.append(strength * F.interpolate(noise, (SIDE, SIDE), mode="bilinear"))
    return torch.cat(parts)


def build_plain(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with a Python loop over the subnets."""
    x = _crops(torch.Generator().manual_seed(SEED))
    model: Any = _network(LoopRouter, 2 if size == "paper" else 1)
    finish(model)
    with torch.no_grad():
        loads = (zipf_shares(len(SUBNETS)) * CROPS).round().int().tolist()
        balance_labels(model.scorer.logits(x), model.scorer.out.bias, loads, SEED)
    return model, (x,)


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """48 crops ``[48, 3, 32, 32]``; the paper size doubles the subnets' widths and depths."""
    from ... import Router

    plain, inputs = build_plain(size)
    model = _network(Router, 2 if size == "paper" else 1)
    model.load_state_dict(plain.state_dict())
    return model.eval(), inputs
