"""Problem files: read back as written, and each fault named by op, device and field."""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plait.passes.placement.errors import InfeasibleError, PlacementError
from plait.passes.placement.problem_file import (
    problem_from_dict,
    problem_to_dict,
    read_problem,
)

from . import rules

GOOD: dict[str, Any] = {
    "format": "placement-problem v1",
    "name": "small",
    "memory_model": "dynamic",
    "devices": [{"name": "a", "memory_bytes": 10}, {"name": "b", "memory_bytes": 10, "speed": 2}],
    "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
    "links": [{"src": "a", "dst": "b", "latency_s": 1, "bandwidth_Bps": 2}],
    "ops": [{"name": "p", "time_s": 1}, {"name": "q", "time_s": [None, 2], "group": "g"}],
    "edges": [{"src": "p", "dst": "q", "bytes": 3}],
}


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the value at a path such as ``ops.0.name``; deletes it for ``...``."""

    def change(data: Any) -> None:
        *keys, last = [int(k) if k.isdigit() else k for k in path.split(".")]
        for key in keys:
            data = data[key]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return change


FAULTS = [
    ("format", ..., "field 'format' must be"),
    ("format", "placement-problem v9", "'placement-problem v9'"),
    ("devices", [], "devices: the problem has none"),
    ("devices", ..., "field 'devices' must be a list"),
    ("ops", ..., "field 'ops' must be a list"),
    ("edges", {}, "field 'edges' must be a list"),
    ("links", 3, "field 'links' must be a list"),
    ("default_link", ..., "default_link must be an object"),
    ("default_link.latency_s", ..., "default_link: latency_s is missing"),
    ("default_link.bandwidth_Bps", 0, "default_link: bandwidth_Bps must be finite and above zero"),
    ("memory_model", "elastic", "memory_model 'elastic' is unknown"),
    ("devices.0.name", "b", "device 'b' is there twice"),
    ("devices.0.memory_bytes", -1, "device 'a': memory_bytes must be finite and zero or more"),
    ("devices.0.memory_bytes", "10", "device 'a': memory_bytes must be a number"),
    ("devices.0.memory_bytes", ..., "device 'a': memory_bytes is missing"),
    ("devices.1.speed", 0, "device 'b': speed must be finite and above zero"),
    ("links.0.src", "z", "there is no device 'z'"),
    ("links.0.bandwidth_Bps", math.nan, r"links\[0\]: bandwidth_Bps must be finite"),
    ("ops.1.name", "p", "op 'p' is there twice"),
    ("ops.0.name", 3, r"ops\[0\]: name must be a name"),
    ("ops.0", "p", r"ops\[0\] must be an object"),
    ("ops.0.time_s", ..., "op 'p': time_s is missing"),
    ("ops.0.time_s", math.nan, "op 'p': time_s must be finite"),
    ("ops.0.time_s", math.inf, "op 'p': time_s must be finite"),
    ("ops.0.time_s", True, "op 'p': time_s must be a number"),
    ("ops.0.time_s", 10**400, "op 'p': time_s must be finite"),
    ("ops.1.time_s", [1], "op 'q': time_s has 1 columns for 2 devices"),
    ("ops.1.time_s", [1, -1], r"op 'q': time_s\[1\] must be finite"),
    ("ops.1.time_s", [None, None], "op 'q': time_s allows it on no device"),
    ("ops.0.param_bytes", -3, "op 'p': param_bytes must be finite"),
    ("ops.0.output_bytes", None, "op 'p': output_bytes is missing"),
    ("ops.0.keep", 1, "op 'p': keep must be true or false"),
    ("ops.1.group", [], "op 'q': group must be text"),
    ("edges.0.src", "z", "edge 'z' -> 'q': there is no op 'z'"),
    ("edges.0.bytes", -1, "edge 'p' -> 'q': bytes must be finite"),
    ("edges.0.bytes", ..., "edge 'p' -> 'q': bytes is missing"),
    ("edges.0.tensor", 3, "edge 'p' -> 'q': tensor must be text"),
    ("edges.0.dst", "p", "cycle p -> p"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), FAULTS, ids=[f"{a}={b}" for a, b, _ in FAULTS]
)
def test_each_fault_is_named(path: str, value: Any, message: str) -> None:
    data = copy.deepcopy(GOOD)
    put(path, value)(data)
    with pytest.raises(PlacementError, match=message):
        problem_from_dict(data)


def test_a_cycle_is_shown_in_its_order() -> None:
    data = copy.deepcopy(GOOD)
    data["ops"] += [{"name": n, "time_s": 1} for n in "rs"]
    data["edges"] += [{"src": a, "dst": b, "bytes": 0} for a, b in ("qr", "rs", "sq")]
    with pytest.raises(PlacementError, match=r"cycle (q -> r -> s -> q|r -> s -> q -> r|s -> q)"):
        problem_from_dict(data)


def test_a_group_that_no_device_may_run_is_infeasible() -> None:
    data = copy.deepcopy(GOOD)
    data["ops"][0].update(time_s=[1, None], group="g")
    with pytest.raises(InfeasibleError, match="group 'g' is allowed on no device"):
        problem_from_dict(data)


@pytest.mark.parametrize("compressed", [False, True])
def test_files_are_read_plain_or_compressed(tmp_path: Path, compressed: bool) -> None:
    text = json.dumps(GOOD).encode()
    path = tmp_path / "problem.json"
    path.write_bytes(gzip.compress(text) if compressed else text)
    problem = read_problem(path)
    assert [op.name for op in problem.ops] == ["p", "q"]
    assert problem.arrays.time.tolist() == [[1.0, 0.5], [math.inf, 2.0]]


@pytest.mark.parametrize("compressed", [False, True])
def test_files_cut_short_are_refused(tmp_path: Path, compressed: bool) -> None:
    text = json.dumps(GOOD).encode()
    whole = gzip.compress(text) if compressed else text
    path = tmp_path / "problem.json"
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PlacementError, match="problem.json"):
            read_problem(path)
    with pytest.raises(PlacementError, match="cannot read"):
        read_problem(tmp_path / "none.json")


def test_what_is_written_reads_back_the_same() -> None:
    rng = random.Random(5)
    for _ in range(20):
        problem = problem_from_dict(rules.random_problem(rng, 9, 3))
        again = problem_from_dict(json.loads(json.dumps(problem_to_dict(problem))))
        assert again == problem
