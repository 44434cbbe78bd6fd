"""The whole compilation on one page: a captured graph goes in, something that runs comes out.

capture -> normalize -> outline-branches -> speculate-routes -> fuse-vertical
        -> storage (layout, halo, concat) -> select kernels -> plan-memory -> Plan -> schedule
        -> Executor
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import torch
import torch.fx as fx

from ..kernels import target as targets
from ..passes.base import copy_graph
from ..passes.manager import PassManager
from ..passes.remarks import Remark
from ..passes.schedule import SCHEDULE, SchedulePass
from ..passes.speculate_routes import ROUTES
from ..runtime.executor import Executor, Part
from ..runtime.plan import Plan
from . import lower, select
from .capture import Captured
from .options import Options

DEFAULT_PIPELINE = "normalize,outline-branches,speculate-routes,fuse-vertical,schedule"


class CompiledGraph:
    """A graph compiled for the CPU: implements `options.Executable`."""

    def __init__(
        self,
        graph: fx.GraphModule,
        lowered: lower.Lowered,
        kernels: select.Kernels,
        remarks: Sequence[Remark],
        seconds: Mapping[str, float],
        executor: Executor,
    ) -> None:
        self.graph, self.lowered = graph, lowered
        self.plan: Plan = lowered.plan
        self.remarks = tuple(remarks)
        self.seconds = dict(seconds)
        self.kernels = kernels
        self.executor = executor
        self.run = self.executor.run


class Deferred:
    """A branch that a bet left out: compiled when a cell first goes there."""

    def __init__(self, name: str, module: fx.GraphModule, tune: str) -> None:
        self.name, self.module, self.tune = name, module, tune
        self._lock = threading.Lock()
        self._executor: Executor | None = None

    def visits(self) -> list[str]:
        """See `Executor.visits`."""
        return [] if self._executor is None else self._executor.visits()

    def run(
        self, tensors: Sequence[torch.Tensor], into: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """See `Executor.run`; the first call compiles."""
        with self._lock:
            if self._executor is None:
                self._executor = self._compile()
        return self._executor.run(tensors, into)

    def _compile(self) -> Executor:
        from ..passes.fuse_vertical import groups_of

        module = self.module
        kernels = select.Kernels(targets.host(), select.database(), self.tune)
        bound = lower.bound_symbols(module)
        with torch.no_grad():
            lowered = lower.lower(module, groups_of(module), kernels, bound, self.name)
        return _executor(lowered, kernels)


def _executor(lowered: lower.Lowered, kernels: select.Kernels) -> Executor:
    parts: dict[str, Part] = {n: _executor(part, kernels) for n, part in lowered.parts.items()}
    for name, module in lowered.deferred.items():
        parts[name] = Deferred(name, module, kernels.tune)
    return Executor(
        lowered.plan, lowered.constants, kernels.functions, lowered.calls, kernels.libraries, parts
    )


def _schedule(executor: Executor, lowered: lower.Lowered, how: SchedulePass, tune: str) -> Executor:
    """The executor of ``lowered`` with its kernels where a search put them, if that gained."""
    from .scheduling import schedule

    result = schedule(executor, how, select.database(), measure=tune != "off")
    if result.memory is not None:
        lowered.plan, lowered.memory = result.executor.plan, result.memory
        lowered.remarks = [r for r in lowered.remarks if r.pass_name != "plan-memory"]
    lowered.remarks = [*lowered.remarks, *result.remarks]
    return result.executor


def compile_graph(captured: Captured, options: Options) -> CompiledGraph:
    """Compiles a captured graph. Raises NotImplementedError for sizes that plans cannot hold."""
    from ..passes.fuse_vertical import groups_of

    clock = [("start", time.perf_counter())]

    def lap(name: str) -> None:
        clock.append((name, time.perf_counter()))

    with torch.no_grad():
        pipeline = DEFAULT_PIPELINE if options.pipeline is None else options.pipeline
        graph = captured.graph_module
        if options.profile is not None:
            graph = copy_graph(graph)
            graph.meta[ROUTES] = options.profile.routes()
        result = PassManager(pipeline).run(graph)
        graph = result.graph_module
        lap("passes")
        groups = groups_of(graph)
        kernels = select.Kernels(targets.host(), select.database(), options.tune)
        lowered = lower.lower(graph, groups, kernels, captured.symbols)
        lap("lower")
        executor = _executor(lowered, kernels)
        how = graph.meta.get(SCHEDULE)
        if how is not None:
            executor = _schedule(executor, lowered, how, options.tune)
        lap("schedule")
    seconds = {name: end - begin for (_, begin), (name, end) in zip(clock, clock[1:], strict=False)}
    remarks = [*captured.remarks, *result.remarks, *lowered.remarks]
    return CompiledGraph(graph, lowered, kernels, remarks, seconds, executor)
