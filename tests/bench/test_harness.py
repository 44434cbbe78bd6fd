"""The harness trusts nobody: wrong answers, failures and absent engines are results, not times."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from plait.bench import harness, peers, report, workloads
from plait.bench.environment import environment
from plait.bench.harness import Result, relative_error, run_workload, summary
from plait.bench.peers import NotApplicable, Peer

CHAIN = workloads.WORKLOADS["chain30"]


def test_a_right_engine_is_timed_and_compared_with_float64() -> None:
    (result,) = run_workload(CHAIN, [peers.PEERS["eager"]], rounds=2, seconds=0.01)
    assert result.status == "OK"
    assert result.error_ratio == pytest.approx(1)
    assert 0 < result.error < 1e-5  # type: ignore[operator]
    assert result.repeatable
    assert 0 < result.p10 <= result.p50 <= result.p90  # type: ignore[operator]
    assert len(result.rounds) == 2


def test_sixteen_bits_are_judged_by_eagers_own_error() -> None:
    def off(factor: float) -> Peer:
        def prepare(model: nn.Module, inputs: tuple):
            assert {x.dtype for x in inputs} == {torch.bfloat16}
            return lambda: model(*inputs) * factor

        return Peer(str(factor), "", prepare)

    engines = [peers.PEERS["eager"], off(1.0), off(1.5)]
    dtype = torch.bfloat16
    results = run_workload(CHAIN, engines, rounds=1, seconds=0.01, dtype=dtype)
    assert [r.status for r in results] == ["OK", "OK", "WRONG"]
    assert {r.dtype for r in results} == {"bfloat16"}
    assert results[0].error > 1e-3  # type: ignore[operator]


def test_failures_are_recorded_and_stop_nobody() -> None:
    def fails(model: nn.Module, inputs: tuple):
        raise RuntimeError("\x1b[31mno such\nluck")

    def absent(model: nn.Module, inputs: tuple):
        raise NotApplicable("not here")

    def wrong(model: nn.Module, inputs: tuple):
        return lambda: model(*inputs) * 1.01

    engines = [
        Peer("fails", "", fails),
        Peer("absent", "", absent),
        Peer("wrong", "", wrong),
        peers.PEERS["eager"],
    ]
    results = {r.peer: r for r in run_workload(CHAIN, engines, rounds=1, seconds=0.01)}
    assert results["fails"].status == "BASELINE_ERROR"
    assert results["fails"].message == "RuntimeError: no such"
    assert (results["absent"].status, results["absent"].message) == ("SKIPPED", "not here")
    assert results["wrong"].status == "WRONG"
    assert results["wrong"].p50 is None
    assert results["eager"].status == "OK"


def test_an_engine_cannot_spoil_the_model_of_the_next() -> None:
    def spoils(model: nn.Module, inputs: tuple):
        for parameter in model.parameters():
            parameter.zero_()
        return lambda: model(*inputs)

    layers = workloads.WORKLOADS["layers30"]
    engines = [Peer("spoils", "", spoils), peers.PEERS["eager"]]
    results = run_workload(layers, engines, rounds=1, seconds=0.01)
    assert [r.status for r in results] == ["WRONG", "OK"]


def test_answers_that_change_from_call_to_call_are_noticed() -> None:
    def noisy(model: nn.Module, inputs: tuple):
        calls = itertools.count()
        return lambda: model(*inputs) + 1e-5 * (next(calls) % 2)

    (result,) = run_workload(CHAIN, [Peer("noisy", "", noisy)], rounds=1, seconds=0.01)
    assert result.repeatable is False


def test_what_cannot_fit_into_memory_is_skipped() -> None:
    huge = workloads.Workload("chain30", "", gib=(("cpu", 1e6),))
    (result,) = run_workload(huge, [peers.PEERS["eager"]])
    assert result.status == "SKIPPED"
    assert "1000000 GiB" in result.message


@pytest.mark.parametrize("name", ["compile", "compile-freeze"])
def test_each_mode_of_torch_compile_compiles_for_itself(name: str) -> None:
    model, inputs = CHAIN.build()
    with torch.no_grad():
        peers.PEERS["compile"].prepare(model, inputs)
        torch._dynamo.utils.counters.clear()
        peers.PEERS[name].prepare(model, inputs)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1


def test_relative_error() -> None:
    one, two = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.1])
    assert relative_error([two], [one]) == pytest.approx(0.05, rel=1e-4)
    assert relative_error([one], [one]) == 0
    infinite = torch.tensor([1.0, float("inf")])
    assert relative_error([infinite], [infinite]) == 0
    for got in ([], [one[:1]], [infinite], [torch.full((2,), torch.nan)]):
        assert relative_error(got, [one]) == float("inf")
    empty = torch.empty(0, 3)
    assert relative_error([empty], [empty]) == 0


def test_summary_takes_the_best_of_a_family_per_workload() -> None:
    results = [
        Result("a", "cpu", "plait", p50=1.0),
        Result("a", "cpu", "eager", p50=4.0, ratio=4.0),
        Result("a", "cpu", "compile", p50=2.0, ratio=2.0),
        Result("b", "cpu", "eager", p50=8.0, ratio=8.0),
        Result("b", "cpu", "compile", p50=9.0, ratio=9.0),
        Result("b", "cpu", "ort", status="BASELINE_ERROR"),
    ]
    means = summary(results, {"eager": "torch", "compile": "torch", "ort": "engine"})
    assert means["eager"] == pytest.approx(32**0.5)
    assert means["best torch"] == means["best all"] == pytest.approx(4)
    assert "best engine" not in means
    assert summary([results[0]], {}) == {}


def test_the_document_is_plain_json_and_the_table_fits_80_columns() -> None:
    results = run_workload(CHAIN, [peers.PEERS["eager"]], rounds=1, seconds=0.01)
    results.append(Result("chain30", "cpu", "compile-freeze", "BASELINE_ERROR", "x " * 100))
    document = json.loads(json.dumps(harness.document(results, {}, environment())))
    assert document["results"][0]["peer"] == "eager"
    assert document["environment"]["versions"]["torch"] == torch.__version__
    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))
    console.print(report.workload_table(results))
    text = console.export_text()
    assert "…" not in text
    assert "BASELINE_ERROR" in text
    assert report.header(document["environment"])


def test_unknown_engines_get_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="unknown peer 'openvno': did you mean 'openvino'"):
        peers.select(["openvno"])


def test_plait_on_a_workload(tmp_path: Path) -> None:
    results = run_workload(CHAIN, peers.select(["plait", "eager"]), rounds=1, seconds=0.01)
    assert [r.status for r in results] == ["OK", "OK"], results[0].message
    assert results[0].repeatable
    assert results[0].error_ratio < 4  # type: ignore[operator]
