"""How live routes differ from a profile: counts of calls, and a test for more than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...passes.route_odds import Loads

SIGNIFICANCE = 1e-3
"""The chance of calling it drift where there is none, for one router and one window."""


@dataclass(frozen=True)
class LiveLoads:
    """Loads of one router as plans count them: an entry per call in which it ran.

    A plan knows slots, not cells: ``cells`` are the slots, too.
    """

    loads: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]

    @property
    def cells(self) -> tuple[int, ...]:
        """The slots."""
        return self.slots

    @property
    def together(self) -> tuple[tuple[int, ...], ...]:
        """Not counted."""
        return ()

    def part(self, begin: int, end: int) -> LiveLoads:
        """The calls from number ``begin`` to before ``end``."""
        return LiveLoads(self.loads[begin:end], self.slots[begin:end])


@dataclass(frozen=True)
class Drift:
    """The branch of a router whose share of the slots moved most: mean shares, and how many
    standard errors lie between them.
    """

    branch: int
    before: float
    now: float
    errors: float


def drift(before: Iterable[Loads], now: Loads) -> Drift | None:
    """Whether the shares of a router's branches are other ones now than they were ``before``.

    Welch's two-sample test (Welch, "The generalization of Student's problem", 1947) on each
    branch's share of the slots per call, corrected for the number of branches (Bonferroni). Calls,
    not cells, are what it counts, for cells of one call go alike. Shares that never varied are not
    taken for certain: a variance is at least that of something rare which nobody saw yet.
    """
    old = [row for loads in before for row in _shares(loads)]
    new = _shares(now)
    if len(old) < 2 or len(new) < 2 or len(old[0]) != len(new[0]):
        return None
    branches = len(new[0])
    limit = statistics.NormalDist().inv_cdf(1 - SIGNIFICANCE / (2 * branches))
    worst: Drift | None = None
    for b in range(branches):
        first, second = [row[b] for row in old], [row[b] for row in new]
        spread = _variance(first) / len(first) + _variance(second) / len(second)
        have, want = statistics.fmean(second), statistics.fmean(first)
        errors = abs(have - want) / math.sqrt(spread)
        if errors > limit and (worst is None or errors > worst.errors):
            worst = Drift(b, want, have, errors)
    return worst


def _shares(loads: Loads) -> list[tuple[float, ...]]:
    pairs = zip(loads.loads, loads.slots, strict=True)
    return [tuple(x / slots for x in load) for load, slots in pairs if slots]


def _variance(values: Sequence[float]) -> float:
    """The variance of a share per call; at least that of a share which is all or nothing as seldom
    as could have escaped so many calls.
    """
    rare = 0.5 / (len(values) + 1)
    return max(statistics.variance(values), rare * (1 - rare))
