"""SqueezeNet 1.1: Iandola et al., "SqueezeNet", 2016, with the release 1.1 layer sizes.

0.35 GMAC and 1.24 million parameters at 224x224.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import finish, image


class Fire(nn.Module):
    """Squeeze to ``squeeze`` channels, expand to ``expand`` by 1x1 and ``expand`` by 3x3."""

    def __init__(self, cin: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(cin, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        return torch.cat([self.relu(self.expand1(x)), self.relu(self.expand3(x))], 1)


class SqueezeNet(nn.Module):
    """Maps ``[N, 3, H, W]`` images to ``[N, 1000]`` logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(512, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Both sizes are the paper's: batch 1 at 224x224."""
    del size
    x = image(224)
    return finish(SqueezeNet(), x), (x,)
