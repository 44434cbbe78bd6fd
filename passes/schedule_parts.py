"""Schedules part by part: the best there is of small parts, local search in others.

The graph is cut where all tasks so far come before all others; in front of a cut everybody waits
for everybody, so the parts can be scheduled one by one. What list scheduling finds for a part is
improved by hill climbing, and where it is small by dynamic programming over the sets of tasks that
are done: every order is looked at, and for each task every number of workers that may share it,
whole on any one, or dealt out to those that are free first so that all end together, as in list
scheduling. Of two ways to have done the same tasks the one that is later everywhere is dropped, and
so is what cannot end sooner than the best schedule known, by the path and the work that are left.

After the dynamic programming over "schedules of endings" in Ding et al., "IOS" (MLSys 2021; see
`ios`), without its stages and the barriers between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import le

from .list_schedule import RULES, dealt, improved, list_schedule
from .tasks import DEFAULT_COSTS, Costs, Place, Schedule, Task, bounds, pieces, simulate

CLOSE = 1.01
"""A part scheduled in less than so many times its lower bound is not worth a search."""
SHARE = 4
"""A part is given one in so many of the states that are left to look at."""

Choice = tuple[int, Place]
"""A task and who does it."""


def schedule_by_parts(
    tasks: Sequence[Task],
    workers: int,
    costs: Costs = DEFAULT_COSTS,
    most: int = 10,
    states: int = 20_000,
    rounds: int = 40,
) -> Schedule:
    """A schedule whose parts of at most ``most`` tasks are the best there are; local search goes
    ``rounds`` steps in each part. Where ``states`` run out, a part keeps the best schedule known.
    """
    order: list[int] = []
    places: dict[int, Place] = {}
    for part in pieces([t.after for t in tasks]):
        local = {number: k for k, number in enumerate(part)}
        own = [
            replace(tasks[n], after=tuple(sorted(local[k] for k in tasks[n].after if k in local)))
            for n in part
        ]
        limit = CLOSE * bounds(own, workers).best
        listed = [(list_schedule(own, workers, rule, costs), rule) for rule in RULES]
        best, rule = min(listed, key=lambda s: s[0].seconds)
        if best.seconds > limit:
            best = improved(own, best, rule, costs, rounds)
        choices: Sequence[Choice] = [(k, best.place(k)) for k in best.order]
        if best.seconds > limit and len(own) <= most:
            search = _Search(own, workers, costs, best.seconds, states // SHARE)
            choices = search.run() or choices
            states -= search.states
        for k, place in choices:
            order.append(part[k])
            places[part[k]] = place
    return simulate(tasks, order, [places[k] for k in range(len(tasks))], workers, costs)


@dataclass(frozen=True, slots=True)
class _State:
    """Tasks that are ``done`` (bits) by ``choices``, when each worker is ``free``, and when each
    can know that a task is over which others wait for (``seen``).
    """

    done: int
    free: tuple[float, ...]
    seen: dict[int, tuple[float, ...]]
    left: float  # seconds of work
    least: float  # no schedule that goes on from here can end sooner
    choices: tuple[Choice, ...]


class _Search:
    """Depth first, the most promising first: there soon is a good schedule to compare with."""

    def __init__(
        self, tasks: Sequence[Task], workers: int, costs: Costs, best: float, most: int
    ) -> None:
        self.tasks, self.workers, self.costs = tasks, workers, costs
        self.best, self.most, self.states = best, most, 0
        self.found: tuple[Choice, ...] = ()
        self.before = [sum(1 << k for k in t.after) for t in tasks]
        self.readers = [0] * len(tasks)
        self.tails: list[float] = []  # from the start of a task to the end of all, at least
        behind = [0.0] * len(tasks)
        for number in reversed(range(len(tasks))):
            task = tasks[number]
            least = task.least(workers) * math.ceil(task.pieces / workers) / task.pieces
            self.tails.append(costs.call + least + behind[number])
            for k in task.after:
                self.readers[k] |= 1 << number
                behind[k] = max(behind[k], self.tails[-1])
        self.tails.reverse()
        self.known: dict[int, list[tuple[float, ...]]] = {}

    def run(self) -> tuple[Choice, ...]:
        """The choices of a schedule that ends sooner than ``best``; none if there is none."""
        everything = (1 << len(self.tasks)) - 1
        work = sum(t.least(self.workers) + self.costs.call for t in self.tasks)
        pending = [_State(0, (0.0,) * self.workers, {}, work, 0.0, ())]
        while pending and self.states < self.most:
            state = pending.pop()
            if state.least >= self.best * (1 - 1e-9):
                continue
            if state.done == everything:
                self.best, self.found = state.least, state.choices
            elif not self._is_dominated(state):
                following = [s for k in self._able(state.done) for s in self._then(state, k)]
                self.states += len(following)
                following = [s for s in following if s.least < self.best]
                following.sort(key=lambda s: -s.least)
                pending += following
        return self.found

    def _able(self, done: int) -> list[int]:
        """Tasks that may come next."""
        return [
            k for k, before in enumerate(self.before) if not done >> k & 1 and not before & ~done
        ]

    def _then(self, state: _State, number: int) -> Iterator[_State]:
        """What becomes of ``state`` when a task comes next, for every way to place it."""
        task = self.tasks[number]
        known = [state.seen[k] for k in task.after]
        starts = [
            max(free, *(times[w] for times in known)) if known else free
            for w, free in enumerate(state.free)
        ]
        places: dict[tuple[float, ...], Place] = {}
        for worker, start in enumerate(starts):
            # Workers that are as free and know as much are the same.
            view = (state.free[worker], start, *(t[worker] for t in state.seen.values()))
            places.setdefault(view, ((worker, task.pieces),))
        shared = {
            dealt(task, starts, count, self.costs)
            for count in range(2, min(self.workers, task.pieces) + 1)
        }
        done = state.done | 1 << number
        left = state.left - task.least(self.workers) - self.costs.call
        path = min(starts) + self.tails[number]
        kept = {k: times for k, times in state.seen.items() if self.readers[k] & ~done}
        for place in (*places.values(), *sorted(p for p in shared if len(p) > 1)):
            low, free, ends = 0, list(state.free), []
            total = task.spent(len(place), self.workers)
            for worker, end in place:
                spent = self.costs.call + total * (end - low) / task.pieces
                free[worker] = starts[worker] + spent
                ends.append((worker, free[worker]))
                low = end
            seen = kept
            if self.readers[number]:
                notice = self.costs.notice
                times = [
                    max(end + (0.0 if w == own else notice) for own, end in ends)
                    for w in range(self.workers)
                ]
                seen = {**kept, number: tuple(times)}
            least = max(state.least, path, max(free), (sum(free) + left) / self.workers)
            yield _State(done, tuple(free), seen, left, least, (*state.choices, (number, place)))

    def _is_dominated(self, state: _State) -> bool:
        """Whether the same tasks were done with every worker as soon free, and knowing as much;
        keeps the state in mind if not.
        """
        open_tasks = sorted(state.seen)
        views = sorted(
            (free, *(state.seen[k][w] for k in open_tasks)) for w, free in enumerate(state.free)
        )
        mine = tuple(value for view in views for value in view)
        known = self.known.setdefault(state.done, [])
        if any(all(map(le, other, mine)) for other in known):
            return True
        known[:] = [other for other in known if not all(map(le, mine, other))]
        known.append(mine)
        return False
