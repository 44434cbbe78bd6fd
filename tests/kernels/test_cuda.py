"""Groups of every kind compile for GPUs; where there is one, they compute the right thing."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tvm

from plait.kernels import cuda
from plait.kernels.build import BuildError
from plait.kernels.cuda_loader import GpuKernel, GpuLibrary
from plait.kernels.definition import Definition
from plait.kernels.group import Group, Unsupported
from plait.kernels.loader import LoadError
from plait.kernels.target import host

from .cuda_emulator import Emulator, buffers, lowered
from .search_check import Problem, linear, problem

aten = torch.ops.aten
TARGET = cuda.sm90()
needs_nvcc = pytest.mark.skipif(not cuda.available(), reason="nvcc is not installed")


def _image(function: Callable[..., torch.Tensor], **layout) -> Problem:
    tensors = [torch.randn(1, 16, 10, 10), torch.randn(32, 16, 3, 3), torch.randn(32)]
    return problem("conv", function, tensors, (1, 2), halo=1, nhwc=True, **layout)


def _layer_norm() -> Problem:
    return problem(
        "rows",
        lambda x, w, b: aten.gelu.default(aten.layer_norm.default(x, [96], w, b)),
        [torch.randn(3, 8, 96), torch.randn(96), torch.randn(96)],
    )


def _product(*shapes: tuple[int, ...]) -> Problem:
    return problem("gemm", aten.bmm.default, [torch.randn(s) for s in shapes])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "pointwise": lambda: problem(
        "pointwise",
        lambda x, y: aten.gelu.default(aten.add.Tensor(x, y)),
        [torch.randn(33, 100), torch.randn(100)],
    ),
    "softmax": lambda: problem(
        "rows",
        lambda x: aten.softmax.int(aten.mul.Tensor(x, 0.5), -1),
        [torch.randn(20, 100)],
    ),
    "layer_norm": _layer_norm,
    "group_norm": lambda: problem(
        "rows",
        lambda x, w, b: aten.group_norm.default(x, 2, w, b),
        [torch.randn(2, 8, 5, 5), torch.randn(8), torch.randn(8)],
    ),
    "mean": lambda: problem(
        "reduce", lambda x: aten.mean.dim(x, [2, 3]), [torch.randn(2, 8, 7, 7)]
    ),
    "amax": lambda: problem(
        "reduce", lambda x: aten.amax.default(x, [1], True), [torch.randn(9, 70)]
    ),
    "rows of one": lambda: problem(
        "rows",
        lambda x: aten.div.Tensor(x, aten.sum.dim_IntList(x, [1], True)),
        [torch.rand(40, 1)],
    ),
    "sum of all": lambda: problem("reduce", aten.sum.default, [torch.randn(20, 30) + 1.0]),
    "linear": lambda: linear(40, 128, 96),
    "vector": lambda: linear(1, 128, 96),
    "bmm": lambda: _product((4, 24, 32), (4, 32, 40)),
    "conv": lambda: _image(
        lambda x, w, b: aten.relu.default(aten.conv2d.default(x, w, b, [1, 1], [1, 1])), wider=32
    ),
}


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    return {name.replace(" ", "_"): make() for name, make in PROBLEMS.items()}


@pytest.fixture(scope="module")
def definitions(problems: dict[str, Problem]) -> dict[str, Definition]:
    return {n: cuda.lower(p.group, p.io, TARGET) for n, p in problems.items()}


def test_definitions_compute_the_right_thing(
    problems: dict[str, Problem], definitions: dict[str, Definition]
) -> None:
    functions = {n: d.func.with_attr("global_symbol", n) for n, d in definitions.items()}
    module = tvm.compile(tvm.IRModule(functions), target=host().tvm())
    for name, made in problems.items():
        made.reset()
        module[name](*buffers(made, definitions[name]))
        assert made.check() < 1e-5, name


def test_every_definition_gets_threads(definitions: dict[str, Definition]) -> None:
    by_rule = 0
    for name, definition in definitions.items():
        plain = cuda.schedule(definition, TARGET, plain=True).script()
        text = cuda.schedule(definition, TARGET).script()
        assert 'thread="threadIdx.x"' in text, name
        assert plain.count('thread="blockIdx.x"') == len(definition.blocks), name
        by_rule += text != plain
    assert by_rule >= 7  # the plain schedule is for what the rules decline


def test_generated_code_computes_the_right_thing(
    problems: dict[str, Problem], definitions: dict[str, Definition], tmp_path: Path
) -> None:
    """On the CPU, one fiber for each thread; `plain` schedules where a rule's does not lower."""
    devices = lowered(definitions, TARGET)
    assert len(devices["softmax"].kernel.launches) == 1  # the threads of a block share a row
    source = cuda.generate([d.functions for d in devices.values()], TARGET)
    emulator = Emulator(source, [d.kernel for d in devices.values()], tmp_path)
    for name, made in problems.items():
        made.reset()
        emulator.run(devices[name].kernel, buffers(made, definitions[name]))
        assert made.check() < 1e-5, name


