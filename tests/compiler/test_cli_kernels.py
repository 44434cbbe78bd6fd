"""``plait kernels``: a model's kernels for a GPU that need not be here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from plait.kernels import cuda
from plait.runtime.plan import Plan

from .test_cli import MODELS, error_of, plait

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
CHOICES = """
class Sides(torch.nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x * 2 + 1, lambda x: x.tanh(), (x,)) - 1


def sides():
    return Sides(), (torch.ones(4),)


class Some(torch.nn.Module):
    def forward(self, x):
        x = x[x > 0]
        return torch.cond(x.sum() > 1, lambda x: x.sum() * 2, lambda x: x.sum() + 1, (x,))


def some():
    return Some(), (torch.ones(4),)
"""
SQUEEZENET = "plait.bench.workloads.squeezenet1_1:build"


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "models_of_test_cli_kernels.py"
    path.write_text(MODELS + CHOICES, encoding="utf-8")
    return str(path)


@needs_nvcc
def test_squeezenet_compiles_for_sm_90(tmp_path: Path) -> None:
    output, report = tmp_path / "made", tmp_path / "report.json"
    result = plait("kernels", SQUEEZENET, "-o", output, "--json", report)
    assert result.exit_code == 0, result.output
    for words in ("critical path", "work over all multiprocessors", "not a measurement", "streams"):
        assert words in " ".join(result.output.split())
    document = json.loads(report.read_text("utf-8"))
    steps = document["steps"]
    assert document["target"] == "sm_90" and max(document["bounds"].values()) <= document["seconds"]
    ours = [s for s in steps if "registers" in s]
    assert ours and all(0 < s["occupancy"] <= 1 and s["registers"] > 0 for s in ours)
    assert sum(s["kernel"] == "aten.conv2d.default" for s in steps) == 26
    assert any(len(s["parts"]) == 2 for s in ours)  # two branches of a fire module
    assert len({s["stream"] for s in steps}) == 2
    plan = Plan.from_json((output / "plan.json").read_text("utf-8"))
    assert len(plan.steps) == len(steps) == len(plan.lanes)
    launches = json.loads((output / "launches.json").read_text("utf-8"))
    for step in ours:
        found = next(v for v in launches.values() if v["kernel"]["name"] == step["kernel"])
        image = f"kernels{found['image']}"
        assert (output / f"{image}.cubin").read_bytes()[:4] == b"\x7fELF"
        assert found["kernel"]["launches"][0]["function"] in (output / f"{image}.cu").read_text()


@needs_nvcc
def test_what_the_data_choose_has_tables_of_its_own(models: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = plait("kernels", f"{models}:sides", "-o", tmp_path / "made", "--json", report)
    words = " ".join(result.output.split())
    assert result.exit_code == 0 and words.count("which runs where the data say so") == 2
    assert "1 choices of the host's" in words and "cond of 2" in words
    sides = json.loads(report.read_text("utf-8"))["branches"]
    assert len(sides) == 2 and all(any("registers" in s for s in steps) for steps in sides.values())
    assert all((tmp_path / "made" / name / "plan.json").exists() for name in sides)
    routes = plait("kernels", f"{models}:routes")
    assert routes.exit_code == 0 and "compiled for so many rows as they get" in routes.output


@needs_nvcc
def test_what_has_no_plan_for_a_gpu_is_one_clear_line(models: str, tmp_path: Path) -> None:
    line = error_of("kernels", f"{models}:some")
    assert "has no plan for a GPU: branches of cond have sizes that only data tell" in line
    line = error_of("kernels", f"{models}:small", "--target", "sm_99")
    assert "nvcc does not know 'sm_99', only sm_" in line and "choose another --target" in line
    taken = tmp_path / "taken"
    taken.write_text("", encoding="utf-8")
    assert "is no directory" in error_of("kernels", f"{models}:small", "-o", taken)


def test_a_wrong_call_gets_one_clear_line(models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is no GPU generation; write it as sm_90" in error_of(
        "kernels", f"{models}:small", "--target", "h100"
    )
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert "nvcc is not on the PATH; install the CUDA toolkit" in error_of(
        "kernels", f"{models}:small"
    )
