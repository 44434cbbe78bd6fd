"""RandWire: Xie et al., "Exploring Randomly Wired Neural Networks", 2019, table 1, WS(4, 0.75).

The small regime (C = 78, 0.58 GMAC) is the CPU size, the regular regime (C = 109, 4.0 GMAC) the
paper size. Three stages are random graphs of 32 nodes (in the regular regime one of 16 comes
first); edges run from the lower to the higher number, and a node sums its inputs with learnt
weights, then ReLU, separable 3x3 convolution, batch norm.
"""

from __future__ import annotations

import networkx
import torch
from torch import Tensor, nn

from .common import SEED, finish, image


def separable(cin: int, cout: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cin, 3, stride, 1, groups=cin, bias=False),
        nn.Conv2d(cin, cout, 1, bias=False),
        nn.BatchNorm2d(cout),
    )


class Node(nn.Module):
    """Weighted sum of the inputs (sigmoid of learnt weights), ReLU, separable convolution."""

    def __init__(self, inputs: int, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.weight = nn.Parameter(torch.randn(inputs, generator=generator))
        self.conv = separable(cin, cout, stride)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        if len(inputs) == 1:  # one edge needs no weight
            return self.conv(torch.relu(inputs[0]))
        weight = torch.sigmoid(self.weight)
        total = inputs[0] * weight[0]
        for i in range(1, len(inputs)):
            total = total + inputs[i] * weight[i]
        return self.conv(torch.relu(total))


class Stage(nn.Module):
    """A random graph: input nodes have stride 2; the output is the mean of the output nodes."""

    def __init__(self, nodes: int, cin: int, cout: int, seed: int) -> None:
        super().__init__()
        graph = networkx.connected_watts_strogatz_graph(nodes, 4, 0.75, tries=200, seed=seed)
        self.sources = [sorted(m for m in graph[n] if m < n) for n in range(nodes)]
        self.sinks = [n for n in range(nodes) if all(m < n for m in graph[n])]
        self.nodes = nn.ModuleList(
            Node(len(s), cout, cout, 1) if s else Node(1, cin, cout, 2) for s in self.sources
        )

    def forward(self, x: Tensor) -> Tensor:
        values: list[Tensor] = []
        for node, sources in zip(self.nodes, self.sources, strict=True):
            values.append(node([values[s] for s in sources] if sources else [x]))
        total = values[self.sinks[0]]
        for n in self.sinks[1:]:
            total = total + values[n]
        return total / len(self.sinks)


class RandWire(nn.Module):
    """Maps ``[N, 3, H, W]`` images to ``[N, 1000]`` logits."""

    def __init__(self, regular: bool, classes: int = 1000) -> None:
        super().__init__()
        c = 109 if regular else 78
        layers: list[nn.Module] = [
            nn.Conv2d(3, c // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(c // 2),
        ]
        if regular:
            layers.append(Stage(16, c // 2, c, SEED))
            widths = [c, 2 * c, 4 * c, 8 * c]
        else:
            layers += [nn.ReLU(), nn.Conv2d(c // 2, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c)]
            widths = [c, c, 2 * c, 4 * c]
        for i in range(3):
            layers.append(Stage(32, widths[i], widths[i + 1], SEED + 1 + i))
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(widths[-1], 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.head(self.features(x))), 1))


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Batch 1 at 224x224; "cpu" is the small regime, "paper" the regular one."""
    x = image(224)
    return finish(RandWire(regular=size == "paper"), x), (x,)
