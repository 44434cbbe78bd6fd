"""Kernels for a GPU that compute in float64 on the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from plait.compiler.capture.export import capture
from plait.compiler.gpu.branches import assemble
from plait.compiler.gpu.pipeline import planned
from plait.runtime.plan import KernelStep

from ..runtime.fake_gpu import FakeGpu
from .test_gpu import Emulated

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * 1.0


def test_sines_near_multiples_of_pi(tmp_path: Path) -> None:
    x = torch.tensor([0.5, *(torch.pi * (1 << k) for k in range(0, 27, 2)), 3e9, float("inf")])
    with torch.no_grad():
        lowered = planned(capture(Sine().eval(), (x,), {})).lower()
    assert [type(s) for s in lowered.plan.steps] == [KernelStep]
    device = FakeGpu()
    executor = assemble(lowered, device, Emulated(tmp_path))  # holds the memory of what is issued
    (found,) = executor.run([x])
    device.synchronize()
    wanted = torch.sin(x.double()).float()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, equal_nan=True)
