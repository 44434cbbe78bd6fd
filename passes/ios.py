"""IOS: stages found by dynamic programming over the sets of tasks that are done.

Ding, Zhu, Jia, Pekhimenko and Han, "IOS: Inter-Operator Scheduler for CNN Acceleration" (MLSys
2021). The tasks that remain are cut into stages, one after the other; inside a stage connected
tasks form a group, groups run side by side, each on one worker. Its pruning is kept: a stage has
at most ``max_groups`` groups of at most ``max_size`` units. Unlike there a stage may also deal each
of its tasks out to all workers, chains of tasks count as one unit, and the graph is cut where all
paths meet (`tasks.pieces`), each piece being searched on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .tasks import DEFAULT_COSTS, Costs, Place, Schedule, Task, even, pieces, simulate


class TooLarge(ValueError):
    """A graph has more stages to look at than were allowed."""


def ios_schedule(
    tasks: Sequence[Task],
    workers: int,
    costs: Costs = DEFAULT_COSTS,
    max_size: int = 3,
    max_groups: int = 8,
    max_stages: int = 100_000,
) -> Schedule:
    """The best division into stages. Raises TooLarge after looking at ``max_stages`` of them."""
    order: list[int] = []
    places: dict[int, Place] = {}
    left = max_stages
    for piece in _pieces(tasks, _units(tasks)):
        search = _Search(tasks, piece, workers, costs, max_size, max_groups, left)
        for stage in search.stages():
            for number, place in search.dealt(stage):
                order.append(number)
                places[number] = place
        left -= search.looked_at
    return simulate(tasks, order, [places[k] for k in range(len(tasks))], workers, costs)


def _units(tasks: Sequence[Task]) -> list[list[int]]:
    """Maximal chains: a task joins the only one before it where that has no other after it."""
    follows: list[list[int]] = [[] for _ in tasks]
    for number, task in enumerate(tasks):
        for k in set(task.after):
            follows[k].append(number)
    unit_of: dict[int, list[int]] = {}
    units: list[list[int]] = []
    for number, task in enumerate(tasks):
        before = set(task.after)
        only = next(iter(before)) if len(before) == 1 else -1
        if only >= 0 and len(follows[only]) == 1:
            unit = unit_of[only]
        else:
            units.append(unit := [])
        unit.append(number)
        unit_of[number] = unit
    return units


def _pieces(tasks: Sequence[Task], units: Sequence[list[int]]) -> list[list[list[int]]]:
    """Lists of units to be searched one after the other."""
    home = {k: u for u, unit in enumerate(units) for k in unit}
    after = [
        {home[k] for number in unit for k in tasks[number].after} - {u}
        for u, unit in enumerate(units)
    ]
    return [[units[u] for u in piece] for piece in pieces(after)]


class _Search:
    """Dynamic programming over the units of one piece."""

    def __init__(
        self,
        tasks: Sequence[Task],
        units: Sequence[list[int]],
        workers: int,
        costs: Costs,
        max_size: int,
        max_groups: int,
        max_stages: int,
    ) -> None:
        self.tasks, self.units, self.workers, self.costs = tasks, units, workers, costs
        self.max_size, self.max_groups, self.max_stages = max_size, max_groups, max_stages
        home = {k: u for u, unit in enumerate(units) for k in unit}
        self.before = [
            {home[k] for number in unit for k in tasks[number].after if k in home} - {u}
            for u, unit in enumerate(units)
        ]
        self.follows: list[list[int]] = [[] for _ in units]
        for u, before in enumerate(self.before):
            for v in before:
                self.follows[v].append(u)
        self.seconds = [sum(tasks[k].spent(1, workers) for k in unit) for unit in units]
        self.looked_at = 0
        self._best: dict[int, tuple[float, int]] = {}  # done -> (seconds to the end, next stage)

    def stages(self) -> list[list[list[int]]]:
        """The best stages in order, each a list of groups of units."""
        everything = (1 << len(self.units)) - 1
        pending = [0]
        while pending:  # instead of recursion, which would be as deep as there are stages
            done = pending[-1]
            if done in self._best:
                pending.pop()
                continue
            if done == everything:
                self._best[done] = (0.0, 0)
                continue
            options = list(self._endings(done))
            unknown = [done | s for s, _ in options if done | s not in self._best]
            if unknown:
                pending += unknown
                continue
            self._best[done] = min(
                (seconds + self._best[done | stage][0], stage) for stage, seconds in options
            )
            pending.pop()
        found, done = [], 0
        while done != everything:
            stage = self._best[done][1]
            found.append(self._groups(stage))
            done |= stage
        return found

    def _endings(self, done: int) -> Iterator[tuple[int, float]]:
        """Sets of units that can run next as one stage, and how long it takes."""
        known = {0}
        grown = [0]
        while grown:
            stage = grown.pop()
            for u in range(len(self.units)):
                bit = 1 << u
                if (done | stage) & bit or any(not (done | stage) >> v & 1 for v in self.before[u]):
                    continue
                larger = stage | bit
                if larger in known:
                    continue
                known.add(larger)
                groups = self._groups(larger)
                if len(groups) > self.max_groups or max(map(len, groups)) > self.max_size:
                    continue
                self.looked_at += 1
                if self.looked_at > self.max_stages:
                    raise TooLarge(f"more than {self.max_stages} stages to look at")
                grown.append(larger)
                yield larger, self._cost(groups)

    def _groups(self, stage: int) -> list[list[int]]:
        """Connected units of a stage."""
        left = [u for u in range(len(self.units)) if stage >> u & 1]
        groups: list[list[int]] = []
        seen: set[int] = set()
        for first in left:
            if first in seen:
                continue
            group, grown = [], [first]
            seen.add(first)
            while grown:
                u = grown.pop()
                group.append(u)
                for v in (*self.before[u], *self.follows[u]):
                    if stage >> v & 1 and v not in seen:
                        seen.add(v)
                        grown.append(v)
            groups.append(sorted(group))
        return groups

    def _loads(self, groups: Sequence[Sequence[int]]) -> list[tuple[int, Sequence[int]]]:
        """Groups to workers, the longest first to the one with the least (LPT)."""
        loads = [0.0] * self.workers
        found = []
        for group in sorted(groups, key=lambda g: -sum(self.seconds[u] for u in g)):
            worker = min(range(self.workers), key=loads.__getitem__)
            loads[worker] += sum(self.seconds[u] for u in group)
            found.append((worker, group))
        return found

    def _cost(self, groups: Sequence[Sequence[int]]) -> float:
        return min(self._apart(groups), self._together(groups)) + self.costs.notice

    def _apart(self, groups: Sequence[Sequence[int]]) -> float:
        loads = [0.0] * self.workers
        for worker, group in self._loads(groups):
            calls = sum(len(self.units[u]) for u in group)
            loads[worker] += sum(self.seconds[u] for u in group) + calls * self.costs.call
        return max(loads)

    def _together(self, groups: Sequence[Sequence[int]]) -> float:
        seconds = 0.0
        for number in (k for group in groups for u in group for k in self.units[u]):
            task = self.tasks[number]
            share = -(-task.pieces // self.workers) / task.pieces
            seconds += task.seconds * share + self.costs.call + self.costs.notice
        return seconds

    def dealt(self, groups: Sequence[Sequence[int]]) -> Iterator[tuple[int, Place]]:
        """The tasks of a stage in order, and who does each."""
        if self._together(groups) < self._apart(groups):
            for number in sorted(k for group in groups for u in group for k in self.units[u]):
                yield number, even(self.tasks[number].pieces, self.workers)
            return
        for worker, group in self._loads(groups):
            for number in sorted(k for u in group for k in self.units[u]):
                yield number, ((worker, self.tasks[number].pieces),)
