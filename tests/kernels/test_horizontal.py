"""Fused launches compute what their parts compute apart, bit for bit; what may not fuse does not.

Without a GPU the generated CUDA C runs thread by thread on the CPU (`cuda_emulator`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
import tvm_ffi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import s_tir

from plait.kernels import cuda, horizontal
from plait.kernels.abi import TensorArg, contiguous_strides
from plait.kernels.cuda import DeviceKernel
from plait.kernels.cuda_loader import GpuKernel, GpuLibrary, Launch
from plait.kernels.definition import Definition, Physical
from plait.kernels.group import Unsupported
from plait.kernels.horizontal import Part, Place

from .cuda_emulator import EmulationError, Emulator
from .search_check import Problem, linear, problem

aten = torch.ops.aten
TARGET = cuda.sm90()
needs_nvcc = pytest.mark.skipif(not cuda.available(), reason="nvcc is not installed")
_COUNTER = itertools.count()
_KEPT: list[Problem] = []  # places are named by address, which must not be given out twice


@dataclass
class Case:
    """A kernel with the tensors it is to run on."""

    part: Part
    made: Problem
    physical: tuple[Physical, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [
            t.as_strided(p.shape, contiguous_strides(p.shape), t.storage_offset() - p.offset)
            for t, p in zip((*self.made.inputs, *self.made.outputs), self.physical, strict=True)
        ]

    def results(self) -> list[torch.Tensor]:
        return [t.clone() for t in self.made.outputs]


def case(made: Problem, *, plain: bool = False, block: Sequence[int] = (), **options: Any) -> Case:
    """A problem's kernel by rule, ``plain``, or elementwise in blocks of a given shape."""
    definition = cuda.lower(made.group, made.io, TARGET)
    name = f"k{next(_COUNTER)}"
    _KEPT.append(made)
    if block:
        function = _elementwise(definition, block, options.pop("grid", (None, 1, 1)))
        device = DeviceKernel(*cuda._split(name, function, definition, TARGET))
    else:
        device = cuda.device_kernel(name, definition, TARGET, plain=plain)
    tensors = (*made.inputs, *made.outputs)
    places = [
        Place(t.untyped_storage().data_ptr(), t.storage_offset() * t.itemsize) for t in tensors
    ]
    part = Part.of(device, definition, places, **options)
    return Case(part, made, (*definition.inputs, *definition.outputs))


def _elementwise(definition: Definition, block: Sequence[int], grid: Sequence[int | None]) -> Any:
    """One stage whose elements are dealt to a grid and blocks of the given shapes, x fastest."""
    made = s_tir.Schedule(definition.func)
    loop = made.fuse(*made.get_loops(made.get_sblock(definition.blocks[0])))
    gx, gy, gz = grid
    tags = ["blockIdx.z", "blockIdx.y", "blockIdx.x", "threadIdx.z", "threadIdx.y", "threadIdx.x"]
    extents = [gz, gy, gx, *reversed(block)]
    for part, tag, extent in zip(made.split(loop, extents), tags, extents, strict=True):
        if extent != 1:  # what a kernel does not mention has extent 1
            made.bind(part, tag)
    return made.mod["main"]


def sums(rows: int = 37) -> Problem:
    return problem(
        "pointwise",
        lambda x, y: aten.add.Tensor(aten.mul.Tensor(x, 1.5), y),
        [torch.randn(rows, 30), torch.randn(30)],
    )


def layer_norm(rows: int = 5) -> Problem:
    return problem(
        "rows",
        lambda x, w, b: aten.layer_norm.default(x, [96], w, b),
        [torch.randn(rows, 96), torch.randn(96), torch.randn(96)],
    )


def softmax() -> Problem:
    return problem("rows", lambda x: aten.softmax.int(x, -1), [torch.randn(6, 40)])


def maxima() -> Problem:
    return problem("reduce", lambda x: aten.amax.default(x, [1]), [torch.randn(300, 9)])


def conv() -> Problem:
    tensors = [torch.randn(1, 16, 10, 10), torch.randn(32, 16, 3, 3), torch.randn(32)]
    function = lambda x, w, b: aten.conv2d.default(x, w, b, [1, 1], [1, 1])  # noqa: E731
    return problem("conv", function, tensors, (1, 2), halo=1, nhwc=True, wider=32)


