"""Schedules become kernels that compute the right thing; the search finds fast ones and resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tvm import s_tir

from plait.kernels import definitions, metaschedule
from plait.kernels.abi import Kernel, TensorArg
from plait.kernels.build import build
from plait.kernels.definition import Definition, Physical
from plait.kernels.group import Unsupported
from plait.kernels.scheduled import to_kernel
from plait.kernels.target import host

from .search_check import Problem, linear, problem

aten = torch.ops.aten
LANES = host().vector_bytes // 4


def conv(
    c: int, size: int, oc: int, k: int = 3, stride: int = 1, groups: int = 1,
    dtype: torch.dtype = torch.float32, **layout,
) -> Problem:  # fmt: skip
    def function(x, w, b):
        y = aten.conv2d.default(x, w, b, [stride, stride], [k // 2, k // 2], [1, 1], groups)
        return aten.silu.default(y)

    shapes = (2, c, size, size), (oc, c // groups, k, k), (oc,)
    tensors = [torch.randn(*shape).to(dtype) for shape in shapes]
    return problem("conv", function, tensors, (1, 2), nhwc=True, halo=k // 2, **layout)


def _residual() -> Problem:
    return problem(
        "gemm",
        lambda x, w, r: aten.add.Tensor(aten.mul.Tensor(aten.linear.default(x, w), 0.5), r),
        [torch.randn(2, 12, 40), torch.randn(4 * LANES, 40), torch.randn(2, 12, 4 * LANES)],
        const=(1,),
    )


def _batched() -> Problem:
    tensors = [torch.randn(3, 10, 24), torch.randn(3, 24, 2 * LANES)]
    return problem("gemm", aten.bmm.default, tensors, const=(1,))


CASES: dict[str, tuple[Callable[[], Problem], Callable[..., Definition], int]] = {
    "linear": (linear, definitions.gemm, 4 * LANES),
    "narrow panels": (linear, definitions.gemm, LANES),
    "residual": (_residual, definitions.gemm, 2 * LANES),
    "batched": (_batched, definitions.gemm, 2 * LANES),
    "conv 3x3": (lambda: conv(8, 7, 2 * LANES), definitions.conv, 2 * LANES),
    "conv stride 2": (lambda: conv(8, 9, 2 * LANES, stride=2), definitions.conv, LANES),
    "conv into a slice": (lambda: conv(4, 6, LANES, k=1, wider=LANES), definitions.conv, LANES),
    "conv groups": (lambda: conv(8, 6, 2 * LANES, groups=2), definitions.conv, LANES),
    "linear half": (lambda: linear(dtype=torch.float16), definitions.gemm, LANES),
    "conv half": (lambda: conv(8, 7, 2 * LANES, dtype=torch.float16), definitions.conv, LANES),
}


def test_sketches_of_all_kinds_are_right() -> None:
    problems: dict[str, Problem] = {}
    kernels: list[Kernel] = []
    for name, (make, define, width) in CASES.items():
        made = make()
        defined = define(made.group, made.io, host(), width=width)
        for first in (False, True):
            for seed in (1, 2):
                schedule = s_tir.Schedule(defined.func, seed=seed)
                schedule = metaschedule._sketch(schedule, defined, host(), first)
                symbol = f"k{len(kernels)}"
                kernels.append(to_kernel(schedule.mod["main"], defined, host(), symbol, {}))
                problems[symbol] = made
        assert made.expected[0].abs().max() > 0, name
    bundle = build(kernels, host())
    assert bundle.failed == {}
    for kernel in kernels:
        made = problems[kernel.name]
        made.reset()
        for output in made.outputs:
            assert output.isnan().all()
        made.candidate(kernel, bundle.address(kernel.name)).run()
        half = made.outputs[0].dtype == torch.float16
        assert made.check() < (2e-3 if half else 1e-5), kernel.name


def test_any_split_of_the_tasks_gives_the_same_bits() -> None:
    made = linear()
    defined = definitions.gemm(made.group, made.io, host(), width=LANES)
    schedule = metaschedule._sketch(s_tir.Schedule(defined.func, seed=3), defined, host(), True)
    kernel = to_kernel(schedule.mod["main"], defined, host(), "k", {})
    assert isinstance(kernel.tasks, int) and kernel.tasks > 1
    address = build([kernel], host()).address("k")
    whole = made.candidate(kernel, address)
    whole.run()
    expected = made.outputs[0].clone()
    made.reset()
    from plait.kernels import loader

    words, _ = whole.keep
    call = loader.function(address, len(words))
    for task in reversed(range(kernel.tasks)):
        call(task, task + 1, *words)
    assert torch.equal(made.outputs[0], expected)


def test_strides_become_dense_buffers() -> None:
    nhwc = TensorArg(
        torch.float32, (2, 8, 5, 6), (8 * 56, 1, 64, 8), ((0, 0), (0, 0), (1, 1), (1, 1))
    )
    physical = Physical.of(nhwc)
    assert physical.dims == (0, 2, 3, 1) and physical.shape == (2, 7, 8, 8)
    assert physical.offset == 64 + 8
    piece = Physical.of(TensorArg(torch.float32, (4, 3), (10, 1)))
    assert piece.shape == (4, 10) and piece.dims == (0, 1)
    apart = Physical.of(TensorArg(torch.float32, (4, 3), (6, 2)))
    assert apart.shape == (4, 3, 2) and apart.dims == (0, 1, None)
    scalar = Physical.of(TensorArg(torch.float32, (), ()))
    assert scalar.shape == (1,) and scalar.dims == (None,)
    with pytest.raises(Unsupported, match="overlapping"):
        Physical.of(TensorArg(torch.float32, (4, 3), (2, 1)))
    with pytest.raises(Unsupported, match="without elements"):
        Physical.of(TensorArg(torch.float32, (0, 3), (3, 1)))


def test_what_definitions_do_not_cover_is_declined() -> None:
    for made, define in (
        (linear(dtype=torch.bfloat16), definitions.gemm),
        (conv(8, 7, 32, dtype=torch.bfloat16), definitions.conv),
    ):
        with pytest.raises(Unsupported, match="bfloat16"):
            define(made.group, made.io, host())
    made = linear(n=100)
    with pytest.raises(Unsupported, match="whole panels"):
        definitions.gemm(made.group, made.io, host(), width=LANES)
    bare = conv(4, 6, LANES)
    x = bare.group.inputs[0]
    io = {**bare.io, x: TensorArg(torch.float32, bare.io[x].shape, bare.io[x].strides)}
    with pytest.raises(Unsupported, match="zeros around"):
        definitions.conv(bare.group, io, host(), width=LANES)


def test_schedules_that_need_barriers_are_declined() -> None:
    made = linear()
    defined = definitions.gemm(made.group, made.io, host(), width=LANES)
    with pytest.raises(Unsupported, match="2 loop nests"):
        to_kernel(defined.func, defined, host(), "k", {})


def test_the_search_finds_a_right_kernel_and_goes_on_later(tmp_path: Path) -> None:
    made = linear(48, 96, 4 * LANES)
    defined = definitions.gemm(made.group, made.io, host(), width=4 * LANES)
    seen: list[tuple[int, float]] = []
    search = metaschedule.search
    first = search(
        defined, host(), made.bench(), tmp_path, trials=6, progress=lambda *p: seen.append(p)
    )
    assert first.kernel is not None and first.trials == 6 and seen[-1] == (6, first.seconds)
    kernel = first.kernel
    assert kernel.config["source"] == "metaschedule" and kernel.config["tiles"]
    made.reset()
    made.candidate(kernel, build([kernel], host()).address("kernel")).run()
    assert made.check() < 1e-5
    seen.clear()
    again = search(
        defined, host(), made.bench(), tmp_path, trials=10, progress=lambda *p: seen.append(p)
    )
    assert again.trials == 10 and again.seconds <= first.seconds and seen[-1][0] == 10
    seen.clear()
    done = search(defined, host(), made.bench(), tmp_path, trials=10, name="other")
    assert done.trials == 10 and not seen
    assert done.kernel is not None and done.kernel.name == "other"


def test_damaged_records_start_the_search_afresh(tmp_path: Path) -> None:
    made = linear()
    defined = definitions.gemm(made.group, made.io, host(), width=2 * LANES)
    metaschedule.search(defined, host(), made.bench(), tmp_path, trials=3)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:-20])
    found = metaschedule.search(defined, host(), made.bench(), tmp_path, trials=3)
    assert found.kernel is not None and found.trials == 3


def test_a_search_without_time_or_with_wrong_results_finds_nothing(tmp_path: Path) -> None:
    made = linear()
    defined = definitions.gemm(made.group, made.io, host(), width=2 * LANES)
    late = metaschedule.search(defined, host(), made.bench(), tmp_path / "a", seconds=-1)
    assert late.kernel is None and late.trials == 0
    bench = made.bench()
    bench.check = lambda: 1.0
    wrong = metaschedule.search(defined, host(), bench, tmp_path / "b", trials=3)
    assert wrong.kernel is None and wrong.trials == 3
    assert any("wrong result" in reason for reason in wrong.failures)
    with pytest.raises(ValueError, match="negative"):
        metaschedule.search(defined, host(), bench, tmp_path / "b", trials=-1)


def test_time_ends_a_search_between_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = linear()
    defined = definitions.gemm(made.group, made.io, host(), width=2 * LANES)
    monkeypatch.setattr(metaschedule, "BATCH", 2)
    finished = metaschedule._Session.finish_batch

    def finish(session: metaschedule._Session, count: int) -> None:
        finished(session, count)
        session.deadline = 0.0

    monkeypatch.setattr(metaschedule._Session, "finish_batch", finish)
    found = metaschedule.search(defined, host(), made.bench(), tmp_path, trials=8)
    assert found.trials == 2 and found.kernel is not None
