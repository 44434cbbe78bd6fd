"""Resident memory under a budget for weights, as the system counts it of a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.kernels import routing

CODE = """
import sys, torch, plait
from plait.bench.measure import high_water
path, budget, call = sys.argv[1:]
model = plait.load(path, weight_budget=budget or None)
x = torch.randn([int(d) for d in model.programs[0].captured.inputs[0].shape])
with torch.no_grad():
    for k in range(24):
        eval(call)
print(high_water(), 'tvm' in sys.modules)
"""


def peak(path: Path, budget: str, call: str) -> int:
    """The most bytes resident in a process that loads a model and makes 24 calls."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(path), budget, call], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        figure, compiled = done.stdout.split()
        if compiled == "False":  # else that took memory, too; the second has the kernels
            return int(figure)
    raise AssertionError("kernels are compiled each time")


def weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def test_of_experts_35_percent_at_most(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self, inner: int) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, inner, 1024) * 0.03)
            self.down = nn.Parameter(torch.randn(8, 1024, inner) * 0.03)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            route = routing.route(index, 8)
            inner = routing.routed_linear(x, *route, self.up, None, False, 1, False).relu()
            return routing.routed_linear(inner, *route, self.down, None, False, 0, True)

    peaks = []
    for inner, budget in ((64, "50%"), (4096, "30%")):
        path = tmp_path / f"{inner}.plait"
        inputs = (torch.randn(4, 1024), torch.zeros(4, 1, dtype=torch.int64))
        plait.compile(Wide(inner).eval(), example_inputs=inputs, tune="off").save(path)
        peaks.append(peak(path, budget, "model(x, torch.full((4, 1), k % 8))"))
    assert peaks[1] - peaks[0] < 0.35 * 256 * 2**20, peaks


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_of_branches_35_percent_at_most(tmp_path: Path, kind: str) -> None:
    def branch(width: int) -> nn.Module:
        if kind == "linear":
            return nn.Sequential(nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, 1024))
        first = nn.Conv2d(64, width // 8, 3, padding=1)
        second = nn.Conv2d(width // 8, 448, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.BatchNorm2d(448), nn.ReLU())

    count = 8 if kind == "linear" else 16

    def scorer(x: Tensor) -> Tensor:
        return (x[:, 0] if x.dim() == 2 else x[:, 0, 0, 0]).long() % count

    peaks, sizes = [], []
    for width, budget in ((64, ""), (4096, "30%")):
        path = tmp_path / f"{width}.plait"
        model = plait.Router([branch(width) for _ in range(count)], scorer, combine="sum").eval()
        sizes.append(weights(model))
        x = torch.randn(4, 1024) if kind == "linear" else torch.randn(4, 64, 2, 2)
        plait.compile(model, example_inputs=(x,), tune="off").save(path)
        peaks.append(peak(path, budget, "model(x * 0 + k + 0.5)"))
    assert sizes[1] > 140 << 20
    assert peaks[1] - peaks[0] < 0.35 * sizes[1], (peaks, sizes)
