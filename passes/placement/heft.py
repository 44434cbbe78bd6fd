"""HEFT: ops by upward rank, each to the device that finishes it first, gaps included.

Heterogeneous Earliest Finish Time (Topcuoglu et al., 2002), with memory limits and colocation
added as in `list_scheduling`. A heuristic without a guarantee.
"""

from __future__ import annotations

import bisect

import numpy as np

from .list_scheduling import Ledger, Listed, upward_ranks
from .problem import Problem


def heft(
    problem: Problem, contention: bool = False, limited: bool = True, balanced: bool = False
) -> Listed:
    """Places ops by HEFT; ``contention`` sees busy links. Raises InfeasibleError if stuck."""
    ledger = Ledger(problem, contention, limited, balanced)
    rank = upward_ranks(problem)
    place = np.empty(ledger.n, np.int64)
    place[problem.arrays.topo] = np.arange(ledger.n)
    order = np.lexsort((place, -rank)).tolist()  # topological: ranks of zero-time ops may tie
    busy: list[list[tuple[float, float]]] = [[] for _ in range(ledger.m)]
    blocks: list[list[tuple[float, float]]] = [[] for _ in range(ledger.m)]
    starts = [0.0] * ledger.n
    for op in order:
        able = ledger.devices(op)
        if not able:
            raise ledger.stuck(op, "HEFT")
        best = (float("inf"), 0.0, 0)
        for d in able:
            length = ledger.time[op][d]  # an op of no time also starts between two others
            start = _gap((blocks if length else busy)[d], ledger.arrival(op, d), length)
            best = min(best, (start + ledger.time[op][d], start, d))
        end, start, d = best
        ledger.place(op, d, start)
        starts[op] = start
        bisect.insort(busy[d], (start, end))
        _join(blocks[d], start, end)
    sequence = np.lexsort((place, np.array(starts)))
    return Listed(np.array(ledger.assign, np.int64), sequence.astype(np.int64))


def _gap(busy: list[tuple[float, float]], ready: float, length: float) -> float:
    """First start at or after ``ready`` where a device is idle for ``length`` seconds."""
    k = bisect.bisect_left(busy, (ready, ready))
    start = max(ready, busy[k - 1][1]) if k else ready
    for begin, end in busy[k:]:
        if start + length <= begin:
            return start
        start = max(start, end)
    return start


def _join(blocks: list[tuple[float, float]], start: float, end: float) -> None:
    """Adds a busy time to those of a device, in which there is no idle time to be looked for."""
    k = bisect.bisect_left(blocks, (start, end))
    if start == end and k and blocks[k - 1][1] >= end:
        return
    first, last = k, k
    if k and blocks[k - 1][1] == start:
        first, start = k - 1, blocks[k - 1][0]
    if k < len(blocks) and blocks[k][0] == end:
        last, end = k + 1, blocks[k][1]
    blocks[first:last] = [(start, end)]
