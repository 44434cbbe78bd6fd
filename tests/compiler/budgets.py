"""Models under several budgets for weights, and what holds of each after a call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import plait
from plait.kernels import routing
from plait.runtime.tier import Tier

EXPERTS, WIDTH, INNER = 5, 32, 48


class Experts(nn.Module):
    """A block of experts whose routes are an input; ``EXPERTS`` stands for no expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / INNER**0.5)
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        slots = index.shape[1]
        route = routing.route(index, EXPERTS)
        inner = routing.routed_linear(x, *route, self.up, None, False, slots, False).relu()
        out = routing.routed_linear(inner, *route, self.down, self.bias, False, 0, True)
        return out.view(*index.shape, -1).sum(1)


class Net(nn.Module):
    """Two blocks; the second one gets the routes in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.one, self.two = Experts(), Experts()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        x = self.dense(x)
        x = x + self.one(x, index)
        return x + self.two(x, index.flip(0))


UNIT = (INNER + 16) * WIDTH * 4  # the larger matrix, its columns filled up to whole panels


def weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def example(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=generator)
    return x, torch.randint(0, EXPERTS + 1, (tokens, 2), generator=generator)


def compiled(model: nn.Module, budget: Any, **options: Any) -> Any:
    dynamic = {"x": {0: torch.export.Dim("t")}, "index": {0: torch.export.Dim("t")}}
    return plait.compile(
        model, example_inputs=example(9), dynamic_shapes=dynamic, weight_budget=budget, **options
    )


DEMAND = (
    "normalize,outline-branches,prefetch-weights{ahead=false,evict=lru,cached=false},fuse-vertical"
)
"""A pipeline that fetches what is wanted when it is wanted, and drops the least recently used."""


def under_budgets(compiled: Callable[..., Any], net: nn.Module, least: int) -> dict[str, Any]:
    """``net`` with all weights in memory, with room for some parts, and for ``least`` bytes."""
    return {
        "resident": compiled(copy.deepcopy(net), None),
        "some": compiled(copy.deepcopy(net), "60%"),
        "one": compiled(copy.deepcopy(net), least),
        "demand": compiled(copy.deepcopy(net), "60%", pipeline=DEMAND),
    }


def within_budget(model: Any) -> Tier:
    """The tier of a compiled model, which never held more than it may and waits for nothing."""
    tier = model.weight_tier
    assert tier.counters.peak_bytes <= tier.capacity and not tier.counters.over
    assert not tier._waving and not tier._frames
    return tier
