"""Branches of routers under a budget for weights: the same bits, and only the taken in memory."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.kernels.routing import gather, route, routed_linear, scatter
from plait.runtime.plan import BranchStep, Plan

sys.path.insert(0, str(Path(__file__).parent))
from budgets import under_budgets, within_budget  # a plain module beside this file

WIDTH, INNER = 64, 512


class Tail(nn.Module):
    """Numbers without weights of their own worth fetching."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * 0.5


class Two(nn.Module):
    """Branches within a branch, chosen by the second column; and weights beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, 384)
        self.after = nn.Linear(384, WIDTH)
        self.one = nn.Linear(384, 384)
        self.two = nn.Sequential(nn.Linear(384, 512), nn.ReLU(), nn.Linear(512, 384))

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, 1:2] > 0).long()
        first, second = scatter(self.before(x), index, 2)
        return self.after(gather([self.one(first), self.two(second)], index, None))


class Table(nn.Module):
    """A lookup, which a library operator makes: its weights are read as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(300, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[(x[:, 2].abs() * 100).long() % 300]


def dense(inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, inner), nn.GELU(), nn.Linear(inner, WIDTH))


class Net(nn.Module):
    """Six unlike branches, and a router with two more; routes are an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.branches = nn.ModuleList(
            [dense(INNER), dense(2 * INNER), Two(), Table(), Tail(), dense(INNER)]
        )
        self.others = nn.ModuleList([dense(3 * INNER), dense(INNER)])

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        x = self.first(x)
        parts = scatter(x, index, 6)
        x = x + gather([b(p) for b, p in zip(self.branches, parts, strict=True)], index, None)
        other = index[:, :1] % 2
        parts = scatter(x, other, 2)
        return x + gather([b(p) for b, p in zip(self.others, parts, strict=True)], other, None)


LARGEST = 4 * (2 * WIDTH * 384 + 2 * 384 * 512)
"""Weights worth fetching of `Two` and the larger branch within it: there is no larger branch."""


def weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def small(model: nn.Module) -> int:
    """Bytes of what is not worth fetching, and of what is outside of branches."""
    return sum(
        p.nbytes for n, p in model.named_parameters() if n.startswith("first") or p.nbytes < 1 << 16
    )


def example(cells: int, seed: int = 0, branches: Sequence[int] | None = None) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(cells, WIDTH, generator=generator)
    index = torch.randint(0, 7, (cells, 2), generator=generator)
    if branches is not None:
        index = torch.tensor(branches).view(-1, 1).expand(-1, 2).contiguous()
    return x, index


def compiled(model: nn.Module, budget: Any, **options: Any) -> Any:
    dim = torch.export.Dim("t")
    shapes = {"x": {0: dim}, "index": {0: dim}}
    options = {"example_inputs": example(9), "dynamic_shapes": shapes, "tune": "off", **options}
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
    """Compiled with everything in memory, with room for some branches, and for hardly one."""
    with torch.no_grad():
        return under_budgets(compiled, net, small(net) + LARGEST)


ROUTES = st.one_of(
    st.integers(0, 6).map(lambda b: [(b, b)] * 7),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=24),
    st.permutations([(b, b) for b in range(6)]),
)


@settings(max_examples=40, deadline=None)
@given(ROUTES)
def test_any_routes_give_the_same_bits(variants: dict[str, Any], routes: list[Any]) -> None:
    index = torch.tensor(routes)
    x, _ = example(len(index), seed=len(index))
    wanted = variants["resident"](x, index)
    for name in ("some", "one", "demand"):
        assert torch.equal(variants[name](x, index), wanted), name
        within_budget(variants[name])


def test_the_small_budget_works_in_waves_and_the_larger_one_need_not(
    variants: dict[str, Any],
) -> None:
    for name, branches, waves in (("one", range(6), True), ("some", [0, 1, 0], False)):
        counters = variants[name].weight_tier.counters
        before = counters.waves
        variants[name](*example(len(branches), branches=list(branches)))
        assert (counters.waves > before) == waves


def test_only_what_is_taken_is_fetched(variants: dict[str, Any]) -> None:
    model = variants["some"]
    tier = model.weight_tier
    tier.record = []
    model(*example(4, branches=[1, 1, 5, 4]))
    outer = max(tier.sites, key=lambda site: len(site.units))
    assert (outer.number, (1, 5)) in tier.record  # the fourth has nothing to be fetched
    assert len(tier.record) == 2
    tier.record = None


def test_plans_tell_what_their_branches_fetch(variants: dict[str, Any]) -> None:
    plan = variants["some"].plan
    steps = [s for s in plan.steps if isinstance(s, BranchStep)]
    fetched = [[len(plan.parts[name].fetched) for name in step.plans] for step in steps]
    assert fetched == [[2, 2, 2, 1, 0, 2], [2, 2]]
    text = str(plan)
    assert "fetched where it runs: " in text
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json() and str(again) == text
    assert "fetched where" not in str(variants["resident"].plan)
    assert "PLT-PRE-001" in variants["some"].explain()


def test_the_model_keeps_its_parameters(net: Net) -> None:
    model = copy.deepcopy(net)
    before = dict(model.named_parameters())
    wanted = model(*example(9))
    budget = compiled(model, "60%")
    assert all(before[n] is p for n, p in model.named_parameters())
    assert all(torch.equal(p, dict(net.named_parameters())[n]) for n, p in before.items())
    assert torch.equal(model(*example(9)), wanted)
    model.branches[1][0].weight.mul_(2.0)
    model.branches[3].table.add_(1.0)
    resident = compiled(copy.deepcopy(model), None)
    assert torch.equal(budget(*example(9)), resident(*example(9)))


def test_weights_that_something_else_reads_stay(net: Net) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            weight = self.net.branches[0][0].weight
            return self.net(x, index) + nn.functional.linear(x, weight)[:, :WIDTH]

    budget = compiled(Tied().eval(), "60%")
    resident = compiled(Tied().eval(), None)
    assert torch.equal(budget(*example(9)), resident(*example(9)))
    (remark,) = (r for r in budget.remarks if r.id == "PLT-PRE-006")
    assert "no branch reads" in remark.reason
    steps = [s for s in budget.plan.steps if isinstance(s, BranchStep)]
    assert len(budget.plan.parts[steps[0].plans[0]].fetched) == 1


def test_routers_that_share_branches_share_what_is_fetched(net: Net) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = copy.deepcopy(net.branches[:2])

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            for column in (0, 1):
                own = index[:, column : column + 1] % 2
                parts = scatter(x, own, 2)
                x = x + gather([b(p) for b, p in zip(self.branches, parts, strict=True)], own, None)
            return x

    model = Twice().eval()
    budget, resident = compiled(model, "80%"), compiled(copy.deepcopy(model), None)
    for seed in range(4):
        assert torch.equal(budget(*example(5, seed)), resident(*example(5, seed)))
    assert len(within_budget(budget).sites) == 1


def test_calls_from_many_threads(variants: dict[str, Any]) -> None:
    wrong: list[Any] = []

    def work(name: str, seed: int) -> None:
        with torch.no_grad():
            for k in range(10):
                inputs = example(3 + seed, seed=seed * 100 + k)
                if not torch.equal(variants[name](*inputs), variants["resident"](*inputs)):
                    wrong.append((name, seed))

    threads = [
        threading.Thread(target=work, args=("one" if n % 2 else "some", n)) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_branch_that_fails_leaves_the_tier_in_order(net: Net) -> None:
    class Lookup(Table):
        def forward(self, x: Tensor) -> Tensor:
            return self.table[x[:, 2].long()]

    model = copy.deepcopy(net)
    model.branches[3] = Lookup().eval()
    least = small(model) + LARGEST
    budget, resident = compiled(model, least), compiled(copy.deepcopy(model), None)
    x, index = example(6, branches=list(range(6)))
    x = x.clamp(-1, 1)
    assert torch.equal(budget(x, index), resident(x, index))
    model.first.weight.zero_()
    model.first.bias.fill_(1e6)
    with pytest.raises((IndexError, RuntimeError)):
        budget(x, index)
    model.first.bias.fill_(0.5)
    resident = compiled(copy.deepcopy(model), None)
    assert torch.equal(budget(x, index), resident(x, index))
    within_budget(budget)


# -- bets ------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """A router by the first column."""

    def __init__(self) -> None:
        super().__init__()
        branches = [dense(INNER), dense(2 * INNER), Two()]
        self.router = plait.Router(branches, lambda x: x[:, 0].long(), combine="sum")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.router(x)


def cells(branches: Sequence[int], seed: int = 0) -> Tensor:
    x = torch.rand(len(branches), WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.9
    x[:, 1] -= 0.45
    x[:, 0] += torch.tensor(branches)
    return x


def timed(calls: Sequence[Any]) -> list[float]:
    """Stands in for timing: the special plan, the last one, always wins."""
    for call in calls:
        call()
    return [1.0] * (len(calls) - 1) + [0.1]


BETS = "normalize,outline-branches,speculate-routes{%s},prefetch-weights,fuse-vertical"


def with_bets(routes: Sequence[int], bet: str, budget: Any) -> tuple[Any, Any]:
    """Compiled with a profile of such routes under a budget, and without a budget."""
    torch.manual_seed(1)
    model = Routed().eval()
    profile = plait.profile(model, [(cells(routes, k),) for k in range(16)], holdout=0.25)
    options: dict[str, Any] = {"example_inputs": (cells(routes),), "tune": "off"}
    options |= {"profile": profile, "pipeline": BETS % bet}
    alone = plait.compile(copy.deepcopy(model), **options)
    return plait.compile(model, weight_budget=budget, **options), alone


def agree(mine: Any, alone: Any) -> None:
    routes = ([0] * 12, [1] * 12, [2] * 12, [0, 1, 2] * 4, [0] * 11 + [2], [5] * 12)
    for number, branches in enumerate(routes):
        x = cells(branches, number)
        assert torch.equal(mine(x), alone(x))


def test_a_branch_that_is_deferred_is_fetched_once_it_is_compiled() -> None:
    mine, alone = with_bets([0, 1] * 6, "likely=2.0,sized=false", "80%")
    assert "PLT-SPC-001" in {r.id for r in mine.remarks}
    (name,) = mine.plan.deferred
    tier = mine.weight_tier
    mine(cells([0, 1] * 6))
    assert [site.bytes[2] for site in tier.sites] == [0]
    agree(mine, alone)
    fetching = mine.programs[-1].executable.executor.fetching
    (site,) = fetching.sites.values()
    assert min(site.bytes) > 0 and len(site.units) == 3
    agree(mine, alone)
    within_budget(mine)


def test_a_deferred_branch_counts_for_the_least_budget() -> None:
    with pytest.raises(plait.OptionError, match=r"largest expert's or branch's weights are 1\.\d+"):
        with_bets([0, 1] * 6, "likely=2.0,sized=false", 1 << 20)


def test_the_likely_plan_holds_the_branches_that_became_part_of_it(monkeypatch: Any) -> None:
    from plait.compiler.measure import bets

    monkeypatch.setattr(bets, "timed", timed)
    mine, alone = with_bets([0] * 12, "sized=false,min_cells=1000", "85%")
    executable = mine.programs[-1].executable
    assert executable.speculation is not None
    agree(mine, alone)
    tier = within_budget(mine)
    weights_of = {n: p.nbytes for n, p in mine.named_parameters()}
    held = sum(v for n, v in weights_of.items() if n.startswith("router.branches.0"))
    assert tier.capacity <= 0.85 * sum(weights_of.values()) - held
    refused, plain = with_bets([0] * 12, "sized=false,min_cells=1000", "60%")
    assert refused.programs[-1].executable.speculation is None
    assert any(r.id == "PLT-SPC-009" and "PLT-OPT-006" in r.reason for r in refused.remarks)
    assert refused.weight_tier.capacity > 0.59 * sum(weights_of.values())  # given back
    torch.testing.assert_close(refused(cells([0, 1, 2])), plain(cells([0, 1, 2])))


def test_the_room_of_a_plan_that_is_no_more_is_given_back(monkeypatch: Any) -> None:
    from plait.compiler.measure import bets

    monkeypatch.setattr(bets, "timed", timed)
    mine, alone = with_bets([0] * 12, "sized=false,min_cells=1000", "85%")
    tier = mine.weight_tier
    before = tier.capacity
    mine(cells([0] * 5))  # another size, another program, which needs as much for good
    assert len(mine.programs) == 2 and tier.capacity == before
    for program in mine.programs:
        program.executable._specialise({})  # without bets
    wanted = int(0.85 * weights(mine)) - small(mine)
    assert before < tier.capacity == wanted
    agree(mine, alone)
    within_budget(mine)


def test_a_plan_for_a_number_of_rows_is_fetched_with_its_branch(monkeypatch: Any) -> None:
    from plait.compiler.measure import bets

    monkeypatch.setattr(bets, "timed", timed)
    mine, alone = with_bets([0, 1] * 6, "likely=2.0,dense=2.0", "80%")
    step = next(s for s in mine.plan.steps if isinstance(s, BranchStep))
    sized = [name for _, name in step.sized if name]
    assert sized and all(mine.plan.parts[name].fetched for name in sized)
    agree(mine, alone)
    within_budget(mine)


def test_a_profile_seeds_the_forecast_of_branches() -> None:
    mine, alone = with_bets([2] * 12, "likely=2.0,dense=2.0,sized=false", "80%")
    (site,) = mine.programs[-1].executable.executor.fetching.sites.values()
    assert mine.weight_tier.forecast._total[site.number].argmax() == 2
    agree(mine, alone)


# -- saved models ---------------------------------------------------------------------------------


def test_a_loaded_model_keeps_a_budget(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "model.plait"
    resident = compiled(copy.deepcopy(net), None)
    compiled(copy.deepcopy(net), "60%").save(path)
    own, given = plait.load(path), plait.load(path, weight_budget=small(net) + LARGEST)
    path.unlink()
    for seed in range(4):
        wanted = resident(*example(9, seed))
        assert torch.equal(own(*example(9, seed)), wanted)
        assert torch.equal(given(*example(9, seed)), wanted)
    assert within_budget(given).counters.waves and within_budget(own).counters.fetches
    assert all(torch.equal(own.state_dict()[n], p) for n, p in net.state_dict().items())


# -- refusals --------------------------------------------------------------------------------------


def test_a_budget_below_the_largest_branch_names_the_least_there_is(net: Net) -> None:
    with pytest.raises(plait.OptionError, match=r"PLT-OPT-006.*give at least \d+ bytes") as caught:
        compiled(copy.deepcopy(net), small(net) + LARGEST // 2)
    assert "largest expert's or branch's weights" in str(caught.value)
    least = int(caught.value.hint.split()[3])
    model, resident = compiled(copy.deepcopy(net), least), compiled(copy.deepcopy(net), None)
    inputs = example(6, branches=list(range(6)))
    assert torch.equal(model(*inputs), resident(*inputs))
    within_budget(model)
    with pytest.raises(plait.OptionError):
        compiled(copy.deepcopy(net), least - 1)


def test_weights_that_cannot_be_read_back_are_one_error_and_read_again_later(
    variants: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.runtime import bank as banks

    def broken(*_: object) -> None:
        raise banks.BankError("weights cannot be read back: Input/output error")

    for name in ("some", "one"):
        with monkeypatch.context() as patched:
            patched.setattr(banks.Bank, "load", broken)
            with pytest.raises(plait.FileError, match=r"PLT-PRE-005.*Input/output error"):
                for branch in (0, 1, 2, 3, 5):  # some of them are still in memory
                    variants[name](*example(3, branches=[branch] * 3))
        inputs = example(9, seed=1)
        assert torch.equal(variants[name](*inputs), variants["resident"](*inputs))
        within_budget(variants[name])


class Experts(nn.Module):
    """Two experts for each row, of a choice that the first column makes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, INNER, WIDTH) / 8)
        self.down = nn.Parameter(torch.randn(4, WIDTH, INNER) / 20)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, :1] > 0).long() + torch.arange(2)
        offsets, order = route(index, 4)
        hidden = routed_linear(x, offsets, order, self.up, None, False, 2, False).relu()
        return routed_linear(hidden, offsets, order, self.down, None, False, 0, True)[::2]


def test_what_one_stage_has_fetched_makes_room_for_the_next_ones_experts() -> None:
    """Its branch fetches nothing as a whole, so no fetch of its own would let go of them."""
    stages = [Experts(), Experts()]
    heads = [nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)]
    net = plait.EarlyExit(stages, heads, lambda z: z[:, 0] > 9).eval()
    unit = stages[0].up[0].nbytes + stages[0].down[0].nbytes
    rest = sum(p.nbytes for p in net.parameters()) - 8 * unit
    with torch.no_grad():
        tiered = plait.compile(net, tune="off", weight_budget=rest + 3 * unit + unit // 2)
        for rows in (8, 5):
            x = torch.randn(rows, WIDTH)
            torch.testing.assert_close(tiered(x), net(x), rtol=1e-4, atol=1e-4)
    assert not within_budget(tiered).counters.waves
