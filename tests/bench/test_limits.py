"""Limits: no run beats what is said to bound it; only what is known is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import plait
from plait.bench import limits as limits_module
from plait.bench.bounds import Machine
from plait.bench.harness import Result
from plait.bench.limits import limits, machine_for
from plait.bench.peers import limits_of
from plait.bench.report import _limits

MACHINE = Machine(flops=1e9, bandwidth=1e6)


def _model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(4, 64)


def test_a_run_takes_at_least_its_bounds_and_bytes_are_counted_once() -> None:
    model, x = _model()
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,))
        found = limits(compiled.programs[-1].executable.executor, [x], MACHINE)  # type: ignore[attr-defined]
    assert found is not None
    assert 0 < found.work <= found.measured * (1 + 1e-9)
    assert 0 < found.path
    assert found.compute * 1e9 >= 2 * 4 * (64 * 32 + 32 * 8)
    weights = 64 * 32 + 32 + 32 * 8 + 8
    assert weights + 4 * 64 + 4 * 8 <= found.memory * 1e6 / 4 <= 1.5 * weights + 4 * 64 + 4 * 8


def test_nothing_is_told_of_free_sizes_nor_of_other_engines() -> None:
    model, x = _model()
    shapes = {"input": {0: torch.export.Dim("rows", min=2, max=9)}}
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,), dynamic_shapes=shapes)
        assert limits(compiled.programs[-1].executable.executor, [x], MACHINE) is None  # type: ignore[attr-defined]
    assert limits_of(lambda: model(x), MACHINE) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_machine_is_measured_in_the_plans_type(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _model()
    with torch.no_grad():
        compiled = plait.compile(model.to(dtype), example_inputs=(x.to(dtype),), tune="off")
    monkeypatch.setattr(limits_module, "measure_machine", lambda asked: asked)
    assert compiled.plan is not None
    assert machine_for(compiled.plan) == dtype


def test_the_line_names_what_binds() -> None:
    result = Result("a", "cpu", "plait")
    result.limits = {
        "measured": 4e-3, "planned": 4e-3, "path": 1e-3, "work": 2e-3, "compute": 1e-3,
        "memory": 5e-4,
    }  # fmt: skip
    text = "2.00x the schedule's bound (work, 2 ms), 4.00x the roofline (FLOPs, 1 ms)"
    assert _limits(result.limits) == text
