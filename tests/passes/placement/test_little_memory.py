"""Little memory: what fits is found, in time, and never worse than what simple algorithms find."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from plait.passes.placement import feasible
from plait.passes.placement.clusters import linear_orders
from plait.passes.placement.errors import InfeasibleError
from plait.passes.placement.feasible import exchange, pack
from plait.passes.placement.list_scheduling import Ledger
from plait.passes.placement.plan import NAMES, place
from plait.passes.placement.problem import Problem
from plait.passes.placement.problem_file import problem_from_dict
from plait.passes.placement.starts import simple_starts

from . import rules


def chain(sizes: list[int], rooms: list[float], latency: float = 0.0, **first: object) -> Problem:
    """A chain of ops of these sizes in static memory; ``first`` are fields of the first op."""
    ops = [{"name": f"o{k}", "time_s": 1e-3, "param_bytes": s} for k, s in enumerate(sizes)]
    ops[0] |= first
    return problem_from_dict(
        {
            "format": "placement-problem v1",
            "memory_model": "static",
            "devices": [{"name": f"d{k}", "memory_bytes": x} for k, x in enumerate(rooms)],
            "default_link": {"latency_s": latency, "bandwidth_Bps": 1e9},
            "ops": ops,
            "edges": [
                {"src": f"o{k}", "dst": f"o{k + 1}", "bytes": 1} for k in range(len(sizes) - 1)
            ],
        }
    )


@pytest.mark.parametrize("pinned", [False, True])
def test_devices_that_a_chain_fills_exactly_are_filled(pinned: bool) -> None:
    rng = random.Random(5)
    sizes = [rng.randrange(1, 10**9) for _ in range(160)]
    cuts = [0, 20, 22, 70, 71, 130, 160]
    parts = [sizes[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    rooms = [float(sum(part)) for part in parts]
    first: dict[str, object] = {}
    if pinned:  # the first op may only be on the last device, which has room for just that
        rooms = [rooms[0] - sizes[0], *rooms[1:-1], rooms[-1] + sizes[0]]
        first = {"time_s": [None] * 5 + [1e-3]}
    report = place(chain(sizes, rooms, **first), budget=0.5).report
    assert list(report["peak_bytes"].values()) == rooms


@pytest.mark.parametrize("seed", range(4))
def test_sizes_that_repeat_are_packed_exactly(seed: int) -> None:
    """Devices have just as much room as is needed; one unit may only be where it was."""
    rng = random.Random(seed)
    sizes = [rng.choice([0, 3, 7, 7, 64, 500, 1024]) for _ in range(2000)]
    home = [rng.randrange(5) for _ in sizes]
    rooms = np.bincount(home, sizes, 5).tolist()
    problem = chain(sizes, rooms, time_s=[1.0 if d == home[0] else None for d in range(5)])
    near = np.array(home)
    near[1::100] = 0  # most is as it should be
    device = pack(problem, 5.0, 0.0, near)
    assert device is not None
    assert (np.bincount(device, sizes, 5) <= problem.arrays.cap).all()
    assert device[0] == home[0]
    assert (device == home).mean() > 0.4


@pytest.mark.parametrize(("units", "devices"), [(60, 3), (400, 6), (160, 8)])
def test_sizes_that_hardly_repeat_fill_devices_exactly(units: int, devices: int) -> None:
    """All are different, and each device has room for just what some scattered ops need.

    At the end there are few units left, and often no way to divide them: full devices are opened
    again.
    """
    rng = random.Random(units)
    sizes = [rng.randrange(1, 10**9) for _ in range(units)]
    home = [rng.randrange(devices) for _ in sizes]
    rooms = np.bincount(home, sizes, devices).tolist()
    only = [1.0 if d == home[0] else None for d in range(devices)]
    problem = chain(sizes, rooms, time_s=only)
    near = np.full(units, home[0])
    deadline = time.perf_counter() + 600
    device = exchange(problem, near, 1.0, np.random.default_rng(0), deadline)
    assert device is not None and device[0] == home[0]
    assert np.bincount(device, sizes, devices).tolist() == rooms


def test_large_sizes_fill_many_devices_in_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few units a device, of sizes below 1e10: the last devices must be left with small ones."""
    monkeypatch.setattr(feasible, "_AGAIN", 20)
    rng = random.Random(1)
    sizes, rooms = [], [0.0] * 32
    for _ in range(500):
        sizes.append(rng.randint(1, 9_999_999_999))
        rooms[rng.randrange(32)] += sizes[-1]
    problem = chain(sizes, rooms)
    deadline = time.perf_counter() + 600
    tries = np.random.default_rng(0)
    device = exchange(problem, np.zeros(500, np.int64), 1.0, tries, deadline)
    assert device is not None
    assert np.bincount(device, sizes, 32).tolist() == rooms


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rooms", [[0.0, 9.0], [9.0, 0.0], [0.0, 0.0, 9.0]])
def test_devices_may_have_no_memory(rooms: list[float]) -> None:
    placed = place(chain([3, 3, 3], rooms), budget=0.2)
    peaks = placed.report["peak_bytes"].values()
    assert sum(peaks) == 9.0 and all(p <= r for p, r in zip(peaks, rooms, strict=True))


