"""Models that seed generators of random numbers, or ask them, while they run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import plait


class Draws(nn.Module):
    """What ``does`` gives is added."""

    def __init__(self, does: Any) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.does()


def seeds() -> Any:
    torch.manual_seed(7)
    return torch.randn(3)


def seeds_generator() -> Any:
    torch.default_generator.manual_seed(7)
    return torch.randn(3)


def forks() -> Any:
    with torch.random.fork_rng():
        first = torch.randn(3)
    return first + torch.randn(3)


def seeds_numpy() -> Any:
    np.random.seed(3)
    return float(np.random.rand())


def three(model: Any) -> list[Any]:
    """Results of three calls after the same seeds, and what is drawn after them."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    results = [model(torch.zeros(3)) for _ in range(3)]
    return [*results, torch.rand(2), torch.tensor([random.random(), np.random.rand()])]


@pytest.mark.parametrize("does", [seeds, seeds_generator, forks, random.random, np.random.rand])
def test_what_a_program_would_not_repeat_is_not_captured(does: Any) -> None:
    model = Draws(does).eval()
    compiled = plait.compile(model, tune="off")
    with pytest.warns(UserWarning, match="PLT-CAP-029"):
        have = three(compiled)
    assert all(map(torch.equal, have, three(model))) and not compiled.programs


@pytest.mark.parametrize("does", [lambda: torch.rand(3), seeds_numpy])
def test_what_follows_torchs_generator_or_is_constant_is_captured(does: Any) -> None:
    model = Draws(does).eval()
    compiled = plait.compile(model, tune="off")
    assert all(map(torch.equal, three(compiled)[:4], three(model)[:4]))
    assert sum(p.calls for p in compiled.programs) == 3
