"""Where memory is for exactly one plan: devices that wait for room, and splits to the brim."""

from __future__ import annotations

import random

import numpy as np

from plait.passes.placement.brim import brim_splits
from plait.passes.placement.clusters import linear_orders
from plait.passes.placement.engine import DONE, GATED, Engine
from plait.passes.placement.plan import place
from plait.passes.placement.problem import Problem
from plait.passes.placement.problem_file import problem_from_dict

from . import rules


def engine_of(problem: Problem) -> Engine:
    p = problem.arrays
    none = np.zeros(1, int), np.zeros(0, int)
    return Engine(p, np.zeros((0, len(p.unit_ptr) - 1)), none)


def pipeline(stages: int, batches: int) -> rules.Json:
    """Microbatches of a training step; stage k has room for those of stages - k, and no more."""
    ops, edges = [], []
    for b in range(batches):
        for k in range(stages):
            pinned = [1.0 if d == k else None for d in range(stages)]
            for name, size in (("f", 100), ("b", 1)):
                ops.append({"name": f"{name}{b}.{k}", "time_s": pinned, "param_bytes": 0,
                            "temp_bytes": 0, "output_bytes": size})  # fmt: skip
            edges.append({"src": f"f{b}.{k}", "dst": f"b{b}.{k}", "bytes": 100, "tensor": "kept"})
            if k:
                edges.append({"src": f"f{b}.{k - 1}", "dst": f"f{b}.{k}", "bytes": 1})
                edges.append({"src": f"b{b}.{k}", "dst": f"b{b}.{k - 1}", "bytes": 1})
    rooms = [100 * (stages - k) + 5 for k in range(stages)]
    return {
        "format": "placement-problem v1",
        "memory_model": "dynamic",
        "devices": [{"name": f"d{k}", "memory_bytes": x} for k, x in enumerate(rooms)],
        "default_link": {"latency_s": 0.01, "bandwidth_Bps": 1e3},
        "links": [],
        "ops": ops,
        "edges": edges,
    }


def test_devices_wait_where_they_have_no_room_for_what_is_ready() -> None:
    """Without waiting, the first stage runs ahead with forward passes that it cannot keep."""
    raw = pipeline(3, 5)
    placed = place(problem_from_dict(raw), budget=0.5)
    assert placed.mode == "strict"
    played = rules.play(raw, placed.assign, placed.order, placed.mode)
    assert played is not None and rules.fits(raw, played[1])
    assert played[0] == placed.report["makespan_s"] < 15  # 14 without transfers: one each way


def test_orders_of_devices_that_waited_are_played_as_the_rules_say() -> None:
    """What the engine counts as the best fits, as lists that devices keep to, in that time."""
    found = 0
    for seed in range(60):
        raw = rules.random_problem(random.Random(seed), 12, 2, tight=True)
        problem = problem_from_dict(raw)
        p = problem.arrays
        engine = engine_of(problem)
        engine.set_mode(GATED)
        engine.state.assign[:] = p.allowed.argmax(1)[p.unit]
        for k, d in enumerate(np.random.default_rng(seed).integers(0, 2, len(p.allowed)).tolist()):
            if p.allowed[k, d]:
                engine.state.assign[p.unit == k] = d
        engine.settle(1.0)
        if not np.isfinite(engine.state.cost[1]):
            continue
        found += 1
        order: dict[str, list[str]] = {}
        names = [d.name for d in problem.devices]
        for i in engine.work.sequence.tolist():
            order.setdefault(names[engine.state.assign[i]], []).append(problem.ops[i].name)
        assign = {op.name: names[engine.state.assign[i]] for i, op in enumerate(problem.ops)}
        played = rules.play(raw, assign, order, "strict")
        assert played is not None and rules.fits(raw, played[1])
        assert played[0] == engine.state.cost[1]
    assert found > 10


def test_a_split_that_fills_devices_to_the_byte_is_found() -> None:
    """A chain there and back, as a training step: what is kept for the way back is no sum."""
    rng = random.Random(0)
    n = 30
    ops, edges = [], []
    for k in range(n):
        size = rng.randrange(1, 10**6)
        ops.append({"name": f"f{k}", "time_s": rng.uniform(1, 2), "group": str(k),
                    "param_bytes": rng.randrange(1, 10**6), "output_bytes": size})  # fmt: skip
        ops.append({"name": f"b{k}", "time_s": rng.uniform(2, 3), "group": str(k),
                    "output_bytes": rng.randrange(1, 10**5)})  # fmt: skip
        edges.append({"src": f"f{k}", "dst": f"b{k}", "bytes": size})
        if k:
            edges.append({"src": f"f{k - 1}", "dst": f"f{k}", "bytes": 1000})
            edges.append({"src": f"b{k}", "dst": f"b{k - 1}", "bytes": 1000, "tensor": "g"})
    raw: rules.Json = {
        "format": "placement-problem v1",
        "memory_model": "dynamic",
        "devices": [{"name": f"d{k}", "memory_bytes": 1e12} for k in range(3)],
        "default_link": {"latency_s": 0.01, "bandwidth_Bps": 1e6},
        "ops": ops,
        "edges": edges,
    }
    engine = engine_of(problem_from_dict(raw))
    home = np.repeat(np.searchsorted([8, 21], np.arange(n), "right"), 2).astype(np.int32)
    engine.simulate(home, engine.bottom_levels(home))
    for device, top in zip(raw["devices"], engine.work.top.tolist(), strict=True):
        device["memory_bytes"] = top
    problem = problem_from_dict(raw)
    p, engine = problem.arrays, engine_of(problem)
    device = next(iter(brim_splits(engine, linear_orders(p))))
    assign = device[p.unit].astype(np.int32)
    assert engine.simulate(assign, engine.bottom_levels(assign))[0] == DONE
    assert (engine.work.top <= p.cap).all()
