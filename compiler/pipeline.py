"""The whole compilation on one page: a captured graph goes in, something that runs comes out.

capture -> normalize -> outline-branches -> speculate-routes -> prefetch-weights -> fuse-vertical
        -> storage (layout, halo, concat) -> select kernels -> plan-memory -> Plan -> schedule
        -> Executor

With a profile of routes the graph of the likely ones goes the same way from prefetch-weights on,
and bets decide by measurement which of the two plans runs first. Under a budget for weights both
plans fetch the same ones, from one tier.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from ..kernels import target as targets
from ..passes.base import copy_graph
from ..passes.batch_norm import KEEP
from ..passes.fuse_horizontal import FUSE
from ..passes.ir import branches_of
from ..passes.likely import LIKELY, Likely
from ..passes.manager import PassManager
from ..passes.merge_parallel import JUDGE, Judge, MergeParallelOps
from ..passes.prefetch_weights import BUDGET, TIERED, Tiered
from ..passes.remarks import Remark
from ..passes.route_odds import Routes
from ..passes.schedule import SCHEDULE, SchedulePass
from ..passes.speculate_routes import ROUTES, SIZED, SpeculateRoutes
from ..passes.streams import STREAMS
from ..runtime import driver
from ..runtime.executor import Executor
from ..runtime.plan import BranchStep, Plan
from ..runtime.trace import made_up
from .assemble import assemble, refusals
from .capture.captured import Captured
from .capture.export import EXCLUSIVE
from .errors import OptionError
from .lowering import lower, select
from .lowering.least import least
from .lowering.lowered import Lowered
from .measure import merging
from .measure.bets import Sample, Speculation, judge_capacities, judge_likely, refused
from .modes import plain_modes
from .options import Bettable, Options
from .routing.online import Monitor
from .weights.absent import fill
from .weights.budget import WeightStore, reading

DEFAULT_PIPELINE = (
    "normalize,outline-branches,speculate-routes,prefetch-weights,fuse-vertical,schedule"
)


@dataclass(frozen=True)
class Prepared:
    """A graph after passes and lowering; its kernels are built, its weights may be absent."""

    graph: fx.GraphModule
    lowered: Lowered
    kernels: select.Kernels
    remarks: tuple[Remark, ...]


@dataclass(frozen=True)
class _Made(Prepared):
    """What a compilation made: a plan, what runs it, and the same with bets on it."""

    seconds: dict[str, float]
    engine: Executor | Speculation


class CompiledGraph:
    """A graph compiled for the CPU: implements `options.Executable`.

    Where it bets on routes, or learns them, a `Monitor` watches its calls and may put another plan
    of the same graph into service, by assigning what `run` calls next.
    """

    def __init__(
        self,
        captured: Captured,
        options: Options,
        store: WeightStore | None,
        prepared: Prepared | None = None,
    ) -> None:
        self.captured, self.options, self.store = captured, options, store
        routes = captured.routes
        if routes is None and isinstance(options.profile, Bettable):
            routes = options.profile.routes()
        if prepared is not None:
            made = _finish(captured, prepared)
        else:
            made = _make(captured, options, routes, store)
        self.monitor: Monitor | None = None
        self._serve(made)
        if options.profile is not None and _has_branches(made.lowered.plan):
            self.monitor = Monitor(self._specialise, routes)
            self.monitor.attach(self.engine, sum(made.seconds.values()))
            self.run = self._watched

    def _serve(self, made: _Made) -> None:
        self.graph, self.lowered, self.kernels = made.graph, made.lowered, made.kernels
        self.plan: Plan = made.lowered.plan
        self.seconds = made.seconds
        self.own_remarks = made.remarks
        self.executor = made.engine.general if isinstance(made.engine, Speculation) else made.engine
        self.engine = made.engine
        self._run = self.engine.run if self.store is None else reading(self.engine.run)
        if self.monitor is None:
            self.run = self._run

    def _watched(
        self, tensors: Sequence[torch.Tensor], into: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        assert self.monitor is not None
        begin = time.perf_counter()
        results = self._run(tensors, into)
        self.monitor.called(time.perf_counter() - begin)
        return results

    def _specialise(self, routes: Routes) -> float:
        """Puts a plan that bets on ``routes`` into service. Called in a thread of the monitor."""
        assert self.monitor is not None
        with plain_modes():
            try:
                made = _make(self.captured, self.options, routes, self.store)
                self.captured.routes = routes
                self.monitor.attach(made.engine, sum(made.seconds.values()))
                self._serve(made)
            finally:
                if self.store is not None:
                    self.store.settle()
        return sum(r.predicted_gain or 0.0 for r in made.remarks if r.id.startswith("PLT-SPC"))

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What was done, or not done and why, in order."""
        hint = "branches that are kernels alone run within the launch"
        apart = [
            Remark("PLT-BRN-008", "missed", "launch", (), f"more than one launch: {reason}", hint)
            for reason in dict.fromkeys(self.engine.apart())
        ]
        return (
            *self.own_remarks,
            *_forked_notes(),
            *apart,
            *self._refused(),
            *(self.monitor.remarks if self.monitor is not None else ()),
        )

    def _refused(self) -> list[Remark]:
        two = self.speculation
        found = [
            x for e in ((two.likely, two.general) if two else (self.executor,)) for x in refusals(e)
        ]
        text = "its operators run one by one"
        return [
            Remark("PLT-SPC-016", "missed", "speculate-routes", (name,), f"{reason}; {text}")
            for name, reason in dict.fromkeys(found)
        ]

    @property
    def speculation(self) -> Speculation | None:
        """What runs the likely plan first, if anything does."""
        return self.engine if isinstance(self.engine, Speculation) else None

    def visits(self) -> list[str]:
        """What became of bets and how often each branch ran, as lines of text."""
        return [*([] if self.monitor is None else self.monitor.visits()), *self.engine.visits()]


