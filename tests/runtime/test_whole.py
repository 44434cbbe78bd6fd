"""One launch of everything, with fetches of weights and branches, and why there may be more."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.kernels import routing
from plait.runtime import load_costs

WIDTH = 64


class Mixed(nn.Module):
    """A router, experts, a router and a cond; the first elements of a row say where it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = self.router(0), self.router(1)
        self.up = nn.Parameter(torch.randn(4, 512, WIDTH) * 0.05)
        self.down = nn.Parameter(torch.randn(4, WIDTH, 512) * 0.05)
        self.norm = nn.LayerNorm(WIDTH)
        self.sides = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, k), nn.ReLU(), nn.Linear(k, WIDTH)) for k in (512, 640)
        )

    @staticmethod
    def router(place: int) -> nn.Module:
        branches = [
            nn.Sequential(nn.Linear(WIDTH, k), nn.ReLU(), nn.Linear(k, WIDTH))
            for k in (512, 768, 512, 16)
        ]
        return plait.Router(branches, lambda x: (x[:, place] * 10).long() % 4, combine="sum")

    def forward(self, x: Tensor) -> Tensor:
        places = x[:, :2]
        x = torch.cat([places, self.norm(x + self.first(x))[:, 2:]], 1)
        route = routing.route((places[:, :1] * 10).long() % 4, 4)
        inner = routing.routed_linear(x, *route, self.up, None, False, 1, False).relu()
        x = x + routing.routed_linear(inner, *route, self.down, None, False, 0, True)
        x = torch.cat([places, self.norm(x)[:, 2:]], 1)
        x, (left, right) = x + self.last(x), self.sides
        truth = places[:, 0].sum() - places[:, 1].sum() > 0.05
        if torch.compiler.is_exporting():  # in eager mode torch.cond compiles for each size
            return torch.cond(truth, left, right, (x,))
        return left(x) if truth else right(x)


def rows(first: list[int], last: list[int]) -> Tensor:
    x = torch.randn(len(first), WIDTH, generator=torch.Generator().manual_seed(len(first)))
    x[:, 0], x[:, 1] = (torch.tensor(r) / 10 + 0.05 for r in (first, last))
    return x


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", autouse=True)
def cheap_loads() -> Iterator[None]:
    """Loads are cheap, and cost by their bytes: how long one takes says how busy the machine is."""

    def ended(costs: load_costs.LoadCosts, *_: object) -> None:
        costs.cheap = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_costs.LoadCosts, "end", ended)
        yield


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any, nn.Module]:
    """With 60 % of the weights in memory, and with all."""
    torch.manual_seed(0)
    model, x = Mixed().eval(), rows([0, 1, 2, 3], [0, 1, 2, 3])
    made = [
        plait.compile(copy.deepcopy(model), tune="off", example_inputs=(x,), weight_budget=budget)
        for budget in ("60%", None)
    ]
    return made[0], made[1], model


ROUTE = st.lists(st.integers(0, 3), min_size=4, max_size=4)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(first=ROUTE, last=ROUTE)
def test_any_route_under_a_budget(both, first: list[int], last: list[int]) -> None:
    compiled, resident, model = both
    x = rows(first, last)
    have = compiled(x)
    assert torch.equal(have, resident(x)) and torch.equal(have, compiled(x))
    torch.testing.assert_close(have, model(x))
    tier = compiled.weight_tier
    assert tier.counters.peak_bytes <= tier.capacity


def test_branches_experts_and_sides_are_fetched_within_the_launch(both) -> None:
    compiled, _, _ = both
    executor, tier = compiled.programs[0].executable.executor, compiled.weight_tier
    calls = [rows([k] * 4, [j] * 4) for k in range(3) for j in range(3)]
    for x in calls * 4:
        compiled(x)
    inside, before = executor.inside, copy.copy(tier.counters)
    for x in calls * 4:
        compiled(x)
    assert executor.inside - inside > 18 and tier.counters.inside - before.inside > 18
    wanted = [c.hits + c.misses for c in (before, tier.counters)]
    assert wanted[1] - wanted[0] == 36 * 4
    assert tier.counters.bytes_moved > before.bytes_moved


def test_the_side_of_a_cond_that_ran_is_resident(both) -> None:
    compiled, _, _ = both
    executor, tier = compiled.programs[0].executable.executor, compiled.weight_tier
    [cond] = [s.name for s in executor.plan.steps if getattr(s, "kind", "") == "cond"]
    lacked = 0

    def resident() -> int:
        """A bit for each side."""
        with tier._state:
            tier._take_back()
        return tier._resident[executor.fetching.sites[cond].number]

    for first, last in [(3, 0), (0, 3), (3, 1), (1, 3), (2, 2)] * 8:
        inside, before = executor.inside, resident()
        compiled(rows([first] * 4, [last] * 4))
        side = 0 if first > last else 1
        assert resident() >> side & 1
        lacked += executor.inside > inside and not before >> side & 1
    assert lacked  # sides that the launch itself had to fetch


class Inner(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.router = plait.Router(
            [inner, nn.Linear(WIDTH, WIDTH)], lambda x: (x[:, 0] > 0).long(), combine="sum"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x)


class Library(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 1)


class Cond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: torch.logcumsumexp(x, 1), lambda x: x - 1, (x,))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Inner(Library()), "is not kernels alone, but has aten.logcumsumexp"),
        (Inner(Inner(Library())), "is not kernels alone, but has aten.logcumsumexp"),
        (Cond(), "is not kernels alone, but has aten.logcumsumexp"),
        (nn.Sequential(Inner(nn.Identity()), Library(), nn.ReLU()), "is called between"),
    ],
)
def test_why_there_is_more_than_one_launch(model: nn.Module, reason: str) -> None:
    model.eval()
    x = torch.randn(3, WIDTH)
    compiled = plait.compile(model, tune="off", example_inputs=(x,))
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled.programs[0].executable.executor.inside == 0
    (said,) = [r.reason for r in compiled.remarks if r.id == "PLT-BRN-008"]
    assert reason in said and said in compiled.explain()
