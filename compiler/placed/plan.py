"""From a model to what each device runs: capture, units, costs, placement, segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from ...kernels.ops.bounds import IndexCheck, index_checks
from ...passes.annotations import annotation
from ...passes.manager import PassManager
from ...passes.placement import plan
from ...passes.placement.devices import parse_link
from ...passes.placement.errors import InfeasibleError
from ...passes.placement.placement import Placement
from ...passes.placement.problem import Link, Problem
from ...passes.remarks import Remark
from ...runtime.pipeline import RankProgram
from ..capture.captured import Captured
from ..capture.tree import flatten
from ..options import Options
from ..weights.absent import Rows
from .capture import Whole, capture_whole
from .divided import divided
from .graph import bytes_of
from .measure import Costs, measure
from .options import Here, PlacementOptions, threads_of
from .part import segment_to_json
from .predict import predicted
from .segments import Segment, divide, extract, own_results, programs
from .units import Unit, Units, work

_LINKS = {"inline": "10GB/s,5us", "processes": "1GB/s,100us", "torchrun": "1GB/s,100us"}
"""What transfers are assumed to cost where nothing was said or measured."""
_ATTEMPTS = 4
"""Placements, each with less room, before batches in flight are found not to fit."""


@dataclass
class Division:
    """How a model is divided, as plain data. ``predicted_s`` is a step's time (latency) or the time
    from one result to the next (throughput), in seconds.

    ``call`` describes arguments and results of the captured call; its graph is gone. ``names`` are
    the call's tensors, ``results`` its results in order, ``owners`` the rank, type and shape of
    each tensor that a rank makes for the caller. ``checks`` are of inputs that are indices.
    ``flight_bytes`` is what each rank holds beyond the placement's peak, which is that of one
    batch, while `Placed.map` keeps all stages busy.
    """

    call: Captured
    problem: Problem
    placement: Placement
    programs: list[RankProgram]
    names: list[str]
    results: list[str]
    owners: dict[str, tuple[int, str, tuple[int, ...]]]
    checks: list[IndexCheck]
    predicted_s: float
    flight_bytes: list[float]
    remarks: list[Remark]

    @property
    def planned_bytes(self) -> list[float]:
        """The most that each rank should hold, batches in flight included."""
        peaks = self.placement.report["peak_bytes"].values()
        return [a + b for a, b in zip(peaks, self.flight_bytes, strict=True)]

    @property
    def segments(self) -> int:
        """How many graphs the model became."""
        return sum(len(p.steps) for p in self.programs)


@dataclass
class Planned:
    """A division with the graphs that it is of, and where their weights come from."""

    division: Division
    whole: Whole
    segments: list[Segment]
    graphs: dict[str, Captured]

    def payload(self, rank: int, shard: bool = False) -> dict[str, Any]:
        """A rank's segments as plain values and constants; with ``shard`` rows of a weight are
        known by a name of their own, as in a file that was made for the rank.
        """
        mine = [s.name for s in self.segments if s.rank == rank]
        names = {t: str(n) for t, n in self.whole.names.items()} if shard else self.whole.names
        return {n: segment_to_json(self.graphs[n], names) for n in mine}

    def weights(self, rank: int) -> set[str | Rows]:
        """The source's names of the weights, or rows of weights, that a rank holds."""
        held = [self.graphs[s.name].constants() for s in self.segments if s.rank == rank]
        return {self.whole.names[t] for part in held for t in part if t in self.whole.names}


def plan_model(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    devices: Sequence[Here],
    options: PlacementOptions,
    compile_options: Options,
    measured_link: Callable[[], tuple[float, float]] | None = None,
) -> Planned:
    """Divides one call of ``model``, whose arguments are examples for costs.

    ``measured_link`` tells latency (seconds) and bandwidth (bytes/s) between ranks. Raises
    CaptureError, OptionError, FileError, InfeasibleError or PlacementError.
    """
    whole = capture_whole(model, args, kwargs, options.weights)
    with torch.no_grad():
        result = PassManager("normalize").run(whole.captured.graph_module)
        module = own_results(result.graph_module)
    tensors = [x for x in flatten((tuple(args), dict(kwargs)))[0] if isinstance(x, torch.Tensor)]
    plan_of = _Plan(type(model).__name__, tensors, devices, options, compile_options, measured_link)
    names = [d.placed.device.name for d in devices]
    if options.experts not in (None, "together"):
        return plan_of.make(*divided(whole, module, names, options.experts))
    try:
        return plan_of.make(whole, module)
    except InfeasibleError:
        if options.experts is not None:
            raise
        parts = divided(whole, module, names, "divided")
        if not any(r.id == "PLT-DST-014" for r in parts[-1]):
            raise
    return plan_of.make(*parts)


