"""Compilation for a GPU on one page.

capture -> normalize -> outline-branches -> prefetch-weights
        -> fuse-vertical -> fuse-horizontal, streams (what they are to do)
        -> heavy operators to the library -> storage -> kernels (TVM, nvcc)
        -> fused launches -> streams -> plan-memory -> Plan -> CUDA graph
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...kernels import cuda
from ...kernels.build import BuildError
from ...kernels.occupancy import SM90, Gpu
from ...kernels.target import Target
from ...passes.base import copy_graph
from ...passes.fuse_horizontal import FUSE, FuseHorizontal
from ...passes.manager import PassManager
from ...passes.prefetch_weights import BUDGET, TIERED, Tiered
from ...passes.remarks import Remark
from ...passes.schedule import SCHEDULE
from ..capture.captured import Captured
from ..capture.export import EXCLUSIVE
from ..lowering import select
from ..pipeline import check_outlined, elsewhere
from .lower import GpuLowered, lower_gpu
from .paged import Layout, address
from .select import GpuKernels

GPU_PIPELINE = "normalize,outline-branches,prefetch-weights,fuse-vertical,fuse-horizontal,streams"


class Planned:
    """A captured graph after the passes for a GPU, to be lowered with or without fused launches.

    Experts that lie in host memory are of ``layout``, if any do; ``tiered`` is what was decided
    where there is a budget.
    """

    def __init__(
        self,
        captured: Captured,
        pipeline: str | None,
        target: Target,
        gpu: Gpu,
        budget: int | str | None = None,
        layout: Layout | None = None,
    ) -> None:
        with EXCLUSIVE, torch.no_grad():
            manager = PassManager(GPU_PIPELINE if pipeline is None else pipeline)
            graph = copy_graph(captured.graph_module)
            if budget is not None:
                graph.meta[BUDGET] = budget
            result = manager.run(graph)
        self.captured, self.graph = captured, result.graph_module
        check_outlined(captured, self.graph)
        told = elsewhere(self.graph, {SCHEDULE: "the CPU"})
        self.layout, left = address(self.graph, layout)
        self.tiered: Tiered | None = self.graph.meta.get(TIERED)
        self.remarks: tuple[Remark, ...] = (*captured.remarks, *result.remarks, *told, *left)
        how = self.graph.meta.get(FUSE) or FuseHorizontal(most=1)
        self.kernels = GpuKernels(target, select.database(), how.own_flops, gpu)

    def lower(self, *, fused: bool = True) -> GpuLowered:
        """The plan and its compiled kernels. Raises NotImplementedError and BuildError."""
        with EXCLUSIVE, torch.no_grad():
            return lower_gpu(self.graph, self.kernels, self.captured.symbols, fused=fused)


def planned(
    captured: Captured,
    pipeline: str | None = None,
    arch: str = "sm_90",
    gpu: Gpu = SM90,
    budget: int | str | None = None,
    layout: Layout | None = None,
) -> Planned:
    """A captured graph on its way to a GPU of generation ``arch``, for the rest see `Planned`.

    Raises BuildError where nvcc is missing or does not know that.
    """
    if not cuda.available():
        raise BuildError("nvcc is not on the PATH: install the CUDA toolkit to compile GPU kernels")
    if arch not in cuda.architectures():
        known = ", ".join(cuda.architectures())
        raise BuildError(f"nvcc does not know {arch!r}, only {known}")
    return Planned(captured, pipeline, replace(cuda.sm90(), arch=arch), gpu, budget, layout)