def test_a_packing_that_fits_but_for_rounding_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver may miss by its tolerance, a byte of 1e9 here; subsets are then looked at."""
    solved = SimpleNamespace(status=0, x=np.array([0.0, 1.0, 1.0, 0.0, 0.0, 1.0]))
    monkeypatch.setattr(feasible, "milp", lambda *_, **__: solved)
    sizes = [10**9 + 1, 10**9, 5]
    problem = chain(sizes, [10**9 + 5.0, 10**9 + 1.0])
    assert pack(problem, 5.0) is None
    assert list(place(problem, budget=0.1).report["peak_bytes"].values()) == [1e9 + 5, 1e9 + 1]


def test_quick_algorithms_are_starts_whatever_the_clock_says() -> None:
    problem = chain([3, 3, 3], [9.0, 9.0])
    orders = linear_orders(problem.arrays)
    names = {name for name, _ in simple_starts(problem, orders, 1.0, lambda: True)}
    assert {"single", "min-cut", "m-topo", "heft"} <= names
    assert not names & {"m-etf", "m-sct"}


def test_a_share_that_stays_free_proves_nothing() -> None:
    assert pack(chain([3, 3], [3.0, 3.0]), 5.0, slack=0.25) is None
    device = pack(chain([3, 3, 2], [8.0, 8.0]), 5.0, slack=0.25)
    assert device is not None and np.bincount(device, [3, 3, 2]).max() <= 6
    with pytest.raises(InfeasibleError, match="no packing exists") as error:
        pack(chain([3, 3], [5.0, 2.0]), 5.0)
    assert error.value.proven


@pytest.mark.parametrize(
    ("more", "seconds", "fits"), [(0, 1, True), (1, 1, False), (1, 0, True), (1, [0, 1], True)]
)
def test_what_an_op_needs_while_it_runs_is_proven(more: int, seconds: object, fits: bool) -> None:
    """What an op of no time takes it frees at the same instant."""
    ops = [{"name": "p", "time_s": seconds, "param_bytes": 3, "output_bytes": 2,
            "temp_bytes": 3 + more}]  # fmt: skip
    problem = problem_from_dict(
        {
            "format": "placement-problem v1",
            "devices": [{"name": "a", "memory_bytes": 8}, {"name": "b", "memory_bytes": 4}],
            "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
            "ops": ops,
            "edges": [],
        }
    )
    if fits:
        place(problem, budget=0.05)
        return
    with pytest.raises(InfeasibleError, match="op 'p' needs 9 bytes and fits nowhere") as error:
        feasible.refuse_hopeless(problem)
    assert error.value.proven and error.value.shortfall == {"a": 1.0, "b": 5.0}


def test_units_stay_where_they_were_only_where_they_may_run() -> None:
    problem = chain([3, 3], [6.0, 6.0], time_s=[None, 1e-3])
    rng = np.random.default_rng(0)
    device = exchange(problem, np.zeros(2, np.int64), 1.0, rng, time.perf_counter() + 600)
    assert device is not None and device.tolist() == [1, 0]


def test_one_device_that_is_too_small_is_not_filled() -> None:
    problem = chain([3, 3], [6.0])
    near = np.zeros(2, np.int64)
    assert exchange(problem, near, 0.9, np.random.default_rng(0), time.perf_counter() + 600) is None


def test_what_cannot_be_exchanged_is_not_found() -> None:
    problem = chain([3, 3, 3], [4.0, 5.0])
    near = np.zeros(3, np.int64)
    assert exchange(problem, near, 1.0, np.random.default_rng(0), time.perf_counter() + 600) is None


def test_scattered_ops_that_fill_devices_exactly_are_placed() -> None:
    rng = random.Random(7)
    sizes = [rng.randrange(1, 10**9) for _ in range(300)]
    rooms = np.bincount([rng.randrange(4) for _ in sizes], sizes, 4).tolist()
    report = place(chain(sizes, rooms), budget=2.0).report
    assert list(report["peak_bytes"].values()) == rooms


def test_an_overrun_is_no_bargain_where_links_are_slow() -> None:
    """One device would do in a thousandth of the time, and is a little too small."""
    rng = random.Random(105)
    n = 140
    ops = [{"name": f"o{k}", "time_s": rng.choice([0, 1e-3]), "param_bytes": rng.randrange(50),
            "output_bytes": rng.randrange(50)} for k in range(n)]  # fmt: skip
    edges = [
        {"src": f"o{max(0, k - 1 - int(rng.expovariate(0.05)))}", "dst": f"o{k}", "bytes": 0}
        for k in range(1, n)
        for _ in range(2)
    ]
    total = sum(x["param_bytes"] + x["output_bytes"] for x in ops)
    raw: rules.Json = {
        "format": "placement-problem v1",
        "memory_model": "static",
        "devices": [{"name": x, "memory_bytes": total * share} for x, share in
                    (("a", 0.55), ("b", 0.5))],
        "default_link": {"latency_s": 100, "bandwidth_Bps": 1e9},
        "ops": ops,
        "edges": edges,
    }  # fmt: skip
    problem = problem_from_dict(raw)
    best = place(problem, budget=1.0).report["makespan_s"]
    answers = []
    for name in NAMES[1:]:
        try:
            answers.append(place(problem, algorithm=name).report["makespan_s"])
        except InfeasibleError:
            continue
    assert best <= min(answers)


@pytest.mark.parametrize("seed", range(8))
def test_one_device_is_able_where_the_list_of_all_has_it(seed: int) -> None:
    problem = problem_from_dict(rules.random_problem(random.Random(seed), 14, 3, tight=True))
    ledger = Ledger(problem)
    for op in problem.arrays.topo.tolist():
        able = ledger.devices(op)
        assert able == [d for d in range(3) if ledger.able(op, d)]
        if not able:
            break
        ledger.place(op, able[-1], 0.0)
