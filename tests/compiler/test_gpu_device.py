"""Which device a model is compiled for; where there is a GPU, models run on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import plait
from plait.compiler.build import gpu_of

from .budgets import Net, example
from .test_gpu import OWN, Cell

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CPU, ONE, TWO = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


def _captured(*devices: torch.device, constants: Any = None) -> Any:
    inputs = [SimpleNamespace(device=d) for d in devices]
    return SimpleNamespace(inputs=inputs, constants=lambda: constants or {})


def test_the_inputs_say_where_a_model_runs() -> None:
    assert gpu_of(_captured(CPU)) is None
    assert gpu_of(_captured(ONE, ONE)) == ONE
    number = {"two": torch.tensor(2.0)}  # eager PyTorch takes a number along to any device
    assert gpu_of(_captured(ONE, constants=number)) == ONE
    assert gpu_of(_captured(CPU, constants={"w": torch.ones(3)})) is None


@pytest.mark.parametrize("devices", [(CPU, ONE), (ONE, TWO)])
def test_several_devices_are_refused(devices: tuple[torch.device, ...]) -> None:
    with pytest.raises(NotImplementedError, match="are on several devices"):
        gpu_of(_captured(*devices))
    with pytest.raises(NotImplementedError, match="are on several devices: cpu, cuda:0"):
        gpu_of(_captured(ONE, constants={"w": torch.ones(3)}))


@needs_gpu
@pytest.mark.parametrize("pipeline", [None, OWN])
@torch.no_grad()
def test_a_model_on_a_gpu_computes_what_eager_does(pipeline: str | None) -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = Cell().eval().cuda()
    compiled = plait.compile(model, pipeline=pipeline)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(6):
        x = torch.randn(2, 3, 9, 9, device="cuda")
        with torch.cuda.stream(streams[turn % 2]):
            streams[turn % 2].wait_stream(torch.cuda.default_stream())
            results = compiled(x)
        torch.cuda.synchronize()
        for have, want in zip(results, model(x), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    (program,) = compiled.programs
    assert program.executable.executor.refusal == ""  # it ran as one CUDA graph
    assert "PLT-CAP-015" not in {r.id for r in compiled.remarks}


@needs_gpu
@pytest.mark.parametrize("share", ["20%", "60%"])
@torch.no_grad()
def test_experts_come_from_host_memory(share: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    net, other = Net().eval().cuda(), Net().eval().cuda()
    other.load_state_dict(net.state_dict())
    model = plait.compile(net, weight_budget=share)
    for seed in range(8):
        given = [t.cuda() for t in example(3, seed)]
        torch.testing.assert_close(model(*given), other(*given), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(*given), other(*given), rtol=1e-4, atol=1e-5)
    assert model.weight_tier is not None
    counters = model.weight_tier.counters
    assert counters.fetches == 16 and counters.misses and not counters.over
    assert "PLT-CAP-015" not in {r.id for r in model.remarks}


@needs_gpu
@torch.no_grad()
def test_every_size_gets_a_program_of_its_own() -> None:
    model = Cell().eval().cuda()
    compiled = plait.compile(model)
    for n in (1, 2, 3):
        x = torch.randn(n, 3, 9, 9, device="cuda")
        for have, want in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)
    assert len(compiled.programs) == 3


@needs_gpu
@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    model = Cell().eval().cuda()
    compiled = plait.compile(model)
    x = torch.randn(1, 3, 9, 9, device="cuda")
    compiled(x)
    model.left.weight.mul_(2)
    for have, want in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)