@needs_nvcc
def test_every_kind_of_group_compiles(definitions: dict[str, Definition]) -> None:
    bundle = cuda.build(lowered(definitions, TARGET), TARGET)
    assert bundle.failed == {} and set(bundle.kernels) == set(definitions)
    assert bundle.image[:4] == b"\x7fELF"
    for name, kernel in bundle.kernels.items():
        definition = definitions[name]
        count = len(definition.inputs) + len(definition.outputs)
        assert len(kernel.offsets) == count and kernel.launches
        for launch in kernel.launches:
            assert (
                f"{launch.function}(" in bundle.source and launch.function.encode() in bundle.image
            )
            assert 1 <= math.prod(launch.block) <= 1024 and math.prod(launch.grid) >= 1
            assert set(launch.buffers) <= set(range(count + len(kernel.temporaries)))
    assert bundle.kernels["conv"].offsets[0] == 4 * (12 * 16 + 16)


@needs_nvcc
def test_plain_schedules_are_one_launch_a_stage(
    definitions: dict[str, Definition], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = cuda.schedule
    monkeypatch.setattr(cuda, "schedule", lambda d, t, plain: schedule(d, t, plain=True))
    chosen = {n: definitions[n] for n in ("softmax", "sum_of_all", "linear")}
    bundle = cuda.build(lowered(chosen, TARGET), TARGET)
    for name, definition in chosen.items():
        kernel = bundle.kernels[name]
        assert len(kernel.launches) == len(definition.blocks)
        # Every stage but the last leaves a temporary, or writes into the result's memory.
        assert 1 <= len(kernel.temporaries) <= len(definition.blocks) - 1
    linear = bundle.kernels["linear"]
    assert linear.launches[0].grid == (15, 1, 1) and linear.launches[0].block == (256, 1, 1)
    assert linear.temporaries == (4 * 40 * 96,)
    assert linear.launches[0].buffers[0] == linear.launches[1].buffers[1] or set(
        linear.launches[0].buffers
    ) & set(linear.launches[1].buffers) == {4}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_run_on_a_gpu(
    problems: dict[str, Problem], definitions: dict[str, Definition]
) -> None:
    torch.cuda.init()
    bundle = cuda.build(lowered(definitions, TARGET), TARGET)
    library = GpuLibrary(bundle.image)
    for name, made in problems.items():
        kernel, definition = bundle.kernels[name], definitions[name]
        made.reset()
        here = buffers(made, definition)
        there = [t.cuda() for t in here]
        first = [t.data_ptr() + o for t, o in zip(there, kernel.offsets, strict=True)]
        shared = [torch.empty(n, dtype=torch.uint8, device="cuda") for n in kernel.temporaries]
        stream = torch.cuda.current_stream().cuda_stream
        library.launch(kernel, first, [t.data_ptr() for t in shared], stream)
        torch.cuda.synchronize()
        for tensor, result in zip(here, there, strict=True):
            tensor.copy_(result)
        assert made.check() < 1e-5, name


def test_pointers_are_numbered_and_shifted() -> None:
    kernel = GpuKernel("k", (), (16, 0), (64,))
    assert kernel.pointers([1000, 2000], [3000]) == [984, 2000, 3000]
    with pytest.raises(ValueError, match="2 tensors and 1 temporaries, got 1 and 0"):
        kernel.pointers([1], [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_loading_without_a_gpu_is_one_clear_error() -> None:
    with pytest.raises(LoadError, match="CUDA"):
        GpuLibrary(b"")


def test_without_nvcc_there_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, definitions: dict[str, Definition]
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="nvcc is not on the PATH"):
        cuda.build(lowered(definitions, TARGET), TARGET)


@needs_nvcc
def test_what_nvcc_refuses_spares_the_rest(
    definitions: dict[str, Definition], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = cuda._split

    def spoilt(name: str, *rest):
        kernel, device = split(name, *rest)
        if name == "bad":
            call = tvm.tirx.Evaluate(tvm.tirx.call_extern("int32", "no_such_function"))
            device = {v: f.with_body(tvm.tirx.SeqStmt([call, f.body])) for v, f in device.items()}
        return kernel, device

    monkeypatch.setattr(cuda, "_split", spoilt)
    both = {"good": definitions["mean"], "bad": definitions["pointwise"]}
    kernels = lowered(both, TARGET)
    bundle = cuda.build(kernels, TARGET)
    assert list(bundle.kernels) == ["good"] and "no_such_function" in bundle.failed["bad"]
    with pytest.raises(BuildError, match="none of 1 GPU kernels"):
        cuda.build({"bad": kernels["bad"]}, TARGET)


def test_what_has_no_definition_is_declined() -> None:
    half = linear(dtype=torch.float16)
    with pytest.raises(Unsupported, match="tensor cores"):
        cuda.lower(half.group, half.io, TARGET)
    made = linear()
    group = made.group
    pooled = Group("pool", group.nodes, group.inputs, group.outputs, group.anchor)
    with pytest.raises(Unsupported, match="pool groups"):
        cuda.lower(pooled, made.io, TARGET)


def test_a_process_that_used_the_schedules_ends_in_peace() -> None:
    code = "from plait.kernels import cuda; cuda._register()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
