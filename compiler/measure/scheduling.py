"""Runs the search that the pass `schedule` asks for: kernels are timed, schedules tried and judged.

A schedule only names an order and places; the runtime makes steps wait wherever memory demands it,
so no schedule can change a result. What was found is kept in the kernel database, but not what was
measured while other work kept the machine busy.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...kernels.database import Database
from ...passes.list_schedule import RULES, in_order, list_schedule
from ...passes.plan_memory import Lifetime, MemoryPlan, describe, plan_memory
from ...passes.remarks import Remark
from ...passes.schedule import SchedulePass
from ...passes.tasks import DEFAULT_COSTS, Bounds, Schedule, Task, bounds, branches, simulate
from ...runtime.executor import Executor
from ...runtime.plan import KernelStep, Plan, Step, touched
from ...runtime.sizes import evaluate
from ...runtime.spans import span_of
from ...runtime.trace import Tracer, made_up
from . import contention
from .kernel_times import Kernel, KernelTimes

SECONDS = 1.5
"""Time for measuring candidates, beyond the fewest runs that tell anything."""
FEWEST, MOST = 7, 41
"""Measured rounds."""
TIMED = 7
"""Runs from which the costs of kernels are taken, by median."""
LONGEST = 0.3
"""Seconds of a call beyond which nothing is tried: waits are no part of it worth the runs."""
BUSY = 2.0
"""Runs in order whose median is so many times the shortest were disturbed by other work."""
LARGEST = 64 << 20
"""Bytes of workspace beyond which one candidate is tried only: each has its own meanwhile."""


class _TooLong(Exception):
    """A call takes too long to try schedules."""


@dataclass(frozen=True)
class Scheduled:
    """An executor of the best schedule found, how its memory lies (None: as before, for nothing was
    gained), and what there is to tell.
    """

    executor: Executor
    memory: MemoryPlan | None
    remarks: list[Remark]


def schedule(
    executor: Executor,
    how: SchedulePass,
    database: Database,
    measure: bool = True,
) -> Scheduled:
    """Looks for a faster order and places of the kernels of ``executor``; without ``measure`` only
    for one that was found before.
    """
    return _Scheduler(executor, how, database).run(measure)


@dataclass(frozen=True)
class Proposal:
    """What a schedule would make of a plan, without running it: seconds of a call by prediction,
    those of the kernels' work divided by the workers, which no context can beat, and an executor
    of the schedule (None: it would not gain over the one in order); and whether other work
    disturbed the runs that kernels were timed in.
    """

    predicted: float
    work: float
    executor: Executor | None
    disturbed: bool = False


def propose(executor: Executor, how: SchedulePass, database: Database) -> Proposal | None:
    """The best schedule by prediction; None where kernels cannot run side by side, or something
    else than kernels runs. Times are those within this plan and not kept: in a small one kernels
    find everything in the caches.

    Raises what a plan raises on made-up inputs.
    """
    return _Scheduler(executor, how, database).proposed()


class _Scheduler:
    def __init__(self, executor: Executor, how: SchedulePass, database: Database) -> None:
        self.executor, self.plan = executor, executor.plan
        self.how, self.database = how, database
        self.workers = torch.get_num_threads()
        self.times = KernelTimes(database, self.workers)

    def run(self, measure: bool) -> Scheduled:
        reason = self._unfit()
        if reason:
            return self._kept("PLT-PAR-004", reason)
        self.segments = segments(self.plan)
        tasks = [tasks_of(self.plan.steps, numbers) for numbers in self.segments]
        if not any(map(branches, tasks)):
            return self._kept("PLT-PAR-002", "no two kernels are independent of each other")
        key = self._key(tasks)
        found = self.database.progress(key)
        if found is None and not measure:
            return self._kept("PLT-PAR-004", "nothing is measured with tune='off'")
        if found is None:
            try:
                with torch.random.fork_rng(devices=[]):
                    found = self._search(tasks)
            except _TooLong as error:
                return self._kept("PLT-PAR-004", str(error))
            except (RuntimeError, ValueError, IndexError) as error:
                text = str(error).strip().splitlines() or [""]
                return self._kept("PLT-PAR-005", f"made-up inputs do not run: {text[0][:200]}")
            if not found["disturbed"]:
                self.database.set_progress(key, found)
        remarks = [Remark.from_json(r) for r in found["remarks"]]
        if not found["taken"]:
            return Scheduled(self.executor, None, remarks)
        taken = [
            simulate(
                [replace(t, seconds=s, beside=b) for t, (s, b) in zip(ts, times, strict=True)],
                order,
                [tuple((w, end) for w, end in place) for place in places],
                self.workers,
            )
            for ts, (times, order, places) in zip(tasks, found["taken"], strict=True)
        ]
        plan, lifetimes, memory = self.arranged(taken)
        remarks.append(describe(lifetimes, memory))
        return Scheduled(self._executor(plan), memory, remarks)

    def proposed(self) -> Proposal | None:
        """See `propose`."""
        if self._unfit() or not all(isinstance(s, KernelStep) for s in self.plan.steps):
            return None
        self.segments = segments(self.plan)
        tasks = [tasks_of(self.plan.steps, numbers) for numbers in self.segments]
        try:
            timed, middle, least = self._measured(tasks, made_up(self.plan))
        except _TooLong:
            return None
        work = sum(t.seconds for ts in timed for t in ts) / self.workers
        plain = sum(in_order(ts, self.workers, DEFAULT_COSTS).seconds for ts in timed)
        best = [self.how.candidates(ts, self.workers)[0][0] for ts in timed]
        if _seconds(best) > (1 - max(0.0, self.how.least_gain)) * plain:
            return Proposal(plain, work, None, middle > BUSY * least)
        executor = self._executor(self.arranged(best)[0])
        return Proposal(_seconds(best), work, executor, middle > BUSY * least)

    def _unfit(self) -> str:
        if self.workers < 2:
            return "there is one thread only"
        if self.plan.symbols:
            return "sizes are known only when the model is called"
        return ""

    def _kept(self, remark: str, reason: str) -> Scheduled:
        remarks = [Remark(remark, "missed", "schedule", (), reason)]
        return Scheduled(self.executor, None, remarks)

    def _key(self, tasks: Sequence[Sequence[Task]]) -> str:
        steps = self.plan.steps
        text = [str(self.how), str(self.workers), "3"]  # the last: version of the search
        for numbers, ts in zip(self.segments, tasks, strict=True):
            kernels = [s.kernel for k in numbers if isinstance(s := steps[k], KernelStep)]
            text += [f"{h} {t.pieces} {t.after}" for h, t in zip(kernels, ts, strict=True)]
        return "schedule " + hashlib.sha256("\n".join(text).encode()).hexdigest()[:32]

    # -- search -------------------------------------------------------------------------------

    def _search(self, tasks: Sequence[Sequence[Task]]) -> dict[str, Any]:
        inputs = made_up(self.plan)
        timed, plain = self._timed(tasks, inputs)
        limits = [bounds(ts, self.workers) for ts in timed]
        limit = Bounds(sum(b.path for b in limits), sum(b.work for b in limits))
        remarks: list[Remark] = []
        options: list[list[Schedule]] = []
        for ts in timed:
            schedules, too_large = self.how.candidates(ts, self.workers)
            options.append(schedules)
            if too_large:
                reason = f"more than {self.how.max_stages} stages; list scheduling took its place"
                hint = "raise max_stages, or use algorithm=list"
                remarks.append(Remark("PLT-PAR-006", "missed", "schedule", (), reason, hint))
        count = max(map(len, options))
        mixed = [[o[min(k, len(o) - 1)] for o in options] for k in range(count)]
        if evaluate(self.plan.arena_bytes, {}) > LARGEST:
            mixed = mixed[:1]
        if self.how.least_gain >= 0:
            if all(_seconds(m) > (1 - self.how.least_gain) * plain for m in mixed):
                # Waits after every kernel make runs in order longer than a simulation tells.
                plain = max(plain, self._measured(tasks, inputs)[1])
            mixed = [m for m in mixed if _seconds(m) <= (1 - self.how.least_gain) * plain]
        nothing: dict[str, Any] = {"taken": None, "remarks": [], "disturbed": False}
        if not mixed:
            best = _seconds([o[0] for o in options])
            reason = f"predicted {_ms(best)} against {_ms(plain)} in order; {_bound(limit)}"
            remarks.append(Remark("PLT-PAR-002", "missed", "schedule", (), reason))
            return {**nothing, "remarks": [r.to_json() for r in remarks]}
        base, measured = self._race(mixed, inputs)
        ratios = [statistics.median(map(_ratio, base, times)) for times in measured]
        winner = max(range(len(ratios)), key=ratios.__getitem__)
        times = measured[winner]
        figures = (
            f"measured {_ms(statistics.median(times))} against {_ms(statistics.median(base))} in "
            f"order, {ratios[winner]:.3f}x (predicted {_ms(_seconds(mixed[winner]))}); "
            f"{_bound(limit)}"
        )
        disturbed = statistics.median(base) > BUSY * min(base)
        nothing["disturbed"] = disturbed
        if not disturbed:
            self._refit(timed, mixed[winner], inputs)
        else:
            figures += "; other work disturbed this, so the next compilation measures anew"
        half = len(base) // 2
        halves = [
            statistics.median(map(_ratio, base[part], times[part]))
            for part in (slice(0, half), slice(half, None))
        ]
        enough = ratios[winner] >= 1 / (1 - self.how.least_gain) and min(halves) > 1
        if self.how.least_gain >= 0 and not enough:
            remarks.append(Remark("PLT-PAR-003", "missed", "schedule", (), figures))
            return {**nothing, "remarks": [r.to_json() for r in remarks]}
        gain = statistics.median(base) - statistics.median(times)
        remarks.append(
            Remark("PLT-PAR-001", "done", "schedule", (), figures, predicted_gain=max(gain, 0.0))
        )
        taken = [
            (
                [(t.seconds, t.beside) for t in ts],
                list(s.order),
                [s.place(k) for k in range(len(ts))],
            )
            for ts, s in zip(timed, mixed[winner], strict=True)
        ]
        return {
            "taken": taken,
            "remarks": [r.to_json() for r in remarks],
            "disturbed": disturbed,
        }

    def _timed(
        self, tasks: Sequence[Sequence[Task]], inputs: Sequence[torch.Tensor]
    ) -> tuple[list[list[Task]], float]:
        """Tasks with their seconds, and how long all launches take together in order: measured,
        unless the times of all kernels are known, as they are from then on.
        """
        kernels = [
            [(self._kernel(k), t.pieces) for t, k in zip(ts, numbers, strict=True)]
            for ts, numbers in zip(tasks, self.segments, strict=True)
        ]
        distinct = {k for ks in kernels for k in ks}
        known = self.times.known(distinct)
        beside = self.times.beside(distinct)
        tasks = [
            [replace(t, beside=beside.get(k, 1.0)) for t, k in zip(ts, ks, strict=True)]
            for ts, ks in zip(tasks, kernels, strict=True)
        ]
        if len(known) < len(distinct):
            timed, plain, least = self._measured(tasks, inputs)
            if plain <= BUSY * least:
                self._keep(timed, kernels, known)
            return timed, plain
        timed = [
            [replace(t, seconds=known[k]) for t, k in zip(ts, ks, strict=True)]
            for ts, ks in zip(tasks, kernels, strict=True)
        ]
        plain = sum(in_order(ts, self.workers, DEFAULT_COSTS).seconds for ts in timed)
        if plain > LONGEST:
            raise _TooLong(f"a call takes {plain:.1f} s, too long to try schedules")
        return timed, plain

    def _refit(
        self,
        timed: Sequence[Sequence[Task]],
        schedules: Sequence[Schedule],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        """Keeps what kernels took beside others in ``schedules``, for the next search."""
        homes = contention.kept_to_few(timed, schedules, self.workers)
        if not homes:
            return
        executor = self._executor(self.arranged(schedules)[0])
        found: dict[Kernel, list[float]] = {}
        measured = contention.ratios(executor, timed, schedules, homes, inputs)
        for (launch, k), ratio in measured.items():
            kernel = (self._kernel(self.segments[launch][k]), timed[launch][k].pieces)
            found.setdefault(kernel, []).append(ratio)
        self.times.refit(found)

    def _kernel(self, number: int) -> str:
        step = self.plan.steps[number]
        assert isinstance(step, KernelStep)
        return step.kernel

    def _keep(
        self,
        timed: Sequence[Sequence[Task]],
        kernels: Sequence[Sequence[Kernel]],
        known: Mapping[Kernel, float],
    ) -> None:
        """Keeps the times of kernels that are not ``known``."""
        fresh: dict[Kernel, list[float]] = {}
        for ts, ks in zip(timed, kernels, strict=True):
            for t, k in zip(ts, ks, strict=True):
                if k not in known:
                    fresh.setdefault(k, []).append(t.seconds)
        self.times.keep({k: statistics.median(seconds) for k, seconds in fresh.items()})

    def _measured(
        self, tasks: Sequence[Sequence[Task]], inputs: Sequence[torch.Tensor]
    ) -> tuple[list[list[Task]], float, float]:
        """Like `_timed`, measured as tasks run in order on all workers, so that what workers cost
        each other is part of it; and how long all launches took at least.
        """
        tracer = Tracer(self.executor, {}, self.workers)
        samples: list[list[float]] = [[] for _ in self.plan.steps]
        wholes: list[float] = []
        launch_of = {k: s for s, numbers in enumerate(self.segments) for k in numbers}
        shortest = math.inf
        for turn in range(TIMED + 1):
            spent = [0.0] * len(samples)
            start = time.perf_counter()
            reach: dict[int, tuple[float, float]] = {}
            for event in tracer.run(inputs):
                spent[event.step] += event.end - event.begin
                if event.step in launch_of:
                    begin, end = reach.get(launch_of[event.step], (event.begin, event.end))
                    reach[launch_of[event.step]] = (min(begin, event.begin), max(end, event.end))
            shortest = min(shortest, time.perf_counter() - start)  # others may run meanwhile
            if turn and shortest > LONGEST:
                raise _TooLong(f"a call takes {shortest:.1f} s, too long to try schedules")
            if turn:  # the first one warms up
                wholes.append(sum(end - begin for begin, end in reach.values()))
                for sample, seconds in zip(samples, spent, strict=True):
                    sample.append(seconds)
        timed = [
            [
                replace(t, seconds=statistics.median(samples[k]))
                for t, k in zip(ts, numbers, strict=True)
            ]
            for ts, numbers in zip(tasks, self.segments, strict=True)
        ]
        return timed, statistics.median(wholes), min(wholes)

    def _race(
        self, mixed: Sequence[Sequence[Schedule]], inputs: Sequence[torch.Tensor]
    ) -> tuple[list[float], list[list[float]]]:
        """Seconds of every run of the plan in order, and of each candidate, taking turns."""
        runs: list[Callable[..., Any]] = [self.executor.run]
        runs += [self._executor(self.arranged(m)[0]).run for m in mixed]
        for run in runs:
            run(inputs)
        times: list[list[float]] = [[] for _ in runs]
        start = time.perf_counter()
        while len(times[0]) < FEWEST or (
            len(times[0]) < MOST and time.perf_counter() - start < SECONDS
        ):
            for run, taken in zip(runs, times, strict=True):
                begin = time.perf_counter()
                run(inputs)
                taken.append(time.perf_counter() - begin)
        return times[0], times[1:]

    # -- plans --------------------------------------------------------------------------------

    def _executor(self, plan: Plan) -> Executor:
        e = self.executor
        return Executor(plan, e.constants, e.functions, e.calls, e.keep, e.parts, e.tier, e.banks)

    def arranged(self, schedules: Sequence[Schedule]) -> tuple[Plan, list[Lifetime], MemoryPlan]:
        """The plan with its kernels in the order and places of ``schedules``, one per segment; two
        buffers share memory only where no step that uses one runs beside one that uses the other.
        """
        steps: list[Step] = []
        spans: list[tuple[float, float]] = []  # when each step runs
        clock = 0.0
        following = {numbers[0]: k for k, numbers in enumerate(self.segments)}
        in_segment = {n for numbers in self.segments for n in numbers}
        for number, step in enumerate(self.plan.steps):
            if number in following:
                numbers = self.segments[following[number]]
                found = schedules[following[number]]
                for k in found.order:
                    kernel = self.plan.steps[numbers[k]]
                    assert isinstance(kernel, KernelStep)
                    steps.append(replace(kernel, place=found.place(k)))
                    spans.append((clock + found.start(k), clock + found.finish(k)))
                clock += found.seconds
            elif number not in in_segment:
                steps.append(step)
                spans.append((clock, clock + 1.0))
                clock += 1.0
        lifetimes = _lifetimes(self.plan, steps, spans)
        memory = plan_memory(lifetimes)
        buffers = dict(self.plan.buffers)
        for name, offset in memory.offsets.items():
            buffers[name] = replace(buffers[name], offset=offset)
        plan = replace(
            self.plan,
            steps=steps,
            buffers=buffers,
            arena_bytes=memory.total,
            workers=self.workers,
        )
        return plan, lifetimes, memory


def segments(plan: Plan) -> list[list[int]]:
    """Numbers of consecutive kernel steps that have something to do: each list is one launch."""
    found: list[list[int]] = []
    fresh = True
    for number, step in enumerate(plan.steps):
        if not isinstance(step, KernelStep):
            fresh = True
            continue
        if fresh:
            found.append([])
            fresh = False
        found[-1].append(number)
    return found


def tasks_of(steps: Sequence[Step], numbers: Sequence[int]) -> list[Task]:
    """The kernel steps ``numbers`` as tasks without times: what must come after what by the memory
    of their tensors. Sizes must be numbers.
    """
    seen: dict[str, list[tuple[int, Any, bool]]] = {}
    tasks = []
    for k, number in enumerate(numbers):
        step = steps[number]
        assert isinstance(step, KernelStep)
        after: set[int] = set()
        for position, ref in enumerate(step.args):
            span, writes = span_of(ref, ref.buffer, 0, {}), position >= step.reads
            known = seen.setdefault(ref.buffer, [])
            after |= {j for j, s, w in known if j != k and (w or writes) and s.overlaps(span)}
            known.append((k, span, writes))
        pieces = max(1, evaluate(step.tasks, {}))
        tasks.append(Task(step.name, 0.0, pieces, tuple(sorted(after))))
    return tasks


def predict(plan: Plan, seconds: Mapping[int, float], workers: int) -> tuple[float, float, float]:
    """Simulated seconds of a plan's launches on ``workers``, given each step's on one: in order,
    by the better of that and list scheduling, and the larger of the lower bounds.
    """
    plain = best = limit = 0.0
    for numbers in segments(plan):
        tasks = [
            replace(t, seconds=seconds[k])
            for t, k in zip(tasks_of(plan.steps, numbers), numbers, strict=True)
        ]
        ordered = in_order(tasks, workers, DEFAULT_COSTS).seconds
        listed = min(list_schedule(tasks, workers, rule).seconds for rule in RULES)
        plain, best = plain + ordered, best + min(ordered, listed)
        limit += bounds(tasks, workers).best
    return plain, best, limit


def _lifetimes(
    plan: Plan, steps: Sequence[Step], spans: Sequence[tuple[float, float]]
) -> list[Lifetime]:
    """Lifetimes by position, each as long as anything runs beside the buffer's users."""
    users: dict[str, list[int]] = {}
    for position, step in enumerate(steps):
        for ref in touched(step):
            if ref is not None and plan.buffers[ref.buffer].kind == "arena":
                users.setdefault(ref.buffer, []).append(position)
    found = []
    for name, positions in users.items():
        begin = min(spans[p][0] for p in positions)
        end = max(spans[p][1] for p in positions)
        first, last = min(positions), max(positions)
        beside = [p for p, (a, b) in enumerate(spans) if a < end and b > begin]
        nbytes = plan.buffers[name].nbytes
        found.append(Lifetime(name, nbytes, min(first, *beside), max(last, *beside)))
    return found


def _seconds(schedules: Sequence[Schedule]) -> float:
    return sum(s.seconds for s in schedules)


def _ratio(base: float, other: float) -> float:
    return base / other


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _bound(limit: Bounds) -> str:
    kind = "work" if limit.work >= limit.path else "critical path"
    return f"no schedule can take less than {_ms(limit.best)} ({kind})"
