"""Models compiled for a GPU: their plans and kernels, and by an emulated GPU their values."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import plait
from plait.compiler import build, specialise
from plait.compiler.capture.export import capture
from plait.compiler.gpu import compiled
from plait.compiler.gpu.branches import assemble
from plait.compiler.gpu.compiled import launcher
from plait.compiler.gpu.lower import GpuLowered
from plait.compiler.gpu.order import dependencies
from plait.compiler.gpu.pipeline import planned
from plait.compiler.gpu.select import PLAIN
from plait.kernels.cuda_loader import GpuKernel
from plait.kernels.occupancy import SM90
from plait.runtime.cuda_graph import GpuExecutor
from plait.runtime.plan import KernelStep, LibraryStep, Plan

from ..kernels.cuda_emulator import Emulator
from ..runtime.fake_gpu import FakeGpu

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
OWN = "normalize,fuse-vertical,fuse-horizontal{own_flops=100000000},streams"


class Cell(nn.Module):
    """Branches of several kinds over one image, concatenated, and a head with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 5, 1)
        self.three = nn.Conv2d(8, 6, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 4, 1)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.left, self.right = nn.Linear(23, 12), nn.Linear(23, 7)
        self.norm = nn.LayerNorm(23)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = torch.relu(self.stem(x))
        parts = [
            torch.relu(self.one(x)),
            torch.relu(self.three(x)),
            self.point(torch.relu(self.depth(x))),
            self.pool(x),
        ]
        y = torch.cat(parts, 1)
        z = self.norm(y.mean((2, 3)))
        return torch.tanh(self.left(z)), torch.softmax(self.right(z), -1), y


def _model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Cell().eval(), torch.randn(2, 3, 9, 9)


def _lowered(pipeline: str | None = None, fused: bool = True) -> GpuLowered:
    model, x = _model()
    with torch.no_grad():
        captured = capture(model, (x,), {})
    return planned(captured, pipeline).lower(fused=fused)


@pytest.fixture(scope="module")
def own() -> GpuLowered:
    """Everything but pooling by kernels of ours."""
    return _lowered(OWN)


@pytest.fixture(scope="module")
def shared() -> GpuLowered:
    """Convolutions by the library."""
    return _lowered("normalize,fuse-vertical,fuse-horizontal{own_flops=0},streams")


_EMULATORS: dict[Any, Emulator] = {}
"""By source and kernels: tests share models, and C++ takes seconds."""


