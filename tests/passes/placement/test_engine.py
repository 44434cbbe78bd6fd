"""What the annealer keeps up to date is what it would be if made anew, and cuts cut only losers."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.kernels.c_compiler import c_compiler
from plait.passes.placement import engine as engine_module
from plait.passes.placement.clusters import cluster_levels, linear_orders, regions
from plait.passes.placement.engine import Engine
from plait.passes.placement.errors import PlacementError
from plait.passes.placement.problem_file import problem_from_dict

from . import rules


def annealed(seed: int, ops: int, devices: int, throughput: bool, steps: int) -> Engine:
    """An engine after some moves on a random problem, accepted and rejected."""
    problem = rules.random_problem(random.Random(seed), ops, devices, tight=seed % 2 == 0)
    p = problem_from_dict(problem).arrays
    engine = Engine(p, linear_orders(p), regions(cluster_levels(p)))
    engine.set_throughput(throughput)
    engine.state.assign[:] = np.argmax(p.allowed, axis=1)[p.unit]
    engine.state.random[0] = seed
    engine.settle(3.0)
    engine.anneal(steps, 2.0, 0.01, 3.0, 0.3)
    return engine


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 100_000), st.integers(1, 90), st.integers(1, 5), st.booleans())
def test_levels_and_cost_after_moves_are_those_made_anew(
    seed: int, ops: int, devices: int, throughput: bool
) -> None:
    engine = annealed(seed, ops, devices, throughput, 60)
    s = engine.state
    kept, priority, cost = engine.work.level.copy(), s.priority.copy(), float(s.cost[0])
    level = engine.bottom_levels(s.assign)
    assert kept.tolist() == level.tolist()
    assert priority.tolist() == (level + s.offset).tolist()
    assert engine.settle(3.0) == cost


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 100_000), st.integers(1, 60), st.integers(1, 5), st.booleans())
def test_a_limit_cuts_what_is_above_it_and_nothing_else(
    seed: int, ops: int, devices: int, throughput: bool
) -> None:
    engine = annealed(seed, ops, devices, throughput, 20)
    cost = float(engine.state.cost[0])
    assert engine.settle(3.0, cost * (1 + 1e-9)) == cost
    assert engine.settle(3.0, np.nextafter(cost, -1.0)) == np.inf


@pytest.mark.parametrize("memory_model", ["dynamic", "static"])
def test_the_cost_is_the_makespan_and_what_is_over_memory(memory_model: str) -> None:
    sizes = {"output_bytes": 2, "temp_bytes": 3, "keep": True}
    problem = {
        "format": "placement-problem v1",
        "memory_model": memory_model,
        "devices": [{"name": "a", "memory_bytes": 4}],
        "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
        "ops": [{"name": x, "time_s": 1, **sizes} for x in "pqr"],
        "edges": [],
    }
    p = problem_from_dict(problem).arrays
    engine = Engine(p, linear_orders(p), regions(cluster_levels(p)))
    peak = 9 if memory_model == "dynamic" else 15  # 5, 7 and 9: outputs stay
    assert engine.settle(8.0) == 3.0 + 8.0 * (peak - 4) / 4
    engine.set_throughput(True)
    assert engine.settle(8.0) == 3.0 + 8.0 * (peak - 4) / 4
    assert engine.settle(8.0, 3.0 + 8.0 * (peak - 4) / 4) < np.inf
    assert engine.settle(8.0, 3.0 + 8.0 * (peak - 4) / 4 - 1e-9) == np.inf


def test_sums_in_another_order_cut_nothing() -> None:
    assert 0.1 + 0.2 + 0.3 > 0.3 + 0.2 + 0.1
    problem = {
        "format": "placement-problem v1",
        "devices": [{"name": "a", "memory_bytes": 4}],
        "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
        "ops": [{"name": str(x), "time_s": x} for x in (0.1, 0.2, 0.3)],
        "edges": [],
    }
    p = problem_from_dict(problem).arrays
    engine = Engine(p, linear_orders(p), regions(cluster_levels(p)))
    cost = engine.settle(1.0)  # the longest op leads
    assert cost == 0.3 + 0.2 + 0.1
    assert engine.settle(1.0, cost) == cost


@pytest.mark.parametrize("devices", [1, 4])
def test_no_ops_are_no_moves(devices: int) -> None:
    engine = annealed(1, 1, devices, False, 5)
    assert engine.state.cost[1] <= engine.state.cost[0]


def test_the_library_is_built_anew_where_the_kept_one_is_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = c_compiler()
    assert compiler is not None
    monkeypatch.setenv("TMPDIR", "/proc")  # where no compiler writes
    source = "int answer(void) { return 42; }"
    kept = tmp_path / "kept.so"
    kept.write_bytes(b"of another machine")
    assert engine_module._loaded(kept, compiler, source).answer() == 42
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "engine.so"  # as in a folder that cannot be written
    assert engine_module._loaded(nowhere, compiler, source).answer() == 42

    def no_folder(**_: object) -> object:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", no_folder)
    with pytest.raises(PlacementError, match="set TMPDIR"):
        engine_module._loaded(nowhere, compiler, source)


def test_ops_find_the_device_that_is_good_at_them() -> None:
    """A chain over 64 devices, each op a thousand times as fast on one of them as elsewhere."""
    rng = random.Random(3)
    apt = [rng.randrange(64) for _ in range(60)]
    problem: rules.Json = {
        "format": "placement-problem v1",
        "devices": [{"name": f"d{k}", "memory_bytes": 1} for k in range(64)],
        "default_link": {"latency_s": 0, "bandwidth_Bps": 1e9},
        "ops": [
            {"name": f"o{k}", "time_s": [0.001 if d == a else 1.0 for d in range(64)]}
            for k, a in enumerate(apt)
        ],
        "edges": [{"src": f"o{k}", "dst": f"o{k + 1}", "bytes": 0} for k in range(59)],
    }
    p = problem_from_dict(problem).arrays
    engine = Engine(p, linear_orders(p), regions(cluster_levels(p)))
    engine.settle(1.0)
    engine.anneal(4000, 1e-3, 1e-5, 1.0, 0.1)
    assert engine.state.assign.tolist() == apt
