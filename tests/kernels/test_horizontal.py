"""Fused launches compute what their parts compute apart, bit for bit.

Without a GPU the generated CUDA C runs thread by thread on the CPU (`cuda_emulator`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.kernels import cuda, horizontal
from plait.kernels.cuda_loader import GpuKernel, GpuLibrary
from plait.kernels.group import Unsupported
from plait.kernels.occupancy import choose
from plait.kernels.regions import Place

from .horizontal_cases import (
    TARGET,
    Case,
    case,
    emulate,
    layer_norm,
    pool_of_kernels,
    run_alone,
    same_bits,
    sums,
)
from .search_check import linear

needs_nvcc = pytest.mark.skipif(not cuda.available(), reason="nvcc is not installed")


@pytest.fixture(scope="module")
def pool() -> dict[int, dict[str, Case]]:
    """Kernels by thread count and name, made once."""
    return pool_of_kernels()


@pytest.fixture(scope="module")
def alone(
    pool: dict[int, dict[str, Case]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[torch.Tensor]]:
    """What every kernel of the pool computes when launched by itself."""
    cases = [c for named in pool.values() for c in named.values()]
    return run_alone(cases, tmp_path_factory.mktemp("alone"))


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
    emulator = emulate(fused, scratch=tmp_path_factory.mktemp("fused"))
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
    emulate(fused, scratch=tmp_path).run(fused.kernel, [*one.tensors, *copies])
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


def test_blocks_of_other_shapes_share_a_launch(
    pool: dict[int, dict[str, Case]], alone: dict[str, list[torch.Tensor]], tmp_path: Path
) -> None:
    square, flat = pool[128]["linear"], pool[128]["sum (2, 8, 8) (2, 3, None)"]
    fused = horizontal.fuse("f", [square.part, flat.part])
    assert fused.kernel.launches[0].block == (128, 1, 1)
    for one in (square, flat):
        one.made.reset()
    emulate(fused, scratch=tmp_path).run(fused.kernel, [*square.tensors, *flat.tensors])
    for one in (square, flat):
        assert same_bits(one.results(), alone[one.part.name])


@needs_nvcc
def test_shared_memory_is_the_largest_need_and_not_the_sum(
    pool: dict[int, dict[str, Case]],
) -> None:
    products = [pool[128][n].part for n in ("linear", "product", "conv")]
    norms = [pool[256]["layer_norm"].part, case(layer_norm(7)).part]
    devices = {p.name: p.device for p in (*products, *norms)}
    devices |= {"f": horizontal.fuse("f", products), "n": horizontal.fuse("n", norms)}
    usage = cuda.build(devices, TARGET).usage
    for fused, parts in (("f_kernel", products), ("n_kernel", norms)):
        need = [usage[p.device.kernel.launches[0].function].shared_bytes for p in parts]
        assert usage[fused].shared_bytes == max(need) < sum(need) and min(need) > 100
        assert usage[fused].spilled_bytes == 0


@needs_nvcc
def test_variants_are_chosen_for_the_whole() -> None:
    made = sums(4000)
    lone = case(made, block=(128, 1, 1)).part
    variants = [case(sums(), block=b, seconds=1e-6).part for b in ((256, 1, 1), (16, 8, 1))]
    bundle = cuda.build({p.name: p.device for p in (lone, *variants)}, TARGET)
    first, *others = (
        horizontal.candidate(p.device, bundle.usage, p.seconds) for p in (lone, *variants)
    )
    assert choose([[first], others]).picks == (0, 1)
    assert horizontal.fuse("f", (lone, variants[1])).kernel.launches[0].block == (128, 1, 1)
    with pytest.raises(Unsupported, match="PLT-HFU-001"):
        choose([[first], others[:1]])


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
