"""ResNeXt-50 (32x4d): Xie et al., "Aggregated Residual Transformations", 2017, table 1.

4.2 GMAC and 25.0 million parameters at 224x224.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import finish, image


def conv_bn(
    cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


class Block(nn.Module):
    """Figure 3 (c): a bottleneck whose 3x3 convolution has 32 groups."""

    def __init__(self, cin: int, width: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(cin, width, 1),
            conv_bn(width, width, 3, stride, groups=32),
            conv_bn(width, cout, 1, relu=False),
        )
        same = stride == 1 and cin == cout
        self.skip = nn.Identity() if same else conv_bn(cin, cout, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class ResNeXt50(nn.Module):
    """Maps ``[N, 3, H, W]`` images to ``[N, 1000]`` logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
        cin = 64
        for stage, (blocks, width) in enumerate(((3, 128), (4, 256), (6, 512), (3, 1024))):
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                layers.append(Block(cin, width, 2 * width, stride))
                cin = 2 * width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.features(x)), 1))


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Both sizes are the paper's: batch 1 at 224x224."""
    del size
    x = image(224)
    return finish(ResNeXt50(), x), (x,)
