"""plait's simulator does what the rules say, also where many things happen at one instant."""

from __future__ import annotations

import random

import pytest

from plait.passes.placement.errors import PlacementError
from plait.passes.placement.placement import Placement
from plait.passes.placement.problem_file import problem_from_dict
from plait.passes.placement.simulator import simulate

from . import rules


def random_placement(rng: random.Random, problem: rules.Json) -> Placement:
    devices = [d["name"] for d in problem["devices"]]
    by_group: dict[str, str] = {}
    assign = {}
    for op in problem["ops"]:
        able = [d for d in devices if rules.seconds(problem, op, d) is not None]
        chosen = rng.choice(able)
        if "group" in op:
            chosen = by_group.setdefault(op["group"], chosen)
        assign[op["name"]] = chosen
    kind = rng.choice(["none", "part", "priority", "strict"])
    if kind == "none":
        return Placement(assign)
    names = list(assign)
    if kind == "strict" and rng.random() < 0.8:
        pass  # in index order, which is topological
    else:
        rng.shuffle(names)
    if kind == "part":
        names = names[: len(names) // 2]
    order: dict[str, list[str]] = {}
    for name in names:
        order.setdefault(assign[name], []).append(name)
    return Placement(assign, order, "strict" if kind == "strict" else "priority")


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_the_rules_on_random_graphs(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):  # 2,000 in all
        problem = rules.random_problem(rng, rng.randrange(1, 14), rng.randrange(1, 5))
        placement = random_placement(rng, problem)
        order = {k: list(v) for k, v in placement.order.items()} if placement.order else None
        expected = rules.play(problem, dict(placement.assign), order, placement.mode)
        checked = problem_from_dict(problem)
        if expected is None:
            with pytest.raises(PlacementError, match="wait for one another"):
                simulate(checked, placement)
            continue
        schedule = simulate(checked, placement)
        assert schedule.makespan == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
        peaks = [expected[1][d["name"]] for d in problem["devices"]]
        assert schedule.peak.tolist() == pytest.approx(peaks, rel=1e-9)


def test_a_link_sends_one_tensor_after_another() -> None:
    problem = {
        "format": "placement-problem v1",
        "devices": [{"name": "a", "memory_bytes": 99}, {"name": "b", "memory_bytes": 99}],
        "default_link": {"latency_s": 1, "bandwidth_Bps": 1},
        "ops": [{"name": x, "time_s": 1} for x in ("p", "q", "r")],
        "edges": [
            {"src": "p", "dst": "q", "bytes": 2, "tensor": "x"},
            {"src": "p", "dst": "r", "bytes": 3, "tensor": "y"},
        ],
    }
    schedule = simulate(problem_from_dict(problem), Placement({"p": "a", "q": "b", "r": "b"}))
    assert [(x.start, x.end) for x in schedule.transfers] == [(1.0, 4.0), (4.0, 8.0)]
    assert schedule.makespan == 9.0
    assert schedule.peak.tolist() == [0.0, 5.0]
    assert schedule.load == 7.0


def test_readers_on_one_device_share_what_is_sent() -> None:
    problem = {
        "format": "placement-problem v1",
        "devices": [{"name": "a", "memory_bytes": 99}, {"name": "b", "memory_bytes": 99}],
        "default_link": {"latency_s": 1, "bandwidth_Bps": 1},
        "ops": [{"name": x, "time_s": 1} for x in ("p", "q", "r")],
        "edges": [{"src": "p", "dst": x, "bytes": 2} for x in ("q", "r")],
    }
    schedule = simulate(problem_from_dict(problem), Placement({"p": "a", "q": "b", "r": "b"}))
    assert len(schedule.transfers) == 1 and schedule.load == 3.0


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement({"p": "a"}), "op 'q' is not placed"),
        (Placement({"p": "a", "q": "z"}), "unknown device 'z'"),
        (Placement({"p": "a", "q": "b", "x": "a"}), "there is no op 'x'"),
        (Placement({"p": "a", "q": "b"}, {"a": ["p", "p"]}), "op 'p' is twice there"),
        (Placement({"p": "a", "q": "b"}, {"a": ["q"]}), "not on 'a'"),
        (Placement({"p": "a", "q": "b"}, {"a": ["p"]}, "strict"), "op 'q' is missing"),
        (Placement({"p": "a", "q": "b"}, {"z": []}), "no device 'z'"),
    ],
)
def test_what_is_no_placement_of_the_problem_is_refused(placement: Placement, message: str) -> None:
    problem = {
        "format": "placement-problem v1",
        "devices": [{"name": "a", "memory_bytes": 9}, {"name": "b", "memory_bytes": 9}],
        "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
        "ops": [{"name": "p", "time_s": 1}, {"name": "q", "time_s": 1}],
        "edges": [],
    }
    with pytest.raises(PlacementError, match=message):
        simulate(problem_from_dict(problem), placement)
