"""Builds launch tables: consecutive kernel steps become per-worker lists with barriers.

Steps keep their order. A barrier goes in only where a step touches memory that another worker has
written, or overwrites what another has read, since the last barrier; steps too small to share run
whole on one worker, chains of them on the same one, without any barrier between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import driver
from .plan import KernelStep, TensorRef
from .sizes import evaluate

# Rough rates of one core that decide whether a step is worth sharing; a launch costs microseconds.
FLOPS_PER_US = 40_000
BYTES_PER_US = 10_000
MIN_SHARED_US = 3.0


@dataclass(frozen=True)
class Span:
    """Memory that a step touches: elements of a strided view, for telling overlap."""

    space: str  # "arena" or the buffer's name
    start: int  # bytes
    extent: int  # bytes from the first to past the last element
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def overlaps(self, other: Span) -> bool:
        """Whether the two views may share a byte (False only when they certainly do not)."""
        if self.space != other.space:
            return False
        if self.start + self.extent <= other.start or other.start + other.extent <= self.start:
            return False
        return _may_meet(self, other)


def _may_meet(a: Span, b: Span) -> bool:
    """Whether two views that lie across each other share an element.

    Exact for equal strides: an element is shared if the distance between the views is a sum of
    ``c_k * stride_k`` with every c_k in reach of both. So slices of one concatenation are told
    apart. Anything unusual counts as meeting.
    """
    if a.strides != b.strides or a.itemsize != b.itemsize or (b.start - a.start) % a.itemsize:
        return True
    order = sorted(range(len(a.strides)), key=lambda i: -a.strides[i])
    if any(a.strides[i] <= 0 for i in order):
        return True
    reach = [0] * (len(order) + 1)  # how far the dimensions from this one inwards go
    for k in reversed(range(len(order))):
        i = order[k]
        reach[k] = reach[k + 1] + (max(a.shape[i], b.shape[i]) - 1) * a.strides[i]

    def solvable(k: int, distance: int) -> bool:
        if k == len(order):
            return distance == 0
        i, inner = order[k], reach[k + 1]
        stride = a.strides[i]
        low = max(-((inner - distance) // stride), 1 - b.shape[i])
        high = min((distance + inner) // stride, a.shape[i] - 1)
        if high - low > 3:
            return True
        return any(solvable(k + 1, distance - c * stride) for c in range(low, high + 1))

    return solvable(0, (b.start - a.start) // a.itemsize)


@dataclass
class Table:
    """Native memory of one launch; keep it alive while it may run."""

    block: np.ndarray
    arrays: list[np.ndarray]
    workers: int
    barriers: int
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.block.ctypes.data


@dataclass(frozen=True)
class Address:
    """Where a buffer starts: an absolute address, or entry ``ext`` of the per-call pointers."""

    base: int
    ext: int = -1


ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "float32": 4, "int64": 8, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


def span_of(ref: TensorRef, space: str, base: int, values: Mapping[str, int]) -> Span:
    """The memory of ``ref`` inside ``space``, whose buffer starts at byte ``base`` of it."""
    size = ITEMSIZE[ref.dtype]
    shape = tuple(evaluate(d, values) for d in ref.shape)
    strides = tuple(evaluate(s, values) for s in ref.strides)
    offset = evaluate(ref.offset, values)
    reach = sum((d - 1) * s for d, s in zip(shape, strides, strict=True)) + 1 if all(shape) else 0
    start = base + offset * size
    kept = [(d, s) for d, s in zip(shape, strides, strict=True) if d != 1]
    return Span(
        space,
        start,
        max(0, reach) * size,
        size,
        tuple(d for d, _ in kept),
        tuple(s for _, s in kept),
    )


@dataclass
class _Pending:
    spans: list[tuple[Span, bool]]
    workers: frozenset[int]


def share(step: KernelStep, tasks: int, values: Mapping[str, int], workers: int) -> int:
    """How many workers a step is worth: 1 when its whole work is shorter than a hand-off."""
    work = max(
        evaluate(step.flops, values) / FLOPS_PER_US, evaluate(step.bytes, values) / BYTES_PER_US
    )
    if tasks <= 1 or work < MIN_SHARED_US:
        return 1
    return min(workers, tasks)


def build_table(
    steps: Sequence[KernelStep],
    spans: Sequence[Sequence[Span]],
    addresses: Mapping[str, Address],
    functions: Mapping[str, int],
    values: Mapping[str, int],
    workers: int,
) -> Table:
    """Lays out one launch of ``steps`` for ``workers`` threads.

    ``spans[i][k]`` is the memory of argument k of step i. Raises KeyError when a kernel's address
    is missing from ``functions``.
    """
    arrays: list[np.ndarray] = []
    patches: list[tuple[int, int, int]] = []
    lists: list[list[tuple[int, ...]]] = [[] for _ in range(workers)]
    pending: list[_Pending] = []
    barriers = 0
    for step, own in zip(steps, spans, strict=True):
        tasks = evaluate(step.tasks, values)
        if tasks <= 0:
            continue
        words, classes = _arguments(step, addresses, values, patches)
        arrays.append(words)
        touched = [(span, k >= step.reads) for k, span in enumerate(own)]
        conflicts = [p for p in pending if _conflict(p.spans, touched)]
        count = share(step, tasks, values, workers)
        if count == 1:
            homes = {p.workers for p in conflicts}
            if len(homes) == 1 and len(next(iter(homes))) == 1:
                chosen = next(iter(homes))
            else:
                chosen = frozenset([0])
        else:
            chosen = frozenset(range(count))
        if any(p.workers != chosen or len(chosen) > 1 for p in conflicts):
            for entries in lists:
                entries.append((driver.BARRIER, 0, 0, 0, 0, 0))
            barriers += 1
            pending.clear()
        ranks = sorted(chosen)
        for rank, worker in enumerate(ranks):
            lo, hi = tasks * rank // len(ranks), tasks * (rank + 1) // len(ranks)
            if lo < hi:
                lists[worker].append(
                    (driver.CALL, functions[step.kernel], lo, hi, words.ctypes.data, classes)
                )
        pending.append(_Pending(touched, chosen))
    used = max(
        (w + 1 for w in range(workers) if any(e[0] == driver.CALL for e in lists[w])), default=1
    )
    lists = lists[:used]
    if used == 1:
        lists[0] = [e for e in lists[0] if e[0] != driver.BARRIER]
        barriers = 0
    return _block(lists, patches, arrays, barriers)


def _conflict(before: list[tuple[Span, bool]], now: list[tuple[Span, bool]]) -> bool:
    return any((written or writes) and a.overlaps(b) for a, written in before for b, writes in now)


def _arguments(
    step: KernelStep,
    addresses: Mapping[str, Address],
    values: Mapping[str, int],
    patches: list[tuple[int, int, int]],
) -> tuple[np.ndarray, int]:
    """The argument words of a step; words that hold per-call pointers join ``patches``."""
    count = len(step.args) + len(step.symbols)
    classes = driver.args_class(count)
    words = np.zeros(driver.ARG_CLASSES[classes], dtype=np.int64)
    for k, ref in enumerate(step.args):
        where = addresses[ref.buffer]
        shift = evaluate(ref.offset, values) * ITEMSIZE[ref.dtype]
        if where.ext >= 0:
            patches.append((words.ctypes.data + 8 * k, where.ext, shift))
        else:
            words[k] = where.base + shift
    for k, symbol in enumerate(step.symbols):
        words[len(step.args) + k] = values[symbol]
    return words, classes


def _block(
    lists: list[list[tuple[int, ...]]],
    patches: list[tuple[int, int, int]],
    arrays: list[np.ndarray],
    barriers: int,
) -> Table:
    entries = [np.array([*e, (driver.END,) + (0,) * 5], dtype=np.int64) for e in lists]
    patch_table = np.array(patches or [(0, 0, 0)], dtype=np.int64)
    arrivals = np.zeros(8, dtype=np.int64)
    block = np.zeros(driver.LISTS + 2 * len(lists), dtype=np.int64)
    gomp, thread_num, num_threads = driver.openmp()
    block[driver.WORKERS] = len(lists)
    block[driver.BARRIER_COUNT] = arrivals.ctypes.data
    block[driver.GOMP], block[driver.THREAD_NUM] = gomp, thread_num
    block[driver.NUM_THREADS], block[driver.YIELD] = num_threads, driver.sched_yield()
    block[driver.PATCHES], block[driver.N_PATCHES] = patch_table.ctypes.data, len(patches)
    for worker, e in enumerate(entries):
        block[driver.LISTS + worker] = e.ctypes.data
    return Table(block, [*arrays, *entries, patch_table, arrivals], len(lists), barriers)
