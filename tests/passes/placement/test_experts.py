"""Experts: counts as defined, limits always kept, never worse than brute force or the baselines."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.passes.placement import expert_lines, expert_slots
from plait.passes.placement.errors import InfeasibleError, PlacementError
from plait.passes.placement.expert_search import ALGORITHMS, place_experts
from plait.passes.placement.experts import (
    ExpertPlacement,
    ExpertTraffic,
    least_crossing,
    limits_of,
    read_expert_placement,
    round_robin,
)

AB = ("a", "b")


def routes(seed: int, layers: int, experts: int, tokens: int = 60, k: int = 2) -> dict[str, Any]:
    """Skewed routes that depend on a hidden kind of each token, so that layers go together."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, tokens)
    found = {}
    for layer in range(layers):
        taste = rng.gumbel(size=(4, experts)) * 2
        score = taste[kind] + rng.gumbel(size=(tokens, experts))
        found[f"l{layer}"] = np.argsort(-score, axis=1)[:, :k]
    return found


def counted(taken: dict[str, Any], where: list[Any]) -> int:
    """Crossing tokens, counted one by one from the definition."""
    layers = list(taken.values())
    return sum(
        where[n][i] != where[n + 1][j]
        for n, (first, second) in enumerate(itertools.pairwise(layers))
        for a, b in zip(first, second, strict=True)
        for i in a
        for j in b
    )


def kept(traffic: ExpertTraffic, placed: ExpertPlacement, **limits: Any) -> None:
    """Asserts that capacities and loads are kept, from their definitions."""
    found = limits_of(traffic, len(placed.devices), limits.get("capacity"), limits.get("balance"))
    for layer, where in enumerate(placed.indices(traffic)):
        for device in range(len(placed.devices)):
            here = where == device
            assert here.sum() <= found.capacity[device]
            assert traffic.loads[layer][here].sum() <= found.load[layer]


def brute_force(traffic: ExpertTraffic, capacity: Any, load: Any, devices: int) -> float:
    """The fewest crossing tokens of all placements within the limits."""
    choices = []
    for counts, most in zip(traffic.loads, load, strict=True):
        fitting = [
            p
            for p in itertools.product(range(devices), repeat=len(counts))
            if (np.bincount(p, minlength=devices) <= capacity).all()
            and np.bincount(p, counts, devices).max() <= most
        ]
        choices.append(fitting)
    return min((traffic.crossing(p) for p in itertools.product(*choices)), default=np.inf)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3))
