"""Small decisions one after the other, and within each other: what it costs to branch.

``conds``: 8 residual steps, each one of two sides of a `torch.cond`, by the mean of a column, as in
networks that skip or deepen layers by input (SkipNet, Wang et al., ECCV 2018). ``tree``: 2 trees of
experts, three gates deep (Jordan and Jacobs, "Hierarchical mixtures of experts", Neural Computation
1994), each gate sending a sample one way. Features ``[4, 64]`` and ``[16, 64]``; the paper size has
1024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .common import SEED, finish
from .loops import LoopRouter

STEPS, TREES, DEPTH = 8, 2, 3


def _dense(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))


class Choice(nn.Module):
    """A short side or a long one, by the mean of a column; ``plain`` asks Python."""

    def __init__(self, hidden: int, column: int, plain: bool) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(hidden, hidden), _dense(hidden)
        self.column, self.plain = column, plain

    def forward(self, x: Tensor) -> Tensor:
        which = x[:, self.column].mean() > 0
        if self.plain:
            return x + (self.short(x) if which else self.long(x))
        return x + torch.cond(which, self.short, self.long, (x,))


class Gate(nn.Module):
    """Scores ``[N, 2]`` of cells ``[N, hidden]``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.scores = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).softmax(1)


def _tree(hidden: int, depth: int, router: Callable[..., nn.Module]) -> nn.Module:
    if not depth:
        return _dense(hidden)
    below = [_tree(hidden, depth - 1, router) for _ in range(2)]
    return router(below, Gate(hidden), top_k=1)


def build(size: str = "cpu", part: str = "conds") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network and its features."""
    from ... import Router

    return _with(size, part, Router, plain=False)


def build_plain(size: str = "cpu", part: str = "conds") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, decided in Python."""
    return _with(size, part, LoopRouter, plain=True)


def _with(size: str, part: str, router: Any, plain: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    hidden = 1024 if size == "paper" else 64
    generator = torch.Generator().manual_seed(SEED)
    if part == "tree":
        model = nn.Sequential(*[_tree(hidden, DEPTH, router) for _ in range(TREES)])
        return finish(model), (torch.randn(16, hidden, generator=generator),)
    model = nn.Sequential(*[Choice(hidden, k, plain) for k in range(STEPS)])
    return finish(model), (torch.randn(4, hidden, generator=generator),)