def _has_branches(plan: Plan) -> bool:
    return any(isinstance(step, BranchStep) for step in plan.steps)


def _schedule(executor: Executor, lowered: Lowered, how: SchedulePass, tune: str) -> Executor:
    """The executor of ``lowered`` with its kernels where a search put them, if that gained."""
    from .measure.scheduling import schedule

    result = schedule(executor, how, select.database(), measure=tune != "off")
    if result.memory is not None:
        lowered.plan, lowered.memory = result.executor.plan, result.memory
        lowered.remarks = [r for r in lowered.remarks if r.pass_name != "plan-memory"]
    lowered.remarks = [*lowered.remarks, *result.remarks]
    return result.executor


def compile_graph(
    captured: Captured, options: Options, store: WeightStore | None = None
) -> CompiledGraph:
    """Compiles a captured graph; ``store`` keeps its weights where there is a budget for them.

    Raises NotImplementedError for sizes that plans cannot hold, OptionError for a budget that
    cannot be kept and FileError where weights cannot be written.
    """
    return CompiledGraph(captured, options, store)


def prepare(captured: Captured, options: Options) -> Prepared:
    """The part of a compilation that needs no weights. See `compile_graph`."""
    from ..passes.fuse_vertical import groups_of

    with EXCLUSIVE, torch.no_grad(), plain_modes():
        manager = PassManager(DEFAULT_PIPELINE if options.pipeline is None else options.pipeline)
        result = manager.run(captured.graph_module)
        check_outlined(captured, result.graph_module)
        kernels = select.Kernels(targets.host(), select.database(), options.tune)
        groups = groups_of(result.graph_module)
        lowered = lower.lower(result.graph_module, groups, kernels, captured.symbols)
    return Prepared(result.graph_module, lowered, kernels, result.remarks)


def finish(captured: Captured, prepared: Prepared) -> CompiledGraph:
    """What runs a prepared graph: its weights are read from ``captured.weights``."""
    return CompiledGraph(captured, Options(), None, prepared)


