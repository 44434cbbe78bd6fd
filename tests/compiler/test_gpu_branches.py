"""Models whose work branches, compiled for a GPU: plans, and by an emulated GPU their values."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plait
from plait.compiler.capture.export import capture
from plait.compiler.gpu.branches import LEAST, Bucketed, assemble, bucket
from plait.compiler.gpu.lower import GpuLowered
from plait.compiler.gpu.pipeline import planned
from plait.runtime.cuda_graph import GpuExecutor
from plait.runtime.plan import BranchStep, Plan

from ..runtime.fake_gpu import FakeGpu
from .test_gpu import Emulated

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
WIDTH = 6


def _lowered(model: nn.Module, *inputs: torch.Tensor) -> GpuLowered:
    with torch.no_grad():
        return planned(capture(model.eval(), inputs, {})).lower()


def _check(
    model: nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]], scratch: Path, seed: int = 0
) -> GpuExecutor:
    """Every call's results are the model's, whatever else is in flight."""
    device = FakeGpu(seed)
    executor = assemble(_lowered(model, *inputs[0]), device, Emulated(scratch))
    found = []
    for number, given in enumerate(inputs):
        device.caller = f"caller {number % 2}"
        found.append((executor.run(given), given))
    device.synchronize()
    for results, given in found:
        with torch.no_grad():
            torch.testing.assert_close(results[0], model(*given), rtol=1e-4, atol=1e-5)
    return executor


class Sides(nn.Module):
    """A choice between two sides, one of which chooses again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x)) + x

        def one(x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 4, lambda x: torch.tanh(x), lambda x: x * 3 + 1, (x,))

        def other(x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.one(x)) - 1

        return torch.cond(x.sum() > 0, one, other, (x,)) * 2 + x


class Routed(nn.Module):
    """Cells go to branches; ``branches`` are from `WIDTH` to `WIDTH` features."""

    def __init__(self, branches: Sequence[nn.Module], top_k: int = 1) -> None:
        super().__init__()
        scorer = nn.Linear(WIDTH, len(branches))
        self.router = plait.Router(branches, scorer, top_k=top_k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.router(x * 2)) + 1


class Mean(nn.Module):
    """Looks at all of its cells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH))


def _cells(rows: int, calls: int = 5) -> list[tuple[torch.Tensor, ...]]:
    """Inputs whose cells spread, or all go one way."""
    found = [torch.randn(rows, WIDTH) * (1 + k) for k in range(calls)]
    found[1], found[2] = found[1][:1].expand(rows, -1).clone(), found[2] * 0 + 1
    return [(x,) for x in found]


def test_a_cond_runs_the_side_that_data_choose(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = [(torch.randn(3, WIDTH) + shift,) for shift in (2, -2, 0.2, 2, -2, 0.2, 1, -1)]
    executor = _check(Sides(), inputs, tmp_path)
    assert executor.refusals() == []
    assert len([s for s in executor.plan.steps if isinstance(s, BranchStep)]) == 1
    ran = [line for line in executor.visits() if not line.startswith(" ")]
    assert len(ran) == 2 and not any(" 0 times" in line for line in ran)


def test_branches_get_programs_for_buckets_of_rows(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Routed([_mlp(), nn.LayerNorm(WIDTH), nn.Identity()], top_k=2)
    executor = _check(model, _cells(11), tmp_path)
    assert executor.refusals() == []
    parts = [p for p in executor.parts.values() if isinstance(p, Bucketed)]
    assert len(parts) == 3 and all(p.programs for p in parts)
    assert all(set(p.programs) <= {8, 16, 22} for p in parts)
    assert all(isinstance(e, GpuExecutor) for p in parts for e in p.programs.values())


def test_what_looks_at_all_of_its_cells_gets_no_others(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Routed([_mlp(), Mean()])
    lowered = _lowered(model, *_cells(11)[0])
    told = [r for r in lowered.remarks if r.id == "PLT-GPU-008"]
    assert len(told) == 1 and "more than one cell" in told[0].reason
    executor = _check(model, _cells(11), tmp_path)
    [mean] = [p for p in executor.parts.values() if isinstance(p, Bucketed) and p.branch.refusal]
    assert mean.programs == {}


def test_routers_and_conds_within_branches(tmp_path: Path) -> None:
    torch.manual_seed(3)
    inner = Routed([_mlp(), nn.Tanh()])
    executor = _check(Routed([inner, nn.Linear(WIDTH, WIDTH)]), _cells(9, 3), tmp_path)
    assert any("program for" in line for line in executor.visits())


def test_a_branch_without_kernels_runs_by_its_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, size: int) -> str:
        return "code generation failed (BuildError: no nvcc)"

    torch.manual_seed(1)
    monkeypatch.setattr(Bucketed, "_compile", broken)
    executor = _check(Routed([_mlp(), nn.Tanh()]), _cells(11), tmp_path)
    assert {reason for _, reason in executor.refusals()} == {broken(None, 0)}


def test_buckets() -> None:
    assert [bucket(rows, 100) for rows in (1, 8, 9, 16, 33, 65, 100)] == [
        8,
        8,
        16,
        16,
        64,
        100,
        100,
    ]
    assert LEAST == 8 and bucket(3, 5) == 5


def test_plans_with_branches_survive_a_file() -> None:
    plan = _lowered(Sides(), torch.randn(3, WIDTH)).plan
    assert Plan.from_json(plan.to_json()) == plan
    assert "cond" in str(plan) and "stream 0" in str(plan)


def test_branches_that_must_not_be_empty_have_to_be_outlined() -> None:
    model = Routed([nn.Tanh(), nn.Identity()])
    captured = capture(model.eval(), (torch.randn(11, WIDTH),), {})
    captured.occupied = True
    with pytest.raises(NotImplementedError, match="has to be outlined"):
        planned(captured, "normalize")
