"""The default planner: a portfolio of starts, then annealing over assignment and order at once.

Starts are ranked by simulation. The better ones are annealed for a short while, the best of them
for the rest of the budget, in rounds at temperatures that paid before. Memory beyond a device's
capacity is a penalty that grows while nothing fits, so infeasible starts are repaired on the way;
where memory is static, integer programming decides feasibility instead.

The work is counted in moves, not in seconds: the same seed and budget give the same placement on
any machine that is fast enough. On a slower one the clock ends the search, and the report says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from time import thread_time

import numpy as np

from . import feasible, starts
from .coarsen import coarsen
from .engine import DONE, GATED, PRIORITY
from .errors import InfeasibleError, shortages
from .exhaustive import exhaustive
from .fitting import Fitting, Progress
from .found import Found
from .problem import Floats, Ints, Problem

_LAMBDAS = (0.3, 0.05, 1.0)  # weights of the depth-first place against bottom levels
_ROUNDS = 24
_MANY = range(1_000, 40_000)
"""Ops for which a search on a coarser graph comes first: more than moves reach one by one, and few
enough that there is time for both."""

_COARSE_SHARE = 0.4  # of the budget that it takes
_PATIENCE = 3.0  # seconds of a core for which to go on past the budget at least, if nothing fits
_SHARED = 8.0  # programs that share the core then, at most
_GATED_STARTS = 60  # starts that are played again with devices that wait for memory, at most
_WAITS_SAVE = 0.99  # of the time that waiting must come down to, for devices to wait at all
_BRIMS = (1.0, 0.97, 0.9, 0.8, 0.65)
"""Shares of memory up to which devices are filled where nothing else fits: ops that come later, and
copies on their way, need the rest."""


class Search(Fitting):
    """One run of the planner on a problem. Deterministic for a seed, unless the clock ends it."""

    def run(self) -> Found:
        """Searches. Raises InfeasibleError where nothing that fits was found."""
        found = self.attempt()
        if not found.fits:  # late is better than never
            wall, busy = time.perf_counter() - self.began, thread_time() - self.busy
            late = max(self.budget, _PATIENCE) * min(max(wall / max(busy, 1e-3), 1.0), _SHARED)
            self.deadline = max(self.deadline, time.perf_counter() + late)
            self._insist()
            found = self._found()
        if not found.fits:
            self._give_up()
        return found

    def attempt(self) -> Found:
        """Searches within the budget; what it ends at where nothing fits."""
        self.prepare()
        return self.finish()

    def prepare(self) -> Found:
        """The first part of `attempt`, which looks at starts; the best of them."""
        self.ranked = self._ranked_starts() if self.n else []
        return self._found()

    def finish(self) -> Found:
        """The second part of `attempt`, which is most of it."""
        self._anneal_rounds(self.ranked)
        return self._found()

    def _found(self) -> Found:
        if not self.n:
            empty = np.zeros(0, np.int64)
            return Found(empty, empty, 0.0, self.bounds, "", 0, "done")
        s, w = self.engine.state, self.engine.work
        fits, mode = self._fits(), "priority"
        if fits:
            s.assign[:], s.offset[:] = s.best_assign, s.best_offset
            self.engine.set_mode(int(s.best_mode[0]))
        cost = self.engine.settle(0.0)
        sequence = w.sequence.astype(np.int64)
        if fits and s.best_mode[0] == GATED:
            cost = float(s.cost[1])
            mode = "priority" if self._as_ready(sequence, cost) else "strict"
        self.engine.set_mode(self.mode)
        out_of_time = self.hurried or time.perf_counter() >= self.deadline
        return Found(
            s.assign.astype(np.int64), sequence, cost, self.bounds, self.start,
            int(s.counts[1]), "clock" if out_of_time else "moves", fits, mode,
        )  # fmt: skip

    def _as_ready(self, sequence: Ints, cost: float) -> bool:
        """Whether an order needs no device to wait on purpose."""
        s, w = self.engine.state, self.engine.work
        rank = np.empty(self.n)
        rank[sequence] = -np.arange(self.n, dtype=float)
        code, makespan = self.engine.simulate(s.assign, rank)
        fits = code == DONE and bool((w.top <= self.p.cap).all())
        return fits and (makespan <= cost or self.throughput)

    def _ranked_starts(self) -> list[tuple[float, Ints, Floats]]:
        """Starts (cost, devices by op, offsets), cheapest first and each only once."""
        p, engine, s = self.p, self.engine, self.engine.state
        kept: dict[bytes, tuple[float, Ints, Floats]] = {}
        over: dict[bytes, float] = {}  # by how much of its memory each is too large

        def consider(name: str, assign: Ints, offset: Floats, limit: float = np.inf) -> float:
            s.assign[:], s.offset[:] = assign, offset
            before = s.cost[1]
            cost = engine.settle(self.weight, limit)
            if s.cost[1] < before:
                self.start = name
            key = s.assign.tobytes()
            if np.isfinite(cost) and (key not in kept or cost < kept[key][0]):
                kept[key] = (cost, s.assign.copy(), s.offset.copy())
                over[key] = engine.overrun()
                if self.nearest is None or over[key] < self.nearest[0]:
                    self.nearest = over[key], *kept[key][1:]
            return cost

        def consider_run(assign: Ints, offset: Floats) -> float:
            # Three times the best is no start: such schedules need not be played to the end.
            cheapest = min((x[0] for x in kept.values()), default=np.inf)
            return consider("runs", assign, offset, 3 * cheapest)

        first = np.argmax(p.allowed, axis=1)[p.unit]
        scale = float(engine.bottom_levels(first.astype(np.int32)).max())
        self.weight = 4 * max(self.bounds["best"], scale / 8)
        zero = np.zeros(self.n)
        large = self.n + len(p.pair_dst) > 40_000
        runs = []
        for device in starts.run_starts(p, self.orders, (1, 2) if large else (1, 2, 4, 8)):
            assign = device[p.unit]
            runs.append((consider_run(assign, zero), assign))
            if time.perf_counter() > self.began + 0.1 * self.budget:
                self.hurried = True
                break
        runs.sort(key=lambda item: item[0])

        def listed_start(name: str, assign: Ints, sequence: Ints) -> None:
            """One that comes with an order: bottom levels decide, or the order does."""
            consider(name, assign, zero)
            rank = np.empty(self.n)
            rank[sequence] = -np.arange(self.n, dtype=float)
            level = engine.bottom_levels(assign.astype(np.int32))
            consider(name, assign, rank * scale - level)

        if self.given is not None:
            listed_start("coarse", *self.given)
        place = starts.depth_first(p)
        for share in _LAMBDAS:
            for _, assign in runs[: 12 if large else 60]:
                longest = float(engine.bottom_levels(assign.astype(np.int32)).max())
                consider_run(assign, -share * longest * place)
            if time.perf_counter() > self.began + 0.2 * self.budget:
                self.hurried = True
                break
        late = lambda: time.perf_counter() > self.began + 0.45 * self.budget  # noqa: E731
        for name, listed in starts.simple_starts(self.problem, self.orders, self.budget, late):
            listed_start(name, listed.assign, listed.sequence)
        self.hurried |= late()
        if not self._fits():
            for assign, sequence in self._brimful():
                listed_start("filled", assign, sequence)
        ranked = sorted(kept.values(), key=lambda item: item[0])
        if any(over.values()) and not p.static:
            # Those that take little time if memory does not count, but hold what stays, and others.
            key = lambda item: item[0] - self.weight * over[item[1].tobytes()]  # noqa: E731
            quick = [x for x in sorted(ranked, key=key) if self._holds(x[1])][:_GATED_STARTS]
            waiting = self._gated([*quick, *ranked[:_GATED_STARTS]])
            if waiting is not None:
                return waiting
        # Starts that overrun and yet cost half of any that fits would draw the search away from
        # those: memory must matter more, such as where a transfer takes longer than all else.
        while self._fits() and min(x[0] for x in kept.values()) < s.cost[1] / 2:
            for key, (cost, *rest) in kept.items():
                kept[key] = (cost + 3 * self.weight * over[key], *rest)
            self.weight *= 4
        return sorted(kept.values(), key=lambda item: item[0])

    def _gated(
        self, ranked: list[tuple[float, Ints, Floats]]
    ) -> list[tuple[float, Ints, Floats]] | None:
        """The best starts again, with devices that wait where they have no room: where nothing else
        fits, or takes more than that. None where that makes nothing better.
        """
        s = self.engine.state
        before = float(s.cost[1])
        place, found = starts.depth_first(self.p), []
        self._set_mode(GATED)
        for _, assign, offset in ranked:
            longest = float(self.engine.bottom_levels(assign).max())
            for tried in (offset, *(-share * longest * place for share in (0.3, 1.0, 10.0))):
                s.assign[:], s.offset[:] = assign, tried
                least = s.cost[1]
                found.append((self.engine.settle(self.weight), assign, tried))
                self.start = "waits" if s.cost[1] < least else self.start
            if time.perf_counter() > self.began + 0.5 * self.budget:
                self.hurried = True
                break
        if s.cost[1] < _WAITS_SAVE * before:
            return sorted(found, key=lambda item: item[0])
        self._set_mode(PRIORITY)
        return None

    def _holds(self, assign: Ints) -> bool:
        """Whether what stays for the whole step has room."""
        stays = np.bincount(assign, self.p.param, self.m)
        return bool((stays <= self.p.cap).all())

    def _brimful(self) -> Iterator[tuple[Ints, Ints]]:
        """Devices by op and orders that use all of the memory: where little is to spare."""
        p = self.p
        for sequence in (p.topo, np.argsort(starts.depth_first(p), kind="stable")):
            for share in _BRIMS:
                yield starts.filled(self.problem, sequence, share).assign, sequence
                if self._fits() or time.perf_counter() > self.began + 0.4 * self.budget:
                    return

    def _anneal_rounds(self, ranked: list[tuple[float, Ints, Floats]]) -> None:
        """One cold anneal from the best start; if moves abound, trials before and rounds after."""
        s = self.engine.state
        s.random[0] = self.seed * 1_000_003 + 12345
        if not ranked:
            return
        self._count_moves(ranked[0])
        # Units say how many moves one anneal needs; what is left over pays for more of them.
        rounds = min(self.moves // (30 * (len(self.p.unit_ptr) - 1)), _ROUNDS)
        left = self.moves
        if rounds >= 4:
            share = self.moves // 30
            results = []
            for k in range(min(3, len(ranked))):
                for hot in (3e-4, 3e-3):
                    self._load(*ranked[k][1:])
                    self._anneal(share, hot, hot / 10)
                    results.append((s.cost[0], k, hot, s.assign.copy(), s.offset.copy()))
                    left -= share
            self._load(*min(results, key=lambda item: item[:3])[3:])
        whole = rounds < 2 and self._fits()
        self._anneal(left if whole else left // 3, 3e-4, 2e-5, 0.05 if rounds < 2 else 0.15)
        left -= left // 3
        if not self._fits():
            self._insist()
            if rounds < 2:
                self._anneal(left, 3e-4, 2e-5, 0.05)
        gain = dict.fromkeys((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 1.0)
        hots = list(gain)
        rng = np.random.default_rng(self.seed)
        for k in range(rounds if rounds >= 2 else 0):
            if time.perf_counter() >= self.deadline or self._optimal():
                break
            # Temperatures by what they gained lately; the last rounds are cold.
            weights = np.array(list(gain.values()))
            hot = hots[int(rng.choice(len(hots), p=weights / weights.sum()))]
            if k >= rounds - 2:
                hot = hots[0]
            before = s.cost[0], s.assign.copy(), s.offset.copy()
            self._anneal(left // rounds, hot, min(hot / 10, 3e-5))
            gained = max(before[0] - s.cost[0], 0.0) / max(before[0], 1e-300)
            gain[hot] = max(0.5 * gain[hot] + 50 * gained, 0.05)
            if s.cost[0] > before[0]:
                self._load(*before[1:])
            if not self._fits():
                self.weight *= 2  # memory matters more
                self._load(s.assign.copy(), s.offset.copy())

    def _give_up(self) -> None:
        p, s, w = self.p, self.engine.state, self.engine.work
        self._set_mode(PRIORITY)
        self.engine.settle(self.weight)
        short = {
            device.name: float(top - cap)
            for device, top, cap in zip(self.problem.devices, w.top, p.cap, strict=True)
            if top > cap
        }
        raise InfeasibleError(
            f"found no placement that fits, and no proof that there is none; in the nearest of "
            f"{s.counts[1]} tried, {shortages(short)}; give a larger budget, or more memory",
            short,
            False,
        )


def best(
    problem: Problem,
    objective: str = "latency",
    budget: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
    began: float | None = None,
    price: float = 0.0,
) -> Found:
    """The best placement found in about ``budget`` seconds since ``began`` (perf_counter), where
    each transfer adds ``price`` seconds to what is made small.

    Raises InfeasibleError with a certificate, or with the nearest miss, where nothing fits.
    """
    began = time.perf_counter() if began is None else began
    feasible.refuse_hopeless(problem)
    found = exhaustive(problem, objective, budget, price)
    if found is not None:
        return found
    seconds = search_seconds(budget)
    end = max(began + seconds, time.perf_counter() + 0.05 * budget)
    return search(problem, objective, seed, seconds, progress, price, end).run()


def search_seconds(budget: float) -> float:
    """Of a budget, what the search may take: the rest is for simulating and writing its answer.

    By this the work is counted. What has passed before shortens it by the clock only, for a seed
    and a budget must always mean the same work.
    """
    return max(0.92 * budget - 0.15, 0.05 * budget)


def search(
    problem: Problem,
    objective: str,
    seed: int,
    budget: float,
    progress: Progress | None,
    price: float = 0.0,
    end: float | None = None,
) -> Search:
    """A search for ``budget`` seconds, less what one on a coarser graph has taken by now; until
    ``end`` (perf_counter) at the latest.
    """
    now = time.perf_counter()
    end = now + budget if end is None else end
    given = None
    if len(problem.ops) in _MANY:
        until = now + _COARSE_SHARE * (end - now)
        given = _coarse_start(
            problem, objective, seed, _COARSE_SHARE * budget, progress, price, until
        )
        budget *= 1 - _COARSE_SHARE  # whatever the clock says: the work is what the seed decides
    return Search(problem, objective, seed, end, budget, progress, given, price)


def _coarse_start(
    problem: Problem,
    objective: str,
    seed: int,
    budget: float,
    progress: Progress | None,
    price: float,
    end: float,
) -> tuple[Ints, Ints] | None:
    """Devices and starting order of the ops by a search on a coarser graph; None without one."""
    coarse = coarsen(problem)
    if len(coarse.problem.ops) > 0.8 * len(problem.ops):
        return None
    try:
        found = Search(
            coarse.problem, objective, seed, end, budget, progress, None, price
        ).attempt()
    except InfeasibleError:  # a proof, but of joined ops; the ops themselves may yet fit
        return None
    return found.assign[coarse.member], coarse.members(found.sequence)
