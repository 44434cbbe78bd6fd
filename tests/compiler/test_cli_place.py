"""`plait place` writes a placement, or one error and no file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from plait.compiler.cli import app
from plait.passes.placement.placement import read_placement
from plait.passes.placement.problem_file import read_problem
from plait.passes.placement.simulator import simulate

PROBLEM: dict[str, Any] = {
    "format": "placement-problem v1",
    "memory_model": "static",
    "devices": [{"name": "a", "memory_bytes": 10}, {"name": "b", "memory_bytes": 10}],
    "default_link": {"latency_s": 0.5, "bandwidth_Bps": 1},
    "ops": [{"name": x, "time_s": 1, "param_bytes": 6} for x in ("p", "q")],
    "edges": [{"src": "p", "dst": "q", "bytes": 1}],
}


def place(folder: Path, problem: Any, *options: str) -> Result:
    path = folder / "problem.json"
    path.write_text(json.dumps(problem) if isinstance(problem, dict) else problem)
    out = str(folder / "out.json")
    return CliRunner().invoke(app.app, ["place", str(path), "-o", out, "--budget", "0.3", *options])


@pytest.mark.parametrize("algorithm", ["best", "min-cut", "m-topo", "m-etf", "m-sct", "heft"])
def test_a_placement_is_written_and_told_of(tmp_path: Path, algorithm: str) -> None:
    result = place(tmp_path, PROBLEM, "--algorithm", algorithm)
    assert result.exit_code == 0, result.output
    placement = json.loads((tmp_path / "out.json").read_text())
    assert sorted(placement["assign"].values()) == ["a", "b"]
    assert placement["report"]["makespan_s"] == 3.5
    assert placement["report"]["algorithm"] == algorithm
    assert "step: 3.5 s, lower bound" in result.output


def test_throughput_reports_the_largest_load(tmp_path: Path) -> None:
    result = place(tmp_path, PROBLEM, "--objective", "throughput")
    assert "seconds per input: 1.5 s" in result.output


TIGHT: dict[str, Any] = {
    "format": "placement-problem v1",
    "memory_model": "dynamic",
    "devices": [{"name": "gpu", "memory_bytes": 4}, {"name": "host", "memory_bytes": 99}],
    "default_link": {"latency_s": 0, "bandwidth_Bps": 100},
    "ops": [{"name": x, "time_s": [1, None], "output_bytes": 1}
            for x in ("f0", "f1", "f2", "f3", "b3", "b2", "b1", "b0")],
    "edges": [{"src": x[:2], "dst": x[3:], "bytes": 1}
              for x in ("f0 f1", "f1 f2", "f2 f3", "f3 b3", "b3 b2", "b2 b1", "b1 b0", "f0 b0",
                        "f1 b1", "f2 b2")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        (["--recompute"], "recompute", "1 ops recomputed in 1 s, outputs of 0 offloaded"),
        (["--offload", "host"], "offload", "0 ops recomputed in 0 us, outputs of 1 offloaded, 1 B"),
    ],
)
def test_activations_make_room(tmp_path: Path, options: list[str], kind: str, told: str) -> None:
    refused = place(tmp_path, TIGHT)
    assert refused.exit_code == 2
    told_short = "all 1 were played in all orders; in the nearest, 'gpu' is 1 bytes short"
    assert told_short in refused.output
    whole = tmp_path / "whole.json"
    gantt, trace = tmp_path / "step.svg", tmp_path / "step.json"
    result = place(tmp_path, TIGHT, *options, "--rewritten", str(whole), "--gantt", str(gantt),
                   "--trace", str(trace), "--budget", "1")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert told in result.output
    placement = json.loads((tmp_path / "out.json").read_text())
    (item,) = placement["alternatives"]
    assert item["kind"] == kind and item["op"].startswith("f")
    written = read_problem(whole)
    schedule = simulate(written, read_placement(tmp_path / "out.json"))
    assert not schedule.shortfall(written)
    assert schedule.makespan == placement["report"]["makespan_s"]
    assert f"{item['op']}@{kind}" in trace.read_text()
    assert gantt.stat().st_size


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    result = place(tmp_path, PROBLEM, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"ops": [{"name": "p", "time_s": 1, "param_bytes": 11}], "edges": []}, [],
         "op 'p' needs 11 bytes and fits nowhere: 'a' is 1 bytes short"),
        ({"devices": [{"name": "a", "memory_bytes": 10}]}, [], "2 bytes short"),
        ({"devices": []}, [], "devices: the problem has none"),
        ({"edges": [{"src": "p", "dst": "z", "bytes": 1}]}, [], "there is no op 'z'"),
        ({"edges": [{"src": a, "dst": b, "bytes": 1} for a, b in ("pq", "qp")]}, [],
         "edges: cycle"),
        ({"ops": [{"name": "p", "time_s": 1}] * 2, "edges": []}, [], "op 'p' is there twice"),
        ({"devices": [{"name": "a", "memory_bytes": 10}] * 2}, [], "device 'a' is there twice"),
        ({"ops": [{"name": "p", "time_s": -1}], "edges": []}, [], "op 'p': time_s must be finite"),
        ({"ops": [{"name": "p", "time_s": math.nan}], "edges": []}, [],
         "op 'p': time_s must be finite"),
        ({"devices": [{"name": "a", "memory_bytes": -1}]}, [], "device 'a': memory_bytes must be"),
        ({"devices": [{"name": "a"}]}, [], "device 'a': memory_bytes is missing"),
        ({"ops": [{"name": "p", "time_s": 1e308}], "edges": []}, [], "and zero or more, below"),
        ({"devices": [{"name": "a", "memory_bytes": 10, "speed": 1e-300}]}, [], "above zero"),
        ({"ops": [{"time_s": 1}], "edges": []}, [], "ops[0]: name"),
        ({}, ["--coarsen", "0"], "coarsen_to must be a number of ops"),
        ({}, ["--recompute"], "free nothing where memory_model is 'static'"),
        ({"memory_model": "dynamic"}, ["--offload", "disk"], "there is no device 'disk'"),
        ({"memory_model": "dynamic"}, ["--recompute", "--algorithm", "heft"], "only algorithm"),
        ({"ops": [{"name": "p", "time_s": 1, "recompute": 1}], "edges": []}, [],
         "op 'p': recompute must be true or false, is 1"),
        ({}, ["--algorithm", "single"], "no device holds the whole problem"),
        ({}, ["--algorithm", "magic"], "algorithm 'magic' is unknown"),
        ({}, ["--objective", "joy"], "objective 'joy' is unknown"),
        ({}, ["--budget", "-1"], "budget must be a positive number"),
    ],
)  # fmt: skip
def test_faults_exit_with_2_and_write_nothing(
    tmp_path: Path, change: dict[str, Any], options: list[str], message: str
) -> None:
    result = place(tmp_path, {**PROBLEM, **change}, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("text", ["", "{", '{"format": "placement-problem v1", "ops": ['])
def test_files_cut_short_exit_with_2(tmp_path: Path, text: str) -> None:
    result = place(tmp_path, text)
    assert result.exit_code == 2
    assert "cut short" in result.output
    assert not (tmp_path / "out.json").exists()


def test_a_failure_leaves_an_older_placement_alone(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("old")
    assert place(tmp_path, "{").exit_code == 2
    assert (tmp_path / "out.json").read_text() == "old"


@pytest.mark.parametrize("options", [["-o", "problem.json"], ["--trace", "out.json"]])
def test_no_output_takes_the_place_of_another_file(tmp_path: Path, options: list[str]) -> None:
    result = place(tmp_path, PROBLEM, options[0], str(tmp_path / options[1]))
    assert result.exit_code == 2 and "is named twice" in result.output
    assert json.loads((tmp_path / "problem.json").read_text()) == PROBLEM


def test_a_folder_that_is_not_there_is_told_before_planning(tmp_path: Path) -> None:
    result = place(tmp_path, PROBLEM, "-o", str(tmp_path / "no" / "out.json"))
    assert result.exit_code == 2
    assert "does not exist" in result.output
