"""The driver of ``plait tune``: spends a budget on the kernels of a model, the heaviest first.

For each kernel all of its template's candidates are raced, then schedules are searched
(`kernels.metaschedule`), and the best of both meet in a final race. Winners go to the database
at once, so an interrupted run loses at most the step it was in; run again, it goes on from there.
"""

from __future__ import annotations

import functools
import importlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import definitions, race
from .abi import Kernel
from .build import BuildError, build
from .database import FAST, FRUGAL, Database, Entry, Measured
from .definition import Definition
from .files import scratch_folder
from .group import IO, Group, Unsupported
from .metaschedule import Bench, Found, search
from .target import Target

SEARCHED = {kind: definitions.DEFINITIONS[kind] for kind in ("gemm", "conv")}
_STAGES = {"template": "templates", "metaschedule": "search"}
_RACE_SECONDS = 3.0
_LEAST_FLOPS = 1 << 20  # below, a call takes microseconds and there is nothing to find
_LEAST_SECONDS = 2.0  # of a search; less would not pay for its start


@dataclass(frozen=True)
class Task:
    """A kernel to be tuned.

    ``key`` is its key in the database, ``weight`` its share of the model's time, ``bench()``
    sets up memory and a reference result, ``record(kernel)`` makes the database's record and
    ``revive(entry)`` a `Kernel` from it, enough of one to be called (``func`` may be None).
    """

    key: str
    name: str
    weight: float
    group: Group
    io: IO
    bench: Callable[[], Bench]
    record: Callable[[Kernel], dict[str, Any]]
    revive: Callable[[Entry], Kernel]


@dataclass(frozen=True)
class Progress:
    """Where a tuning run is: at ``task`` (number ``index`` of ``count``), in ``stage`` "templates",
    "search" or "done", after ``trials`` kernels tried for it, with its best time so far
    (infinite before the first).
    """

    task: str
    index: int
    count: int
    stage: str
    trials: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What tuning did for one task: seconds of the kernel that was there before (None without
    one), of the best now, and how many kernels were tried in all. ``source`` is "template" or
    "metaschedule"; ``remark`` says why a task was left alone.
    """

    task: str
    before: float | None
    after: float | None
    source: str
    trials: int
    remark: str = ""


@dataclass
class _State:
    """What is kept between runs of one task: how many template candidates were raced, and how
    many schedules tried by width of panels."""

    raced: int = 0
    trials: dict[str, int] = field(default_factory=dict)


def tune(
    tasks: Sequence[Task],
    database: Database,
    target: Target,
    *,
    budget: float,
    trials: int = 64,
    progress: Callable[[Progress], None] | None = None,
) -> list[Outcome]:
    """Tunes ``tasks`` for about ``budget`` seconds, with at most ``trials`` schedules each.

    Tasks are taken by weight; each gets a share of the time left that fits its weight, and what
    one does not use goes to the others. Tasks tuned as far before cost nothing. Raises ValueError
    for a budget that is not positive, and KeyboardInterrupt when interrupted.
    """
    if not budget > 0:
        raise ValueError(f"the tuning budget must be positive, got {budget}")
    deadline = time.monotonic() + budget
    order = sorted(tasks, key=lambda t: -t.weight)
    outcomes: list[Outcome] = []
    for index, task in enumerate(order):
        left = deadline - time.monotonic()
        weights = sum(t.weight for t in order[index:])
        share = left * (task.weight / weights if weights > 0 else 1.0 / (len(order) - index))
        notify = _Notify(progress, task.name, index, len(order))
        if left <= 0:
            outcomes.append(_skipped(task, database, "the budget is spent"))
            continue
        try:
            with _interruptible():
                outcomes.append(_Tuning(task, database, target, share, trials, notify).run())
        except Unsupported as error:
            outcomes.append(_skipped(task, database, error.reason))
        except BuildError as error:
            outcomes.append(_skipped(task, database, str(error)))
    return outcomes


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C through TVM, which turns a KeyboardInterrupt in its threads into errors of its
    own. Only the main thread gets signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def interrupt(*_: Any) -> None:
        nonlocal seen
        seen = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if seen:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _skipped(task: Task, database: Database, remark: str) -> Outcome:
    entry = database.lookup(task.key)
    seconds = entry.seconds if entry is not None else None
    return Outcome(task.name, seconds, seconds, "", 0, remark)


@dataclass
class _Notify:
    """The caller's progress callback, for one task."""

    callback: Callable[[Progress], None] | None
    task: str
    index: int
    count: int

    def __call__(self, stage: str, trials: int, seconds: float) -> None:
        if self.callback is not None:
            progress = Progress(self.task, self.index, self.count, stage, trials, seconds)
            self.callback(progress)