def _make(
    captured: Captured, options: Options, routes: Routes | None, store: WeightStore | None
) -> _Made:
    """The whole compilation, with bets on ``routes`` where they are known."""
    from ..passes.fuse_vertical import groups_of

    clock = [("start", time.perf_counter())]

    def lap(name: str) -> None:
        clock.append((name, time.perf_counter()))

    with torch.no_grad(), contextlib.ExitStack() as trial:
        with EXCLUSIVE:
            manager = PassManager(
                DEFAULT_PIPELINE if options.pipeline is None else options.pipeline
            )
            graph = copy_graph(captured.graph_module)
            graph.meta[JUDGE] = _merge_judge(manager, options.tune)
            if routes is not None:
                graph.meta[ROUTES] = routes
            if store is not None:
                graph.meta[BUDGET], graph.meta[KEEP] = store.budget, store.keep
            result = manager.run(graph)
            graph = result.graph_module
            check_outlined(captured, graph)
            graph.meta.pop(JUDGE)
            graph.meta.pop(KEEP, None)
            tiered: Tiered | None = graph.meta.get(TIERED)
            if routes is not None:
                _finish_sized(graph, _after(manager, SpeculateRoutes.name), tiered)
            told = elsewhere(graph, {FUSE: "a GPU", STREAMS: "a GPU"})
            lap("passes")
            kernels = select.Kernels(targets.host(), select.database(), options.tune)
            if store is not None and tiered is not None:
                store.open(tiered)
                trial.enter_context(store.trying())
            lowered = lower.lower(graph, groups_of(graph), kernels, captured.symbols, store=store)
        capacity, largest = math.inf, least(lowered)
        bets: list[Remark] = []
        if store is not None and tiered is not None:
            capacity = store.close(tiered, largest, lowered.stayed, bets)
        lap("lower")
        if routes is not None:
            values = _sizes_of(captured)
            build = functools.partial(assemble, kernels=kernels, store=store)
            room = math.inf if store is None or store.tier is None else store.tier.capacity
            bets += judge_capacities(lowered, build, routes, values, room)
            lap("bets on capacities")
        engine: Executor | Speculation = _scheduled(graph, lowered, kernels, store)
        lap("schedule")
        if store is not None and isinstance(options.profile, Bettable):
            store.learn(engine, options.profile)
        likely: Likely | None = graph.meta.pop(LIKELY, None)
        if routes is not None and likely is not None:
            with EXCLUSIVE:
                _decide(likely.graph, tiered)
                other = _after(manager, SpeculateRoutes.name).run(likely.graph).graph_module
                groups = groups_of(other)
                special = lower.lower(other, groups, kernels, captured.symbols, "likely", store)
            held: Tiered | None = other.meta.get(TIERED)
            both = max(largest, least(special))
            beside = _room_beside(likely, special, held, both, store, bets)
            if beside is not None:
                quick = _scheduled(other, special, kernels, store)
                sample = Sample(made_up(lowered.plan, values), routes)
                verdict = judge_likely(likely, engine, quick, sample, bets)
                if verdict is quick:  # right for every route: nothing has to stand behind it
                    graph, lowered = other, special
                if verdict is not None:
                    engine, capacity, largest = verdict, min(capacity, beside), both
            lap("bets on likely routes")
        if store is not None and tiered is not None:
            store.serve(engine, int(capacity), largest, tiered.tiered - lowered.stayed)
    seconds = {name: end - begin for (_, begin), (name, end) in zip(clock, clock[1:], strict=False)}
    remarks = (*captured.remarks, *result.remarks, *told, *lowered.remarks, *bets, *_cache_notes())
    return _Made(graph, lowered, kernels, remarks, seconds, engine)


def check_outlined(captured: Captured, graph: fx.GraphModule) -> None:
    """Raises NotImplementedError where branches may run without cells that must not."""
    if not captured.occupied:
        return
    left = graph.graph.find_nodes(op="call_function", target=torch.ops.plait.scatter.default)
    if left:
        reason = "operators of a branch ask whether they have cells, so it has to be outlined"
        raise NotImplementedError(reason)
    for _, branch in branches_of(graph):
        check_outlined(captured, branch)


