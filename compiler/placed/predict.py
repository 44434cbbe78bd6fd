"""What a divided model takes: the programs of its ranks, simulated on what they share.

The rules that score a placement know of devices and links alone. Ranks on one machine share its
cores and the rate of its memory, a rank begins a segment when all is there that it reads, a message
keeps both ends busy, and results go to the caller. So the programs are played here as `Player`
plays them. What runs at the same time shares like fluids do: each gets an equal part of the cores
where there are too few, and what waits for memory is slower by as much as all ask for too much.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...passes.placement.placement import Placement
from ...passes.placement.problem import Link, Problem
from ...runtime.pipeline import RankProgram, Wire
from .graph import bytes_of
from .measure import Costs
from .options import Here, PlacementOptions, cores, ranks_here, threads_of
from .segments import Segment
from .units import Units, work

_COUNTED = 12
"""Results of a full pipeline that are timed."""


@dataclass(frozen=True, eq=False)
class Host:
    """A machine: its cores, and bytes/s that one of its ranks and all its cores can read."""

    cores: float
    alone: float = math.inf
    together: float = math.inf


@dataclass(frozen=True)
class Cost:
    """A segment without others beside it: seconds, cores, and bytes that it moves."""

    seconds: float
    cores: float = 0.0
    nbytes: float = 0.0


@dataclass(frozen=True)
class System:
    """What runs: programs by rank, the host of each (the last one is the caller's), costs by
    segment, bytes by tensor, and the link, whose latency keeps both ends busy by halves.

    ``turns`` is how many ranks of a host compute at a time, and whether there is a caller who feeds
    ranks and is sent their results is ``called``.
    """

    programs: Sequence[RankProgram]
    hosts: Sequence[Host]
    costs: Mapping[str, Cost]
    nbytes: Mapping[str, float]
    link: Link
    turns: float = math.inf
    called: bool = True

    def step(self) -> float:
        """Seconds of a batch alone."""
        return _Play(self, 1, 1).results[0]

    def period(self) -> float:
        """Seconds from one result to the next while as many batches as possible are in flight."""
        ahead = self.programs[0].stages + 1  # as `LocalEngine` has it
        steady = 2 * ahead
        times = _Play(self, steady + _COUNTED + ahead, ahead).results
        return (times[steady + _COUNTED] - times[steady]) / _COUNTED


def predicted(
    problem: Problem,
    placement: Placement,
    programs: Sequence[RankProgram],
    segments: Sequence[Segment],
    units: Units,
    costs: Costs,
    link: Link,
    devices: Sequence[Here],
    options: PlacementOptions,
) -> float:
    """Seconds of a step, or from one result to the next, whichever the objective makes small."""
    latency = options.objective == "latency"
    on_cpu = [d.torch.type == "cpu" for d in devices]
    threads = threads_of(options, devices)
    seconds: dict[str, Any] = {op.name: op.time_s for op in problem.ops}
    segment_costs = {}
    for segment in segments:
        inside = {units.of[n].name: units.of[n] for n in segment.nodes}
        total = costs.call + sum(seconds[name][segment.rank] for name in inside)
        nbytes = sum(work(unit)[1] for unit in inside.values())
        cost = Cost(total, threads, nbytes) if on_cpu[segment.rank] else Cost(total)
        segment_costs[segment.name] = cost
    if options.how() == "inline":  # one thread drives all devices, and is a CPU's
        report = placement.report
        mine = (c.seconds for c in segment_costs.values() if c.cores)
        return max(report["makespan_s" if latency else "load_s"], sum(mine))
    nbytes = {x.name: bytes_of(x) for s in segments for x in (*s.inputs, *s.outputs)}
    each = ranks_here(options, devices) or 1
    machines = [Host(cores(), costs.alone, costs.together) for _ in range(-(-len(devices) // each))]
    hosts = [machines[k // each] for k in range(len(devices))]
    called = options.how() == "processes"
    turns = max(1, cores() // threads) if called else math.inf  # as `local.Ranks` gives
    system = System(programs, [*hosts, machines[0]], segment_costs, nbytes, link, turns, called)
    return system.step() if latency else system.period()


@dataclass
class _Event:
    """Something that is waited for: who waits, until it has come."""

    missing: int = 1
    waiting: list[_Rank] = field(default_factory=list)


@dataclass(eq=False)
class _Task:
    """Work under way. ``part`` of it waits for memory, of which it reads ``rate`` bytes/s."""

    left: float
    cores: float
    host: Host
    rate: float
    part: float
    then: _Rank | _Event


@dataclass
class _Turns:
    """Turns that nobody has, and who waits for one."""

    free: float
    waiting: deque[_Rank] = field(default_factory=deque)


_Wants = _Event | _Task | _Turns
_Rank = Generator[_Wants, None, None]


class _Play:
    """Plays ``batches`` batches, ``ahead`` of them in flight at most; when each was done."""

    def __init__(self, system: System, batches: int, ahead: int) -> None:
        self.system, self.batches, self.ahead = system, batches, ahead
        self.now = 0.0
        self.results = [0.0] * batches
        self.running: list[_Task] = []
        programs = system.programs
        self.stages = programs[0].stages
        owners = sum(bool(p.results) for p in programs)
        self.fed = [[_Event() for _ in programs] for _ in range(batches + self.stages - 1)]
        self.done = [_Event(owners if system.called else len(programs)) for _ in range(batches)]
        self.arrived: dict[tuple[int, int], _Event] = {}
        self.turns = {host: _Turns(system.turns) for host in system.hosts}
        self.ready = [self._feed(), self._watch(), *(self._play(p) for p in programs)]
        self._run()

    # -- who does what ----------------------------------------------------------------------------

    def _feed(self) -> _Rank:
        """The caller's feeding of batches."""
        system = self.system
        for k, events in enumerate(self.fed):
            if system.called and self.ahead <= k < self.batches:
                yield self.done[k - self.ahead]
            for p, event in zip(system.programs, events, strict=True):
                if system.called:
                    size = sum(map(self._size, p.inputs)) if k < self.batches else 0.0
                    yield self._message(-1, size)
                self._come(event)

    def _watch(self) -> _Rank:
        """The caller's wait for results."""
        for k, event in enumerate(self.done):
            yield event
            self.results[k] = self.now

    def _play(self, program: RankProgram) -> _Rank:
        """A rank, period by period."""
        rank = program.rank
        for period, fed in enumerate(self.fed):
            yield fed[rank]
            for step in program.steps:
                batch = period - step.stage
                if not 0 <= batch < self.batches:
                    continue
                for wire in step.receives:
                    yield self._arrival(batch, wire)
                turns = self.turns[self.system.hosts[rank]]
                yield turns
                yield self._segment(rank, step.segment)
                for wire in step.sends:
                    yield self._message(rank, self._size(wire.tensor))
                    arrives = self._message(wire.target, self._size(wire.tensor))
                    arrives.then = self._arrival(batch, wire)
                    self.running.append(arrives)
                turns.free += 1
                self._take(turns)
            batch = period - self.stages + 1
            if batch < 0:
                continue
            if not self.system.called:
                self._come(self.done[batch])
            elif program.results:
                size = sum(map(self._size, program.results))
                yield self._message(rank, size)
                received = self._message(-1, size)
                received.then = self.done[batch]
                self.running.append(received)

    def _size(self, tensor: str) -> float:
        return self.system.nbytes.get(tensor, 0.0)

    def _arrival(self, batch: int, wire: Wire) -> _Event:
        return self.arrived.setdefault((batch, wire.number), _Event())

    def _segment(self, rank: int, name: str) -> _Task:
        host, cost = self.system.hosts[rank], self.system.costs[name]
        rate = min(cost.nbytes / cost.seconds, host.alone) if cost.seconds else 0.0
        part = rate / host.alone if cost.cores else 0.0
        return _Task(cost.seconds, cost.cores, host, rate, part, _Event())

    def _message(self, rank: int, nbytes: float) -> _Task:
        """One end's half of a message, which is a core's work."""
        link = self.system.link
        seconds = (link.latency_s + nbytes / link.bandwidth_Bps) / 2
        return _Task(seconds, 1.0, self.system.hosts[rank], 0.0, 0.0, _Event())

    # -- time -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            while self.ready:
                self._resume(self.ready.pop())
            if not self.running:
                return
            speeds = _speeds(self.running)
            passed = min(t.left / s for t, s in zip(self.running, speeds, strict=True))
            self.now += passed
            still = []
            ended = []
            for task, speed in zip(self.running, speeds, strict=True):
                ends = task.left / speed <= passed
                task.left -= passed * speed
                (ended if ends else still).append(task)
            self.running = still
            for task in ended:
                if isinstance(task.then, _Event):
                    self._come(task.then)
                else:
                    self.ready.append(task.then)

    def _resume(self, rank: _Rank) -> None:
        """Lets a rank go on until it has to wait."""
        for wants in rank:
            if isinstance(wants, _Task):
                wants.then = rank
                self.running.append(wants)
                return
            if isinstance(wants, _Turns):
                wants.waiting.append(rank)
                self._take(wants)
                return
            if wants.missing:
                wants.waiting.append(rank)
                return

    def _take(self, turns: _Turns) -> None:
        """Gives turns to those who waited longest."""
        while turns.free >= 1 and turns.waiting:
            turns.free -= 1
            self.ready.append(turns.waiting.popleft())

    def _come(self, event: _Event) -> None:
        event.missing -= 1
        if not event.missing:
            self.ready += event.waiting


def _speeds(tasks: Sequence[_Task]) -> list[float]:
    """How fast tasks go beside each other; 1 is alone."""
    asked: dict[Host, float] = {}
    for task in tasks:
        asked[task.host] = asked.get(task.host, 0.0) + task.cores
    share = {host: min(1.0, host.cores / cores) if cores else 1.0 for host, cores in asked.items()}
    read: dict[Host, float] = {}
    for task in tasks:
        if task.part:
            read[task.host] = read.get(task.host, 0.0) + task.rate * share[task.host]
    speeds = []
    for task in tasks:
        stretch = max(1.0, read.get(task.host, 0.0) / task.host.together)
        own = share[task.host] if task.cores else 1.0
        speeds.append(own / (1.0 - task.part + task.part * stretch))
    return speeds
