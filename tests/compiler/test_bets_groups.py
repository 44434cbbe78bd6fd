"""Bets on branches that run together: one path for them, the same results for any routes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.compiler.measure import bets
from plait.passes.route_odds import Grouping, broken, grouping, outcomes

BRANCHES, CELLS, WIDTH = 6, 12, 16
PAIRS = ((0, 3), (1, 4), (2, 5))
PIPELINE = "normalize,outline-branches,speculate-routes{sized=false%s},fuse-vertical"


class Wins:
    """Stands in for timing: every bet that can be won pays."""

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        for call in calls:
            call()
        return [1.0] * (len(calls) - 1) + [0.1]


@pytest.fixture(autouse=True)
def wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bets, "timed", Wins())


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, WIDTH))


def labels(x: Tensor) -> Tensor:
    """What a cell's first two columns name."""
    return x[:, :2].floor().long()


ROUTERS: dict[str, dict] = {
    "top_k": {"scorer": lambda x: x[:, :BRANCHES], "top_k": 2},
    "threshold": {"scorer": lambda x: x[:, :BRANCHES], "threshold": 0.0},
    "threshold sum": {"scorer": lambda x: x[:, :BRANCHES], "threshold": 0.0, "combine": "sum"},
    "labels": {"scorer": labels, "combine": "sum"},
}


class Routed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        branches = [mlp(8 + 4 * (b % 2)) for b in range(BRANCHES)]
        self.router = plait.Router(branches, **ROUTERS[kind])
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.router(x)).relu()


def cells(kind: str, routes: Sequence[Sequence[int]]) -> Tensor:
    """A cell for each of ``routes``, the branches that it takes (two, unless by threshold)."""
    x = torch.rand(len(routes), WIDTH)
    if kind == "labels":
        x[:, :2] = torch.tensor([list(route) for route in routes]).reshape(-1, 2) + 0.5
        return x
    x[:, :BRANCHES] -= 2.0
    for row, route in enumerate(routes):
        for b in route:
            x[row, b] += 2.0
    return x


def mixed(*routes: Sequence[int]) -> list[list[list[int]]]:
    """Batches whose cells take one of ``routes`` each."""
    return [[list(routes[(k + n) % len(routes)]) for n in range(CELLS)] for k in range(16)]


ANY = ([0, 1, 3], [2, 4, 5], [], [0, 1, 2, 3, 4, 5], [2])
GROUPS = ({0, 1, 3}, {2}, {4, 5})
"""What runs together in these."""
USUAL = {
    "together": mixed([0, 3]),
    "pairs": mixed(*PAIRS),
    "any": mixed(*ANY),
    "alone": mixed([0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 0]),
    "held out": [*mixed(*PAIRS)[:12], *([[0, 1], *routes[1:]] for routes in mixed(*PAIRS)[12:])],
}


@functools.cache
def made(kind: str, usual: str, options: str = ""):
    """A model, compiled with bets on the routes of ``usual`` batches, and without bets."""
    model = Routed(kind).eval()
    batches = [(cells(kind, routes),) for routes in USUAL[usual]]
    profile = plait.profile(model, batches, holdout=0.25)
    shapes = ({0: torch.export.Dim("n", min=0, max=99)},)
    with torch.no_grad():
        compiled, plain = (
            plait.compile(
                model,
                profile=p,
                tune="off",
                example_inputs=batches[0],
                dynamic_shapes=shapes,
                pipeline=PIPELINE % options,
            )
            for p in (profile, None)
        )
    return model, compiled, plain


def speculation(compiled):
    return compiled.programs[0].executable.speculation


def reasons(compiled, remark: str) -> list[str]:
    return [r.reason for r in compiled.remarks if r.id == remark]


def check(kind: str, model, compiled, plain, routes, won: bool | None = None) -> None:
    """A call gives what it does without bets: the very bits where the bet is lost.

    A single cell, and none, have programs of their own.
    """
    bet = speculation(compiled)
    before = bet.hits
    x = cells(kind, routes)
    with torch.no_grad():
        result, wanted = compiled(x), plain(x)
        torch.testing.assert_close(result, wanted)
        torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-5)
    hit = bet.hits > before
    if len(routes) > 1:
        assert won is None or hit == won
        assert hit or torch.equal(result, wanted)


MISSES = [[[0, 2]] * CELLS, [[0, 3]] * (CELLS - 1) + [[4, 3]]]


