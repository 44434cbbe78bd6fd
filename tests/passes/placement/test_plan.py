"""Plans fit, bounds hold, nothing beats brute force, and what fits is found."""

from __future__ import annotations

import bisect
import math
import random
import time
from types import SimpleNamespace

import pytest

from plait.passes.placement import best, fitting, heft, plan
from plait.passes.placement.bounds import lower_bounds
from plait.passes.placement.errors import InfeasibleError, PlacementError
from plait.passes.placement.m_etf import m_etf
from plait.passes.placement.plan import NAMES, place
from plait.passes.placement.problem_file import problem_from_dict
from plait.passes.placement.simulator import simulate

from . import rules


def layered(layers: int, width: int, devices: int, memory: float) -> rules.Json:
    """A forward and backward graph: each layer's weights tie its op to its gradient's."""
    ops, edges = [], []
    for k in range(layers):
        for j in range(width):
            for way in ("f", "b"):
                ops.append({"name": f"{way}{k}.{j}", "time_s": 1.0 + (k * 7 + j) % 3,
                            "param_bytes": 10 if way == "f" else 0, "output_bytes": 2,
                            "temp_bytes": 0, "group": f"w{k}.{j}"})  # fmt: skip
            edges.append({"src": f"f{k}.{j}", "dst": f"b{k}.{j}", "bytes": 2})
            if k:
                for i in {j, (j + 1) % width}:
                    edges.append({"src": f"f{k - 1}.{i}", "dst": f"f{k}.{j}", "bytes": 2})
                    edges.append({"src": f"b{k}.{j}", "dst": f"b{k - 1}.{i}", "bytes": 2})
    return {
        "format": "placement-problem v1",
        "name": "layered",
        "memory_model": "dynamic",
        "devices": [{"name": f"d{k}", "memory_bytes": memory} for k in range(devices)],
        "default_link": {"latency_s": 0.01, "bandwidth_Bps": 10.0},
        "links": [],
        "ops": ops,
        "edges": edges,
    }


@pytest.mark.parametrize("seed", range(12))
def test_bounds_and_plans_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    for ops in (3, 4, 5):
        raw = rules.random_problem(rng, ops, 2, tight=seed % 2 == 0)
        optimum = rules.optimum(raw)
        problem = problem_from_dict(raw)
        if math.isinf(optimum):
            with pytest.raises(InfeasibleError) as caught:
                place(problem, budget=0.3)
            assert caught.value.proven and min(caught.value.shortfall.values()) > 0
            continue
        assert lower_bounds(problem.arrays)["best"] <= optimum * (1 + 1e-9)
        placement = place(problem, budget=0.5)
        assert placement.report["makespan_s"] == pytest.approx(optimum)
        makespan, peak = rules.play(raw, placement.assign, placement.order, placement.mode)[:2]
        assert makespan == pytest.approx(optimum) and rules.fits(raw, peak)


def test_the_bound_on_seven_ops_never_exceeds_the_optimum() -> None:
    raw = layered(3, 1, 2, 31)
    raw["ops"].append(
        {"name": "last", "time_s": 2, "param_bytes": 0, "temp_bytes": 0, "output_bytes": 0}
    )
    raw["edges"].append({"src": "b0.0", "dst": "last", "bytes": 1})
    assert len(raw["ops"]) == 7
    optimum = rules.optimum(raw)
    bounds = lower_bounds(problem_from_dict(raw).arrays)
    assert bounds["best"] <= optimum * (1 + 1e-9)
    assert place(problem_from_dict(raw), budget=1.0).report["makespan_s"] == pytest.approx(optimum)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_the_default_is_never_worse_than_what_it_starts_from(objective: str) -> None:
    problem = problem_from_dict(layered(8, 3, 3, 150))
    key = "makespan_s" if objective == "latency" else "load_s"
    best = place(problem, objective=objective, budget=1.5).report
    assert best["lower_bound_s"] <= best[key] * (1 + 1e-9)
    answered = 0
    for name in NAMES[1:]:
        try:
            other = place(problem, algorithm=name, objective=objective).report
        except InfeasibleError:
            continue
        answered += 1
        assert best[key] <= other[key] * (1 + 1e-9), name
    assert answered >= 2


