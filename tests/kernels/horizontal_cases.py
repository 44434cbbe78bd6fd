"""Kernels for the tests of fused GPU launches, with tensors to run them on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tvm import s_tir

from plait.kernels import cuda
from plait.kernels.abi import contiguous_strides
from plait.kernels.cuda import DeviceKernel
from plait.kernels.definition import Definition, Physical
from plait.kernels.horizontal import Part
from plait.kernels.regions import Place

from .cuda_emulator import Emulator
from .search_check import Problem, linear, problem

aten = torch.ops.aten
TARGET = cuda.sm90()
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


def pool_of_kernels() -> dict[int, dict[str, Case]]:
    """Kernels by thread count and name."""
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


def emulate(*devices: DeviceKernel, scratch: Path) -> Emulator:
    """The kernels' CUDA C, ready to run on the CPU."""
    source = cuda.generate([d.functions for d in devices], TARGET)
    return Emulator(source, [d.kernel for d in devices], scratch)


def run_alone(cases: Sequence[Case], scratch: Path) -> dict[str, list[torch.Tensor]]:
    """What every kernel computes when launched by itself, by the parts' names."""
    emulator = emulate(*(c.part.device for c in cases), scratch=scratch)
    found = {}
    for one in cases:
        one.made.reset()
        emulator.run(one.part.device.kernel, one.tensors)
        assert one.made.check() < 1e-5, one.part.name
        found[one.part.name] = one.results()
    return found


def same_bits(have: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
        for a, b in zip(have, want, strict=True)
    )