class Emulated:
    """Kernels by the emulator (`branches.Loader`)."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self._plans = scratch, itertools.count()

    def functions(self, lowered: GpuLowered) -> dict[str, Callable[..., None]]:
        place = self.scratch / str(next(self._plans))
        emulators: dict[int, Emulator] = {}
        for number in sorted({f.image for f in lowered.kernels.values()}):
            kernels = [f.kernel for f in lowered.kernels.values() if f.image == number]
            source = lowered.sources[number]
            key = source, frozenset(k.name for k in kernels)
            if key not in _EMULATORS:
                _EMULATORS[key] = Emulator(source, kernels, place / str(number))
            emulators[number] = _EMULATORS[key]

        def launch(image: int, kernel: GpuKernel, tensors: Sequence[int], *rest: Any) -> None:
            starts = [t - o for t, o in zip(tensors, kernel.offsets, strict=True)]
            is_plain = kernel.name.endswith(PLAIN) or "fused" in kernel.name
            assert is_plain or not any(s % 16 for s in starts), "rules take vectors to be aligned"
            emulators[image].launch(kernel, tensors, *rest)

        return {n: launcher(partial(launch, f.image), f) for n, f in lowered.kernels.items()}

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def _executor(lowered: GpuLowered, device: FakeGpu, scratch: Path) -> GpuExecutor:
    return assemble(lowered, device, Emulated(scratch))


@pytest.mark.parametrize("which", ["own", "shared"])
def test_a_model_computes_the_right_thing_in_every_order(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    lowered: GpuLowered = request.getfixturevalue(which)
    model, x = _model()
    device = FakeGpu()
    executor = _executor(lowered, device, tmp_path)
    for turn in range(6):
        device.caller = f"caller {turn % 2}"
        given = torch.randn_like(x) if turn else x
        results = executor.run([given])
        device.synchronize()
        for have, want in zip(results, model(given), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert device.captures == 1 and device.replays == 5 and executor.refusal == ""


def test_fused_launches_compute_the_same(own: GpuLowered, tmp_path: Path) -> None:
    _, x = _model()
    apart = _lowered(OWN, fused=False)
    assert own.fused >= 1 and apart.fused == 0
    assert len(own.plan.steps) < len(apart.plan.steps)
    found = []
    for number, lowered in enumerate((own, apart)):
        device = FakeGpu(number)
        executor = _executor(lowered, device, tmp_path / str(number))
        results = executor.run([x])  # its memory must outlive what was only issued
        device.synchronize()
        found.append(results)
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_heavy_operators_are_the_librarys_and_what_follows_is_ours(shared: GpuLowered) -> None:
    library = [s.target for s in shared.plan.steps if isinstance(s, LibraryStep)]
    assert library.count("aten.conv2d.default") == 5
    assert not any("relu" in target for target in library)
    assert "PLT-GPU-003" in {r.id for r in shared.remarks}


def test_steps_that_share_memory_are_ordered(own: GpuLowered, shared: GpuLowered) -> None:
    for lowered in (own, shared):
        before = _before(lowered.plan)
        wanted = dependencies(lowered.plan.steps, set())
        for number, needs in enumerate(wanted):
            assert all(before[number] >> k & 1 for k in needs)
        assert len({lane.stream for lane in lowered.plan.lanes}) > 1


def _before(plan: Plan) -> list[int]:
    found: list[int] = []
    for number, lane in enumerate(plan.lanes):
        same = [k for k in range(number) if plan.lanes[k].stream == lane.stream]
        bits = 0
        for k in (*lane.waits, *same):
            bits |= found[k] | 1 << k
        found.append(bits)
    return found


def test_the_plan_says_what_runs_where_and_survives_a_file(own: GpuLowered) -> None:
    text = str(own.plan)
    assert "stream 0" in text and "stream 1" in text and "after" in text
    assert Plan.from_json(own.plan.to_json()) == own.plan
    fused = [s for s, i in zip(own.plan.steps, own.steps, strict=True) if i.parts]
    assert all(isinstance(s, KernelStep) and s.kernel in own.kernels for s in fused)
    assert own.bounds.best <= own.seconds


def test_kernels_are_compiled_once(own: GpuLowered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("nvcc ran again"))
    again = _lowered(OWN)
    assert again.images == own.images and again.plan == own.plan


def test_sizes_known_only_at_run_time_are_refused() -> None:
    model, x = _model()
    with torch.no_grad():
        captured = capture(model, (x,), {}, [{0: torch.export.Dim.DYNAMIC}])
    with pytest.raises(NotImplementedError, match="sizes that are known"):
        planned(captured).lower()


# -- routed computation --------------------------------------------------------------------------


def _experts(k: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Tokens of positive numbers go to the first ``k`` experts, those of negative ones to the last
    ones.
    """
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=k
    )
    model = MixtralSparseMoeBlock(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.gate.weight += torch.tensor([[3.0], [1.0], [-1.0], [-3.0]], dtype=dtype)
    return model


def _routed(k: int, tokens: int, dtype: torch.dtype = torch.float32) -> GpuLowered:
    with torch.no_grad():
        captured = capture(_experts(k, dtype), (torch.randn(1, tokens, 16, dtype=dtype),), {})
    return planned(captured).lower()


@pytest.mark.parametrize(("k", "tokens"), [(2, 6), (1, 40), (2, 1)])
def test_experts_get_whatever_rows_are_routed_to_them(k: int, tokens: int, tmp_path: Path) -> None:
    lowered = _routed(k, tokens)
    assert not any(isinstance(s, LibraryStep) for s in lowered.plan.steps)
    assert lowered.graphable
    model, device = _experts(k), FakeGpu(tokens)
    executor = _executor(lowered, device, tmp_path)
    x = torch.randn(1, tokens, 16)
    signs = torch.ones(1, tokens, 1)
    signs[:, ::2] = -1
    with torch.no_grad():
        for given in (x, x.abs(), -x.abs(), x.abs() * signs, 0 * x + 1, 2 * x):
            (have,) = executor.run([given])
            device.synchronize()
            torch.testing.assert_close(have, model(given), rtol=1e-4, atol=1e-5)
    assert device.captures == 1 and device.replays == 5 and executor.refusal == ""


def test_routed_products_of_the_library_are_no_part_of_a_graph() -> None:
    lowered = _routed(2, 6, torch.bfloat16)
    library = [s.target for s in lowered.plan.steps if isinstance(s, LibraryStep)]
    assert library.count("plait.routed_linear.default") == 2
    assert not {"aten.topk.default", "plait.route.default"} & set(library)
    assert not lowered.graphable
    told = {r.id: r.reason for r in lowered.remarks}
    assert "count the rows" in told["PLT-GPU-004"] and "float32" in told["PLT-EXP-002"]


# -- plait.compile ------------------------------------------------------------------------------


class _Here:
    """A GPU executor whose calls have ended when they return."""

    def __init__(self, lowered: GpuLowered, scratch: Path) -> None:
        self.device = FakeGpu()
        self.inner = _executor(lowered, self.device, scratch)

    def refusals(self) -> list[tuple[str, str]]:
        return self.inner.refusals()

    def visits(self) -> list[str]:
        return self.inner.visits()

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        results = self.inner.run(tensors)
        self.device.synchronize()
        return results


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[GpuLowered]:
    """Lets `plait.compile` take the CPU for a GPU; what it compiled."""
    made: list[GpuLowered] = []

    def executor(lowered: GpuLowered, device: torch.device, store: Any) -> _Here:
        assert device == torch.device("cpu") and store is None
        made.append(lowered)
        return _Here(lowered, tmp_path / str(len(made)))

    properties = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048)
    for module in (build, specialise):
        monkeypatch.setattr(module, "gpu_of", lambda captured: torch.device("cpu"))
    monkeypatch.setattr(compiled, "executor", executor)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr(compiled, "_ROUNDS", 1)
    return made


