"""Tasks for a number of workers, schedules of them, and how long they must take at least.

A task is a kernel on given tensors: it takes ``seconds`` of work, and its ``pieces`` can be dealt
out to several workers (it is *moldable*). Workers contend for caches and memory, and otherwise with
pieces of the same task than with other tasks, so a task that is not dealt out to as many as can
share it takes ``beside`` times its seconds. Workers run what they were given in order. A share
starts when its worker is free and every task before it has ended, with some delay where that ran
elsewhere; so the shares of one task need not start together.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

Place = tuple[tuple[int, int], ...]
"""Who does a task: pairs (worker, end) in order; a worker does the pieces up to its end."""


@dataclass(frozen=True)
class Task:
    """``seconds`` of work, summed over all workers where these share it; ``pieces`` to deal out;
    the numbers of the ``after`` tasks that must have ended before; and what fewer workers take,
    other tasks ``beside`` them, as a multiple of ``seconds``.
    """

    name: str
    seconds: float
    pieces: int = 1
    after: tuple[int, ...] = ()
    beside: float = 1.0

    def spent(self, sharing: int, workers: int) -> float:
        """Seconds of work where so many of the ``workers`` share the task."""
        return self.seconds * (self.beside if sharing < min(workers, self.pieces) else 1.0)

    def least(self, workers: int) -> float:
        """Seconds of work at least, however many workers share the task."""
        return min(self.seconds, self.spent(1, workers))


@dataclass(frozen=True)
class Costs:
    """Seconds that a call takes beside its work, and that another worker needs to notice its
    end.
    """

    call: float = 0.1e-6
    notice: float = 0.4e-6


DEFAULT_COSTS = Costs()


@dataclass(frozen=True)
class Share:
    """A part of a task: pieces up to ``end`` on ``worker``, from ``start`` to ``finish``
    (seconds).
    """

    worker: int
    end: int
    start: float
    finish: float


@dataclass(frozen=True)
class Schedule:
    """Tasks in the order in which workers take them, and the shares of each task."""

    workers: int
    order: tuple[int, ...]
    shares: tuple[tuple[Share, ...], ...]

    @functools.cached_property
    def seconds(self) -> float:
        """When the last share ends."""
        return max((s.finish for shares in self.shares for s in shares), default=0.0)

    def start(self, task: int) -> float:
        """When the first share of a task starts."""
        return min(s.start for s in self.shares[task])

    def finish(self, task: int) -> float:
        """When the last share of a task ends."""
        return max(s.finish for s in self.shares[task])

    def place(self, task: int) -> Place:
        """Who does a task."""
        return tuple((s.worker, s.end) for s in self.shares[task])


@dataclass(frozen=True)
class Bounds:
    """What no schedule can beat, in seconds.

    ``path`` is the longest chain of tasks, each dealt out as finely as it goes; ``work`` all
    tasks together divided by the workers.
    """

    path: float
    work: float

    @property
    def best(self) -> float:
        """The larger one."""
        return max(self.path, self.work)


def check(tasks: Sequence[Task]) -> None:
    """Raises ValueError for tasks that come after later ones or after themselves (so no order is
    known to exist), and for times and pieces that make no sense.
    """
    for number, task in enumerate(tasks):
        if any(not 0 <= k < number for k in task.after):
            raise ValueError(f"task {task.name} comes after one that is not before it")
        numbers = (task.seconds, task.beside)
        if not all(math.isfinite(n) and n >= 0 for n in numbers) or task.pieces < 1:
            raise ValueError(f"task {task.name} takes {task.seconds} s in {task.pieces} pieces")


def bounds(tasks: Sequence[Task], workers: int) -> Bounds:
    """Lower bounds on the makespan of ``tasks``."""
    ends: list[float] = []
    for task in tasks:
        least = task.least(workers) * math.ceil(task.pieces / workers) / task.pieces
        ends.append(max((ends[k] for k in task.after), default=0.0) + least)
    return Bounds(max(ends, default=0.0), sum(t.least(workers) for t in tasks) / workers)


def simulate(
    tasks: Sequence[Task],
    order: Sequence[int],
    places: Sequence[Place],
    workers: int,
    costs: Costs = DEFAULT_COSTS,
) -> Schedule:
    """When everything happens if workers take ``tasks`` in ``order``, ``places[k]`` doing task k.

    Raises ValueError where the order is none of all tasks that respects what comes after what, or
    a place does not do its task exactly once.
    """
    if sorted(order) != list(range(len(tasks))):
        raise ValueError("the order does not hold every task once")
    free = [0.0] * workers
    shares: list[tuple[Share, ...]] = [()] * len(tasks)
    for number in order:
        task, place = tasks[number], places[number]
        ends = [0, *(end for _, end in place)]
        if ends[-1] != task.pieces or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"the places of task {task.name} do not do it once")
        if any(not shares[k] for k in task.after):
            raise ValueError(f"task {task.name} is ordered before what it comes after")
        done, spent = [], task.spent(len(place), workers)
        for low, (worker, end) in zip(ends, place, strict=False):
            start = max(free[worker], ready(tasks, shares, number, worker, costs))
            finish = start + costs.call + spent * (end - low) / task.pieces
            done.append(Share(worker, end, start, finish))
        for share in done:
            free[share.worker] = share.finish
        shares[number] = tuple(done)
    return Schedule(workers, tuple(order), tuple(shares))


def ready(
    tasks: Sequence[Task],
    shares: Sequence[Sequence[Share]],
    number: int,
    worker: int,
    costs: Costs,
) -> float:
    """When ``worker`` can know that everything before a task has ended."""
    latest = 0.0
    for k in tasks[number].after:
        for share in shares[k]:
            seen = share.finish if share.worker == worker else share.finish + costs.notice
            latest = max(latest, seen)
    return latest


def even(pieces: int, workers: int) -> Place:
    """All workers, with shares as equal as they go."""
    count = min(pieces, workers)
    return tuple((k, pieces * (k + 1) // count) for k in range(count))


def bottom_levels(tasks: Sequence[Task]) -> list[float]:
    """Seconds from the start of each task to the end of all, were there workers without limit."""
    levels = [t.seconds for t in tasks]
    for number in reversed(range(len(tasks))):
        for k in tasks[number].after:
            levels[k] = max(levels[k], tasks[k].seconds + levels[number])
    return levels


def branches(tasks: Sequence[Task]) -> bool:
    """Whether any task does not come after the one before it."""
    reached: list[set[int]] = []
    for number, task in enumerate(tasks):
        before = set(task.after).union(*(reached[k] for k in task.after))
        reached.append(before)
        if number and number - 1 not in before:
            return True
    return False


def pieces(after: Sequence[Collection[int]]) -> list[list[int]]:
    """Nodes, of which each comes ``after`` some with smaller numbers, cut wherever all so far come
    before all others; each piece is in an order that respects what comes after what.
    """
    before: list[int] = []  # bits of all nodes, near and far, that come before each
    for earlier in after:
        bits = 0
        for k in earlier:
            bits |= before[k] | 1 << k
        before.append(bits)
    order = sorted(range(len(before)), key=lambda k: (before[k].bit_count(), k))
    behind, common = (1 << len(order)) - 1, -1  # common: what comes before all nodes from here on
    cuts = [len(order)]
    for position in reversed(range(len(order))):
        common &= before[order[position]]
        behind &= ~(1 << order[position])
        if not behind & ~common:
            cuts.append(position)
    cuts.reverse()
    return [order[a:b] for a, b in itertools.pairwise(cuts)]