def _merge_judge(manager: PassManager, tune: str) -> Judge:
    """Measures mergers as the passes after them will leave them."""
    from ..passes.fuse_vertical import groups_of

    def build(graph: fx.GraphModule) -> Executor:
        kernels = select.Kernels(targets.host(), select.database(), tune)
        lowered = lower.lower(graph, groups_of(graph), kernels, {}, "merger")
        return assemble(lowered, kernels, None)

    rest = _after(manager, MergeParallelOps.name)
    return merging.judge(rest, build, select.database(), tune != "off")


def _finish(captured: Captured, prepared: Prepared) -> _Made:
    """The rest of the compilation of a prepared graph, once its weights are read."""
    graph, lowered, kernels = prepared.graph, prepared.lowered, prepared.kernels
    with torch.no_grad():
        if captured.weights is not None:
            fill((lowered, captured.weights))
        engine = _scheduled(graph, lowered, kernels, None)
    remarks = (*captured.remarks, *prepared.remarks, *lowered.remarks, *_cache_notes())
    return _Made(graph, lowered, kernels, remarks, {}, engine)


def _forked_notes() -> list[Remark]:
    if not driver.alone():
        return []
    reason = "a process that shared launches forked this one: they run on one thread"
    hint = "compile in the children alone, or start them by spawn"
    return [Remark("PLT-RUN-001", "missed", "launch", (), reason, hint)]


def _cache_notes() -> list[Remark]:
    """What the kernel database had to work around."""
    notes = select.database().notes
    return [Remark(n.id, "note", "cache", (), n.reason, n.hint) for n in notes]


def elsewhere(graph: fx.GraphModule, keys: Mapping[str, str]) -> list[Remark]:
    """Remarks on passes that only asked for something which this kind of device does not do; by
    their key in ``meta``, what they are for.
    """
    return [
        Remark("PLT-GPU-007", "note", key, (), f"this pass is for {device}; it did nothing")
        for key, device in keys.items()
        if key in graph.meta
    ]


def _scheduled(
    graph: fx.GraphModule,
    lowered: Lowered,
    kernels: select.Kernels,
    store: WeightStore | None,
) -> Executor:
    """The executor of ``lowered``, its kernels placed as the pass `schedule` asks for."""
    executor = assemble(lowered, kernels, store)
    how = graph.meta.get(SCHEDULE)
    return executor if how is None else _schedule(executor, lowered, how, kernels.tune)


def _sizes_of(captured: Captured) -> dict[str, int]:
    """The sizes of the call that was captured, by symbol."""
    inputs = list(captured.graph_module.graph.find_nodes(op="placeholder"))
    return {
        name: int(inputs[i].meta["val"].shape[d].node.hint)
        for name, (i, d) in captured.symbols.items()
    }


def _after(manager: PassManager, name: str) -> PassManager:
    """The passes of a pipeline that come after the one called ``name``: none if it lacks that."""
    names = [item.name for item in manager.passes]
    first = names.index(name) + 1 if name in names else len(names)
    return PassManager(manager.passes[first:])


def _finish_sized(module: fx.GraphModule, rest: PassManager, tiered: Tiered | None) -> None:
    """Runs the passes after the bets on the graphs for a number of rows, in place."""
    for node in module.graph.nodes:
        if node.meta.get(SIZED):
            for _, graph in node.meta[SIZED].values():
                _decide(graph, tiered)
            node.meta[SIZED] = {
                b: (rows, rest.run(graph).graph_module)
                for b, (rows, graph) in node.meta[SIZED].items()
            }
    for _, branch in branches_of(module):
        _finish_sized(branch, rest, tiered)


def _decide(variant: fx.GraphModule, tiered: Tiered | None) -> None:
    """What was decided for a graph's weights holds for a variant of it, which shares them."""
    if tiered is not None:
        variant.meta[BUDGET] = tiered


def _room_beside(
    likely: Likely,
    special: Lowered,
    tiered: Tiered | None,
    largest: int,
    store: WeightStore | None,
    remarks: list[Remark],
) -> float | None:
    """Bytes of weights that may be fetched beside a second plan; None where these are too few."""
    if store is None or tiered is None:
        return math.inf
    try:
        return store.close(tiered, largest, special.stayed)
    except OptionError as error:
        remarks.append(refused(likely, str(error)))
        return None