def _clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Pretends that plans with fused launches, and those without, take these seconds."""
    turns = iter(seconds * 100)

    def clock(call: Callable[[], Any]) -> float:
        call()
        return next(turns)

    monkeypatch.setattr(compiled, "_Clock", lambda device: clock)


@pytest.mark.parametrize("fused_is_faster", [True, False])
def test_compile_takes_the_faster_of_both_plans(
    fused_is_faster: bool, here: list[GpuLowered], monkeypatch: pytest.MonkeyPatch
) -> None:
    _clock(monkeypatch, *((1e-6, 2e-6) if fused_is_faster else (2e-6, 1e-6)))
    model, x = _model()
    with torch.no_grad():
        compiled = plait.compile(model, pipeline=OWN, example_inputs=(x,))
        for have, want in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert [lowered.fused > 0 for lowered in here] == [True, False]
    assert compiled.plan == here[0 if fused_is_faster else 1].plan
    ids = {r.id for r in compiled.remarks}
    assert ("PLT-HFU-007" in ids) == fused_is_faster != ("PLT-GPU-006" in ids)


class Chooses(nn.Module):
    """One of two sides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: torch.tanh(x), (x,)) + 1


def test_compile_of_a_model_that_chooses(here: list[GpuLowered]) -> None:
    model, x = Chooses().eval(), torch.rand(4)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,), tune="off")
        for sign in (1, -1, 1, -1):
            torch.testing.assert_close(compiled(x * sign), model(x * sign))
    assert len(here) == 1 and "PLT-CAP-015" not in {r.id for r in compiled.remarks}
    lines = compiled.explain().splitlines()
    assert "  true_graph_0 ran 3 times" in lines and "  false_graph_0 ran 2 times" in lines


def test_the_model_of_a_gpu_follows_its_multiprocessors() -> None:
    half = SimpleNamespace(multi_processor_count=66, max_threads_per_multi_processor=1536)
    found = compiled.model_of(half)
    assert found.sms == 66 and found.threads == 1536
    assert found.flops == pytest.approx(SM90.flops / 2)
