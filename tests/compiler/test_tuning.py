"""Tuning a compiled model: tasks by weight, winners that later compilations get."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import plait
from plait.compiler.cli import app
from plait.compiler.lowering.trial import Trial
from plait.compiler.measure import tuning

pytestmark = pytest.mark.usefixtures("kernels_win")  # what the library wins, nothing can tune
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64))
    return model.eval(), (torch.randn(32, 256),)
"""


def compiled_model() -> tuple[plait.Compiled, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 96)
    ).eval()
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        return plait.compile(model, example_inputs=x), x


def test_heavy_kernels_become_tasks_heaviest_first() -> None:
    compiled, x = compiled_model()
    graph = compiled.programs[-1].executable
    tasks = tuning.tasks_of(graph, [x])
    assert [t.group.kind for t in tasks] in (["conv", "gemm"], ["gemm", "conv"])
    assert [t.weight for t in tasks] == sorted((t.weight for t in tasks), reverse=True)
    for task in tasks:
        entry = graph.kernels.store.lookup(task.key)
        kernel = task.revive(entry)
        assert kernel.name == entry.symbol and kernel.tasks >= 1
        bench = task.bench()
        bench.reset()
        run = bench.candidate(kernel, graph.kernels.store.address(entry))
        assert not bench.check() <= bench.tolerance  # spoilt outputs are not right by chance
        run.run()
        assert bench.check() <= bench.tolerance


def test_tuned_kernels_are_what_the_next_compilation_runs() -> None:
    compiled, x = compiled_model()
    graph = compiled.programs[-1].executable
    seen = []
    outcomes = tuning.tune_graph(graph, [x], budget=120.0, trials=2, progress=seen.append)
    assert len(outcomes) == 2 and all(o.after is not None for o in outcomes)
    assert {p.stage for p in seen} >= {"templates", "done"}
    again, _ = compiled_model()
    with torch.no_grad():
        torch.testing.assert_close(again(x), compiled(x), rtol=1e-4, atol=1e-4)
    store = graph.kernels.store
    for key in again.programs[-1].executable.kernels.requests:
        assert store.lookup(key) is not None


def test_a_budget_must_be_positive() -> None:
    compiled, x = compiled_model()
    with pytest.raises(ValueError, match="must be positive"):
        tuning.tune_graph(compiled.programs[-1].executable, [x], budget=0.0)


def test_trials_differ_from_their_reference_until_a_kernel_ran() -> None:
    compiled, _ = compiled_model()
    for request in compiled.programs[-1].executable.kernels.requests.values():
        trial = Trial(request.group, request.io, {})
        trial.spoil()
        assert not trial.error() < 1e-3


def test_command_line(tmp_path) -> None:
    path = tmp_path / "model_to_tune.py"
    path.write_text(MODEL, encoding="utf-8")
    arguments = ["tune", f"{path}:build", "--budget", "6", "--trials", "2"]
    result = CliRunner().invoke(app.app, arguments)
    assert result.exit_code == 0, result.output
    assert "linear" in result.output and "the whole model:" in result.output


def test_a_saved_program_can_be_tuned(tmp_path) -> None:
    compiled, x = compiled_model()
    compiled.save(tmp_path / "model.plait")
    arguments = ["tune", str(tmp_path / "model.plait"), "--budget", "4", "--trials", "2"]
    result = CliRunner().invoke(app.app, arguments)
    assert result.exit_code == 0, result.output
    assert "the whole model:" in result.output


def test_kernels_of_both_sides_of_a_choice_are_tuned() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(256, 384), nn.Linear(256, 128)
            self.back = nn.Linear(128, 384)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def one(x: torch.Tensor) -> torch.Tensor:
                return self.wide(x)

            def other(x: torch.Tensor) -> torch.Tensor:
                return self.back(self.narrow(x))

            return torch.cond(x.sum() > 0, one, other, (x,))

    x = torch.randn(16, 256)
    with torch.no_grad():
        compiled = plait.compile(Choice().eval(), example_inputs=x)
    tasks = tuning.tasks_of(compiled.programs[-1].executable, [x])
    assert [t.group.kind for t in tasks] == ["gemm"] * 3
    assert all(t.weight > 0 for t in tasks)
