"""List scheduling of moldable tasks: the earliest free worker takes the most urgent ready task.

After Graham ("Bounds on Multiprocessing Timing Anomalies", 1969), with bottom levels for urgency
(HEFT: Topcuoglu, Hariri and Wu, 2002), and a choice for each task of how many workers share it:
where the other ready tasks could not keep the other workers busy, the task is dealt out to as many
as its part of the work deserves, so that all of its shares end at the same time wherever their
workers stand.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .tasks import (
    DEFAULT_COSTS,
    Costs,
    Place,
    Schedule,
    Share,
    Task,
    bottom_levels,
    even,
    ready,
    simulate,
)


@dataclass(frozen=True)
class Rule:
    """How choices are made.

    A task is given the share of the workers that its work is of all ready work, that of the others
    divided by ``spare``; it stays on one if it takes less than ``least`` seconds. ``urgency``:
    "path" (longest way to the end), "depth" (what continues on the worker's last task), "order" (as
    given).
    """

    spare: float = 0.5
    urgency: str = "path"
    least: float = 3e-6


RULES = tuple(
    Rule(spare, urgency) for urgency in ("path", "depth", "order") for spare in (0.1, 0.5, 2.0)
)


def list_schedule(
    tasks: Sequence[Task],
    workers: int,
    rule: Rule,
    costs: Costs = DEFAULT_COSTS,
    forced: Sequence[bool | None] = (),
) -> Schedule:
    """A schedule by one rule; ``forced[k]`` decides whether task k is shared where not None."""
    return _Lister(tasks, workers, rule, costs, forced).run()


class _Lister:
    def __init__(
        self,
        tasks: Sequence[Task],
        workers: int,
        rule: Rule,
        costs: Costs,
        forced: Sequence[bool | None],
    ) -> None:
        self.tasks, self.workers, self.rule, self.costs = tasks, workers, rule, costs
        self.forced = forced or [None] * len(tasks)
        self.free = [0.0] * workers
        self.shares: list[tuple[Share, ...]] = [()] * len(tasks)
        self.levels = bottom_levels(tasks)
        self.turn = [-1] * len(tasks)  # when each task was taken
        self.urgency: Callable[[int, int], tuple[float, ...]] = {
            "path": lambda k, w: (self.levels[k], -k),
            "depth": lambda k, w: (self._last_on(k, w), self.levels[k], -k),
            "order": lambda k, w: (-k,),
        }[rule.urgency]

    def run(self) -> Schedule:
        left = [len(t.after) for t in self.tasks]
        follows: list[list[int]] = [[] for _ in self.tasks]
        for number, task in enumerate(self.tasks):
            for k in task.after:
                follows[k].append(number)
        waiting = [k for k, count in enumerate(left) if not count]
        order: list[int] = []
        while waiting:
            worker = min(range(self.workers), key=self.free.__getitem__)
            starts = {k: max(self.free[worker], self._ready(k, worker)) for k in waiting}
            soonest = min(starts.values()) + 1e-9
            chosen = max(
                (k for k in waiting if starts[k] <= soonest),
                key=lambda k: self.urgency(k, worker),
            )
            waiting.remove(chosen)
            self._take(chosen, worker, sum(self.tasks[k].seconds for k in waiting))
            self.turn[chosen] = len(order)
            order.append(chosen)
            for k in follows[chosen]:
                left[k] -= 1
                if not left[k]:
                    waiting.append(k)
        # Workers take their shares by the order, so it must be the order of the shares' starts.
        return Schedule(self.workers, tuple(order), tuple(self.shares))

    def _ready(self, number: int, worker: int) -> float:
        return ready(self.tasks, self.shares, number, worker, self.costs)

    def _last_on(self, number: int, worker: int) -> float:
        """How lately ``worker`` ran something that the task reads; -1 if never."""
        return max(
            (
                float(self.turn[k])
                for k in self.tasks[number].after
                if any(s.worker == worker for s in self.shares[k])
            ),
            default=-1.0,
        )

    def _take(self, number: int, worker: int, others: float) -> None:
        task, rule = self.tasks[number], self.rule
        starts = [max(self.free[w], self._ready(number, w)) for w in range(self.workers)]
        forced = self.forced[number]
        most = self.workers if forced else 1
        if forced is None and task.seconds >= rule.least:
            most = round(self.workers * task.seconds / (task.seconds + others / rule.spare))
        place = dealt(task, starts, most, self.costs) if most > 1 and task.pieces > 1 else ()
        if not place:
            best = min(range(self.workers), key=starts.__getitem__)
            home = worker if starts[worker] <= starts[best] + 1e-9 else best
            place = ((home, task.pieces),)
        low, shares, spent = 0, [], task.spent(len(place), self.workers)
        for w, end in place:
            finish = starts[w] + self.costs.call + spent * (end - low) / task.pieces
            shares.append(Share(w, end, starts[w], finish))
            self.free[w] = finish
            low = end
        self.shares[number] = tuple(shares)


def dealt(task: Task, starts: Sequence[float], most: int, costs: Costs) -> Place:
    """A task on up to ``most`` workers, which can begin at ``starts``: as many as help, all ending
    together as nearly as pieces allow.
    """
    order = sorted(range(len(starts)), key=starts.__getitem__)
    spent = task.spent(1, len(starts))
    used, finish = order[:1], starts[order[0]] + costs.call + spent
    for count in range(2, most + 1):
        begun = sum(starts[w] + costs.call for w in order[:count])
        shared = task.spent(count, len(starts))
        together = (begun + shared) / count
        if together >= finish or starts[order[count - 1]] >= together:
            break
        used, finish, spent = order[:count], together, shared
    cuts: list[tuple[int, int]] = []
    filled = 0.0
    for worker in sorted(used):
        filled += max(0.0, finish - starts[worker] - costs.call)
        last = worker == max(used)
        end = task.pieces if last else round(task.pieces * filled / spent)
        end = min(end, task.pieces)
        if end > (cuts[-1][1] if cuts else 0):
            cuts.append((worker, end))
    return tuple(cuts)


def in_order(tasks: Sequence[Task], workers: int, costs: Costs, least: float = 3e-6) -> Schedule:
    """Tasks one after the other, each dealt out to all workers if it takes ``least`` seconds."""
    places = [even(t.pieces, workers if t.seconds >= least else 1) for t in tasks]
    return simulate(tasks, range(len(tasks)), places, workers, costs)


def improved(
    tasks: Sequence[Task],
    start: Schedule,
    rule: Rule,
    costs: Costs,
    rounds: int,
    seed: int = 0,
) -> Schedule:
    """Hill climbing from ``start``, which ``rule`` gave: for a few tasks at a time the choice of
    sharing them is turned round, and kept so where that ends sooner. Deterministic for a seed.
    """
    chance = random.Random(seed)
    best = start
    forced: list[bool | None] = [None] * len(tasks)
    able = [k for k, t in enumerate(tasks) if t.pieces > 1]
    for _ in range(rounds if able else 0):
        trial = list(forced)
        for k in chance.sample(able, min(len(able), chance.randint(1, 3))):
            trial[k] = len(best.shares[k]) == 1
        found = list_schedule(tasks, start.workers, rule, costs, trial)
        if found.seconds < best.seconds:
            best, forced = found, trial
    return best
