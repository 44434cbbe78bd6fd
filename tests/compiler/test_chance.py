"""Models that seed generators of random numbers, or ask them, while they run."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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


def checkpoints() -> Any:
    return checkpoint(torch.rand, 3, use_reentrant=False)


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


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(3)])
def test_what_another_thread_draws_is_not_the_models(draw: Any) -> None:
    """Threads draw while one captures: beside the first trace here, and not beside the second."""
    traced: list[bool] = []

    def does() -> float:
        if torch.compiler.is_exporting() and not traced:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(draw).result()
        traced.append(torch.compiler.is_exporting())
        return 2.0

    compiled = plait.compile(Draws(does).eval(), tune="off")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # a thread that lives meanwhile
        have = compiled(torch.zeros(3))
    assert torch.equal(have, torch.full((3,), 2.0)) and compiled.programs and len(traced) == 2


@pytest.mark.parametrize("does", [lambda: torch.rand(3), seeds_numpy, checkpoints])
def test_what_follows_torchs_generator_or_is_constant_is_captured(does: Any) -> None:
    model = Draws(does).eval()
    compiled = plait.compile(model, tune="off")
    assert all(map(torch.equal, three(compiled)[:4], three(model)[:4]))
    assert sum(p.calls for p in compiled.programs) == 3
