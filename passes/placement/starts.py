"""Places from which the search sets out: simple algorithms, and cyclic runs of linear orders."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterator

import numpy as np

from .errors import InfeasibleError
from .heft import heft
from .list_scheduling import Ledger, Listed
from .m_etf import m_etf
from .m_sct import favourites, m_sct
from .m_topo import m_topo
from .min_cut import min_cut, single_device
from .problem import Arrays, Floats, Ints, Problem

ALGORITHMS: dict[str, Callable[[Problem], Listed]] = {
    "single": single_device,
    "min-cut": min_cut,
    "m-topo": m_topo,
    "m-etf": m_etf,
    "m-sct": m_sct,
    "heft": heft,
}
BALANCED: dict[str, Callable[[Problem], Listed]] = {
    "min-cut": lambda x: min_cut(x, balanced=True),
    "m-topo": lambda x: m_topo(x, balanced=True),
    "m-etf": lambda x: m_etf(x, balanced=True),
    "m-sct": lambda x: m_sct(x, balanced=True),
    "heft": lambda x: heft(x, balanced=True),
}
"""The same, with memory shared out evenly: what to try where the first answer does not fit."""

_SCT_RATE = 2_500
"""Ops and edges for each second of the budget up to which the LP of m-SCT takes a part of it."""

_WAITS = 80_000
"""Waits (`earliest_first`) for each second of the budget up to which list schedulers go on."""

_SCT_SHARE = 0.2  # of the budget after which the LP is given up all the same


def simple_starts(
    problem: Problem, orders: Ints, budget: float, late: Callable[[], bool]
) -> Iterator[tuple[str, Listed]]:
    """What the simple algorithms answer, with and without memory limits; failures are left out.

    So the search, which keeps the best of what fits, is never worse than any of them; m-SCT is left
    out where its linear program takes too much of ``budget``, seconds, and both it and m-ETF where
    thousands of ops are ready at once. Those two come last, as long as it is not ``late``: the
    others take no time to speak of.
    """
    p = problem.arrays
    patience = _WAITS * max(budget, 1.0)
    attempts: dict[str, Callable[[Problem], Listed]] = dict(ALGORITHMS)
    if not p.static:
        attempts |= {f"{name} balanced": f for name, f in BALANCED.items()}
        attempts["m-etf balanced"] = lambda x: m_etf(x, balanced=True, patience=patience)
    attempts["m-etf"] = lambda x: m_etf(x, patience=patience)
    if len(p.topo) + len(p.pair_dst) > _SCT_RATE * max(budget, 1.0):
        attempts = {name: f for name, f in attempts.items() if not name.startswith("m-sct")}
    else:
        child = functools.cache(lambda: favourites(problem, _SCT_SHARE * budget))
        attempts["m-sct"] = lambda x: m_sct(x, child(), patience=patience)
        if not p.static:
            attempts["m-sct balanced"] = lambda x: m_sct(x, child(), True, patience)
    attempts["heft with queues"] = lambda x: heft(x, contention=True)
    attempts["heft without limits"] = lambda x: heft(x, contention=True, limited=False)
    attempts["min-cut"] = lambda x: min_cut(x, orders)
    slow = [name for name in attempts if name.startswith(("m-etf", "m-sct"))]
    for name in [*(name for name in attempts if name not in slow), *slow]:
        if name in slow and late():
            return
        try:
            yield name, attempts[name](problem)
        except InfeasibleError:
            continue


def run_starts(p: Arrays, orders: Ints, repeats: tuple[int, ...]) -> Iterator[Ints]:
    """Devices by unit: each order cut into equal runs, dealt to the first devices in turn.

    Equal in work, in memory or in their mean. Several runs a device leave it work to do while the
    critical path is elsewhere; fewer devices than there are transfer less.
    """
    units, m = len(p.unit_ptr) - 1, len(p.cap)
    weigh = lambda x: np.bincount(p.unit, x, units) / max(float(x.sum()), 1e-300)  # noqa: E731
    work, memory = weigh(p.time.min(1)), weigh(p.param + p.out + p.temp)
    speed = 1.0 / np.maximum(np.where(np.isfinite(p.time), p.time, 0.0).sum(0), 1e-300)
    counts = sorted({m, max(m // 2, 1), *(range(1, m + 1) if m <= 8 else ())}, reverse=True)
    for order in orders:
        for mix in (0.0, 0.5, 1.0):
            along = np.cumsum(((1 - mix) * work + mix * memory)[order])
            along = along / max(float(along[-1]), 1e-300) if units else along
            for used in counts:
                for repeat in repeats:
                    if repeat > 1 and used < m:
                        continue
                    rate = (1 - mix) * speed / speed.sum() + mix * p.cap / max(p.cap.sum(), 1e-300)
                    edges = np.cumsum(np.tile(rate[:used], repeat))
                    if not edges[-1]:
                        continue  # none of them has memory
                    run = np.searchsorted(edges / edges[-1], along - 1e-9) % used
                    device = np.zeros(units, np.int64)
                    device[order] = run
                    yield _allowed(p, device)


def filled(problem: Problem, sequence: Ints, share: float) -> Listed:
    """Devices filled one after another up to ``share`` of their memory, along ``sequence``.

    ``sequence`` has sources first. Memory is booked as list schedulers book it, but parameters are
    there from the beginning: they must fit beside the most that was ever live. What fits nowhere
    goes where most is left, so the answer may overrun; it is a start to be repaired.
    """
    ledger = Ledger(problem)
    need, at, cap = ledger.need, ledger.unit_device, problem.arrays.cap.tolist()
    allowed = [np.flatnonzero(row).tolist() for row in problem.arrays.allowed]
    stays, most = [0.0] * ledger.m, [0.0] * ledger.m  # bytes: parameters; the most live beside
    for unit, devices in enumerate(allowed):
        if len(devices) == 1:  # has no choice: its room is kept for it
            at[unit] = devices[0]
            stays[devices[0]] += need[unit]
            ledger.room[devices[0]] -= need[unit]

    def live(op: int, d: int) -> float:
        """Bytes on a device beside parameters while an op runs there."""
        if ledger.whole:
            return 0.0
        held = cap[d] - stays[d] - ledger.room[d] + ledger.out[op] + ledger.temp[op]
        sources = {t: ledger.tensor_src[t] for t in ledger.inputs[op]}
        return held + sum(
            ledger.tensor_bytes[t]
            for t, u in sources.items()
            if ledger.assign[u] != d and d not in ledger.live[u]
        )

    device = 0
    for op in sequence.tolist():
        unit = ledger.unit[op]
        here = at[unit]
        if here < 0:
            fitting = [
                d
                for d in allowed[unit]
                if stays[d] + need[unit] + max(most[d], live(op, d)) <= share * cap[d]
            ]
            here = next((d for d in fitting if d >= device), -1)
            if here < 0:
                here = max(fitting or allowed[unit], key=lambda d: ledger.room[d])
            elif device in allowed[unit]:
                device = here
            most[here] = max(most[here], live(op, here))
            stays[here] += need[unit]
        else:
            most[here] = max(most[here], live(op, here))
        ledger.place(op, here, 0.0)
    return Listed(np.array(ledger.assign, np.int64), sequence)


def depth_first(p: Arrays) -> Floats:
    """Place of each op, in [0, 1), when what is begun is finished first.

    Bottom levels tie where a graph repeats itself, as microbatches do, and list scheduling then
    advances all copies together, which fills memory and starves later stages of a pipeline.
    """
    n = len(p.topo)
    missing = np.diff(p.in_ptr).tolist()
    first, dst = p.tensor_ptr[p.out_ptr].tolist(), p.pair_dst.tolist()
    stack = [i for i in range(n - 1, -1, -1) if not missing[i]]
    order: list[int] = []
    while stack:
        u = stack.pop()
        order.append(u)
        for q in range(first[u + 1] - 1, first[u] - 1, -1):
            missing[dst[q]] -= 1
            if not missing[dst[q]]:
                stack.append(dst[q])
    place = np.empty(n)
    place[order] = np.arange(n) / max(n, 1)
    return place


def lean_order(p: Arrays, sequence: Ints) -> Ints:
    """Ops with sources first, what takes the least memory next; else as in ``sequence``.

    An op takes its output, and frees the outputs that only it has yet to read. Bottom levels leave
    gradients of weights for later, and with them all that these read.
    """
    n = len(p.topo)
    place = np.empty(n, np.int64)
    place[sequence] = np.arange(n)
    first = p.tensor_ptr[p.out_ptr]
    rows = zip(first, first[1:], strict=False)
    readers = [list(dict.fromkeys(p.pair_dst[a:b].tolist())) for a, b in rows]
    sources: list[list[int]] = [[] for _ in range(n)]
    for u, all_ in enumerate(readers):
        for v in all_:
            sources[v].append(u)
    unread = [len(x) for x in readers]
    missing = [len(x) for x in sources]
    freed = np.where(p.keep, 0.0, p.out).tolist()
    takes = p.out.tolist()

    heap = [(takes[i], int(place[i]), i) for i in range(n) if not missing[i]]
    heapq.heapify(heap)
    order: list[int] = []
    done = [False] * n
    while heap:
        i = heapq.heappop(heap)[2]
        if done[i]:
            continue
        done[i] = True
        order.append(i)
        for u in sources[i]:
            unread[u] -= 1
            if unread[u] == 1:
                (last,) = (v for v in readers[u] if not done[v])
                takes[last] -= freed[u]
                if not missing[last]:
                    heapq.heappush(heap, (takes[last], int(place[last]), last))
        for v in readers[i]:
            missing[v] -= 1
            if len(readers[i]) == 1:
                takes[v] -= freed[i]
            if not missing[v]:
                heapq.heappush(heap, (takes[v], int(place[v]), v))
    return np.array(order, np.int64)


def _allowed(p: Arrays, device: Ints) -> Ints:
    """The same with units that may not be where they are on the first device that takes them."""
    wrong = ~p.allowed[np.arange(len(device)), device]
    device[wrong] = np.argmax(p.allowed[wrong], axis=1)
    return device
