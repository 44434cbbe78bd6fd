"""What may not share a launch is refused, and would go wrong if it were not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.kernels import cuda, horizontal, regions
from plait.kernels.abi import TensorArg
from plait.kernels.cuda import DeviceKernel
from plait.kernels.cuda_loader import GpuKernel, Launch
from plait.kernels.group import Unsupported
from plait.kernels.horizontal import Part
from plait.kernels.regions import Place
from plait.kernels.shared_memory import SharedMemory

from .cuda_emulator import EmulationError, Emulator
from .horizontal_cases import TARGET, case, conv, emulate, layer_norm, same_bits, sums


def refused(remark: str, parts: Sequence[Part]) -> Unsupported:
    with pytest.raises(Unsupported) as error:
        horizontal.fuse("f", parts)
    assert error.value.remark == remark and error.value.reason and error.value.hint
    return error.value


def forced(monkeypatch: pytest.MonkeyPatch, check: str, parts: Sequence[Part]) -> DeviceKernel:
    monkeypatch.setattr(horizontal, check, lambda *_: None)
    return horizontal.fuse("f", parts)


def test_unequal_thread_counts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, small = case(layer_norm()), case(sums(), block=(64, 1, 1), seconds=1.0)
    error = refused("PLT-HFU-001", [small.part, norm.part])
    assert "64x1x1" in error.reason and "256x1x1" in error.reason
    fused = forced(monkeypatch, "_check_threads", [small.part, norm.part])
    norm.made.reset()
    emulate(fused, scratch=tmp_path).run(fused.kernel, [*small.tensors, *norm.tensors])
    assert not norm.made.check() < 1e-2


def test_threads_beyond_a_part_cannot_be_masked_out(tmp_path: Path) -> None:
    """Why unequal counts are not met halfway: those who sit out leave before the barrier."""
    source = """#include <cuda.h>
    extern "C" __global__ void masked(float* p) {
      if ((int)threadIdx.x < 32) { p[threadIdx.x] = 1.0f; __syncthreads(); }
    }"""
    kernel = GpuKernel("masked", (Launch("masked", (1, 1, 1), (64, 1, 1), 0, (0,)),), (0,), ())
    with pytest.raises(EmulationError, match="left before a barrier"):
        Emulator(source, [kernel], tmp_path).run(kernel, [torch.zeros(64)])


def test_thread_counts_that_are_implicit_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = case(sums(), block=(32, 1, 1), seconds=20.0)  # mentions no threadIdx.y
    four = case(sums(), block=(32, 4, 1), seconds=1.0)
    refused("PLT-HFU-001", [one.part, four.part])
    fused = forced(monkeypatch, "_check_threads", [one.part, four.part])
    four.made.reset()
    emulate(fused, scratch=tmp_path).run(fused.kernel, [*one.tensors, *four.tensors])
    assert bool(four.results()[0].isnan().any())


def test_results_that_another_part_touches_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (case(sums(), block=(128, 1, 1), seconds=1.0) for _ in range(2))
    second.made.inputs[0] = first.made.outputs[0]  # reads the other's result
    into = replace(second.part, places=(first.part.places[-1], *second.part.places[1:]))
    error = refused("PLT-HFU-002", [first.part, into])
    assert first.part.name in error.reason and into.name in error.reason
    refused("PLT-HFU-002", [into, first.part])
    same = replace(second.part, places=(*second.part.places[:2], first.part.places[-1]))
    refused("PLT-HFU-002", [first.part, same])  # both write it
    fused = forced(monkeypatch, "_check_memory", [first.part, into])
    emulator, answers = emulate(fused, scratch=tmp_path), []
    for backwards in (False, True):  # the order of blocks would decide the answer
        first.made.reset()
        emulator.run(fused.kernel, [*first.tensors, *second.tensors], backwards)
        answers.append(second.results())
    assert not same_bits(*answers)


def test_shared_inputs_and_slices_of_one_result_fuse() -> None:
    first, second = (case(sums(), block=(128, 1, 1), seconds=1.0).part for _ in range(2))
    horizontal.fuse("f", [first, replace(second, places=(*first.places[:2], second.places[2]))])
    # Channels-last slices of one concatenation lie across each other without meeting.
    wide = case(conv()).part
    place = wide.places[-1]
    shape, strides = wide.outputs[0].shape, wide.outputs[0].strides
    assert strides[1] == 1 and strides[3] == 64 and shape[1] == 32
    slices = [
        replace(wide, places=(*wide.places[:-1], Place(place.storage, start)))
        for start in (0, 128, 124)
    ]
    horizontal.fuse("f", slices[:2])
    refused("PLT-HFU-002", [slices[0], slices[2]])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_regions_told_apart_are_apart(data: st.DataObject) -> None:
    def region(label: str) -> tuple[TensorArg, int]:
        dims = data.draw(st.integers(1, 3), label=label)
        shape = tuple(data.draw(st.integers(1, 4)) for _ in range(dims))
        strides = tuple(data.draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12])) for _ in range(dims))
        halo = tuple((data.draw(st.integers(0, 1)), 0) for _ in range(dims))
        start = data.draw(st.integers(0, 12)) * 4
        return TensorArg(torch.float32, shape, strides, halo), start

    def touched(arg: TensorArg, start: int) -> set[int]:
        ranges = [range(-h[0], n + h[1]) for n, h in zip(arg.shape, arg.halo, strict=True)]
        steps = arg.strides
        return {
            start + 4 * sum(i * s for i, s in zip(index, steps, strict=True)) + byte
            for index in itertools.product(*ranges)
            for byte in range(4)
        }

    (a, at), (b, bt) = region("a"), region("b")
    both = [regions.region_of(arg, Place("m", s)) for arg, s in ((a, at), (b, bt))]
    if regions.disjoint(*both):
        assert not touched(a, at) & touched(b, bt)
    elsewhere = replace(both[1], storage="other")
    assert regions.disjoint(both[0], elsewhere)


def test_sizes_known_only_at_run_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tir = tvm.tirx
    good, other = (case(sums(), block=(128, 1, 1), seconds=1.0).part for _ in range(2))
    ((variable, function),) = good.device.functions.items()
    size = tir.Var("n", "int32")
    widened = tir.PrimFunc([*function.params, size], _with_grid(function.body, size))
    for key, value in function.attrs.items():
        widened = widened.with_attr(key, value)
    open_size = replace(good, device=replace(good.device, functions={variable: widened}))
    assert "blockIdx.x" in refused("PLT-HFU-003", [open_size, other]).reason
    symbolic = replace(good.outputs[0], shape=(torch.sym_int(3), "s0"))
    refused("PLT-HFU-003", [replace(good, outputs=(symbolic,)), other])
    # The launch would miss an argument, and its ranges would be those of one size only.
    fused = forced(monkeypatch, "_check_decided", [open_size, other])
    (merged,), launch = fused.functions.values(), fused.kernel.launches[0]
    assert len(merged.params) == len(launch.buffers) + 1


def _with_grid(body: Any, extent: Any) -> Any:
    def attribute(stmt: Any, mutator: Any) -> Any:
        if stmt.attr_key == "thread_extent" and stmt.node.thread_tag == "blockIdx.x":
            return tvm.tirx.AttrStmt(stmt.node, stmt.attr_key, extent, mutator.mutate(stmt.body))
        return mutator.default_mutate(stmt)

    return tvm_ffi.structural_mutate(body, ((tvm.tirx.AttrStmt, attribute),))


def _calling(part: Part, call: Any) -> Part:
    """The part with a call at the end of its body."""
    ((variable, function),) = part.device.functions.items()
    body = tvm.tirx.SeqStmt([function.body, tvm.tirx.Evaluate(call)])
    return replace(
        part, device=replace(part.device, functions={variable: function.with_body(body)})
    )


def test_blocks_that_work_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extern = tvm.tirx.call_extern
    good, other = (case(sums(), block=(128, 1, 1), seconds=s).part for s in (1.0, 2.0))
    for call in (
        extern("int32", "cuda_grid_sync"),
        extern("int32", "cuda_cluster_sync"),
        extern("int32", "cooperative_launch"),
        tvm.tirx.call_intrin("int32", "tirx.tvm_storage_sync", "global"),
    ):
        refused("PLT-HFU-004", [_calling(good, call), other])
    ((variable, function),) = good.device.functions.items()
    launched = function.with_attr("tirx.kernel_launch_params", ["clusterCtaIdx.x", "blockIdx.x"])
    clustered = replace(good, device=replace(good.device, functions={variable: launched}))
    assert "clusterCtaIdx.x" in refused("PLT-HFU-004", [clustered, other]).reason
    # A barrier of all blocks would stand where only one part's blocks ever come.
    waiting = _calling(good, extern("int32", "cuda_grid_sync"))
    fused = forced(monkeypatch, "_check_grid_wide", [waiting, other])
    source = cuda.generate([fused.functions], TARGET)
    body = source[source.rindex("__launch_bounds__") :]
    mine = math.prod(other.device.kernel.launches[0].grid)
    assert body.index(f"blockIdx.x) < {mine}") < body.index("else") < body.index("cuda_grid_sync")


def _with_shared(part: Part, count: int, scope: str = "shared") -> Part:
    """The part with an array of so many floats in shared memory that no compiler can do without."""
    tir = tvm.tirx
    ((variable, function),) = part.device.functions.items()
    known: list[Any] = []
    tvm_ffi.structural_walk(function.body, (tir.DeclBuffer, lambda d: known.append(d.buffer)))
    big = tir.decl_buffer((count,), "float32", "big", scope=scope)
    last, zero = (tir.IntImm("int32", v) for v in (count - 1, 0))
    place = tir.call_pure_extern("int32", "__float_as_int", known[0][zero])
    body = [tir.AllocBuffer(big), tir.BufferStore(big, known[0][zero], [last])]
    body += [function.body.seq[i] for i in range(len(function.body.seq))]
    body += [tir.BufferStore(known[0], big[place], [zero])]
    declared = len(known)  # the declarations come first, so that what is added can refer to them
    order = [*body[2 : 2 + declared], *body[:2], *body[2 + declared :]]
    kernel = part.device.kernel
    if scope == "shared.dyn":
        kernel = replace(kernel, launches=(replace(kernel.launches[0], shared_bytes=4 * count),))
    functions = {variable: function.with_body(tir.SeqStmt(order))}
    return replace(part, device=DeviceKernel(kernel, functions))


def test_more_shared_memory_than_a_block_may_declare_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = (case(sums(), block=(128, 1, 1), seconds=1.0).part for _ in range(2))
    most = [_with_shared(p, (48 << 10) // 4) for p in (first, second)]
    horizontal.fuse("f", most)  # each may take all of it
    over = _with_shared(first, (48 << 10) // 4 + 1)
    assert "49216" in refused("PLT-HFU-005", [over, second]).reason
    if cuda.available():
        monkeypatch.setattr(SharedMemory, "check", lambda *_: None)
        with pytest.raises(cuda.BuildError, match="too much shared data"):
            cuda.build({"f": horizontal.fuse("f", [over, second])}, TARGET)


def test_dynamic_shared_memory_is_shared_too() -> None:
    first, second = (case(sums(), block=(128, 1, 1), seconds=1.0).part for _ in range(2))
    parts = [_with_shared(p, n, "shared.dyn") for p, n in ((first, 20000), (second, 30000))]
    fused = horizontal.fuse("f", parts)
    assert fused.kernel.launches[0].shared_bytes == 4 * 30000
    (function,) = fused.functions.values()
    names = [str(p) for p in function.attrs["tirx.kernel_launch_params"]]
    assert names == ["blockIdx.x", "threadIdx.x", "tirx.use_dyn_shared_memory"]
    assert cuda.generate([fused.functions], TARGET).count("extern __shared__") == 1
    # Together with the static memory of another part it must fit into what a block may have.
    fits = _with_shared(first, 11008)
    most = _with_shared(second, (227 << 10) // 4, "shared.dyn")
    assert str(4 * 11008 + (227 << 10)) in refused("PLT-HFU-005", [fits, most]).reason


def test_launches_of_too_many_blocks_or_tensors_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part, other = (case(sums(), block=(128, 1, 1), seconds=1.0).part for _ in range(2))
    kernel = part.device.kernel
    huge = replace(kernel, launches=(replace(kernel.launches[0], grid=((1 << 31) - 1, 1, 1)),))
    many = replace(part, device=replace(part.device, kernel=huge))
    refused("PLT-HFU-006", [many, other])
    with monkeypatch.context() as patch:
        patch.setattr(horizontal, "_MAX_GRID", 1 << 40)
        with pytest.raises(Exception, match="(?i)bound|exceed|int32|fit"):  # no index reaches it
            horizontal.fuse("f", [many, other])
    monkeypatch.setattr(horizontal, "_MAX_POINTERS", 5)
    refused("PLT-HFU-006", [part, other])


def test_what_makes_no_sense_is_an_error() -> None:
    part = case(layer_norm()).part
    with pytest.raises(ValueError, match="at least two kernels"):
        horizontal.fuse("f", [part])
    with pytest.raises(ValueError, match="4 tensors, but 4 descriptions and 1 places"):
        replace(part, places=part.places[:1])