@pytest.mark.parametrize("kind", ROUTERS)
def test_cells_that_all_take_the_same_branches(kind: str) -> None:
    parts = made(kind, "together")
    assert speculation(parts[1]).bet.assumed == {("router", 0): (0, 3)}
    assert not speculation(parts[1]).bet.grouped
    (reason,) = reasons(parts[1], "PLT-SPC-014")
    assert reason.endswith("0+3 together in 12 of 12 fitted and 4 of 4 held-out batches")
    for count in (CELLS, 2):
        check(kind, *parts, [[3, 0]] * count, won=True)
    for routes in MISSES:
        check(kind, *parts, routes, won=False)
    assert "router: branches 0+3 as one" in parts[1].explain()


@pytest.mark.parametrize("kind", ROUTERS)
def test_cells_that_take_different_pairs(kind: str) -> None:
    parts = made(kind, "pairs")
    assert speculation(parts[1]).bet.grouped == {("router", 0): Grouping(PAIRS, whole=True)}
    for count in (CELLS, 2):
        check(kind, *parts, USUAL["pairs"][0][:count], won=True)
    check(kind, *parts, [[4, 1]] * CELLS, won=True)  # all to one
    for routes in MISSES:
        check(kind, *parts, routes, won=False)
    assert "router: branches 0+3, 1+4, 2+5 as one" in parts[1].explain()


@pytest.mark.parametrize("kind", ["threshold", "threshold sum"])
def test_cells_that_take_any_number_of_groups(kind: str) -> None:
    groups = tuple(tuple(sorted(group)) for group in GROUPS)
    parts = made(kind, "any")
    assert speculation(parts[1]).bet.grouped == {("router", 0): Grouping(groups, whole=False)}
    for wanted in (USUAL["any"][0], [[]] * CELLS, [[4, 5]] * 3, [[0, 1, 2, 3]] * CELLS):
        check(kind, *parts, wanted, won=True)
    for wanted in ([[0]] * CELLS, [[0, 1]] + [[2]] * 5, [[5]] * 2):
        check(kind, *parts, wanted, won=False)


@pytest.mark.parametrize("usual", ["together", "pairs"])
def test_one_cell_and_none(usual: str) -> None:
    parts = made("top_k", usual)
    for routes in ([[3, 0]], [[0, 2]], []):
        check("top_k", *parts, routes)


@pytest.mark.parametrize("usual", ["together", "pairs"])
def test_labels_that_are_no_groups(usual: str) -> None:
    """Twice the same branch, none at all, half of a group."""
    parts = made("labels", usual)
    for route in ([0, 0], [3, 3], [0, BRANCHES], [-1, 3], [-1, BRANCHES], [7, 99]):
        for routes in ([route] * CELLS, [[0, 3]] * (CELLS - 1) + [route]):
            check("labels", *parts, routes, won=False)


SETS = st.lists(
    st.lists(st.integers(0, BRANCHES - 1), min_size=2, max_size=2, unique=True), max_size=9
)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(ROUTERS)),
    usual=st.sampled_from(["together", "pairs"]),
    routes=st.one_of(SETS, st.lists(st.sampled_from([[0, 3], [4, 1], [2, 5]]), max_size=9)),
)
def test_any_routes(kind: str, usual: str, routes: list[list[int]]) -> None:
    """Drawn at random, against the plan without bets and the model."""
    sets = {tuple(sorted(route)) for route in routes}
    won = sets <= ({(0, 3)} if usual == "together" else set(PAIRS))
    if len(routes) > 1:
        check(kind, *made(kind, usual), routes, won)


@settings(max_examples=30, deadline=None)
@given(routes=st.lists(st.sets(st.integers(0, BRANCHES - 1)), min_size=2, max_size=9))
def test_any_thresholds(routes: list[set[int]]) -> None:
    whole = all(len(route & group) in (0, len(group)) for route in routes for group in GROUPS)
    check("threshold", *made("threshold", "any"), [sorted(route) for route in routes], whole)


@pytest.mark.parametrize("usual", ["together", "pairs"])
def test_without_the_option_there_are_no_groups(usual: str) -> None:
    _, compiled, _ = made("top_k", usual, ",groups=false")
    assert speculation(compiled) is None
    assert not reasons(compiled, "PLT-SPC-014")


def test_branches_that_run_alone_are_no_group() -> None:
    assert speculation(made("top_k", "alone")[1]) is None


def test_held_out_batches_judge_groups() -> None:
    """Four of the held-out cells leave their groups: as many batches may be lost, all there are."""
    _, compiled, _ = made("top_k", "held out")
    assert speculation(compiled) is None
    (reason,) = reasons(compiled, "PLT-SPC-009")
    assert "lost in each of 4 held-out batches" in reason


