"""MSDNet: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Classification", 2018.

Every layer keeps features at several scales and adds to each a few channels made from that scale
and the next finer one; a classifier on the coarsest scale after every second layer lets samples
leave. Finer scales are dropped as the network goes on, as in the released code. The weights are
random, the classifiers' temperatures such that equal shares leave at each of the five exits.

CPU size: the CIFAR network (32x32, three scales, growth 6) with ten layers; paper size: the
ImageNet network (224x224, four scales, growth 16, exits after every fourth layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .common import finish, image
from .loops import LoopEarlyExit, balance_exits, exits_taken

BATCH, CONFIDENT = 16, 0.7
Shape = tuple[int, int]  # channels, side


@dataclass(frozen=True)
class Sizes:
    side: int
    stem: int  # channels of the finest scale
    growth: int
    factors: tuple[int, ...]  # channels of each scale relative to the finest; also of bottlenecks
    layers: int  # between exits
    classes: int


SIZES = {
    "cpu": Sizes(32, 16, 6, (1, 2, 4), 2, 10),
    "paper": Sizes(224, 32, 16, (1, 2, 4, 4), 4, 1000),
}
EXITS = 5


class Conv(nn.Sequential):
    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
        )


class Bottleneck(nn.Sequential):
    def __init__(self, cin: int, cout: int, factor: int, stride: int = 1) -> None:
        inner = min(cin, factor * cout)
        super().__init__(Conv(cin, inner, 1), Conv(inner, cout, 3, stride))


class First(nn.Module):
    """Features at every scale, ``[N, c, side, side]`` each, of images."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        channels = [sizes.stem * f for f in sizes.factors]
        if sizes.side >= 224:
            stem: nn.Module = nn.Sequential(Conv(3, channels[0], 7, 2), nn.MaxPool2d(3, 2, 1))
        else:
            stem = Conv(3, channels[0])
        down = [Conv(a, b, 3, 2) for a, b in zip(channels, channels[1:], strict=False)]
        self.scales = nn.ModuleList([stem, *down])
        side = sizes.side // (4 if sizes.side >= 224 else 1)
        self.shapes: list[Shape] = [(c, side >> s) for s, c in enumerate(channels)]

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for scale in self.scales:
            x = scale(x)
            features.append(x)
        return features


class Step(nn.Module):
    """One layer; takes features at the coarsest ``len(shapes)`` scales, drops the finest or not."""

    def __init__(self, sizes: Sizes, shapes: list[Shape], drop: bool) -> None:
        super().__init__()
        self.drop = drop
        self.same, self.down, self.reduce = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.shapes: list[Shape] = []
        factors = sizes.factors[len(sizes.factors) - len(shapes) :]
        for s in range(drop, len(shapes)):
            channels, side = shapes[s]
            grown = sizes.growth * factors[s]
            if s:
                grown //= 2
                finer = Bottleneck(shapes[s - 1][0], grown, factors[s - 1], 2)
                self.down.append(finer)
            self.same.append(Bottleneck(channels, grown, factors[s]))
            total = channels + grown * (2 if s else 1)
            if drop:  # the released code's transition
                self.reduce.append(Conv(total, total // 2, 1))
                total //= 2
            self.shapes.append((total, side))

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        result, down = [], iter(self.down)
        for number, same in enumerate(self.same):
            s = number + self.drop
            parts = [x[s], next(down)(x[s - 1])] if s else [x[s]]
            grown = torch.cat([*parts, same(x[s])], 1)
            result.append(self.reduce[number](grown) if self.drop else grown)
        return result


class Stage(nn.Sequential):
    """Layers up to the next exit: from images or a list of features to a list of features."""

    def __init__(self, before: list[Shape] | None, *steps: First | Step) -> None:
        super().__init__(*steps)
        self.before, self.after = before, steps[-1].shapes


class Packed(Stage):
    """The same where one row is all features of a sample: ``[N, sum of c * side * side]``."""

    def forward(self, input: Tensor) -> Tensor:
        x: Any = input if self.before is None else _unpack(input, self.before)
        return torch.cat([f.flatten(1) for f in super().forward(x)], 1)


class Head(nn.Module):
    """Logits from the coarsest scale; the side there is 8 or 7, halved twice and pooled to 1."""

    def __init__(self, shapes: list[Shape], sizes: Sizes) -> None:
        super().__init__()
        self.shape = shapes[-1]
        channels = self.shape[0] if sizes.side >= 224 else 128
        self.convs = nn.Sequential(
            Conv(self.shape[0], channels, 3, 2), Conv(channels, channels, 3, 2)
        )
        self.pool, self.out = nn.AvgPool2d(2), nn.Linear(channels, sizes.classes)

    def forward(self, x: list[Tensor]) -> Tensor:
        return self.out(self.pool(self.convs(x[-1])).flatten(1))


class PackedHead(Head):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        channels, side = self.shape
        return super().forward([x[:, -channels * side * side :].reshape(-1, channels, side, side)])


class Everything(nn.Module):
    """All exits of all samples, to see every batch norm's statistics."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> list[Tensor]:
        logits = []
        for stage, head in zip(self.model.stages, self.model.heads, strict=True):
            x = stage(x)
            logits.append(head(x))
        return logits


def _unpack(x: Tensor, shapes: list[Shape]) -> list[Tensor]:
    parts = x.split([c * side * side for c, side in shapes], 1)
    return [p.reshape(-1, c, side, side) for p, (c, side) in zip(parts, shapes, strict=True)]


def _stages(sizes: Sizes, make: type[Stage]) -> Iterator[Stage]:
    layers = sizes.layers * EXITS
    interval = math.ceil(layers / len(sizes.factors))
    before, number = None, 1  # the stem counts as the first layer
    for _ in range(EXITS):
        steps: list[First | Step] = [] if before else [First(sizes)]
        shapes = before or steps[0].shapes
        for _ in range(sizes.layers - len(steps)):
            number += 1
            steps.append(Step(sizes, shapes, drop=number % interval == 1 and len(shapes) > 1))
            shapes = steps[-1].shapes
        yield make(before, *steps)
        before = shapes


def _network(
    early_exit: Callable[..., nn.Module], stage: type[Stage], head: type[Head], size: str
) -> nn.Module:
    stages = list(_stages(SIZES[size], stage))
    return early_exit(stages, [head(s.after, SIZES[size]) for s in stages], CONFIDENT)


def _weights(size: str) -> tuple[Any, Tensor]:
    """A model that leaves everywhere, with its batch."""
    x = image(SIZES[size].side, BATCH)
    model = _network(LoopEarlyExit, Packed, PackedHead, size)
    finish(Everything(model), x)
    balance_exits(model.stages, model.heads, lambda head: head.out, x, CONFIDENT)  # type: ignore
    return model, x


def _load(model: nn.Module, size: str, exit: int | None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    source, x = _weights(size)
    model.load_state_dict(source.state_dict())
    if exit is not None:
        sample = int((exits_taken(source, x) == exit - 1).nonzero()[0])
        x = x[sample : sample + 1].clone()
    return model.eval(), (x,)


def build(size: str = "cpu", exit: int | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Images ``[16, 3, side, side]`` to logits; with ``exit`` (1 to 5) one that leaves there."""
    from ... import EarlyExit

    return _load(_network(EarlyExit, Packed, PackedHead, size), size, exit)


def build_plain(size: str = "cpu", exit: int | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with a Python loop over the stages and features in lists."""
    return _load(_network(LoopEarlyExit, Stage, Head, size), size, exit)
