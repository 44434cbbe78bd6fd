"""Bets on branches that run together: one path for them, the same results for any routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.compiler import bets
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
    return x[:, :2].long()


ROUTERS: dict[str, dict] = {
    "top_k": {"scorer": lambda x: x[:, :BRANCHES], "top_k": 2},
    "top_k sum": {"scorer": lambda x: x[:, :BRANCHES], "top_k": 2, "combine": "sum"},
    "threshold": {"scorer": lambda x: x[:, :BRANCHES], "threshold": 0.0},
    "threshold sum": {"scorer": lambda x: x[:, :BRANCHES], "threshold": 0.0, "combine": "sum"},
    "labels": {"scorer": labels, "combine": "sum"},
}


class Routed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        branches = [mlp(8 + b) for b in range(BRANCHES)]
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


def made(kind: str, usual: Sequence[Sequence[Sequence[int]]], options: str = ""):
    """A model, compiled with bets on the routes of the batches ``usual``, and without."""
    model = Routed(kind).eval()
    profile = plait.profile(model, [(cells(kind, routes),) for routes in usual], holdout=0.25)
    shapes = ({0: torch.export.Dim("n", min=0, max=99)},)
    with torch.no_grad():
        compiled, plain = (
            plait.compile(
                model,
                profile=p,
                tune="off",
                example_inputs=(cells(kind, usual[0]),),
                dynamic_shapes=shapes,
                pipeline=PIPELINE % options,
            )
            for p in (profile, None)
        )
    return model, compiled, plain


def together(group: Sequence[int]) -> list[list[list[int]]]:
    return [[list(group)] * CELLS] * 16


def mixed(groups: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Batches whose cells take one of ``groups`` each, or several where a route is a list of it."""
    return [[list(groups[(k + n) % len(groups)]) for n in range(CELLS)] for k in range(16)]


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
    parts = made(kind, together([0, 3]))
    assert speculation(parts[1]).bet.assumed == {("router", 0): (0, 3)}
    assert not speculation(parts[1]).bet.grouped
    (reason,) = reasons(parts[1], "PLT-SPC-014")
    assert reason.endswith("0+3 together in 12 of 12 fitted and 4 of 4 held-out batches")
    for count in (CELLS, 2, 5, 1, 0):
        check(kind, *parts, [[3, 0]] * count, won=True)
    for routes in MISSES:
        check(kind, *parts, routes, won=False)
    assert "router: branches 0+3 as one" in parts[1].explain()


@pytest.mark.parametrize("kind", ROUTERS)
def test_cells_that_take_different_pairs(kind: str) -> None:
    parts = made(kind, mixed(PAIRS))
    assert speculation(parts[1]).bet.grouped == {
        ("router", 0): Grouping(PAIRS, whole=True),
    }
    for count in (CELLS, 2, 5, 1, 0):
        check(kind, *parts, mixed(PAIRS)[0][:count], won=True)
    check(kind, *parts, [[4, 1]] * CELLS, won=True)  # all to one
    for routes in MISSES:
        check(kind, *parts, routes, won=False)
    assert "router: branches 0+3, 1+4, 2+5 as one" in parts[1].explain()


@pytest.mark.parametrize("kind", ["threshold", "threshold sum"])
def test_cells_that_take_any_number_of_groups(kind: str) -> None:
    groups = ((0, 1, 3), (2,), (4, 5))
    routes = [[0, 1, 3], [2, 4, 5], [], [0, 1, 2, 3, 4, 5], [2]]
    parts = made(kind, mixed(routes))
    assert speculation(parts[1]).bet.grouped == {("router", 0): Grouping(groups, whole=False)}
    for wanted in (mixed(routes)[0], [[]] * CELLS, [[4, 5]] * 3, [[0, 1, 2, 3]] * CELLS, []):
        check(kind, *parts, wanted, won=True)
    for wanted in ([[0]] * CELLS, [[0, 1]] + [[2]] * 5, [[5]] * 2):
        check(kind, *parts, wanted, won=False)


def test_labels_that_are_no_groups() -> None:
    """Twice the same branch, none at all, half of a group."""
    for usual in (together([0, 3]), mixed(PAIRS)):
        parts = made("labels", usual)
        for route in ([0, 0], [3, 3], [0, BRANCHES], [-1, 3], [-1, BRANCHES], [7, 99]):
            for routes in ([route] * CELLS, [[0, 3]] * (CELLS - 1) + [route]):
                check("labels", *parts, routes, won=False)


@pytest.fixture(scope="module")
def prepared() -> dict:
    return {}


SETS = st.lists(
    st.lists(st.integers(0, BRANCHES - 1), min_size=2, max_size=2, unique=True), max_size=9
)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(ROUTERS)),
    usual=st.sampled_from(["together", "mixed"]),
    routes=st.one_of(SETS, st.lists(st.sampled_from([[0, 3], [4, 1], [2, 5]]), max_size=9)),
)
def test_any_routes(prepared: dict, kind: str, usual: str, routes: list[list[int]]) -> None:
    """Drawn at random, against the plan without bets and the model."""
    if (kind, usual) not in prepared:
        batches = together([0, 3]) if usual == "together" else mixed(PAIRS)
        prepared[kind, usual] = made(kind, batches)
    sets = {tuple(sorted(route)) for route in routes}
    won = sets <= ({(0, 3)} if usual == "together" else set(PAIRS))
    check(kind, *prepared[kind, usual], routes, won)


@settings(max_examples=20, deadline=None)
@given(routes=st.lists(st.sets(st.integers(0, BRANCHES - 1)), max_size=9))
def test_any_thresholds(prepared: dict, routes: list[set[int]]) -> None:
    if "any" not in prepared:
        usual = mixed([[0, 1, 3], [2, 4, 5], [], [0, 1, 2, 3, 4, 5], [2]])
        prepared["any"] = made("threshold", usual)
    check("threshold", *prepared["any"], [sorted(route) for route in routes])


def test_without_the_option_there_are_no_groups() -> None:
    for usual in (together([0, 3]), mixed(PAIRS)):
        _, compiled, _ = made("top_k", usual, ",groups=false")
        assert speculation(compiled) is None
        assert not reasons(compiled, "PLT-SPC-014")


def test_branches_that_run_alone_are_no_group() -> None:
    usual = mixed([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 0]])
    _, compiled, _ = made("top_k", usual)
    assert speculation(compiled) is None


def test_held_out_batches_judge_groups() -> None:
    """Four of the held-out cells leave their groups: as many batches may be lost, all there are."""
    usual = mixed(PAIRS)
    for k in range(12, 16):
        usual[k] = [[0, 1], *usual[k][1:]]
    _, compiled, _ = made("top_k", usual)
    assert speculation(compiled) is None
    (reason,) = reasons(compiled, "PLT-SPC-009")
    assert "lost in each of 4 held-out batches" in reason


def test_a_group_that_does_not_pay_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bets, "timed", lambda calls: [1.0] * len(calls))
    _, compiled, _ = made("top_k", mixed(PAIRS))
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
    _, compiled, _ = made("top_k", mixed(PAIRS))
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
