"""`streams`: which CUDA stream every kernel runs on, and which events order them.

before: kernels one after the other on one stream
after:  kernels that need not wait for each other on different streams; an event only where no other
        wait implies it; streams of the critical path with priority

Streams are chains of a smallest set: a maximum matching of the transitive reduction gives as few
chains as possible such that any two tasks which may run at once are on different ones, and as few
events as such chains can do with. A chain that begins after another has ended takes over its
stream. Kwon et al., "Nimble: Lightweight and Parallel GPU Task Scheduling for Deep Learning",
NeurIPS 2020.

Memory has to follow: two buffers may share bytes only if every task that uses the one is known to
have ended before any that uses the other begins, on whichever streams they are (`lifetimes`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from .base import Pass, PassResult, copy_graph
from .plan_memory import Lifetime

STREAMS = "streams"
"""Key of a graph module's ``meta``: the `StreamsPass` that says how to use streams."""


@dataclass(frozen=True)
class StreamsPass(Pass):
    """Runs independent GPU kernels on streams of their own. Does nothing on the CPU.

    Attributes:
        most: so many streams at most; 1 keeps kernels in order.

    Raises:
        ValueError: ``most`` is not positive.
    """

    name: ClassVar[str] = "streams"
    most: int = 16

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most must be at least 1, is {self.most}")

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        result = copy_graph(graph_module)
        result.meta[STREAMS] = self
        return PassResult(result)


@dataclass(frozen=True)
class Streams:
    """Tasks on streams; those of one stream run in the order of their numbers.

    ``of`` is the stream of each task, ``waits`` the tasks of other streams whose ends it waits for,
    ``before`` all tasks that have certainly ended when it begins, as bits; ``critical`` says of
    each stream whether it has part of the longest chain.
    """

    of: tuple[int, ...]
    waits: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    critical: tuple[bool, ...]

    @property
    def events(self) -> int:
        """How many waits there are."""
        return sum(map(len, self.waits))


def assign(after: Sequence[Sequence[int]], seconds: Sequence[float], most: int) -> Streams:
    """Streams for tasks that take ``seconds`` and come ``after`` earlier ones.

    Raises ValueError for a task that comes after one that is not before it.
    """
    for number, needs in enumerate(after):
        if any(not 0 <= k < number for k in needs):
            raise ValueError(f"task {number} comes after one that is not before it")
    reduced, before = _reduction(after)
    levels, path = _levels(reduced, seconds)
    of = _pack(_chains(reduced, levels), before, seconds, most)
    last: dict[int, int] = {}
    chained = []
    for number, needs in enumerate(reduced):
        previous = last.get(of[number])
        chained.append([*needs, *([] if previous is None else [previous])])
        last[of[number]] = number
    final, known = _reduction(chained)
    waits = [tuple(k for k in needs if of[k] != of[n]) for n, needs in enumerate(final)]
    urgent = {of[k] for k in path}
    critical = tuple(s in urgent for s in range(max(of, default=-1) + 1))
    return Streams(tuple(of), tuple(waits), tuple(known), critical)


def _reduction(after: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """The transitive reduction of a graph of numbered tasks, and what comes before each as bits."""
    before: list[int] = []
    reduced: list[list[int]] = []
    for needs in after:
        unique = sorted(set(needs))
        implied = 0
        for k in unique:
            implied |= before[k]
        reduced.append([k for k in unique if not implied >> k & 1])
        before.append(implied | sum(1 << k for k in unique))
    return reduced, before


def _levels(
    after: Sequence[Sequence[int]], seconds: Sequence[float]
) -> tuple[list[float], list[int]]:
    """Seconds from the start of each task to the end of all, and the tasks of a longest chain."""
    levels = list(seconds)
    following: list[int] = [-1] * len(levels)
    for number in reversed(range(len(levels))):
        for k in after[number]:
            if seconds[k] + levels[number] > levels[k] or following[k] < 0:
                levels[k], following[k] = seconds[k] + levels[number], number
    path = []
    number = max(range(len(levels)), key=lambda k: (levels[k], -k), default=-1)
    while number >= 0:
        path.append(number)
        number = following[number]
    return levels, path


def _chains(after: Sequence[Sequence[int]], levels: Sequence[float]) -> list[list[int]]:
    """As few chains of edges as cover all tasks, by a maximum matching (augmenting paths).

    Urgent tasks choose first, and the most urgent of their readers.
    """
    readers: list[list[int]] = [[] for _ in after]
    for number, needs in enumerate(after):
        for k in needs:
            readers[k].append(number)
    for row in readers:
        row.sort(key=lambda k: -levels[k])
    following: dict[int, int] = {}
    leading: dict[int, int] = {}
    for root in sorted(range(len(after)), key=lambda k: -levels[k]):
        reached: dict[int, int] = {}  # reader: the task that would take it
        queue, free = deque([root]), -1
        while queue and free < 0:
            task = queue.popleft()
            for reader in readers[task]:
                if reader in reached:
                    continue
                reached[reader] = task
                if reader not in leading:
                    free = reader
                    break
                queue.append(leading[reader])
        while free >= 0:
            task = reached[free]
            released = following.get(task, -1)
            following[task], leading[free] = free, task
            free = -1 if task == root else released
    chains = []
    for number in range(len(after)):
        if number not in leading:
            chain = [number]
            while chain[-1] in following:
                chain.append(following[chain[-1]])
            chains.append(chain)
    return chains


def _pack(
    chains: Sequence[Sequence[int]], before: Sequence[int], seconds: Sequence[float], most: int
) -> list[int]:
    """The stream of every task: chains that follow one another share one, and all others where
    there are not enough, the least busy one first.
    """
    of = [0] * len(before)
    ends: list[int] = []  # the last tasks of the chains on each stream, as bits
    busy: list[float] = []
    for chain in sorted(chains, key=lambda c: c[0]):
        fit = [s for s, tails in enumerate(ends) if not tails & ~before[chain[0]]]
        if fit:
            stream = max(fit, key=lambda s: (ends[s].bit_length(), -s))
        elif len(ends) < most:
            stream = len(ends)
            ends.append(0)
            busy.append(0.0)
        else:
            stream = min(range(most), key=lambda s: (busy[s], s))
        ends[stream] |= 1 << chain[-1]
        busy[stream] += sum(seconds[k] for k in chain)
        for k in chain:
            of[k] = stream
    return of


# -- memory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConcurrentLifetime(Lifetime):
    """A buffer used by the tasks ``users``; all of ``before`` (bits both) have ended before any."""

    users: int = 0
    before: int = 0

    def overlaps(self, other: Lifetime) -> bool:
        if not isinstance(other, ConcurrentLifetime):
            return super().overlaps(other)
        return bool(self.users & ~other.before) and bool(other.users & ~self.before)


def lifetimes(
    sizes: Mapping[str, int], users: Mapping[str, Sequence[int]], streams: Streams
) -> list[ConcurrentLifetime]:
    """Lifetimes, for `plan_memory`, of buffers of ``sizes`` bytes with the tasks that use them."""
    found = []
    for name, nbytes in sizes.items():
        tasks = users[name]
        bits, before = 0, -1
        for k in tasks:
            bits |= 1 << k
            before &= streams.before[k]
        found.append(ConcurrentLifetime(name, nbytes, min(tasks), max(tasks), bits, before))
    return found
