"""Trivial answers that must never be missed: one device, and contiguous splits of least cut."""

from __future__ import annotations

import numpy as np

from .clusters import linear_orders
from .errors import InfeasibleError, shortages
from .list_scheduling import Listed, balanced_room
from .problem import Arrays, Floats, Ints, Problem


def single_device(problem: Problem) -> Listed:
    """All ops on the fastest device that may run them and holds their memory.

    Raises InfeasibleError with the bytes that are missing on each.
    """
    p = problem.arrays
    able = np.flatnonzero(p.allowed.all(0))
    need = (p.param + p.out + p.temp).sum() if p.static else p.param.sum()
    if not len(able):
        raise InfeasibleError("no device may run every op (time_s)", {}, False)
    room = [d for d in able if need <= p.cap[d]]
    if not room:
        short = {problem.devices[d].name: float(need - p.cap[d]) for d in able}
        raise InfeasibleError(
            f"no device holds the whole problem: {shortages(short)}", short, False
        )
    best = min(room, key=lambda d: p.time[:, d].sum())
    return Listed(np.full(len(p.topo), best, np.int64), p.topo)


def min_cut(problem: Problem, orders: Ints | None = None, balanced: bool = False) -> Listed:
    """Cuts the order of units by depth into one run for each device, transferring the least.

    Each run must fit its device (params alone where memory is dynamic) and take at most a few
    times its share of the work; of all such splits, dynamic programming finds the one with the
    least time on links. Raises InfeasibleError where no split fits.
    """
    p = problem.arrays
    for order in (linear_orders(p) if orders is None else orders)[:2]:
        for slack in (1.05, 1.2, 1.5, 2.0, np.inf):
            unit_device = split(p, order, slack, balanced)
            if unit_device is not None:
                return Listed(unit_device[p.unit], p.topo)
    raise InfeasibleError("min-cut: no contiguous split fits the devices", {}, False)


def split(p: Arrays, order: Ints, slack: float, balanced: bool = False) -> Ints | None:
    """Devices by unit for the cheapest contiguous split of an order; None where none fits."""
    units, m = len(p.unit_ptr) - 1, len(p.cap)
    need = p.param + p.out + p.temp if p.static or balanced else p.param
    by_unit = np.bincount(p.unit, need, units)
    room = balanced_room(p, by_unit.tolist()) if balanced else p.cap
    memory = np.concatenate([[0.0], np.cumsum(by_unit[order])])
    finite = np.where(np.isfinite(p.time), p.time, 0.0)
    work = np.zeros((m, units + 1))
    for d in range(m):
        np.cumsum(np.bincount(p.unit, finite[:, d], units)[order], out=work[d, 1:])
    banned = np.concatenate([np.zeros((m, 1)), np.cumsum(~p.allowed[order].T, axis=1)], axis=1)
    rate = 1.0 / np.maximum(work[:, -1], 1e-300)
    share = slack / rate.sum()
    # Of a run (i, j], the farthest i back that fits, by bisection, for all three are monotone.
    lows = [
        np.maximum.reduce([
            np.searchsorted(memory, memory - room[d] * (1 + 1e-12), "left"),
            np.searchsorted(work[d], work[d] - share * (1 + 1e-9), "left"),
            np.searchsorted(banned[d], banned[d], "left"),
        ])
        for d in range(m)
    ]  # fmt: skip
    reach = 0  # with every device as full as can be
    for low in lows:
        reach = int(np.searchsorted(low, reach, "right")) - 1
    if reach < units:
        return None
    cut = _cuts(p, order)
    best = np.full(units + 1, np.inf)
    best[0] = 0.0
    back = np.zeros((m, units + 1), np.int64)
    for d, low in enumerate(lows):
        after = np.full(units + 1, np.inf)
        for j in range(units + 1):
            if low[j] <= j:
                k = int(low[j] + np.argmin(best[low[j] : j + 1]))
                after[j] = best[k] + (cut[j] if k < j else 0.0)
                back[d, j] = k
        best = after
    device = np.zeros(units, np.int64)
    j = units
    for d in range(m - 1, -1, -1):
        device[order[back[d, j] : j]] = d
        j = int(back[d, j])
    return device


def _cuts(p: Arrays, order: Ints) -> Floats:
    """Seconds on links for what crosses each place of an order, [units + 1]."""
    units, m = len(order), len(p.cap)
    other = ~np.eye(m, dtype=bool)
    if m == 1:
        return np.zeros(units + 1)
    seconds = p.lat[other].mean() + p.tensor_bytes * (1 / p.bw[other]).mean()
    place = np.empty(units, np.int64)
    place[order] = np.arange(units)
    low = place[p.unit[p.tensor_src]].copy()
    high = low.copy()
    ends = place[p.unit[p.pair_dst]]
    np.minimum.at(low, p.pair_tensor, ends)
    np.maximum.at(high, p.pair_tensor, ends)
    change = np.zeros(units + 2)
    np.add.at(change, low + 1, seconds)
    np.add.at(change, high + 1, -seconds)
    cut = np.cumsum(change)[: units + 1]
    cut[[0, units]] = 0.0
    return cut
