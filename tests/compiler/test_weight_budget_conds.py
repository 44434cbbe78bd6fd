"""Sides of `torch.cond` under a budget for weights: the same bits, and only the taken in memory."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.kernels import routing
from plait.runtime.plan import BranchStep

sys.path.insert(0, str(Path(__file__).parent))
from budgets import under_budgets, within_budget  # a plain module beside this file

WIDTH, INNER = 64, 512


def dense(inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, inner), nn.GELU(), nn.Linear(inner, WIDTH))


class Experts(nn.Module):
    """One product of experts, chosen by the second column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, 1:2].abs() * 100).long() % 6
        route = routing.route(index, 6)
        return routing.routed_linear(x, *route, self.weight, None, False, 1, True)


class Routed(nn.Module):
    """Branches by the first column, and weights beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, 384)
        self.after = nn.Linear(384, WIDTH)
        self.one = nn.Linear(384, 384)
        self.two = nn.Sequential(nn.Linear(384, 512), nn.Linear(512, 384))

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, 0] > 0).long()
        first, second = routing.scatter(self.before(x), index, 2)
        return self.after(routing.gather([self.one(first), self.two(second)], index, None))


class Choice(nn.Module):
    """One of two sides, by the sum of a column."""

    def __init__(self, first: nn.Module, second: nn.Module, column: int) -> None:
        super().__init__()
        self.first, self.second, self.column = first, second, column

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x[:, self.column].sum() > 0, self.first, self.second, (x,))


class Net(nn.Module):
    """Choices one after the other: of plain sides, of a router or experts, of another choice."""

    def __init__(self) -> None:
        super().__init__()
        self.choices = nn.ModuleList(
            [
                Choice(dense(INNER), dense(2 * INNER), 0),
                Choice(Routed(), Experts(), 1),
                Choice(Choice(dense(INNER), dense(3 * INNER), 3), nn.Tanh(), 2),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for choice in self.choices:
            x = x + choice(x)
        return x


LARGEST = 4 * (2 * WIDTH * 384 + 2 * 384 * 512)
"""Weights worth fetching of `Routed` and the larger branch within it: no side needs more."""


def weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def small(model: nn.Module) -> int:
    """Bytes of what is not worth fetching."""
    return sum(p.nbytes for p in model.parameters() if p.nbytes < 1 << 16)


def example(signs: Sequence[int], cells: int = 9, seed: int = 0) -> Tensor:
    """Cells whose first columns have sums of these signs, whatever is added to them."""
    x = torch.randn(cells, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[:, : len(signs)] = x[:, : len(signs)].abs() + 100
    x[:, : len(signs)] *= torch.tensor(signs)
    return x


def compiled(model: nn.Module, budget: Any, **options: Any) -> Any:
    options = {
        "example_inputs": (example([1] * 4),),
        "dynamic_shapes": ({0: torch.export.Dim("t")},),
        "tune": "off",
        **options,
    }
    return plait.compile(model, weight_budget=budget, **options)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def variants(net: Net) -> dict[str, Any]:
    """Compiled with everything in memory, with room for some sides, and for hardly one."""
    with torch.no_grad():
        return under_budgets(compiled, net, small(net) + LARGEST)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4), st.integers(2, 20))
def test_any_sides_give_the_same_bits(
    variants: dict[str, Any], signs: list[int], cells: int
) -> None:
    x = example(signs, cells, cells)
    wanted = variants["resident"](x)
    for name in ("some", "one", "demand"):
        assert torch.equal(variants[name](x), wanted), name
        within_budget(variants[name])


def test_answers_are_those_of_the_model(net: Net, variants: dict[str, Any]) -> None:
    for signs in ([1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -1]):
        x = example(signs)
        torch.testing.assert_close(variants["one"](x), net(x), rtol=1e-4, atol=1e-3)


def test_only_the_side_that_runs_is_fetched() -> None:
    torch.manual_seed(0)
    model = Choice(dense(INNER), dense(2 * INNER), 0).eval()
    budget = small(model) + 4 * 2 * WIDTH * 2 * INNER
    mine, resident = compiled(copy.deepcopy(model), budget), compiled(model, None)
    tier = mine.weight_tier
    (site,) = tier.sites
    first, second = 4 * 2 * WIDTH * INNER, 4 * 2 * WIDTH * 2 * INNER
    assert site.bytes == [first, second] and tier.capacity == second
    tier.record = []
    moved = []
    for sign in (1, 1, -1, -1, 1):
        before = tier.counters.bytes_moved
        x = example([sign])
        assert torch.equal(mine(x), resident(x))
        moved.append(tier.counters.bytes_moved - before)
    assert moved[1:] == [0, second, 0, first]
    assert tier.record == [(0, (side,)) for side in (0, 0, 1, 1, 0)]
    tier.record = None
    within_budget(mine)


def test_plans_tell_what_their_sides_fetch(variants: dict[str, Any]) -> None:
    plan = variants["some"].plan
    steps = [s for s in plan.steps if isinstance(s, BranchStep)]
    assert [s.kind for s in steps] == ["cond"] * 3
    fetched = [[len(plan.parts[name].fetched) for name in step.plans] for step in steps]
    assert fetched == [[2, 2], [2, 0], [0, 0]]  # experts, and an inner side, fetch by themselves
    assert "fetched where it runs: " in str(plan)
    assert not any(r.id in ("PLT-PRE-006", "PLT-PRE-007") for r in variants["some"].remarks)


def test_a_choice_within_a_branch_of_a_router() -> None:
    torch.manual_seed(0)
    inner = Choice(dense(INNER), dense(2 * INNER), 1)
    branches = [nn.Sequential(dense(INNER), inner), dense(INNER)]
    model = plait.Router(branches, lambda x: (x[:, 0] < 0).long(), combine="sum").eval()
    least = small(model) + 4 * 2 * WIDTH * 3 * INNER
    with pytest.raises(plait.OptionError, match="PLT-OPT-006"):
        compiled(copy.deepcopy(model), least - 1)
    some, one = (compiled(copy.deepcopy(model), b) for b in ("80%", least))
    resident = compiled(model, None)
    for signs in ([1, 1], [1, -1], [-1, 1], [-1, -1], [1, 1]):
        x = example(signs)
        x[::2, 0] = -1.0  # some cells go elsewhere
        assert torch.equal(some(x), resident(x)) and torch.equal(one(x), resident(x))
    assert len(within_budget(one).sites) == len(within_budget(some).sites) == 2


class Shares(nn.Module):
    """Both sides read ``both``, one of them a weight that is read outside, too."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.tied = dense(INNER), nn.Linear(WIDTH, INNER)
        self.own = nn.ModuleList([nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(
            x.sum() > 0,
            lambda x: self.own[0](self.both(x)) + self.tied(x),
            lambda x: self.own[1](self.both(x)),
            (x,),
        )
        return y + self.tied(x)


def test_weights_that_others_read_stay_and_are_remarked_on() -> None:
    torch.manual_seed(0)
    model = Shares().eval()
    budget, resident = compiled(copy.deepcopy(model), "90%"), compiled(copy.deepcopy(model), None)
    for sign in (1, -1):
        assert torch.equal(budget(example([sign])), resident(example([sign])))
    said = {r.id: r.reason for r in budget.remarks if r.id.startswith("PLT-PRE")}
    assert set(said) == {"PLT-PRE-001", "PLT-PRE-006", "PLT-PRE-007"}
    assert "0.25 MiB" in said["PLT-PRE-007"]  # the two weights of `both`
    assert within_budget(budget).sites[0].bytes == [4 * WIDTH * INNER] * 2


def test_a_profile_foretells_which_side_runs() -> None:
    torch.manual_seed(0)
    sizes = [(Choice(dense(INNER), dense(2 * INNER), k)) for k in range(2)]
    model = nn.Sequential(*sizes).eval()
    usual = [example([1, 1]), example([-1, -1])] * 8
    profile = plait.profile(model, [(x,) for x in usual])
    pipeline = "normalize,outline-branches,speculate-routes{likely=2.0},prefetch-weights"
    mine = compiled(model, "80%", profile=profile, pipeline=pipeline + ",fuse-vertical")
    forecast, (first, second) = mine.weight_tier.forecast, mine.weight_tier.sites
    for side in (0, 1):
        counts = torch.tensor([1 - side, side]).numpy()
        forecast.saw(first.number, counts, 1)
        following = forecast.next()
        assert following is not None and following[0] == second.number
        assert following[1].argmax() == side
        forecast.saw(second.number, counts, 2)


def test_a_likely_side_that_became_part_of_a_plan_is_resident(monkeypatch: Any) -> None:
    from plait.compiler.measure import bets

    def timed(calls: Sequence[Any]) -> list[float]:
        """Stands in for timing: the special plan, the last one, always wins."""
        for call in calls:
            call()
        return [1.0] * (len(calls) - 1) + [0.1]

    monkeypatch.setattr(bets, "timed", timed)
    torch.manual_seed(0)
    model = Choice(dense(INNER), dense(2 * INNER), 0).eval()
    profile = plait.profile(model, [(example([1], 9, k),) for k in range(16)])
    # Room for the likely side for good, and for the other one behind it.
    mine = compiled(copy.deepcopy(model), weights(model), profile=profile)
    alone = compiled(copy.deepcopy(model), None, profile=profile)
    assert mine.programs[-1].executable.speculation is not None
    for sign in (1, -1, 1, -1):
        x = example([sign])
        assert torch.equal(mine(x), alone(x))


def test_a_loaded_model_keeps_a_budget(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "model.plait"
    resident = compiled(copy.deepcopy(net), None)
    resident.save(path)
    given = plait.load(path, weight_budget=small(net) + LARGEST)
    for signs in ([1, 1, 1, 1], [-1, -1, -1, -1], [1, 1, 1, -1]):
        assert torch.equal(given(example(signs)), resident(example(signs)))
    assert within_budget(given).counters.bytes_moved


def test_a_budget_below_the_largest_side_names_the_least_there_is(net: Net) -> None:
    with pytest.raises(plait.OptionError, match=r"PLT-OPT-006.*give at least \d+ bytes") as caught:
        compiled(copy.deepcopy(net), small(net) + LARGEST // 2)
    least = int(caught.value.hint.split()[3])
    assert least == small(net) + LARGEST