def test_traffic_counts_what_crosses(seed: int, layers: int, k: int) -> None:
    taken = routes(seed, layers, 5, k=k)
    traffic = ExpertTraffic.from_routes(taken, 5)
    where = list(np.random.default_rng(seed).integers(0, 3, (layers, 5)))
    assert traffic.crossing(where) == counted(taken, where)
    assert traffic.total == 60 * k * k * (layers - 1)
    assert all(load.sum() == 60 * k for load in traffic.loads)
    for got, load, place in zip(traffic.imbalance(where, 3), traffic.loads, where, strict=True):
        assert got == pytest.approx(np.bincount(place, load, 3).max() / (load.sum() / 3))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    experts=st.integers(2, 4),
    layers=st.integers(1, 3),
    spare=st.integers(0, 1),
    balance=st.sampled_from([None, 1.0, 1.1, 1.5, 2.0]),
    lines=st.booleans(),
)
def test_the_best_is_what_brute_force_finds(
    seed: int, experts: int, layers: int, spare: int, balance: float | None, lines: bool
) -> None:
    traffic = ExpertTraffic.from_routes(routes(seed, layers, experts), experts)
    capacity = -(-experts // 2) + spare
    limits = limits_of(traffic, 2, capacity, balance)
    optimum = brute_force(traffic, limits.capacity, limits.load, 2)
    with pytest.MonkeyPatch.context() as patch:
        if not lines:  # the search, too, finds the best of what is so small
            patch.setattr(expert_lines, "MOST", 0)
        try:
            placed = place_experts(traffic, AB, capacity=capacity, balance=balance, budget=0.4)
        except InfeasibleError as error:
            assert optimum == np.inf and error.proven
            return
    kept(traffic, placed, capacity=capacity, balance=balance)
    assert placed.report["exact"] == lines
    assert placed.report["cross_tokens"] == optimum == traffic.crossing(placed.indices(traffic))
    assert placed.report["lower_bound_tokens"] <= optimum


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from([None, 1.3, 2.0]))
def test_larger_ones_keep_their_limits_and_beat_the_baselines(
    seed: int, devices: int, balance: float | None
) -> None:
    traffic = ExpertTraffic.from_routes(routes(seed, 4, 12, tokens=300), 12)
    names = [f"d{k}" for k in range(devices)]
    try:
        placed = place_experts(traffic, names, balance=balance, budget=0.2, seed=seed)
    except InfeasibleError:
        limits = limits_of(traffic, devices, None, balance)
        heavy = [max(x.max(), -(-x.sum() // devices)) for x in traffic.loads]
        assert (np.array(heavy) > limits.load).any() or balance == 1.3
        return
    kept(traffic, placed, balance=balance)
    for name in ALGORITHMS[1:]:
        other = place_experts(traffic, names, balance=balance, algorithm=name, seed=seed)
        try:
            kept(traffic, other, balance=balance)
        except AssertionError:
            continue  # the baselines know nothing of load
        assert placed.report["cross_tokens"] <= other.report["cross_tokens"]
    assert placed.report["cross_tokens"] >= least_crossing(traffic, np.array([12]))


def test_correlated_layers_are_brought_together() -> None:
    order = np.random.default_rng(3).permutation(16)
    first = np.repeat(np.arange(16), 5)
    traffic = ExpertTraffic.from_routes({"x": first, "y": order[first]}, 16)
    for algorithm in ("best", "quadratic-assignment"):
        placed = place_experts(traffic, ["a", "b", "c", "d"], algorithm=algorithm)
        assert placed.report["cross_tokens"] == 0
    assert placed.report["round_robin_cross_tokens"] > 40
    assert set(placed.report["imbalance"].values()) == {1.0}


def drifted() -> tuple[ExpertTraffic, ExpertTraffic]:
    """Two layers of 4 experts in step; then half of the tokens of two experts trade ways."""
    before = np.repeat(np.arange(4), 100)
    after = before.copy()
    after[before == 1] = 2
    after[before == 2] = 1
    return (
        ExpertTraffic.from_routes({"x": before, "y": before}, 4),
        ExpertTraffic.from_routes({"x": before, "y": after}, 4),
    )


@pytest.mark.parametrize("lines", [True, False])
def test_experts_move_only_where_it_pays(lines: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not lines:
        monkeypatch.setattr(expert_lines, "MOST", 0)
    before, after = drifted()
    old = ExpertPlacement(AB, {"x": ("a", "a", "b", "b"), "y": ("a", "a", "b", "b")})
    same = place_experts(before, AB, previous=old, budget=0.1)
    assert same.experts == old.experts and same.report["moved"] == 0
    # 1 and 2 of one of the layers change places: two moves save 200 tokens, 100 each.
    cheap = place_experts(after, AB, previous=old, move_cost=99, budget=0.1)
    assert (cheap.report["moved"], cheap.report["cross_tokens"]) == (2, 0)
    assert cheap.report["previous_cross_tokens"] == 200
    dear = place_experts(after, AB, previous=old, move_cost=101, budget=0.1)
    assert dear.experts == old.experts
    free = place_experts(after, AB, previous=old, budget=0.1)
    assert free.report["moved"] == 2  # not four, though those would do as well


def test_an_overloaded_device_is_relieved_though_moves_are_dear() -> None:
    loads = np.repeat(np.arange(4), [40, 40, 5, 5])
    traffic = ExpertTraffic.from_routes({"x": loads}, 4)
    old = ExpertPlacement(AB, {"x": ("a", "a", "b", "b")})
    placed = place_experts(traffic, AB, previous=old, balance=1.2, move_cost=1e9)
    assert placed.report["moved"] == 2
    assert placed.report["imbalance"]["x"] == 1.0


def test_experts_leave_a_device_that_is_gone() -> None:
    before, _ = drifted()
    old = ExpertPlacement(("a", "b", "c"), dict.fromkeys("xy", ("a", "b", "c", "c")))
    placed = place_experts(before, AB, previous=old, move_cost=1e6)
    assert all(where[:2] == ("a", "b") for where in placed.experts.values())
    assert placed.report["moved"] == 4
    assert "previous_cross_tokens" not in placed.report


def test_capacities_may_differ() -> None:
    traffic = ExpertTraffic.from_routes(routes(1, 2, 6), 6)
    placed = place_experts(traffic, AB, capacity=[5, 1], balance=2.0)
    for where in placed.experts.values():
        assert where.count("b") <= 1
    assert round_robin(6, np.array([5, 1])).tolist() == [0, 1, 0, 0, 0, 0]


def test_a_seed_gives_one_placement() -> None:
    traffic = ExpertTraffic.from_routes(routes(5, 4, 24, tokens=400), 24)
    one, two = (place_experts(traffic, list("abcd"), budget=0.3, seed=9) for _ in range(2))
    assert one.experts == two.experts
    assert not one.report["exact"]


def test_layers_in_a_ring_or_apart_are_placed_too() -> None:
    traffic = ExpertTraffic.from_routes(routes(2, 3, 4), 4)
    ring = ExpertTraffic(
        traffic.names, traffic.loads, {**traffic.pairs, (2, 0): traffic.pairs[0, 1]}
    )
    placed = place_experts(ring, AB, budget=0.1)
    limits = limits_of(ring, 2, None, None)
    assert placed.report["cross_tokens"] == brute_force(ring, limits.capacity, limits.load, 2)
    assert not placed.report["exact"]
    apart = ExpertTraffic(traffic.names, traffic.loads, {})
    assert place_experts(apart, AB).report["cross_tokens"] == 0


def test_files_are_read_as_written(tmp_path: Path) -> None:
    traffic = ExpertTraffic.from_routes(routes(1, 2, 4), 4)
    placed = place_experts(traffic, AB)
    placed.write(tmp_path / "p.json")
    again = read_expert_placement(tmp_path / "p.json")
    assert (again.devices, again.experts) == (placed.devices, placed.experts)


GOOD: dict[str, Any] = {
    "format": "expert-placement v1", "devices": ["a", "b"], "experts": {"x": ["a", "b"]}
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "placement v1"}, "field 'format'"),
        ({"devices": ["a", "a"]}, "field 'devices'"),
        ({"devices": "ab"}, "field 'devices'"),
        ({"experts": []}, "field 'experts'"),
        ({"experts": {"x": ["a", 1]}}, "layer 'x' must list"),
        ({"experts": {"x": ["a", "c"]}}, "layer 'x': there is no device 'c'"),
    ],
)
def test_files_without_meaning_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(PlacementError, match=message):
        read_expert_placement(path)
    path.write_text(json.dumps(GOOD)[:-9])
    with pytest.raises(PlacementError, match="cut short"):
        read_expert_placement(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": []}, "devices must be at least one"),
        ({"devices": ["a", "a"]}, "of distinct names"),
        ({"capacity": 1}, "capacity is 2 experts of a layer in all, 2 too few"),
        ({"capacity": -1}, "capacity must be a count"),
        ({"capacity": [1, 2, 3]}, "one for each of 2 devices"),
        ({"balance": 0.9}, "balance must be 1 or more"),
        ({"balance": float("nan")}, "balance must be 1 or more"),
        ({"move_cost": -1.0}, "move_cost must be a number of tokens"),
        ({"algorithm": "magic"}, "algorithm 'magic' is unknown"),
        ({"budget": 0.0}, "budget must be a positive number"),
        ({"seed": -1}, "seed must be an integer"),
        ({"previous": ExpertPlacement(AB, {"l0": ("a",)})}, "layer 'l0' has 4 experts"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    traffic = ExpertTraffic.from_routes(routes(1, 2, 4), 4)
    given = {"devices": AB, **options}
    with pytest.raises(PlacementError, match=message):
        place_experts(traffic, given.pop("devices"), **given)


def test_loads_that_cannot_be_balanced_are_proven() -> None:
    traffic = ExpertTraffic.from_routes({"x": np.repeat([0, 1, 2, 3], [90, 4, 4, 2])}, 4)
    with pytest.raises(InfeasibleError, match=r"layer 'x'.* 1.200 .*less than 1.840") as caught:
        place_experts(traffic, AB, balance=1.2)
    assert caught.value.proven
    assert place_experts(traffic, AB).report["imbalance"]["x"] <= 1.88  # as round robin has it


def test_what_was_not_searched_to_the_end_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = SimpleNamespace(status=1, x=None)
    monkeypatch.setattr(expert_slots, "milp", lambda *_, **__: stopped)
    traffic = ExpertTraffic.from_routes({"x": np.repeat([0, 1, 2, 3], [90, 4, 4, 2])}, 4)
    with pytest.raises(InfeasibleError, match="the best found has") as caught:
        place_experts(traffic, AB, balance=1.2)
    assert not caught.value.proven


def test_a_limit_that_is_a_whole_number_of_tokens_is_that() -> None:
    assert 1.4 * 45 / 3 < 21
    traffic = ExpertTraffic.from_routes({"x": np.repeat([0, 1, 2], [15, 15, 15])}, 3)
    assert limits_of(traffic, 3, None, 1.4).load.tolist() == [21]


def test_exchanges_within_a_device_overload_nothing() -> None:
    traffic = ExpertTraffic.from_routes({"x": np.repeat([0, 1, 2, 3], [9, 4, 3, 2])}, 4)
    state = expert_slots.slots_of(traffic, limits_of(traffic, 2, None, 1.0), None, 0.0)
    here = state.where[0][:, None] == state.where[0][None, :]
    assert not state.exchanges(0, 5.0)[here].any() and state.exchanges(0, 5.0)[~here].any()


def test_routes_without_meaning_are_refused() -> None:
    for taken in ({}, {"x": np.full((3, 2), -1)}):
        with pytest.raises(PlacementError, match="none names an expert"):
            ExpertTraffic.from_routes(taken)
    with pytest.raises(PlacementError, match="routes of 'x' must be integers"):
        ExpertTraffic.from_routes({"x": np.zeros((3, 2))})
    one = np.ones(2, np.int64)
    with pytest.raises(PlacementError, match="distinct names"):
        ExpertTraffic(("x", "x"), (one, one), {})
    with pytest.raises(PlacementError, match="layer 'x': loads"):
        ExpertTraffic(("x",), (-one,), {})
    with pytest.raises(PlacementError, match="pairs 'x' -> 'y'"):
        ExpertTraffic(("x", "y"), (one, one), {(0, 1): np.ones((2, 3), np.int64)})
    dropped = ExpertTraffic.from_routes({"x": [[0, -1], [1, 0]], "y": [[1, 7], [-1, 0]]}, 2)
    assert dropped.pairs[0, 1].tolist() == [[1, 1], [1, 0]]