@dataclass
class _Plan:
    """What a plan is made for: ``tensors`` are the call's, in order."""

    name: str
    tensors: Sequence[torch.Tensor]
    devices: Sequence[Here]
    options: PlacementOptions
    compile_options: Options
    measured_link: Callable[[], tuple[float, float]] | None

    def make(self, whole: Whole, module: fx.GraphModule, remarks: Sequence[Remark] = ()) -> Planned:
        """The plan of a normalised graph."""
        options, devices = self.options, self.devices
        units = Units(module)
        holders = [n.name for n in module.graph.find_nodes(op="placeholder")]
        costs = self._costs(whole, units, dict(zip(holders, self.tensors, strict=True)))
        alone = self._link()
        # What is sent ends a segment here and begins one there.
        link = replace(alone, latency_s=alone.latency_s + costs.call)
        price = _price(devices, costs.seconds)
        kinds = tuple(d.placed.device for d in devices)
        problem = units.problem(self.name, kinds, link, price, costs.temporary)
        last: Any = next(iter(module.graph.find_nodes(op="output")))
        flat = list(last.args[0])
        placement, segments, made, flight = _with_flights(problem, units, flat, link, options)
        graphs = {s.name: extract(module, s) for s in segments}
        nothing: Any = None
        division = Division(
            replace(whole.captured, graph_module=nothing), problem, placement, made, holders,
            [x.name for x in flat], _owners(segments, flat), index_checks(module.graph),
            predicted(
                problem, placement, made, segments, units, costs, alone, devices, options
            ), flight,
            [*remarks, *_remarks(units, segments, made, placement, flight, devices)],
        )  # fmt: skip
        return Planned(division, whole, segments, graphs)

    def _costs(self, whole: Whole, units: Units, inputs: Mapping[str, torch.Tensor]) -> Costs:
        options = self.options
        if options.costs == "measured" and any(d.torch.type == "cpu" for d in self.devices):
            threads = threads_of(options, self.devices)
            return measure(whole, units, inputs, self.compile_options, threads)
        return Costs()

    def _link(self) -> Link:
        options = self.options
        if options.link is None and options.costs == "measured" and self.measured_link is not None:
            return Link(*self.measured_link())
        return parse_link(options.link or _LINKS[options.how()])


def _remarks(
    units: Units,
    segments: Sequence[Segment],
    made: Sequence[RankProgram],
    placement: Placement,
    flight: Sequence[float],
    devices: Sequence[Here],
) -> list[Remark]:
    """What became of the model, what does not fit, and what runs without kernels."""
    reason = (
        f"{len(units.units)} units became {len(segments)} segments on {len(devices)} devices, "
        f"{sum(len(s.sends) for p in made for s in p.steps)} tensors move"
    )
    remarks = [Remark("PLT-DST-012", "done", "place", (), reason)]
    peaks = placement.report["peak_bytes"].values()
    for here, peak, more in zip(devices, peaks, flight, strict=True):
        d = here.placed.device
        if peak + more > d.memory_bytes:
            note = f"batches in flight need {(peak + more) / 1e6:.1f} MB of {d.name}, it has less"
            hint = "call it one batch at a time, without map, or take objective='throughput'"
            remarks.append(Remark("PLT-DST-013", "missed", "place", (), note, hint))
    for here, program in zip(devices, made, strict=True):
        if here.torch.type != "cpu" and program.steps:
            note = f"{len(program.steps)} segments on {here.torch} run by torch's own operators"
            remarks.append(Remark("PLT-DST-009", "note", "place", (), note))
    return remarks


