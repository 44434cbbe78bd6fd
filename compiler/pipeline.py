"""The whole compilation on one page: a captured graph goes in, something that runs comes out.

capture -> normalize -> outline-branches -> fuse-vertical -> storage (layout, halo, concat)
        -> select kernels -> plan-memory -> Plan -> Executor
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
import torch.fx as fx

from ..kernels import target as targets
from ..passes.manager import PassManager
from ..passes.remarks import Remark
from ..runtime.executor import Executor
from ..runtime.plan import Plan
from . import lower, select
from .capture import Captured
from .options import Options

DEFAULT_PIPELINE = "normalize,outline-branches,fuse-vertical"


class CompiledGraph:
    """A graph compiled for the CPU: implements `options.Executable`."""

    def __init__(
        self,
        graph: fx.GraphModule,
        lowered: lower.Lowered,
        kernels: select.Kernels,
        remarks: Sequence[Remark],
        seconds: Mapping[str, float],
    ) -> None:
        self.graph, self.lowered = graph, lowered
        self.plan: Plan = lowered.plan
        self.remarks = tuple(remarks)
        self.seconds = dict(seconds)
        self.kernels = kernels
        self.executor = _executor(lowered, kernels)
        self.run = self.executor.run


def _executor(lowered: lower.Lowered, kernels: select.Kernels) -> Executor:
    return Executor(
        lowered.plan, lowered.constants, kernels.functions, lowered.calls, kernels.libraries,
        {name: _executor(part, kernels) for name, part in lowered.parts.items()},
    )  # fmt: skip


def compile_graph(captured: Captured, options: Options) -> CompiledGraph:
    """Compiles a captured graph. Raises NotImplementedError for sizes that plans cannot hold."""
    from ..passes.fuse_vertical import groups_of

    clock = [("start", time.perf_counter())]

    def lap(name: str) -> None:
        clock.append((name, time.perf_counter()))

    with torch.no_grad():
        pipeline = DEFAULT_PIPELINE if options.pipeline is None else options.pipeline
        result = PassManager(pipeline).run(captured.graph_module)
        graph = result.graph_module
        lap("passes")
        groups = groups_of(graph)
        kernels = select.Kernels(targets.host(), select.database(), options.tune)
        lowered = lower.lower(graph, groups, kernels, captured.symbols)
        lap("lower")
    seconds = {name: end - begin for (_, begin), (name, end) in zip(clock, clock[1:], strict=False)}
    remarks = [*captured.remarks, *result.remarks, *lowered.remarks]
    return CompiledGraph(graph, lowered, kernels, remarks, seconds)