def test_the_same_seed_gives_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine on which the clock does not end the search: for these here it runs slowly."""
    slow = SimpleNamespace(perf_counter=lambda: time.perf_counter() / 100)
    monkeypatch.setattr(best, "time", slow)
    monkeypatch.setattr(fitting, "time", slow)
    monkeypatch.setattr(plan, "time", slow)
    problem = problem_from_dict(layered(6, 3, 3, 120))
    one, two = (place(problem, budget=0.5, seed=7).to_dict() for _ in range(2))
    assert one["report"].pop("stopped") == two["report"].pop("stopped") == "moves"
    del one["report"]["seconds"], two["report"]["seconds"]
    assert one == two


@pytest.mark.parametrize(
    ("objective", "price", "transfers"),
    [("latency", 0.0, 2), ("latency", 0.4, 2), ("latency", 0.6, 0),
     ("throughput", 0.4, 2), ("throughput", 11.0, 0)],
)  # fmt: skip
def test_a_transfer_has_to_save_its_price(objective: str, price: float, transfers: int) -> None:
    """An op of one second beside one of ten: two transfers save a second of the step."""
    seconds = {"first": 10, "beside": 1, "middle": 10, "last": 10}
    edges = [("first", "beside"), ("first", "middle"), ("middle", "last"), ("beside", "last")]
    raw = {
        "format": "placement-problem v1",
        "memory_model": "dynamic",
        "devices": [{"name": name, "memory_bytes": 100} for name in "ab"],
        "default_link": {"latency_s": 0.01, "bandwidth_Bps": 1e9},
        "ops": [{"name": name, "time_s": time} for name, time in seconds.items()],
        "edges": [{"src": src, "dst": dst, "bytes": 1} for src, dst in edges],
    }
    placed = place(problem_from_dict(raw), objective=objective, transfer_price=price, budget=0.5)
    assert placed.report["transfers"] == transfers


def test_memory_is_kept_where_little_is_left() -> None:
    raw = layered(10, 2, 4, 68)  # 200 bytes of parameters, 80 of activations, and copies, in 272
    problem = problem_from_dict(raw)
    placement = place(problem, budget=3.0)
    schedule = simulate(problem, placement)
    assert not schedule.shortfall(problem)
    assert max(schedule.peak) > 50


def test_a_packing_that_greedy_misses_is_found() -> None:
    sizes = [6, 6, 5, 5, 4, 4, 3, 3, 2, 2]  # two devices of 20: only exact packings fit
    raw = {
        "format": "placement-problem v1",
        "memory_model": "static",
        "devices": [{"name": "a", "memory_bytes": 20}, {"name": "b", "memory_bytes": 20}],
        "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
        "ops": [{"name": f"o{k}", "time_s": 1, "param_bytes": s} for k, s in enumerate(sizes)],
        "edges": [],
    }
    peaks = place(problem_from_dict(raw), budget=0.5).report["peak_bytes"]
    assert peaks == {"a": 20.0, "b": 20.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param_bytes": 30}, r"op 'o0' needs 30 bytes and fits nowhere: 'a' is 10 bytes short"),
        ({"param_bytes": 19}, r"all 16 were played in all orders; .* 'b' is 1 bytes short"),
        ({"param_bytes": 20, "output_bytes": 21}, "fits nowhere"),
    ],
)
def test_what_cannot_fit_is_proven(change: dict[str, float], message: str) -> None:
    raw = {
        "format": "placement-problem v1",
        "memory_model": "static",
        "devices": [{"name": "a", "memory_bytes": 20}, {"name": "b", "memory_bytes": 20}],
        "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
        "ops": [{"name": "o0", "time_s": 1, **change}]
        + [{"name": f"o{k}", "time_s": 1, "param_bytes": 7} for k in range(1, 4)],
        "edges": [],
    }
    with pytest.raises(InfeasibleError, match=message) as caught:
        place(problem_from_dict(raw), budget=0.3)
    assert caught.value.proven


def test_too_little_memory_in_all_says_how_much_is_missing() -> None:
    with pytest.raises(InfeasibleError, match="10 bytes short") as caught:
        place(problem_from_dict(layered(10, 2, 2, 95)))
    assert caught.value.shortfall == {"all devices": 10.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "magic"}, "algorithm 'magic' is unknown"),
        ({"objective": "joy"}, "objective 'joy' is unknown"),
        ({"budget": 0.0}, "budget must be a positive number"),
        ({"budget": math.nan}, "budget must be a positive number"),
        ({"seed": -1}, "seed must be an integer"),
        ({"transfer_price": -1.0}, "transfer_price must be seconds"),
        (
            {"transfer_price": 1.0, "recompute": True},
            "transfer_price cannot be used with recompute",
        ),
    ],
)
def test_options_without_meaning_are_refused(options: rules.Json, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        place(problem_from_dict(layered(1, 1, 1, 100)), **options)


def test_list_schedulers_are_given_up_where_too_many_ops_wait() -> None:
    problem = problem_from_dict(layered(1, 40, 2, 1000))
    assert len(m_etf(problem, patience=10_000).sequence) == len(problem.ops)
    with pytest.raises(InfeasibleError, match="m-ETF was given up after 11 waits") as caught:
        m_etf(problem, patience=10)
    assert not caught.value.proven


@pytest.mark.parametrize("seed", range(30))
def test_idle_time_is_found_in_blocks_of_busy_times_as_between_all(seed: int) -> None:
    rng = random.Random(seed)
    busy: list[tuple[float, float]] = []
    blocks: list[tuple[float, float]] = []
    for _ in range(60):
        ready, length = float(rng.randrange(40)), float(rng.randrange(4))
        start = heft._gap(busy, ready, length)
        assert not length or heft._gap(blocks, ready, length) == start
        bisect.insort(busy, (start, start + length))
        heft._join(blocks, start, start + length)
    assert len(blocks) < len(busy) / 2


def test_no_ops_is_a_plan_of_no_time() -> None:
    raw = layered(0, 1, 2, 1)
    assert place(problem_from_dict(raw), budget=0.2).report["makespan_s"] == 0.0
