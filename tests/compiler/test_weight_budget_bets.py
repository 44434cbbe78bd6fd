"""Bets on routes under a budget for weights: both plans fetch the same ones, within one budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.compiler.measure import bets
from plait.kernels import routing
from plait.runtime.executor import Executor
from plait.runtime.plan import FetchStep

EXPERTS, WIDTH = 6, 32


class Experts(nn.Module):
    """One product of experts, chosen by what is in the second column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, 1:2].abs() * 100).long() % EXPERTS
        route = routing.route(index, EXPERTS)
        return routing.routed_linear(x, *route, self.weight, None, False, 1, True)


class Net(nn.Module):
    """Branches by the first column, one of them with experts; then experts for all."""

    def __init__(self) -> None:
        super().__init__()
        dense = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.router = plait.Router([Experts(), dense], lambda x: x[:, 0].long(), combine="sum")
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(x + self.router(x))


def cells(branches: Sequence[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(len(branches), WIDTH, generator=generator) * 0.9
    x[:, 0] += torch.tensor(branches)
    return x


USUAL = [(cells([0] * 12, k),) for k in range(16)]
PIPELINE = "normalize,outline-branches,speculate-routes{%s},prefetch-weights,fuse-vertical"


def timed(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Stands in for timing: the special plan, the last one, always wins."""
    for call in calls:
        call()
    return [1.0] * (len(calls) - 1) + [0.1]


@pytest.fixture(autouse=True)
def wins(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bets, "timed", timed)
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def pair(model: Net, bet: str, budget: Any = "60%") -> tuple[Any, Any]:
    """Compiled with a bet and a budget, and with the bet alone."""
    options: dict[str, Any] = {
        "profile": plait.profile(model, USUAL, holdout=0.25),
        "pipeline": PIPELINE % bet,
        "example_inputs": USUAL[0],
        "tune": "off",
    }
    alone = plait.compile(copy.deepcopy(model), **options)
    return plait.compile(model, weight_budget=budget, **options), alone


def fetches(executor: Any) -> int:
    """Fetches in a plan and its parts."""
    own = sum(isinstance(step, FetchStep) for step in executor.plan.steps)
    return own + sum(fetches(p) for p in executor.parts.values() if isinstance(p, Executor))


def agree(mine: Any, alone: Any, model: Net) -> None:
    for number, branches in enumerate(([0] * 12, [1] * 12, [0, 1] * 6, [0] * 11 + [1], [5] * 12)):
        x = cells(branches, number)
        assert torch.equal(mine(x), alone(x))
        torch.testing.assert_close(mine(x), model(x), rtol=1e-4, atol=1e-5)
    tier = mine.weight_tier
    assert tier.counters.fetches and tier.counters.misses and not tier.counters.over
    assert tier.counters.peak_bytes <= tier.capacity


def test_the_likely_plan_fetches_what_the_general_one_does(model: Net) -> None:
    mine, alone = pair(model, "sized=false,min_cells=1000")
    speculation = mine.programs[-1].executable.speculation
    assert speculation is not None and speculation.bet.assumed == {("router", 0): (0,)}
    assert fetches(speculation.likely) == fetches(speculation.general) == 2
    assert len(mine.weight_tier.sites) == 2  # one copy of each expert, whatever plan runs
    before = speculation.hits, speculation.misses
    agree(mine, alone, model)
    assert speculation.hits > before[0] and speculation.misses > before[1]


def test_a_plan_for_a_number_of_rows_fetches_too(model: Net) -> None:
    mine, alone = pair(model, "likely=2.0,dense=2.0")
    executor = mine.programs[-1].executable.executor
    sized = [part for name, part in executor.parts.items() if "_rows" in name]
    assert [fetches(part) for part in sized] == [1]
    assert len(mine.weight_tier.sites) == 2
    agree(mine, alone, model)


def test_a_bet_that_the_budget_has_no_room_for_is_refused(
    model: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.compiler.weights.budget import WeightStore

    asked: list[int] = []
    close = WeightStore.close

    def second_has_no_room(
        self: WeightStore, tiered: Any, least: Any, stayed: int, *to: Any
    ) -> int:
        asked.append(stayed)
        return close(self, tiered, least, stayed if len(asked) == 1 else 1 << 30, *to)

    monkeypatch.setattr(WeightStore, "close", second_has_no_room)
    mine, alone = pair(model, "sized=false,min_cells=1000")
    assert len(asked) == 2 and mine.programs[-1].executable.speculation is None
    assert any(r.id == "PLT-SPC-009" and "PLT-OPT-006" in r.reason for r in mine.remarks)
    for branches in ([0] * 12, [0, 1] * 6):
        torch.testing.assert_close(mine(cells(branches)), alone(cells(branches)))


def test_plans_made_anew_while_running_keep_the_budget(model: Net) -> None:
    plain = plait.compile(copy.deepcopy(model), tune="off", example_inputs=USUAL[0])
    mine = plait.compile(
        model, profile="online", tune="off", weight_budget="60%", example_inputs=USUAL[0]
    )
    for k in range(40):
        torch.testing.assert_close(mine(cells([0] * 12, k)), plain(cells([0] * 12, k)))
    executable = mine.programs[-1].executable
    executable.monitor.wait()
    assert executable.monitor.rebuilt == 1
    for k in range(8):
        x = cells([k % 2] * 12, k)
        torch.testing.assert_close(mine(x), plain(x))
    tier = mine.weight_tier
    assert fetches(executable.executor) >= 2 and len(tier.sites) == 2
    assert tier.counters.peak_bytes <= tier.capacity
