"""Recompute and offload make fit what does not, never make worse, and say what they did."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.bench.placement_scale import training_graph
from plait.passes.placement import alternatives_search, best, fitting
from plait.passes.placement.alternatives import rewrite
from plait.passes.placement.choices import Allowed, Chooser
from plait.passes.placement.errors import InfeasibleError, PlacementError
from plait.passes.placement.placement import Placement, read_placement
from plait.passes.placement.plan import place
from plait.passes.placement.problem import Problem
from plait.passes.placement.problem_file import problem_from_dict, problem_to_dict
from plait.passes.placement.simulator import simulate
from plait.passes.placement.starts import lean_order

from . import rules


def chain(layers: int, memory: float, host: bool = False, **op: Any) -> rules.Json:
    """A forward chain and its gradients, each of which reads what its layer read and made."""
    names = [f"f{k}" for k in range(layers)] + [f"b{k}" for k in reversed(range(layers))]
    ops = [{"name": x, "time_s": [1, None] if host else 1, "output_bytes": 1, **op} for x in names]
    ops.insert(0, {"name": "x", "time_s": [0, None] if host else 0, "output_bytes": 1})
    names.insert(0, "x")
    edges = [{"src": a, "dst": b, "bytes": 1} for a, b in zip(names, names[1:], strict=False)]
    edges += [{"src": f"f{k}", "dst": f"b{k}", "bytes": 1} for k in range(layers - 1)]
    edges += [{"src": names[k], "dst": f"b{k}", "bytes": 1} for k in range(layers)]
    devices = [{"name": "gpu", "memory_bytes": memory}]
    devices += [{"name": "host", "memory_bytes": 1000}] if host else []
    return {
        "format": "placement-problem v1",
        "memory_model": "dynamic",
        "devices": devices,
        "default_link": {"latency_s": 0.001, "bandwidth_Bps": 20.0},
        "ops": ops,
        "edges": edges,
    }


def judged(problem: Problem, placement: Placement) -> float:
    """The makespan by the rules written down a second time; the placement must fit."""
    raw = problem_to_dict(rewrite(problem, placement.alternatives).problem)
    order = {k: list(v) for k, v in (placement.order or {}).items()}
    played = rules.play(raw, dict(placement.assign), order, placement.mode)
    assert played is not None and rules.fits(raw, played[1])
    return played[0]


def test_what_does_not_fit_fits_with_recompute() -> None:
    problem = problem_from_dict(chain(8, 7))
    with pytest.raises(InfeasibleError) as caught:
        place(problem, budget=0.5)
    assert not caught.value.proven
    placement = place(problem, budget=1.0, recompute=True)
    report = placement.report
    assert judged(problem, placement) == pytest.approx(report["makespan_s"])
    assert report["makespan_s"] > 16  # the step itself, and what runs again
    assert report["recomputed"] == len(placement.alternatives) > 0 == report["offloaded"]
    assert report["recompute_s"] == pytest.approx(report["makespan_s"] - 16)
    assert report["lower_bound_s"] <= 16


def test_what_does_not_fit_fits_with_offload_without_loss_of_time() -> None:
    problem = problem_from_dict(chain(8, 7, host=True))
    with pytest.raises(InfeasibleError):
        place(problem, budget=0.5)
    placement = place(problem, budget=1.0, offload="host")
    assert judged(problem, placement) == pytest.approx(placement.report["makespan_s"])
    assert placement.report["makespan_s"] < 16.5
    assert {item.kind for item in placement.alternatives} == {"offload"}
    assert placement.report["offload_bytes"] == placement.report["peak_bytes"]["host"]


def test_with_both_the_cheaper_is_taken() -> None:
    problem = problem_from_dict(chain(8, 7, host=True))
    both = place(problem, budget=1.0, recompute=True, offload="host")
    assert judged(problem, both) < 16.5
    slow = chain(8, 7, host=True)
    slow["default_link"]["bandwidth_Bps"] = 0.1
    placement = place(problem_from_dict(slow), budget=1.0, recompute=True, offload="host")
    assert {item.kind for item in placement.alternatives} == {"recompute"}


def test_long_chains_need_checkpoints() -> None:
    problem = problem_from_dict(chain(24, 12))
    placement = place(problem, budget=2.0, recompute=True)
    judged(problem, placement)
    kept = 24 - placement.report["recomputed"]
    assert 2 <= kept <= 11


def test_ops_that_may_not_run_twice_do_not() -> None:
    raw = chain(8, 7)
    for op in raw["ops"]:
        op["recompute"] = not op["name"].startswith("f")
    with pytest.raises(InfeasibleError):
        place(problem_from_dict(raw), budget=0.3, recompute=True)
    raw = chain(8, 9)
    for name in ("f1", "f2"):
        next(op for op in raw["ops"] if op["name"] == name)["recompute"] = False
    placement = place(problem_from_dict(raw), budget=1.0, recompute=True)
    assert placement.alternatives and {"f1", "f2"}.isdisjoint(
        item.op for item in placement.alternatives
    )


def test_parameters_stay_where_both_share_them() -> None:
    raw = chain(8, 15, param_bytes=0.5)
    raw["devices"].append({"name": "other", "memory_bytes": 1})
    problem = problem_from_dict(raw)
    placement = place(problem, budget=1.0, recompute=True)
    judged(problem, placement)
    assert placement.alternatives
    for item in placement.alternatives:
        if item.op != "x":
            assert placement.assign[item.op] == placement.assign[f"{item.op}@recompute"]


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 100_000), st.integers(3, 9), st.booleans())
def test_random_problems_never_get_worse(seed: int, ops: int, host: bool) -> None:
    raw = rules.random_problem(random.Random(seed), ops, 2, tight=True)
    problem = problem_from_dict({**raw, "memory_model": "dynamic"})
    try:
        plain = place(problem, budget=0.3).report["makespan_s"]
    except InfeasibleError as error:
        if error.proven and "were played" not in str(error):  # which copies were not
            with pytest.raises(InfeasibleError) as caught:
                place(problem, budget=0.3, recompute=True)
            assert caught.value.proven
            return
        plain = np.inf
    try:
        with pytest.MonkeyPatch.context() as patch:  # the work is counted, not timed
            still = SimpleNamespace(perf_counter=lambda: 0.0)
            patch.setattr(best, "time", still)
            patch.setattr(fitting, "time", still)
            patch.setattr(alternatives_search, "time", still)
            host_name = "d1" if host else None
            placement = place(problem, budget=1.0, recompute=True, offload=host_name)
    except InfeasibleError:
        assert plain == np.inf
        return
    assert judged(problem, placement) == pytest.approx(placement.report["makespan_s"])
    assert placement.report["makespan_s"] <= plain * (1 + 1e-9)
    assert placement.report["lower_bound_s"] <= placement.report["makespan_s"] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_tiny_problems_against_all_placements_of_all_orders(seed: int) -> None:
    raw = {**rules.random_problem(random.Random(seed), 4, 2, tight=True), "memory_model": "dynamic"}
    optimum = rules.optimum(raw)
    problem = problem_from_dict(raw)
    if optimum == np.inf:
        return
    found = place(problem, budget=0.5, recompute=True).report
    assert found["lower_bound_s"] <= optimum * (1 + 1e-9)
    # Copies may make it faster; what waits deliberately is left out, as without them.
    assert found["makespan_s"] <= 1.25 * optimum + 1e-12


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_training_graph_on_devices_too_small_for_it(objective: str) -> None:
    problem = training_graph(250, 2)
    params = sum(op.param_bytes for op in problem.ops)
    small = {"devices": [{"name": f"d{k}", "memory_bytes": params / 2 + 0.5e9} for k in range(2)]}
    problem = problem_from_dict({**problem_to_dict(problem), **small})
    with pytest.raises(InfeasibleError):
        place(problem, budget=1.0, objective=objective)
    placement = place(problem, budget=3.0, recompute=True, objective=objective)
    whole = rewrite(problem, placement.alternatives).problem
    schedule = simulate(whole, placement)
    assert not schedule.shortfall(whole)
    key = {"latency": "makespan_s", "throughput": "load_s"}[objective]
    assert (
        placement.report[key]
        == {"latency": schedule.makespan, "throughput": schedule.load}[objective]
    )
    # Restricted to the original's ops it is a placement of the original.
    assign = {op.name: placement.assign[op.name] for op in problem.ops}
    simulate(problem, Placement(assign))


def test_the_same_seed_gives_the_same_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    still = SimpleNamespace(perf_counter=lambda: 0.0)  # the work is counted, not timed
    monkeypatch.setattr(best, "time", still)
    monkeypatch.setattr(fitting, "time", still)
    monkeypatch.setattr(alternatives_search, "time", still)
    problem = problem_from_dict(chain(10, 8))
    one, two = (place(problem, budget=1.0, seed=4, recompute=True).to_dict() for _ in range(2))
    del one["report"]["seconds"], two["report"]["seconds"]
    assert one == two and one["alternatives"]


def test_a_plan_that_needs_no_copies_has_none() -> None:
    placement = place(problem_from_dict(chain(6, 100)), budget=0.5, recompute=True)
    assert placement.alternatives == () and placement.report["makespan_s"] == 12
    assert placement.report["recomputed"] == 0 and "alternatives" not in placement.to_dict()


def test_no_ops_are_no_choices() -> None:
    raw = {**chain(1, 9), "ops": [], "edges": []}
    assert place(problem_from_dict(raw), budget=0.2, recompute=True).report["makespan_s"] == 0.0


def test_progress_tells_shares_of_the_whole() -> None:
    seen: list[tuple[float, float, float]] = []
    place(problem_from_dict(chain(8, 7)), budget=0.6, recompute=True,
          progress=lambda *x: seen.append(x))  # fmt: skip
    used = [x[0] for x in seen]
    assert used == sorted(used) and used[-1] <= 1.0
    assert {x[2] for x in seen} == {seen[0][2]}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"offload": "disk"}, "offload: there is no device 'disk'; use one of gpu"),
        ({"memory_model": "static"}, {"recompute": True}, "free nothing where memory_model is"),
        ({}, {"recompute": True, "coarsen_to": 3}, "coarsen_to cannot be used with recompute"),
        ({}, {"recompute": True, "algorithm": "heft"}, "only algorithm 'best' can recompute"),
    ],
)
def test_options_without_meaning_are_refused(
    change: rules.Json, options: rules.Json, message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        place(problem_from_dict({**chain(4, 9), **change}), **options)


def test_files_tell_what_was_recomputed(tmp_path: Path) -> None:
    problem = problem_from_dict(chain(8, 7))
    placement = place(problem, budget=1.0, recompute=True)
    placement.write(tmp_path / "p.json")
    back = read_placement(tmp_path / "p.json")
    assert back.alternatives == placement.alternatives
    assert judged(problem, back) == placement.report["makespan_s"]
    data = json.loads((tmp_path / "p.json").read_text())
    data["alternatives"][0]["kind"] = "forget"
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(PlacementError, match=r"p\.json: alternatives: op '.*': kind must be"):
        read_placement(tmp_path / "p.json")
    (tmp_path / "p.json").write_text(json.dumps({**data, "alternatives": {}}))
    with pytest.raises(PlacementError, match="field 'alternatives' must be a list"):
        read_placement(tmp_path / "p.json")


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 100_000), st.integers(1, 16), st.booleans(), st.booleans())
def test_choices_for_any_plan_free_memory_and_make_no_cycle(
    seed: int, ops: int, recompute: bool, host: bool
) -> None:
    rng = random.Random(seed)
    raw = rules.random_problem(rng, ops, 3, tight=True)
    for device in raw["devices"]:
        device["memory_bytes"] *= 0.4
    problem = problem_from_dict({**raw, "memory_model": "dynamic"})
    p = problem.arrays
    assign = np.array([rng.choice(np.flatnonzero(row)) for row in p.allowed])[p.unit]
    order = np.array(rng.sample(range(ops), ops), np.int64)  # sources need not come first
    chooser = Chooser(problem, assign, order, "latency", Allowed(recompute, "d0" if host else None))
    played = chooser.plain
    for segments in (1, 2):
        kept = chooser.checkpoints(segments)
        grown = chooser.grow(played.copies.choices, kept, 0.2, 8)
        assert grown.over <= played.over
        played = grown
    whole = rewrite(problem, played.copies.alternatives(problem))
    names = [op.name for op in whole.problem.ops]
    placed = {n: problem.devices[d].name for n, d in zip(names, played.assign, strict=True)}
    sequence: dict[str, list[str]] = {}
    for i in played.sequence.tolist():
        sequence.setdefault(placed[names[i]], []).append(names[i])
    schedule = simulate(whole.problem, Placement(placed, sequence))
    assert (schedule.makespan, schedule.peak.tolist()) == (played.cost, played.peak.tolist())


def test_what_is_freed_is_gone_at_the_peak() -> None:
    problem = problem_from_dict(chain(12, 8))
    p = problem.arrays
    chooser = Chooser(problem, np.zeros(len(p.topo), np.int64), p.topo, "latency",
                      Allowed(True, None))  # fmt: skip
    assert chooser.plain.peak[0] == 14  # x, all of the forward chain, and the first gradient
    without = chooser.grow({}, frozenset(), 0.2, 24)
    borders = chooser.checkpoints(3)
    assert 1 <= len(borders) <= 4
    with_borders = chooser.grow({}, borders, 0.2, 24)
    assert borders.isdisjoint(with_borders.copies.choices)
    assert with_borders.over < without.over  # one long chain comes back all at once


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 100_000), st.integers(1, 20))
def test_the_lean_order_has_sources_first_and_starts_with_the_least(seed: int, ops: int) -> None:
    p = problem_from_dict(rules.random_problem(random.Random(seed), ops, 2)).arrays
    order = lean_order(p, p.topo)
    assert sorted(order) == list(range(ops))
    place = np.argsort(order)
    assert (place[p.tensor_src[p.pair_tensor]] < place[p.pair_dst]).all()
    first = [i for i in range(ops) if p.in_ptr[i] == p.in_ptr[i + 1]]
    assert p.out[order[0]] == min(p.out[i] for i in first)
