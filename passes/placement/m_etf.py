"""m-ETF: the pair of a ready op and a device with room that can start first, again and again.

Earliest Task First (Hwang et al., 1989) under memory limits, as in Baechi (Jeon et al., SoCC
2020). ETF is within (2 - 1/m) times the optimum without communication plus the largest
communication along a path; with memory limits there is no guarantee.
"""

from __future__ import annotations

import math

from .list_scheduling import Ledger, Listed, earliest_first, upward_ranks
from .problem import Problem


def m_etf(problem: Problem, balanced: bool = False, patience: float = math.inf) -> Listed:
    """Places ops by m-ETF. Raises InfeasibleError if stuck, or out of ``patience``
    (`earliest_first`).
    """
    ledger = Ledger(problem, balanced=balanced)
    rank = (-upward_ranks(problem)).tolist()  # decides between pairs that could start together
    arrivals: dict[tuple[int, int], float] = {}

    def start_of(op: int, d: int, again: bool) -> float:
        if not again:  # links are never busy: data arrives when it arrives
            arrivals[op, d] = ledger.arrival(op, d)
        return max(arrivals[op, d], ledger.free[d])

    return earliest_first(ledger, "m-ETF", rank, start_of, patience=patience)