class _Tuning:
    """One task: template candidates, a search for each width of panels, a final race."""

    def __init__(
        self,
        task: Task,
        database: Database,
        target: Target,
        seconds: float,
        trials: int,
        notify: _Notify,
    ) -> None:
        self.task, self.database, self.target = task, database, target
        self.limit, self.notify = trials, notify
        self.deadline = time.monotonic() + seconds
        self._name = f"tune:{task.key}"
        kept = database.progress(self._name) or {}
        self.state = _State(kept.get("raced", 0), dict(kept.get("trials", {})))

    @functools.cached_property
    def bench(self) -> Bench:
        """The memory to run on, made when it is first needed."""
        return self.task.bench()

    @functools.cached_property
    def definitions(self) -> dict[int, Definition]:
        """What to search, by width of the weight's panels, the likely best first."""
        group, found = self.task.group, {}
        if group.kind in SEARCHED and self.target.kind == "cpu":
            lanes = self.target.vector_bytes // 4
            for width in (4 * lanes, 2 * lanes, 6 * lanes, lanes):
                try:
                    made = SEARCHED[group.kind](group, self.task.io, self.target, width=width)
                except (Unsupported, NotImplementedError):
                    continue
                if len(made.blocks) == 2 and made.flops >= _LEAST_FLOPS:
                    found[width] = made
        return found

    def run(self) -> Outcome:
        """Does the steps that are not done yet, as far as time allows."""
        before = self.database.lookup(self.task.key)
        if before is None or not self.state.raced:
            kernels = self._lowered()
            self._race(kernels, "template", len(kernels))
            self._keep(raced=len(kernels))
        wanted = math.ceil(self.limit / max(len(self.definitions), 1))
        for width, wide in self.definitions.items():
            left = self.deadline - time.monotonic()
            if left < _LEAST_SECONDS or self.state.trials.get(str(width), 0) >= wanted:
                continue
            others = self._tried() - self.state.trials.get(str(width), 0)
            found = self._search(width, wide, wanted, left, others)
            if found.kernel is not None:
                self._race([found.kernel], "metaschedule", others + found.trials)
            self._keep(trials={**self.state.trials, str(width): found.trials})
        best = self.database.lookup(self.task.key)
        after = best.seconds if best is not None else None
        self.notify("done", self._tried(), after if after is not None else math.inf)
        source = str(best.record.get("source", "template")) if best is not None else ""
        seconds = before.seconds if before is not None else None
        return Outcome(self.task.name, seconds, after, source, self._tried())

    def _tried(self) -> int:
        return self.state.raced + sum(self.state.trials.values())

    def _keep(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        self.database.set_progress(self._name, asdict(self.state))

    # -- templates ------------------------------------------------------------------------------

    def _lowered(self) -> list[Kernel]:
        task = self.task
        template = importlib.import_module(f".templates.{task.group.kind}", __package__)
        return [
            template.lower(task.group, task.io, self.target, config, name=self._symbol(f"t{i}"))
            for i, config in enumerate(template.candidates(task.group, task.io, self.target))
        ]

    def _symbol(self, suffix: str) -> str:
        return f"plait_{self.task.key}_{suffix}"

    def _race(self, kernels: list[Kernel], source: str, tried: int) -> None:
        """Races newcomers against what the database has, and stores those that win.

        ``tried`` counts what was tried so far, for the record.
        """
        bundle = build(kernels, self.target)
        new = [k for k in kernels if k.name not in bundle.failed]
        entrants = [self.bench.candidate(k, bundle.address(k.name)) for k in new]
        for role in (FAST, FRUGAL):
            entry = self.database.lookup(self.task.key, role)
            if entry is not None and entry.seconds is not None:  # else it never raced: a candidate
                old = self.task.revive(entry)
                entrants.append(self.bench.candidate(old, self.database.address(entry)))
        results = race.race(
            entrants,
            check=self.bench.check,
            tolerance=self.bench.tolerance,
            reset=self.bench.reset,
            rounds=9,
            budget=_RACE_SECONDS,
            clock=time.thread_time if self.target.kind == "cpu" else time.perf_counter,
        )
        self.database.record_measurements(
            Measured(self.task.key, kernel.config, r.seconds, r.error, r.note)
            for kernel, r in zip(new, results, strict=False)  # incumbents have theirs
        )
        winners: dict[str, tuple[Kernel, dict[str, float]]] = {}
        for role, best in ((FAST, race.fastest(results)), (FRUGAL, race.most_frugal(results))):
            if best is None or best.seconds is None:
                continue
            if role == FAST:
                self.notify(_STAGES[source], tried, best.seconds)
            number = next(i for i, r in enumerate(results) if r is best)
            if number < len(new):
                kernel = new[number]
                winners.setdefault(kernel.name, (kernel, {}))[1][role] = best.seconds
        if not winners:
            return
        kept = build([kernel for kernel, _ in winners.values()], self.target)  # without the losers
        entries = [
            Entry(
                key=self.task.key,
                symbol=kernel.name,
                record={**self.task.record(kernel), "source": source},
                role=role,
                seconds=seconds,
                effort=tried,
            )
            for kernel, roles in winners.values()
            for role, seconds in roles.items()
        ]
        self.database.store(entries, kept.data, kept.library)

    # -- search ---------------------------------------------------------------------------------

    def _search(
        self, width: int, wide: Definition, trials: int, seconds: float, others: int
    ) -> Found:
        with self._directory(width) as directory:
            return search(
                wide,
                self.target,
                self.bench,
                directory,
                name=self._symbol(f"s{width}"),
                trials=trials,
                seconds=seconds,
                progress=lambda n, s: self.notify("search", others + n, s),
            )

    @contextmanager
    def _directory(self, width: int) -> Iterator[Path]:
        """Where the search keeps its records: in the cache, if there is one."""
        kept = self.database.scratch(f"search/{self.task.key}-{width}")
        if kept is not None:
            yield kept
            return
        with scratch_folder("plait-search-") as scratch:
            yield scratch
