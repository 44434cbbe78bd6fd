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
SQUEEZENET = "plait.bench.workloads.squeezenet1_1:build"


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "models_of_test_cli_kernels.py"
    path.write_text(MODELS, encoding="utf-8")
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
def test_what_has_no_plan_for_a_gpu_is_one_clear_line(models: str, tmp_path: Path) -> None:
    line = error_of("kernels", f"{models}:routes", "-p", "normalize,outline-branches,fuse-vertical")
    assert "has no plan for a GPU: branches that data chooses" in line
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