def test_a_group_that_does_not_pay_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bets, "timed", lambda calls: [1.0] * len(calls))
    _, compiled, _ = made.__wrapped__("top_k", "pairs")
    assert speculation(compiled) is None
    (reason,) = reasons(compiled, "PLT-SPC-009")
    assert reason.startswith("1 routers with groups for branches: ")


def test_cells_of_another_type_than_results() -> None:
    """Weights cannot travel with whole numbers."""

    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            branches = [nn.Sequential(nn.Embedding(4, 3)) for _ in range(4)]
            self.router = plait.Router(branches, self.score, top_k=2)

        def score(self, x: Tensor) -> Tensor:
            first = (x % 2).float()
            return torch.stack([first, 1 - first, first, 1 - first], 1) + 1

        def forward(self, x: Tensor) -> Tensor:
            return self.router(x)

    model = Tables().eval()
    batches = [(torch.randint(0, 4, (12,)),) for _ in range(16)]
    profile = plait.profile(model, batches)
    with torch.no_grad():
        compiled = plait.compile(model, profile=profile, tune="off", example_inputs=batches[0])
        assert speculation(compiled) is None and reasons(compiled, "PLT-SPC-007")
        assert torch.allclose(compiled(*batches[0]), model(*batches[0]))


def test_cells_of_several_dimensions() -> None:
    """Images: weights come behind them all the same."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 5, k, padding=k // 2) for k in (1, 3, 3, 5)]
    model = plait.Router(
        [nn.Sequential(c, nn.ReLU()) for c in convolutions],
        lambda x: x[:, 0, 0, :4].sigmoid(),
        top_k=2,
    ).eval()

    def images(*routes: Sequence[int]) -> Tensor:
        x = torch.rand(len(routes), 3, 6, 6)
        for row, route in enumerate(routes):
            x[row, 0, 0, list(route)] += 3.0
        return x

    usual = [(images((0, 2), (1, 3), (2, 0), (3, 1)),) for _ in range(16)]
    profile = plait.profile(model, usual)
    with torch.no_grad():
        compiled = plait.compile(model, profile=profile, tune="off", example_inputs=usual[0])
        bet = speculation(compiled)
        assert bet.bet.grouped == {("", 0): Grouping(((0, 2), (1, 3)), True)}
        for routes in ([(0, 2)] * 4, [(3, 1), (1, 3), (0, 2), (1, 3)], [(0, 1)] * 4):
            x = images(*routes)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert bet.misses == 1


def test_live_routes_are_counted_by_branch() -> None:
    """A hit of groups tells the monitor what each branch had."""
    _, compiled, _ = made("top_k", "pairs")
    monitor = compiled.programs[0].executable.monitor
    with torch.no_grad():
        compiled(cells("top_k", [[0, 3], [3, 0], [1, 4]]))
    notes, _ = monitor._seen[-1]
    assert notes == [("router#0", (2, 1, 0, 2, 1, 0), 6)]


class Loads:
    def __init__(self, together: list[list[int]], cells: list[int], loads=(), slots=()) -> None:
        self.together, self.cells, self.loads, self.slots = together, cells, loads, slots


def test_groups_of_counts() -> None:
    pairs = [[6, 0, 6, 0], [0, 4, 0, 4], [6, 0, 6, 0], [0, 4, 0, 4]]
    found = grouping(Loads(pairs, [5, 5]), 0.9, 2)
    assert found == Grouping(((0, 2), (1, 3)), True)
    assert broken(Loads(pairs, [5, 5]), found) == 0
    one = [[7, 1, 6, 0], [1, 4, 0, 3], [6, 0, 6, 0], [0, 3, 0, 3]]  # a cell that took 0 and 1
    assert broken(Loads(one, [5, 5]), found) >= 1
    assert grouping(Loads(one, [5, 5]), 0.9, 2) is None
    assert grouping(Loads([], [5, 5]), 0.9, 2) is None  # nobody counted
    dead = [row + [0] for row in pairs] + [[0, 0, 0, 0, 2]]
    assert broken(Loads(dead, [5, 5]), found) == 2


def test_outcomes_of_counts() -> None:
    stats = Loads([], [3, 3, 0, 3], [(3, 3, 0), (3, 2, 1), (0, 0, 0), (0, 0, 0)], [6, 6, 0, 6])
    assert outcomes(stats, 2) == [(0, 1), (-2,), (-3,), ()]
