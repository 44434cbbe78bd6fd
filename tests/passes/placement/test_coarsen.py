"""Coarsening makes no cycles and loses nothing; placements come back as placements of the ops."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.bench.placement_scale import training_graph
from plait.passes.placement import best, fitting
from plait.passes.placement import coarsen as module
from plait.passes.placement.coarsen import Coarse, coarsen
from plait.passes.placement.errors import InfeasibleError, PlacementError
from plait.passes.placement.plan import place
from plait.passes.placement.problem import Problem
from plait.passes.placement.problem_file import problem_from_dict
from plait.passes.placement.simulator import simulate

from . import rules
from .test_simulator import random_placement


def drawn(seed: int, ops: int, target: int) -> tuple[rules.Json, Coarse]:
    """A random problem, coarsened without a limit of size."""
    raw = rules.random_problem(random.Random(seed), ops, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SHARE", 1e9)
        return raw, coarsen(problem_from_dict(raw), target)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 100_000), st.integers(2, 30), st.integers(1, 20))
def test_contraction_makes_no_cycle_and_loses_nothing(seed: int, ops: int, target: int) -> None:
    raw, coarse = drawn(seed, ops, target)
    fine, small, member = coarse.fine, coarse.problem, coarse.member
    graph = nx.DiGraph((member[fine.op_index[e["src"]]], member[fine.op_index[e["dst"]]])
                       for e in raw["edges"])  # fmt: skip
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    assert nx.is_directed_acyclic_graph(graph)
    assert {(small.op_index[e.src], small.op_index[e.dst]) for e in small.edges} == set(graph.edges)
    a, b = fine.arrays, small.arrays
    assert b.param.sum() == a.param.sum()
    finite = lambda x: np.where(np.isfinite(x), x, 0).sum(0)  # noqa: E731
    assert finite(b.time) == pytest.approx(finite(a.time))
    for i, c in enumerate(member):
        assert (np.isfinite(a.time[i]) == np.isfinite(b.time[c])).all()
        assert fine.ops[i].group in (None, small.ops[c].group)
        assert small.ops[c].keep or not fine.ops[i].keep
    kept = [{op.group for op in fine.ops if member[fine.op_index[op.name]] == c} - {None}
            for c in range(len(small.ops))]  # fmt: skip
    assert all(len(groups) <= 1 for groups in kept)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 100_000), st.integers(2, 25), st.integers(1, 15))
def test_placements_come_back_sound(seed: int, ops: int, target: int) -> None:
    _, coarse = drawn(seed, ops, target)
    small = coarse.problem
    ordered = [small.ops[i].name for i in small.arrays.topo]
    raw = {
        "devices": [{"name": d.name, "speed": d.speed} for d in small.devices],
        "ops": [{"name": x.name, "time_s": list(x.time_s) if isinstance(x.time_s, tuple) else
                 x.time_s, **({} if x.group is None else {"group": x.group})} for x in small.ops],
    }  # fmt: skip
    placement = random_placement(random.Random(seed), raw)
    if placement.order is not None:  # strict orders must not deadlock
        rank = {name: k for k, name in enumerate(ordered)}
        order = {d: sorted(names, key=rank.get) for d, names in placement.order.items()}
        placement = type(placement)(placement.assign, order, placement.mode)
    back = coarse.expand(placement)
    before, after = simulate(small, placement), simulate(coarse.fine, back)
    assert set(back.assign) == {op.name for op in coarse.fine.ops}
    if coarse.fine.memory_model == "static":
        assert after.peak == pytest.approx(before.peak)
    if len(small.ops) == len(coarse.fine.ops):
        assert after.makespan == pytest.approx(before.makespan)


def test_strict_orders_run_no_later_when_expanded() -> None:
    problem = training_graph(300, 3)
    coarse = coarsen(problem, 60)
    assert len(coarse.problem.ops) < 220
    planned = place(coarse.problem, budget=0.5)
    schedule = simulate(coarse.problem, planned)
    strict = type(planned)(planned.assign, {
        d: sorted(names, key=lambda n: schedule.start[coarse.problem.op_index[n]])
        for d, names in (planned.order or {}).items()
    }, "strict")  # fmt: skip
    fine = simulate(problem, coarse.expand(strict))
    # Members start no later than what holds them did, and send as soon as they are done; only
    # links may see their queues in another order.
    assert fine.makespan <= simulate(coarse.problem, strict).makespan * 1.01


def test_joined_ops_stay_small_enough_to_balance() -> None:
    problem = training_graph(600, 4)
    coarse = coarsen(problem)
    p = coarse.problem.arrays
    before = problem.arrays
    assert p.time.min(1).max() <= before.time.sum() / 4 / before.time.shape[1] / 8 * 1.001
    assert (p.param + p.out + p.temp).max() <= before.cap.min() / 8 * 1.001


def test_a_coarse_plan_is_reported_as_what_the_ops_do() -> None:
    problem = training_graph(400, 3)
    placement = place(problem, budget=0.6, coarsen_to=100)
    schedule = simulate(problem, placement)
    report = placement.report
    assert report["coarse_ops"] < 300
    assert set(placement.assign) == {op.name for op in problem.ops}
    assert report["makespan_s"] == schedule.makespan
    assert report["peak_bytes"] == dict(
        zip((d.name for d in problem.devices), schedule.peak.tolist(), strict=True)
    )
    assert not schedule.shortfall(problem)
    assert report["lower_bound_s"] == place(problem, algorithm="heft").report["lower_bound_s"]


def test_what_a_coarse_plan_misses_is_no_proof() -> None:
    raw = {
        "format": "placement-problem v1",
        "memory_model": "static",
        "devices": [{"name": "a", "memory_bytes": 10}, {"name": "b", "memory_bytes": 10}],
        "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
        "ops": [{"name": n, "time_s": 1, "param_bytes": 5} for n in "pqrs"],
        "edges": [{"src": a, "dst": b, "bytes": 1} for a, b in ("pq", "qr", "rs")],
    }
    problem = problem_from_dict(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SHARE", 1.5)
        with pytest.raises(InfeasibleError, match="with ops joined, .*; leave out coarsen_to") as e:
            place(problem, coarsen_to=1)
    assert not e.value.proven
    assert place(problem, budget=0.2).report["peak_bytes"] == {"a": 10.0, "b": 10.0}
    with pytest.raises(PlacementError, match="coarsen_to must be a number of ops, is 0"):
        place(problem, coarsen_to=0)


def test_a_search_on_the_coarser_graph_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = training_graph(400, 3)
    searched: list[int] = []
    made = best.Search.__init__

    def spy(self: best.Search, given: Problem, *rest: Any) -> None:
        searched.append(len(given.ops))
        made(self, given, *rest)

    monkeypatch.setattr(best.Search, "__init__", spy)
    monkeypatch.setattr(best, "_MANY", range(100, 1000))
    still = SimpleNamespace(perf_counter=lambda: 0.0)  # the work is counted, not timed
    monkeypatch.setattr(best, "time", still)
    monkeypatch.setattr(fitting, "time", still)
    one, two = (place(problem, budget=1.0, seed=3) for _ in range(2))
    assert searched[0] < searched[1] == len(problem.ops) and searched[2:] == searched[:2]
    assert (one.assign, one.order) == (two.assign, two.order)
    for name in ("min-cut", "heft", "m-etf"):
        assert one.report["makespan_s"] <= place(problem, algorithm=name).report["makespan_s"]


def test_what_joined_ops_cannot_do_the_ops_may(monkeypatch: pytest.MonkeyPatch) -> None:
    def hopeless(self: best.Search) -> best.Found:
        if len(self.problem.ops) < len(problem.ops):
            raise InfeasibleError("nothing fits", {}, False)
        return run(self)

    problem, run = training_graph(400, 3), best.Search.run
    monkeypatch.setattr(best, "_MANY", range(100, 1000))
    monkeypatch.setattr(best.Search, "run", hopeless)
    placement = place(problem, budget=1.0)
    assert not simulate(problem, placement).shortfall(problem)


def test_an_op_that_feeds_thousands_is_coarsened_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contraction looks at the neighbours of the smaller op, not of the one that has most."""
    middle = [f"o{k}" for k in range(3000)]
    ops = [{"name": name, "time_s": 1, "param_bytes": 1} for name in ("fork", *middle, "join")]
    edges = [{"src": "fork", "dst": name, "bytes": 1} for name in middle]
    edges += [{"src": name, "dst": "join", "bytes": 1} for name in middle]
    looked, join = [], module._Graph._join

    def spy(self: Any, u: int, v: int) -> list[tuple[float, int, int]]:
        looked.extend(found := join(self, u, v))
        return found

    monkeypatch.setattr(module._Graph, "_join", spy)
    coarse = coarsen(
        problem_from_dict(
            {
                "format": "placement-problem v1",
                "memory_model": "static",
                "devices": [{"name": x, "memory_bytes": 4000} for x in "ab"],
                "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
                "ops": ops,
                "edges": edges,
            }
        )
    )
    assert len(coarse.problem.ops) < 2700
    assert len(looked) < 10 * len(edges)