SHAPES = {
    128: [(128, 1, 1), (16, 8, 1), (2, 8, 8), (32, 1, 4)],
    256: [(256, 1, 1), (64, 4, 1), (8, 4, 8), (1, 256, 1)],
}
GRIDS = [(None, 1, 1), (2, None, 1), (2, 3, None), (1, 1, None)]
POOL: dict[int, dict[str, Callable[[], Case]]] = {
    128: {
        "linear": lambda: case(linear(40, 128, 96)),
        "product": lambda: case(
            problem("gemm", aten.bmm.default, [torch.randn(3, 24, 32), torch.randn(3, 32, 40)])
        ),
        "conv": lambda: case(conv()),
    },
    256: {
        "layer_norm": lambda: case(layer_norm()),
        "softmax": lambda: case(softmax(), plain=True),  # four launches
        "maxima": lambda: case(maxima(), plain=True),  # two launches
        "linear": lambda: case(linear(20, 16, 33), plain=True),
    },
}


@pytest.fixture(scope="module")
def pool() -> dict[int, dict[str, Case]]:
    """Kernels by thread count and name, made once."""
    return {
        threads: {
            **{n: make() for n, make in named.items()},
            **{
                f"sum {block} {grid}": case(sums(), block=block, grid=grid)
                for block, grid in zip(SHAPES[threads], GRIDS, strict=True)
            },
        }
        for threads, named in POOL.items()
    }


