"""The state of a search, and what it does where no start fits: splits, repairs, exact packings.

Contiguous splits that fill devices to the brim come first, then the start that overruns least, with
memory made very dear, then packings of what must stay, by integer programming or by exchanges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from time import thread_time

import numpy as np

from . import feasible, starts
from .bounds import lower_bounds
from .brim import brim_splits
from .clusters import cluster_levels, linear_orders, regions
from .engine import GATED, PRIORITY, Engine
from .problem import Floats, Ints, Problem

Progress = Callable[[float, float, float], None]
"""Called with the share of the budget that is used, the best cost and the lower bound, seconds."""

_CHUNK = 0.04  # seconds between looks at the clock, about
_LATE = 0.1  # of an anneal, by which the clock may be ahead of the moves
_BRIM_SHARE = 0.5  # of the time that is left that contiguous splits may take where nothing fits
_PACK_SHARE = 0.1  # of the budget that one integer program may take
_EXCHANGES = 30  # starts of an exchange of units that has to fill devices to the last byte
_FEW_KINDS = 100  # of units, up to which integer programming is the quicker way to pack them
_RESERVES = (0.7, 0.9, 0.4)
"""Shares of the memory that is to spare that a packing leaves free on each device alike."""
_SLACKS = (0.02, 0.05, 0.1, 0.2)  # of each device's memory, left free likewise


class Fitting:
    """The state of a search, its moves, and its ways to something that fits."""

    def __init__(
        self,
        problem: Problem,
        objective: str,
        seed: int,
        deadline: float,
        budget: float,
        progress: Progress | None,
        given: tuple[Ints, Ints] | None = None,
        price: float = 0.0,
    ) -> None:
        self.problem, self.p, self.given = problem, problem.arrays, given
        self.seed, self.deadline, self.progress = seed, deadline, progress
        p = self.p
        self.n, self.m = p.time.shape
        self.orders = linear_orders(p)
        self.engine = Engine(p, self.orders, regions(cluster_levels(p, seed)))
        self.throughput = objective == "throughput"
        self.engine.set_throughput(self.throughput)
        self.mode = PRIORITY
        self.engine.set_price(price)
        self.bounds = lower_bounds(p, objective == "throughput")
        self.move_seconds, self.moves, self.left = 1.0, 0, 0
        self.began, self.budget = time.perf_counter(), max(budget, 1e-3)
        self.busy = thread_time()
        self.weight = 0.0
        self.start = ""
        self.brims: Iterator[Ints] | None = None
        self.nearest: tuple[float, Ints, Floats] | None = None
        """Of the starts that which overruns the least: its overrun, devices by op, offsets."""
        self.ranked: list[tuple[float, Ints, Floats]] = []
        self.hurried = False  # whether the clock kept a start from being looked at

    def _set_mode(self, mode: int) -> None:
        self.mode = mode
        self.engine.set_mode(mode)

    def _count_moves(self, start: tuple[float, Ints, Floats]) -> None:
        """How many moves the budget is worth; ``start`` becomes the state.

        By what a move takes on one core of the machine that this was written on: graphs that
        outgrow the caches take longer, and so do transfers. A part of the budget stays in reserve.
        """
        self._load(*start[1:])
        size, sent = self.n + len(self.p.pair_dst), int(self.engine.work.counts[1])
        item = 7e-9 + 16e-9 * min(1.0, size / 9000)
        self.move_seconds = 1e-6 + size * item + 90e-9 * sent
        self.moves = self.left = max(int(0.8 * self.budget / self.move_seconds), 50)

    def _fits(self) -> bool:
        """Whether anything that was looked at fits."""
        return bool(np.isfinite(self.engine.state.cost[1]))

    def _optimal(self) -> bool:
        return bool(self.engine.state.cost[1] <= self.bounds["best"] * (1 + 1e-9))

    def _load(self, assign: Ints, offset: Floats) -> None:
        s = self.engine.state
        s.assign[:], s.offset[:] = assign, offset
        self.engine.settle(self.weight)

    def _anneal(self, moves: int, hot: float, cold: float, reorder: float = 0.15) -> None:
        """Anneals in small steps, so that the clock and the progress bar are seen to.

        Where the clock runs faster than the moves, some are left out: it is cold in the end.
        """
        s = self.engine.state
        step = max(int(_CHUNK / self.move_seconds), 1)
        scale, began = s.cost[0], time.perf_counter()
        seconds = (self.deadline - began) * min(moves / max(self.left, 1), 1.0)
        self.left -= moves
        first = 0
        while first < moves:
            now = time.perf_counter()
            if now >= self.deadline or self._optimal():
                return
            late = (now - began) / max(seconds, 1e-9)
            if late > first / moves + _LATE:
                first = int(min(late, 1.0) * moves)
                self.hurried = True
            last = min(first + step, moves)
            if first == last:
                return
            fall = cold / hot
            self.engine.anneal(
                last - first, scale * hot * fall ** (first / moves),
                scale * hot * fall ** (last / moves), self.weight, reorder,
            )  # fmt: skip
            first = last
            if self.progress is not None:
                used = (time.perf_counter() - self.began) / self.budget
                self.progress(min(used, 1.0), float(s.cost[1]), self.bounds["best"])

    def _insist(self) -> None:
        """Nothing fits yet: repair the nearest start, then exact packings of what must stay.

        Where everything stays packings come first, for they need no repair. Else devices wait for
        room from now on, rather than overrun.
        """
        if self._split_to_the_brim():
            return
        if not self.p.static:
            self._set_mode(GATED)
        if not self.p.static and self._nearest_repaired():
            return
        if not self._packed() and self.p.static:
            self._nearest_repaired()

    def _split_to_the_brim(self) -> bool:
        """Whether a contiguous split that uses devices up fits; the next call looks at others."""
        s, zero = self.engine.state, np.zeros(self.n)
        now = time.perf_counter()
        end = now + _BRIM_SHARE * (self.deadline - now)
        self._set_mode(PRIORITY)
        if self.brims is None:
            self.brims = brim_splits(self.engine, self.orders)
        while time.perf_counter() < end:
            device = next(self.brims, None)
            if device is None:
                return False
            self._load(device[self.p.unit], zero)
            over = self.engine.overrun()
            if self.nearest is None or over < self.nearest[0]:
                self.nearest = over, s.assign.copy(), zero
            if self._fits():
                self.start = "brim"
                return True
        return False

    def _nearest_repaired(self) -> bool:
        repaired = self.nearest is not None and self._repaired(*self.nearest[1:])
        if repaired:
            self.start = "nearest"
        return repaired

    def _packed(self) -> bool:
        """Whether a packing of what must stay fits, or can be repaired."""
        p, place = self.p, starts.depth_first(self.p)
        for attempt, packed in enumerate(self._packings()):
            for share in (0.0, 1.0):
                longest = float(self.engine.bottom_levels(packed[p.unit].astype(np.int32)).max())
                if self._repaired(packed[p.unit], -share * longest * place):
                    self.start = f"packing {attempt}"
                    return True
        return False

    def _packings(self) -> Iterator[Ints]:
        """Devices by unit such that what stays fits, with more and more room for what does not."""
        p = self.p
        near = np.zeros(len(p.unit_ptr) - 1, np.int64)
        near[p.unit] = self.engine.state.assign
        rng = np.random.default_rng(self.seed)

        def by_count(slack: float, left: float) -> Ints | None:
            return feasible.pack(self.problem, min(left, _PACK_SHARE * self.budget), slack, near)

        def by_sums(slack: float, left: float) -> Ints | None:
            end = time.perf_counter() + left * (0.8 if p.static else 0.5)
            begin = near
            for _ in range(1 if slack else _EXCHANGES):  # from elsewhere, it comes out elsewhere
                packed = feasible.exchange(self.problem, begin, 1 - slack, rng, end)
                if packed is not None or time.perf_counter() > end:
                    return packed
                begin = np.where(p.allowed, rng.random(p.allowed.shape), -1.0).argmax(1)
            return None

        few = feasible.kinds(self.problem) <= _FEW_KINDS
        spare = max(1 - float(feasible.standing(self.problem).sum() / p.cap.sum()), 0.0)
        reserves = [*(share * spare for share in _RESERVES), *(x for x in _SLACKS if x < spare)]
        for slack in (0.0,) if p.static else (0.0, *reserves):
            for way in (by_count, by_sums) if few else (by_sums, by_count):
                left = self.deadline - time.perf_counter()
                if left <= 0:
                    return
                packed = way(slack, left)
                if packed is not None:
                    yield packed
                    break

    def _repaired(self, assign: Ints, offset: Floats) -> bool:
        """Whether something that fits is found close to a placement, with memory made very dear."""
        longest = float(self.engine.bottom_levels(assign.astype(np.int32)).max())
        self.weight = 100 * longest
        self._load(assign, offset)
        if not self._fits():
            self.left = max(self.left, self.moves)  # an eighth of the time that is left, no more
            self._anneal(self.moves // 8, 1e-3, 1e-5)
        return self._fits()
