"""`schedule`: which kernels run side by side, on which workers, in which order.

before: kernels in the graph's order, each dealt out to all threads
after:  independent kernels on threads of their own where that is faster, waiting only for what they
        need

The pass says how to search; the search itself takes place when kernels have been chosen and can be
timed, since only then costs are known. Candidates come from list scheduling with several rules and
hill climbing on a simulation, for the whole and part by part with small parts scheduled exactly
(``algorithm="list"``), or from IOS's dynamic programming (``algorithm="ios"``); the best few are
run, and one is taken only if it measured faster than the kernels in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from .base import Pass, PassResult, copy_graph
from .ios import TooLarge, ios_schedule
from .list_schedule import RULES, improved, list_schedule
from .schedule_parts import schedule_by_parts
from .tasks import DEFAULT_COSTS, Costs, Schedule, Task, check

SCHEDULE = "schedule"
"""Key of a graph module's ``meta``: the `SchedulePass` that says how to schedule it."""
ALGORITHMS = ("list", "ios")


@dataclass(frozen=True)
class SchedulePass(Pass):
    """Runs independent kernels side by side.

    Attributes:
        algorithm: "list" (list scheduling, local search, small parts exactly) or "ios" (stages by
            dynamic programming).
        measured: how many of the best candidates are run; the fastest is taken.
        least_gain: share of the time that a candidate must save in prediction to be run, and in
            measurement to be taken; a negative one takes the fastest candidate in any case.
        rounds: steps of local search for each candidate.
        exact: parts of the graph of at most so many kernels are scheduled exactly.
        max_stages: IOS looks at so many stages at most.

    Raises:
        ValueError: the algorithm is unknown, no candidate would be run, or a number is negative
            that counts something.
    """

    name: ClassVar[str] = "schedule"
    algorithm: str = "list"
    measured: int = 3
    least_gain: float = 0.01
    rounds: int = 40
    exact: int = 10
    max_stages: int = 20_000

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            known = " or ".join(ALGORITHMS)
            raise ValueError(f"algorithm is {self.algorithm!r}, not {known}")
        if self.measured < 1:
            raise ValueError(f"measured must be at least 1, is {self.measured}")
        for name in ("rounds", "exact", "max_stages"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, is {getattr(self, name)}")

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        result = copy_graph(graph_module)
        result.meta[SCHEDULE] = self
        return PassResult(result)

    def candidates(
        self, tasks: Sequence[Task], workers: int, costs: Costs = DEFAULT_COSTS
    ) -> tuple[list[Schedule], bool]:
        """Schedules to try, the best predicted first, and whether IOS's search was too large (list
        scheduling steps in then).
        """
        check(tasks)
        if self.algorithm == "ios":
            try:
                return [ios_schedule(tasks, workers, costs, max_stages=self.max_stages)], False
            except TooLarge:
                pass
        found = []
        for rule in RULES:
            schedule = list_schedule(tasks, workers, rule, costs)
            found.append((schedule.seconds, len(found), rule, schedule))
        found.sort(key=lambda f: f[:2])
        best = [
            improved(tasks, schedule, rule, costs, self.rounds)
            for _, _, rule, schedule in found[: self.measured]
        ]
        best.append(schedule_by_parts(tasks, workers, costs, self.exact, rounds=self.rounds))
        distinct = {(s.order, tuple(map(s.place, range(len(tasks))))): s for s in best}
        ranked = sorted(distinct.values(), key=lambda s: s.seconds)
        return ranked[: self.measured], self.algorithm == "ios"
