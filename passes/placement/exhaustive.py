"""All placements of a few ops in all orders, where there is time to play each of them.

A search of priorities never lets a device wait while it has a ready op, which an order may do:
it saves time where a dear op becomes ready soon, and memory where another op frees some first.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from .bounds import lower_bounds
from .engine import DONE, Engine
from .errors import InfeasibleError, shortages
from .found import Found
from .problem import Floats, Problem

_FEW = 12  # ops, beyond which not even assignments are counted
_SHARE = 0.15  # of the budget that it may take
_PLAY = 15e-6  # seconds to play one, about


def exhaustive(problem: Problem, objective: str, budget: float, price: float = 0.0) -> Found | None:
    """The best of all that fit; None where there are too many for the budget.

    The cost is the makespan (``objective`` "latency") or the largest load ("throughput"), and
    ``price`` seconds for each transfer. Raises InfeasibleError, proven by having played all, where
    none fits; its shortfall is that of the nearest.
    """
    p = problem.arrays
    n, m = p.time.shape
    most = _SHARE * budget / _PLAY
    if not 0 < n <= _FEW or np.prod(p.allowed.sum(1), dtype=float) > most:
        return None
    orders = _Orders(problem)
    choices = [np.flatnonzero(row).tolist() for row in p.allowed]
    assigns = [np.array(units, np.int32)[p.unit] for units in itertools.product(*choices)]
    if sum(orders.count_all(assign) for assign in assigns) > most:
        return None
    engine = Engine(p, np.zeros((0, len(p.unit_ptr) - 1)), (np.zeros(1, int), np.zeros(0, int)))
    throughput = objective == "throughput"
    least, found, played = np.inf, None, 0
    nearest: Floats | None = None  # bytes that devices are short of where the sum is the least
    position, priority = np.zeros(n, np.int32), np.zeros(n)
    for assign in assigns:
        load = engine.pipeline_load(assign) if throughput else 0.0
        if load >= least:
            continue
        for lists in itertools.product(*(orders.of(mask) for mask in orders.masks(assign))):
            for ops in lists:
                position[list(ops)] = range(len(ops))
            priority[:] = -position
            code, makespan = engine.simulate(
                assign, priority, position, np.inf if throughput else least
            )
            played += 1
            cost = (load if throughput else makespan) + price * int(engine.work.counts[1])
            if code != DONE or cost >= least:
                continue
            if (engine.work.top > p.cap).any():
                over = np.maximum(engine.work.top - p.cap, 0.0)
                if nearest is None or over.sum() < nearest.sum():
                    nearest = over
                continue
            least, sequence = cost, engine.work.sequence.astype(np.int64)
            code, again = engine.simulate(assign, priority)  # no device waits on purpose
            as_ready = again == makespan and (engine.work.top <= p.cap).all()
            mode = "priority" if as_ready else "strict"
            found = assign.astype(np.int64), sequence, mode
            if throughput:  # no order is better, they only fit or not
                break
    if found is None:
        assert nearest is not None, "some order has sources first on all devices at once"
        short = {d.name: float(x) for d, x in zip(problem.devices, nearest, strict=True) if x}
        raise InfeasibleError(
            f"no placement fits: all {len(assigns)} were played in all orders; in the nearest, "
            f"{shortages(short)}",
            short,
            True,
        )
    assign, sequence, mode = found
    bounds = lower_bounds(p, throughput)
    return Found(assign, sequence, least, bounds, "all", played, "moves", True, mode)


class _Orders:
    """Orders of the ops of a device, which is a bit for each, such that sources come first."""

    def __init__(self, problem: Problem) -> None:
        p = problem.arrays
        self.n, self.m = p.time.shape
        self.behind = [0] * self.n  # the ops that need an op, and those that need them
        for u in p.topo[::-1].tolist():
            for t in range(p.out_ptr[u], p.out_ptr[u + 1]):
                for v in p.pair_dst[p.tensor_ptr[t] : p.tensor_ptr[t + 1]].tolist():
                    self.behind[u] |= 1 << v | self.behind[v]
        self.count = functools.cache(self._count)
        self.of = functools.cache(self._of)

    def masks(self, assign: Sequence[int] | np.ndarray) -> list[int]:
        """The ops of each device."""
        masks = [0] * self.m
        for i, d in enumerate(assign):
            masks[d] |= 1 << i
        return masks

    def count_all(self, assign: np.ndarray) -> int:
        """How many combinations of orders an assignment has."""
        return int(np.prod([self.count(mask) for mask in self.masks(assign)], dtype=float))

    def _last(self, mask: int) -> list[int]:
        return [i for i in range(self.n) if mask >> i & 1 and not self.behind[i] & mask]

    def _count(self, mask: int) -> int:
        return sum(self.count(mask & ~(1 << i)) for i in self._last(mask)) if mask else 1

    def _of(self, mask: int) -> list[tuple[int, ...]]:
        if not mask:
            return [()]
        return [(*ops, i) for i in self._last(mask) for ops in self.of(mask & ~(1 << i))]