@pytest.fixture(scope="module")
def alone(
    pool: dict[int, dict[str, Case]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[torch.Tensor]]:
    """What every kernel computes when launched by itself."""
    cases = [c for named in pool.values() for c in named.values()]
    source = cuda.generate([c.part.device.functions for c in cases], TARGET)
    kernels = [c.part.device.kernel for c in cases]
    emulator = Emulator(source, kernels, tmp_path_factory.mktemp("alone"))
    found = {}
    for one in cases:
        one.made.reset()
        emulator.run(one.part.device.kernel, one.tensors)
        assert one.made.check() < 1e-5, one.part.name
        found[one.part.name] = one.results()
    return found


def emulate(device: DeviceKernel, scratch: Path) -> Emulator:
    return Emulator(cuda.generate([device.functions], TARGET), [device.kernel], scratch)


def same_bits(have: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
        for a, b in zip(have, want, strict=True)
    )


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_sets_compute_the_same_bits(
    data: st.DataObject,
    pool: dict[int, dict[str, Case]],
    alone: dict[str, list[torch.Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    named = pool[data.draw(st.sampled_from([128, 256]))]
    names = data.draw(st.lists(st.sampled_from(sorted(named)), min_size=2, max_size=5, unique=True))
    cases = [named[n] for n in names]
    seconds = data.draw(st.permutations(range(1, len(cases) + 1)))
    parts = [replace(c.part, seconds=float(s)) for c, s in zip(cases, seconds, strict=True)]
    fused = horizontal.fuse("fused", parts)
    assert len(fused.kernel.launches) == max(len(p.device.kernel.launches) for p in parts)
    if cuda.available():
        bundle = cuda.build({"fused": fused}, TARGET)
        assert bundle.failed == {} and bundle.image[:4] == b"\x7fELF"
    emulator = emulate(fused, tmp_path_factory.mktemp("fused"))
    for backwards in (False, True):  # the order of blocks and threads makes no difference
        for one in cases:
            one.made.reset()
        emulator.run(fused.kernel, [t for c in cases for t in c.tensors], backwards)
        for one in cases:
            assert same_bits(one.results(), alone[one.part.name]), one.part.name


def test_equal_kernels_fuse_with_themselves(
    pool: dict[int, dict[str, Case]], alone: dict[str, list[torch.Tensor]], tmp_path: Path
) -> None:
    one = pool[256]["layer_norm"]
    other = replace(one.part, places=tuple(Place(("other", i)) for i in range(4)))
    fused = horizontal.fuse("twice", [one.part, other])
    copies = [t.clone() for t in one.tensors]
    one.made.reset()
    emulate(fused, tmp_path).run(fused.kernel, [*one.tensors, *copies])
    want = alone[one.part.name]
    assert same_bits(one.results(), want) and same_bits([copies[-1].view_as(want[0])], want)


# -- the launch -------------------------------------------------------------------------------


def test_blocks_are_laid_out_longest_first(pool: dict[int, dict[str, Case]]) -> None:
    named = pool[128]
    short, long = named["product"].part, named["linear"].part
    blocks = [math.prod(p.device.kernel.launches[0].grid) for p in (short, long)]
    for costs, first in (((1.0, 50.0), long), ((50.0, 1.0), short)):
        parts = [replace(p, seconds=s) for p, s in zip((short, long), costs, strict=True)]
        launch = horizontal.fuse("f", parts).kernel.launches[0]
        assert launch.grid == (sum(blocks), 1, 1) and launch.block == (8, 16, 1)
        count = len(first.device.kernel.launches[0].buffers)
        shift = 0 if first is short else len(short.places)
        mine = [b + shift for b in first.device.kernel.launches[0].buffers]
        assert list(launch.buffers[:count]) == mine


def test_the_roofline_says_what_a_part_costs_unless_told() -> None:
    made = linear(40, 128, 96)
    assert case(made).part.seconds == pytest.approx(
        max(2 * 40 * 128 * 96 / 67e12, 4 * (40 * 128 + 128 * 96 + 96 + 40 * 96) / 4.8e12), rel=0.1
    )
    assert case(made, seconds=3.0).part.seconds == 3.0


def test_blocks_of_other_shapes_keep_their_warps(pool: dict[int, dict[str, Case]]) -> None:
    named = pool[256]
    wide, flat = (next(c for n, c in named.items() if n.startswith(f"sum {s}")) for s in
                  ("(64, 4, 1)", "(8, 4, 8)"))  # fmt: skip
    launch = horizontal.fuse("f", [wide.part, flat.part]).kernel.launches[0]
    assert launch.block == (256, 1, 1)


@needs_nvcc
def test_shared_memory_is_the_largest_need_and_not_the_sum(
    pool: dict[int, dict[str, Case]],
) -> None:
    parts = [pool[128][n].part for n in ("linear", "product", "conv")]
    apart = cuda.build({p.name: p.device for p in parts}, TARGET)
    fused = cuda.build({"f": horizontal.fuse("f", parts)}, TARGET)
    need = [apart.usage[p.device.kernel.launches[0].function].shared_bytes for p in parts]
    assert min(need) > 1000
    assert fused.usage["f_kernel"].shared_bytes == max(need) < sum(need)
    assert fused.usage["f_kernel"].spilled_bytes == 0
    norms = [pool[256]["layer_norm"].part, case(layer_norm(7)).part]
    both = cuda.build({"n": horizontal.fuse("n", norms)}, TARGET)
    one = cuda.build({norms[0].name: norms[0].device}, TARGET)
    assert both.usage["n_kernel"].shared_bytes == one.usage[f"{norms[0].name}_kernel"].shared_bytes


@needs_nvcc
def test_variants_are_chosen_for_the_whole() -> None:
    made = sums(4000)
    lone = case(made, block=(128, 1, 1)).part
    variants = [case(sums(), block=b, seconds=1e-6).part for b in ((256, 1, 1), (16, 8, 1))]
    bundle = cuda.build({p.name: p.device for p in (lone, *variants)}, TARGET)
    chosen = horizontal.choose_variants([[lone], variants], bundle.usage)
    assert chosen == (lone, variants[1])
    assert horizontal.fuse("f", chosen).kernel.launches[0].block == (128, 1, 1)
    with pytest.raises(Unsupported, match="PLT-HFU-001"):
        horizontal.choose_variants([[lone], variants[:1]], bundle.usage)


# -- refusals, and that they are needed -------------------------------------------------------


def refused(remark: str, parts: Sequence[Part]) -> Unsupported:
    with pytest.raises(Unsupported) as error:
        horizontal.fuse("f", parts)
    assert error.value.remark == remark and error.value.reason and error.value.hint
    return error.value


def forced(monkeypatch: pytest.MonkeyPatch, check: str, parts: Sequence[Part]) -> DeviceKernel:
    monkeypatch.setattr(horizontal, check, lambda *_: None)
    return horizontal.fuse("f", parts)


def test_unequal_thread_counts_are_refused(
    pool: dict[int, dict[str, Case]],
    alone: dict[str, list[torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm = pool[256]["layer_norm"]
    small = case(sums(), block=(64, 1, 1), seconds=1.0)
    error = refused("PLT-HFU-001", [small.part, norm.part])
    assert "64x1x1" in error.reason and "256x1x1" in error.reason
    fused = forced(monkeypatch, "_check_threads", [small.part, norm.part])
    norm.made.reset()
    emulate(fused, tmp_path).run(fused.kernel, [*small.tensors, *norm.tensors])
    assert not same_bits(norm.results(), alone[norm.part.name])


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
    emulate(fused, tmp_path).run(fused.kernel, [*one.tensors, *four.tensors])
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
    emulator, answers = emulate(fused, tmp_path), []
    for backwards in (False, True):  # the order of blocks would decide the answer
        first.made.reset()
        emulator.run(fused.kernel, [*first.tensors, *second.tensors], backwards)
        answers.append(second.results())
    assert not same_bits(*answers)


def test_shared_inputs_and_slices_of_one_result_fuse(pool: dict[int, dict[str, Case]]) -> None:
    first, second = (case(sums(), block=(128, 1, 1), seconds=1.0).part for _ in range(2))
    horizontal.fuse("f", [first, replace(second, places=(*first.places[:2], second.places[2]))])
    # Channels-last slices of one concatenation lie across each other without meeting.
    wide = pool[128]["conv"].part
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
    regions = [horizontal._region(arg, Place("m", s)) for arg, s in ((a, at), (b, bt))]
    if horizontal._disjoint(*regions):
        assert not touched(a, at) & touched(b, bt)
    elsewhere = replace(regions[1], storage="other")
    assert horizontal._disjoint(regions[0], elsewhere)


def test_sizes_known_only_at_run_time_are_refused(
    pool: dict[int, dict[str, Case]], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def _with_shared(part: Part, count: int) -> Part:
    """The part with an array of so many floats in shared memory that no compiler can do without."""
    tir = tvm.tirx
    ((variable, function),) = part.device.functions.items()
    known: list[Any] = []
    tvm_ffi.structural_walk(function.body, (tir.DeclBuffer, lambda d: known.append(d.buffer)))
    big = tir.decl_buffer((count,), "float32", "big", scope="shared")
    last, zero = (tir.IntImm("int32", v) for v in (count - 1, 0))
    place = tir.call_pure_extern("int32", "__float_as_int", known[0][zero])
    body = [tir.AllocBuffer(big), tir.BufferStore(big, known[0][zero], [last])]
    body += [function.body.seq[i] for i in range(len(function.body.seq))]
    body += [tir.BufferStore(known[0], big[place], [zero])]
    functions = {variable: function.with_body(tir.SeqStmt([body[2 + i] for i in range(len(known))]
                 + body[:2] + body[2 + len(known):]))}  # fmt: skip
    return replace(part, device=replace(part.device, functions=functions))


def test_more_shared_memory_than_a_block_may_declare_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = (case(sums(), block=(128, 1, 1), seconds=1.0).part for _ in range(2))
    most = [_with_shared(p, (48 << 10) // 4) for p in (first, second)]
    horizontal.fuse("f", most)  # each may take all of it
    over = _with_shared(first, (48 << 10) // 4 + 1)
    assert "49156" in refused("PLT-HFU-005", [over, second]).reason
    if cuda.available():
        monkeypatch.setattr(horizontal._SharedMemory, "check", lambda *_: None)
        with pytest.raises(cuda.BuildError, match="too much shared data"):
            cuda.build({"f": horizontal.fuse("f", [over, second])}, TARGET)


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


def test_what_makes_no_sense_is_an_error(pool: dict[int, dict[str, Case]]) -> None:
    part = pool[256]["layer_norm"].part
    with pytest.raises(ValueError, match="at least two kernels"):
        horizontal.fuse("f", [part])
    with pytest.raises(ValueError, match="4 tensors, but 4 descriptions and 1 places"):
        replace(part, places=part.places[:1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_fused_kernels_run_on_a_gpu(pool: dict[int, dict[str, Case]]) -> None:
    torch.cuda.init()
    stream = torch.cuda.current_stream().cuda_stream
    for named in pool.values():
        cases = list(named.values())
        fused = horizontal.fuse("fused", [c.part for c in cases])
        devices = {c.part.name: c.part.device for c in cases} | {"fused": fused}
        library = GpuLibrary(cuda.build(devices, TARGET).image)

        def run(kernel: GpuKernel, tensors: list[torch.Tensor], lib: Any = library) -> None:
            first = [t.data_ptr() + o for t, o in zip(tensors, kernel.offsets, strict=True)]
            room = [torch.empty(n, dtype=torch.uint8, device="cuda") for n in kernel.temporaries]
            lib.launch(kernel, first, [t.data_ptr() for t in room], stream)
            torch.cuda.synchronize()

        apart = [[t.cuda() for t in c.tensors] for c in cases]
        together = [[t.clone() for t in tensors] for tensors in apart]
        for one, tensors in zip(cases, apart, strict=True):
            run(one.part.device.kernel, tensors)
        run(fused.kernel, [t for tensors in together for t in tensors])
        for one, a, b in zip(cases, apart, together, strict=True):
            assert same_bits(b, a), one.part.name
