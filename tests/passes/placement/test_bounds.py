"""Bounds are below what any placement takes, and as large as their definitions say."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from plait.passes.placement.bounds import _cheapest_cuts, _work, lower_bounds
from plait.passes.placement.placement import Placement
from plait.passes.placement.problem_file import problem_from_dict
from plait.passes.placement.simulator import simulate

from . import rules


@pytest.mark.parametrize("seed", [*range(12), 19, 22, 27, 32, 34, 48, 51, 98, 124])
def test_no_placement_is_below_the_bounds(seed: int) -> None:
    rng = random.Random(seed)
    m = rng.choice([2, 2, 3])
    raw = rules.random_problem(rng, rng.choice([3, 4, 5, 6] if m == 2 else [3, 4]), m, tight=True)
    need = sum(op["param_bytes"] for op in raw["ops"])
    for device in raw["devices"]:  # some that just fit, and that are not alike
        rooms = [need, need / 2, need * 0.75, device["memory_bytes"], need + 8]
        device["memory_bytes"] = rng.choice(rooms)
    problem = problem_from_dict(raw)
    makespan = load = math.inf
    for assign in rules.assignments(raw):
        schedule = simulate(problem, Placement(assign))
        if not schedule.shortfall(problem):
            makespan, load = min(makespan, schedule.makespan), min(load, schedule.load)
    assert lower_bounds(problem.arrays)["best"] <= makespan * (1 + 1e-9)
    assert lower_bounds(problem.arrays, throughput=True)["best"] <= load * (1 + 1e-9)


def test_no_transfer_is_certain_where_ops_may_run_twice() -> None:
    raw = {
        "format": "placement-problem v1",
        "devices": [{"name": "a", "memory_bytes": 9}, {"name": "b", "memory_bytes": 9}],
        "default_link": {"latency_s": 10, "bandwidth_Bps": 1},
        "ops": [{"name": "p", "time_s": 1}, {"name": "q", "time_s": [1, None]},
                {"name": "r", "time_s": [None, 1]}],
        "edges": [{"src": "p", "dst": x, "bytes": 0} for x in "qr"],
    }  # fmt: skip
    arrays = problem_from_dict(raw).arrays
    assert lower_bounds(arrays)["best"] == 12.0
    assert lower_bounds(arrays, copies=True)["best"] <= 2.0


def test_work_that_one_device_must_do_is_not_shared_out() -> None:
    times = np.array([[np.inf, 1.0], [np.inf, 1.0], [1.0, 1.0]])
    assert _work(_timed(times)) == pytest.approx(2.0, rel=1e-5)
    assert _work(_timed(times[2:])) == pytest.approx(0.5, rel=1e-5)


def test_the_work_of_very_many_kinds_is_bounded_too() -> None:
    times = np.random.default_rng(0).uniform(1.0, 2.0, (10_001, 2))
    fastest = np.bincount(times.argmin(1), times.min(1))
    assert 0.4 * fastest.sum() <= _work(_timed(times)) <= fastest.max()


def _timed(times: np.ndarray) -> Any:
    return SimpleNamespace(time=times)


@pytest.mark.parametrize("seed", range(40))
def test_cuts_are_the_cheapest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 8))
    unit, cut = rng.integers(0, 4, count), rng.integers(0, 5, count).astype(float)
    memory, cap = rng.integers(0, 4, 4).astype(float), float(rng.integers(1, 7))
    cut[0] = 0.0
    best = math.inf
    for chosen in itertools.product([False, True], repeat=count - 1):
        ends = [0, *(k + 1 for k, x in enumerate(chosen) if x), count]
        runs = [unit[a:b] for a, b in itertools.pairwise(ends)]
        # A place that alone is too large has to be on some device all the same.
        if all(len(x) == 1 or memory[np.unique(x)].sum() <= cap for x in runs):
            best = min(best, sum(cut[a] for a in ends[1:-1]))
    assert _cheapest_cuts(unit, cut, memory, cap) == best