def _with_flights(
    problem: Problem,
    units: Units,
    results: Sequence[fx.Node],
    link: Link,
    options: PlacementOptions,
) -> tuple[Placement, list[Segment], list[RankProgram], list[float]]:
    """A placement, what ranks run, and what batches in flight take of their memory beside it.

    The placement's memory model knows of one batch. Where others do not fit beside it, and there
    are to be others (the objective is throughput), it is made again for devices of as much less.
    """
    tight, needed = problem, list[float]()
    for attempt in range(_ATTEMPTS):
        try:
            placement = plan.place(
                tight, algorithm=options.algorithm, objective=options.objective,
                budget=options.budget, seed=options.seed,
                transfer_price=link.latency_s,  # both ends are busy then, whatever is scheduled
            )  # fmt: skip
        except InfeasibleError as error:
            if not attempt:
                raise
            raise _short(problem, needed) from error
        ranks = {op: problem.device_index[d] for op, d in placement.assign.items()}
        segments = divide(units, ranks)
        made = programs(segments, len(problem.devices), results)
        sizes = {x.name: bytes_of(x) for s in segments for x in (*s.inputs, *s.outputs)}
        flight = [_waiting(program, sizes) for program in made]
        peaks = placement.report["peak_bytes"].values()
        needed = [a + b for a, b in zip(peaks, flight, strict=True)]
        fits = all(a <= d.memory_bytes for a, d in zip(needed, problem.devices, strict=True))
        if fits or options.objective != "throughput":
            return placement, segments, made, flight
        left = [max(d.memory_bytes - b, 0.0) for d, b in zip(problem.devices, flight, strict=True)]
        smaller = (
            replace(d, memory_bytes=min(d.memory_bytes, x))
            for d, x in zip(tight.devices, left, strict=True)
        )
        tight = replace(problem, devices=tuple(smaller))
    raise _short(problem, needed)


def _short(problem: Problem, needed: Sequence[float]) -> InfeasibleError:
    """The error of batches in flight that do not fit."""
    lacking = {
        d.name: x - d.memory_bytes
        for d, x in zip(problem.devices, needed, strict=True)
        if x > d.memory_bytes
    }
    text = ", ".join(f"{name} is {size / 1e6:.1f} MB short" for name, size in lacking.items())
    return InfeasibleError(
        f"with batches in flight {text}; give more memory, or take objective='latency' and call it "
        "one batch at a time", lacking, False,
    )  # fmt: skip


def _waiting(program: RankProgram, sizes: Mapping[str, float]) -> float:
    """Bytes of a rank's tensors between periods, of the batches at all stages but the last."""
    held, total = set(program.inputs), 0.0
    incoming = {w for step in program.steps for w in step.receives}
    for stage in range(program.stages - 1):
        held |= {w.tensor for w in incoming if w.stage == stage}
        for step in program.steps:
            if step.stage == stage:
                held = (held | set(step.outputs)) - (set(step.drops) - set(program.results))
        total += sum(sizes[name] for name in held)
    return total


def _owners(
    segments: Sequence[Segment], results: Sequence[fx.Node]
) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    owners = {}
    for segment in segments:
        for x in segment.outputs:
            if x in results:
                value = x.meta["val"]
                shape = tuple(int(d) for d in value.shape)
                owners[x.name] = segment.rank, str(value.dtype)[6:], shape
    return owners


def _price(devices: Sequence[Here], seconds: Mapping[str, float]) -> Callable[[Unit], Any]:
    def price(unit: Unit) -> Any:
        flops, nbytes, width = work(unit)
        pinned = {annotation(n).device for n in unit.nodes} - {None}
        times: list[float | None] = []
        for d in devices:
            if pinned and d.placed.device.name not in pinned:
                times.append(None)
            elif d.torch.type == "cpu" and unit.name in seconds:
                times.append(seconds[unit.name] / d.placed.device.speed)
            elif not flops and not nbytes:
                times.append(0.0)
            else:
                rate = d.placed.kind.seconds(flops, nbytes, width)
                times.append(rate / d.placed.device.speed)
        return tuple(times)

    return price
