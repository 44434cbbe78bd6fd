"""m-ETF: the pair of a ready op and a device with room that can start first, again and again.

Earliest Task First (Hwang et al., 1989) under memory limits, as in Baechi (Jeon et al., SoCC
2020). ETF is within (2 - 1/m) times the optimum without communication plus the largest
communication along a path; with memory limits there is no guarantee.
"""

from __future__ import annotations

import heapq

import numpy as np

from .list_scheduling import Ledger, Listed, upward_ranks
from .problem import Problem


def m_etf(
    problem: Problem, contention: bool = False, limited: bool = True, balanced: bool = False
) -> Listed:
    """Places ops by m-ETF; ``contention`` sees busy links. Raises InfeasibleError if stuck."""
    ledger = Ledger(problem, contention, limited, balanced)
    rank = (-upward_ranks(problem)).tolist()  # decides between pairs that could start together
    arrivals: dict[tuple[int, int], float] = {}
    heap: list[tuple[float, float, int, int]] = []

    offered = [0] * ledger.n  # entries of each op in the heap

    def offer(op: int) -> None:
        able = ledger.devices(op)
        if not able:
            raise ledger.stuck(op, "m-ETF")
        offered[op] += len(able)
        for d in able:
            arrivals[op, d] = ledger.arrival(op, d)
            heapq.heappush(heap, (max(arrivals[op, d], ledger.free[d]), rank[op], op, d))

    for op in range(ledger.n):
        if not ledger.missing[op]:
            offer(op)
    sequence = []
    while heap:
        start, _, op, d = heapq.heappop(heap)
        offered[op] -= 1
        if ledger.assign[op] >= 0:
            continue
        if d not in ledger.devices(op):
            if not offered[op]:
                offer(op)  # its group went elsewhere meanwhile, or nothing is left: then it raises
            continue
        if ledger.contention:
            arrivals[op, d] = ledger.arrival(op, d)
        now = max(arrivals[op, d], ledger.free[d])
        if now > start:  # the device or a link has been taken since
            heapq.heappush(heap, (now, rank[op], op, d))
            offered[op] += 1
            continue
        sequence.append(op)
        for v in ledger.place(op, d, now):
            offer(v)
    return Listed(np.array(ledger.assign, np.int64), np.array(sequence, np.int64))
