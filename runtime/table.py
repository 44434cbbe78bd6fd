"""Builds launch tables: consecutive kernel steps become lists of entries, one for each worker.

Steps keep their order. A worker waits only where a step touches memory that another worker has
written, or overwrites what another has read (`ordering`); steps too small to share run whole on one
worker, chains of them on the same one. A plan that was scheduled says itself where its steps run.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import driver
from .ordering import Ordering
from .plan import KernelStep
from .sizes import evaluate
from .spans import ITEMSIZE, Span

# Rough rates of one core that decide whether a step is worth sharing; a launch costs microseconds.
FLOPS_PER_US = 40_000
BYTES_PER_US = 10_000
MIN_SHARED_US = 3.0
MANY = 3
"""A part that waits for more workers than this meets all of them at a barrier instead."""
LINE = 8
"""Words of a cache line: counters do not share one."""


@dataclass
class Table:
    """Native memory of one launch; keep it alive while it may run.

    ``waits`` counts the entries that wait, ``ends`` has the address of each list's last one.
    ``stamps`` are, of a table built with them, two
    ``timespec`` (seconds, nanoseconds) for each part in ``parts``: when it began and ended.
    """

    block: np.ndarray
    arrays: list[np.ndarray]
    workers: int
    waits: int
    parts: list[Part]
    ends: list[int]
    stamps: np.ndarray | None = None
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.block.ctypes.data


@dataclass(frozen=True)
class Part:
    """Tasks [lo, hi) of step number ``step``, on ``worker``."""

    step: int
    worker: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Address:
    """Where a buffer starts: an absolute address, or entry ``ext`` of the per-call pointers."""

    base: int
    ext: int = -1


def micros(step: KernelStep, values: Mapping[str, int]) -> float:
    """About how many microseconds one worker needs for a step."""
    return max(
        evaluate(step.flops, values) / FLOPS_PER_US, evaluate(step.bytes, values) / BYTES_PER_US
    )


def share(step: KernelStep, tasks: int, values: Mapping[str, int], workers: int) -> int:
    """How many workers a step is worth: 1 when its whole work is shorter than a hand-off."""
    if tasks <= 1 or micros(step, values) < MIN_SHARED_US:
        return 1
    return min(workers, tasks)


def build_table(
    steps: Sequence[KernelStep],
    spans: Sequence[Sequence[Span]],
    addresses: Mapping[str, Address],
    functions: Mapping[str, int],
    values: Mapping[str, int],
    workers: int,
    placed: bool = False,
    stamped: bool = False,
    checked: Collection[str] = (),
    stop: int = 0,
    forks: Mapping[str, np.ndarray] | None = None,
    tail: int = driver.END,
) -> Table:
    """Lays out one launch of ``steps`` for ``workers`` threads.

    ``spans[i][k]`` is the memory of argument k of step i; a step writes what lies behind its
    arguments, too. Steps run where their ``place`` says if ``placed``. ``stamped`` tables note when
    each part ran. ``checked`` are kernels that may end the launch, ``stop`` the address of the word
    that they set then. Behind a step whose name is among ``forks`` every worker takes jumps, which
    that step leads somewhere; their addresses are written to ``forks[name]`` (int64 ``[jumps,
    workers]``). Lists end with the operation ``tail``. Raises KeyError when a kernel's address is
    missing from ``functions``.
    """
    builder = _Builder(workers, tail, stop)
    for number, (step, own) in enumerate(zip(steps, spans, strict=True)):
        tasks = evaluate(step.tasks, values)
        if tasks <= 0:
            continue
        accesses = [(span, k >= step.reads) for k, span in enumerate(own)]
        conflicts = builder.ordering.conflicts(accesses)
        if placed and step.place:
            cuts = step.place
        else:
            count = share(step, tasks, values, workers)
            home = 0
            if count == 1:
                homes = {w for c in conflicts for w, _ in c.parts}
                home = homes.pop() if len(homes) == 1 else 0
            cuts = tuple((home + k, tasks * (k + 1) // count) for k in range(count))
        call = (functions[step.kernel], *builder.arguments(step, addresses, values))
        builder.step(number, call, cuts, accesses, conflicts, step.kernel in checked)
        if forks and step.name in forks:
            builder.fork(forks[step.name])
    return builder.table(stamped)


class _Builder:
    """Entries so far. A wait is kept as (other worker, number of its part) until all are known."""

    def __init__(self, workers: int, tail: int, stop: int) -> None:
        self.workers, self.tail, self.stop = workers, tail, stop
        self.ordering = Ordering(workers)
        self.arrays: list[np.ndarray] = []
        self.patches: list[tuple[int, int, int]] = []
        self.lists: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(workers)]
        self.parts: list[Part] = []
        self.meetings = 0
        self.forks: list[np.ndarray] = []

    def step(
        self,
        number: int,
        call: tuple[int, int, int],
        cuts: Sequence[tuple[int, int]],
        accesses: Sequence[tuple[Span, bool]],
        conflicts: Sequence,
        checked: bool,
    ) -> None:
        """Adds a step whose tasks are cut at ``cuts``, (worker, end) in order."""
        ordering = self.ordering
        starts = [0, *(end for _, end in cuts)]
        shares = [(w, lo, end) for lo, (w, end) in zip(starts, cuts, strict=False) if lo < end]
        waits = [ordering.waits(conflicts, worker) for worker, _, _ in shares]
        if max(map(len, waits)) > MANY:
            self.meet()
        else:
            for (worker, _, _), needed in zip(shares, waits, strict=True):
                self.lists[worker] += [("wait", w) for w in needed]
                ordering.wait(worker, needed)
        fn, address, classes = call
        for worker, lo, hi in shares:
            op = driver.CHECKED if checked else driver.CALL
            self.lists[worker].append(("call", (op, fn, lo, hi, address, classes, len(self.parts))))
            self.parts.append(Part(number, worker, lo, hi))
        ordering.add(accesses, [worker for worker, _, _ in shares])

    def meet(self) -> None:
        """All workers wait for each other."""
        self.meetings += 1
        for entries in self.lists:
            entries.append(("meet", (self.meetings,)))
        self.ordering.meet()

    def fork(self, jumps: np.ndarray) -> None:
        """Every worker takes ``len(jumps)`` jumps; all meet before and behind."""
        self.meet()
        for k in range(len(jumps)):
            for entries in self.lists:
                entries.append(("jump", (len(self.forks), k)))
        self.forks.append(jumps)
        self.meet()

    def arguments(
        self, step: KernelStep, addresses: Mapping[str, Address], values: Mapping[str, int]
    ) -> tuple[int, int]:
        """Address and class of a step's argument words; those of per-call pointers are patched."""
        count = len(step.args) + len(step.symbols)
        classes = driver.args_class(count)
        words = np.zeros(driver.ARG_CLASSES[classes], dtype=np.int64)
        for k, ref in enumerate(step.args):
            where = addresses[ref.buffer]
            shift = evaluate(ref.offset, values) * ITEMSIZE[ref.dtype]
            if where.ext >= 0:
                self.patches.append((words.ctypes.data + 8 * k, where.ext, shift))
            else:
                words[k] = where.base + shift
        for k, symbol in enumerate(step.symbols):
            words[len(step.args) + k] = values[symbol]
        self.arrays.append(words)
        return words.ctypes.data, classes

    def table(self, stamped: bool) -> Table:
        """The native table of everything added."""
        used = 1 + max((p.worker for p in self.parts), default=0)
        if self.forks:
            used = self.workers
        awaited = {w for entries in self.lists for kind, w in entries if kind == "wait"}
        counters = np.zeros((used + 1) * LINE, dtype=np.int64)
        stamps = np.zeros((max(1, len(self.parts)), 4), dtype=np.int64) if stamped else None
        clock = driver.clock_gettime() if stamped else 0
        waits = 0
        native: list[np.ndarray] = []
        ordinals: list[dict[int, int]] = []  # of each worker: part -> count of signals up to it
        for worker in range(used):
            numbers = sorted(n for w, n in awaited if w == worker)
            ordinals.append({n: k + 1 for k, n in enumerate(numbers)})

        def counter(worker: int) -> int:
            return counters.ctypes.data + 8 * LINE * worker

        for worker in range(used):
            rows: list[tuple[int, ...]] = []
            jumps: list[tuple[int, int, int]] = []  # entry, fork, jump
            part = 0
            for kind, data in self.lists[worker]:
                if kind == "wait":
                    other, number = data
                    target = ordinals[other][number]
                    rows.append((driver.WAIT, counter(other), target, 0, 0, 0))
                    waits += 1
                elif kind == "meet":
                    if used > 1:
                        rows.append((driver.SIGNAL, counter(used), 0, 0, 0, 0))
                        rows.append((driver.WAIT, counter(used), data[0] * used, 0, 0, 0))
                        waits += 1
                elif kind == "jump":
                    jumps.append((len(rows), *data))
                    rows.append((driver.JUMP, 0, 0, 0, 0, 0))
                else:
                    *call, index = data
                    if stamps is not None:
                        at = stamps.ctypes.data + 32 * index
                        rows.append((driver.CALL, clock, time.CLOCK_MONOTONIC, at, call[4], 0))
                    rows.append(tuple(call))
                    if stamps is not None:
                        at = stamps.ctypes.data + 32 * index + 16
                        rows.append((driver.CALL, clock, time.CLOCK_MONOTONIC, at, call[4], 0))
                    part += 1
                    if part in ordinals[worker]:
                        rows.append((driver.SIGNAL, counter(worker), 0, 0, 0, 0))
            rows.append((self.tail,) + (0,) * 5)
            native.append(np.array(rows, dtype=np.int64))
            for row, fork, jump in jumps:
                self.forks[fork][jump, worker] = native[-1][row:].ctypes.data
        return self._block(native, counters, waits, stamps)

    def _block(
        self,
        entries: list[np.ndarray],
        counters: np.ndarray,
        waits: int,
        stamps: np.ndarray | None,
    ) -> Table:
        patches = np.array(self.patches or [(0, 0, 0)], dtype=np.int64)
        block = np.zeros(driver.LISTS + 2 * len(entries), dtype=np.int64)
        gomp, thread_num, num_threads = driver.openmp()
        if len(entries) > 1:
            driver.share(block)
        block[driver.WORKERS] = len(entries)
        block[driver.GOMP], block[driver.THREAD_NUM] = gomp, thread_num
        block[driver.NUM_THREADS], block[driver.YIELD] = num_threads, driver.sched_yield()
        block[driver.PATCHES], block[driver.N_PATCHES] = patches.ctypes.data, len(self.patches)
        block[driver.STOP] = self.stop or block.ctypes.data + 8 * driver.STOPPED
        if waits:
            block[driver.COUNTERS], block[driver.N_COUNTERS] = counters.ctypes.data, counters.size
        for worker, rows in enumerate(entries):
            block[driver.LISTS + worker] = rows.ctypes.data
        arrays = [*self.arrays, *entries, patches, counters]
        if stamps is not None:
            arrays.append(stamps)
        ends = [rows[-1:].ctypes.data for rows in entries]
        return Table(block, arrays, len(entries), waits, self.parts, ends, stamps)
