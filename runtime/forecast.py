"""When units of weights will be wanted again: counts of the past, and what follows from them.

A *site* is a place in a plan that fetches units, one of each kind of work (an expert, a branch);
the data tells which. Sites come round in a nearly fixed order, call after call. What is kept of
them are shares of slots (routed rows), not of calls, so that forecasts for one token and for a
thousand come from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RECENT = 0.2
"""Weight of the latest visit in the share that follows the text; it is half of a forecast."""
MEMORY = 2048.0
"""Visits after which what was counted before weighs half."""
PRIOR = 64.0
"""Visits that a profile counts for."""
RARE = 1e-4
"""Least share of a unit: never seen is not never."""
SAMPLE = 16
"""Where loads are cheap, forecasts see one round of all sites in so many: to see one takes some
tens of microseconds, which is as long as a few loads.
"""


class Forecast:
    """Expected use of every site's units. Matrices have a row per site, a column per unit."""

    def __init__(self) -> None:
        self.units: list[int] = []
        self._total: list[Floats] = []  # shares of visits, summed
        self._recent: list[Floats] = []
        self._slots: list[float] = []  # of the latest visit
        self._after: list[int] = []  # the site that was visited after it
        self._pairs: dict[tuple[int, int], Floats] = {}
        self._before: tuple[int, Floats] | None = None
        self._last = np.zeros(0)  # number of the fetch that visited last
        self._period = np.zeros(0)  # fetches from one visit to the next
        self._wait = np.zeros((0, 0))  # fetches beyond the site's next visit until a unit's use
        self._stale: set[int] = set()  # sites whose wait is not of now

    def add(self, units: int) -> int:
        """Another site, all of its ``units`` alike so far; returns its number."""
        site = len(self.units)
        self.units.append(units)
        self._total.append(np.full(units, 1.0 / units))
        self._recent.append(np.full(units, 1.0 / units))
        self._slots.append(1.0)
        self._after.append(site)
        self._last = np.append(self._last, 0.0)
        self._period = np.append(self._period, site + 1.0)
        self._wait = grown(self._wait, units, 0.0, np.inf)
        self._stale.add(site)
        return site

    def prior(self, site: int, load: Sequence[float]) -> None:
        """Starts from a profile's ``load``, slots of each unit (ignored if of another router)."""
        counts = np.asarray(load, dtype=np.float64)
        if len(counts) == self.units[site] and counts.sum() > 0:
            share = counts / counts.sum()
            self._total[site], self._recent[site] = share * PRIOR, share
            self._stale.add(site)

    def prior_pair(self, site: int, after: int, table: Sequence[Sequence[float]]) -> None:
        """Starts from a profile's co-activation: ``table[i][j]`` cells went to unit i of ``site``
        and to unit j of the site ``after`` it.
        """
        counts = np.asarray(table, dtype=np.float64)
        if counts.shape == (self.units[site], self.units[after]) and counts.sum() > 0:
            self._pairs[site, after] = counts * (PRIOR / counts.sum()) + RARE
            self._after[site] = after

    def saw(self, site: int, counts: NDArray[np.int64], now: int) -> None:
        """Fetch number ``now`` visited ``site``; ``counts`` are the slots of its units."""
        if self._last[site]:
            self._period[site] = now - self._last[site]
        self._last[site] = now
        total = int(counts.sum())
        if not total:
            return
        taken = counts / total
        self._slots[site] = total
        self._total[site] += taken
        recent = self._recent[site]
        recent += RECENT * (taken - recent)
        if self._before is not None:
            before, earlier = self._before
            self._after[before] = site
            pairs = self._pairs.get((before, site))
            if pairs is None:
                pairs = np.full((len(earlier), len(taken)), RARE)
                self._pairs[before, site] = pairs
            pairs += earlier[:, None] * taken
        self._before = site, taken
        self._stale.add(site)

    def next(self) -> tuple[int, Floats] | None:
        """The site that is likely to be visited next, and its units' chances to be wanted after
        what the latest one took.
        """
        if self._before is None:
            return None
        site, taken = self._before
        after = self._after[site]
        share = self._share(after)
        pairs = self._pairs.get((site, after))
        if pairs is not None:
            share = (share + taken @ (pairs / pairs.sum(1, keepdims=True))) / 2
        return after, self._chance(after, share)

    def distance(self, now: int) -> Floats:
        """Expected number of fetches until each unit is wanted; infinite where there is none."""
        for site in self._stale:
            chance = self._chance(site, self._share(site))
            self._wait[site, : len(chance)] = self._period[site] * (1.0 / chance - 1.0)
        self._stale.clear()
        ahead = np.maximum(self._last + self._period - now, 1.0)
        result = ahead[:, None] + self._wait
        following = self.next()
        if following is not None:
            site, chance = following
            beyond = self._period[site] + self._wait[site, : len(chance)]
            result[site, : len(chance)] = ahead[site] + (1.0 - chance) * beyond
        return result

    def _share(self, site: int) -> Floats:
        total = self._total[site]
        visits = float(total.sum())
        if visits > 2 * MEMORY:
            total /= 2
            visits /= 2
            for pair, pairs in self._pairs.items():
                if pair[1] == site:
                    pairs /= 2
        return (total / visits + self._recent[site]) / 2

    def _chance(self, site: int, share: Floats) -> Floats:
        """Probabilities that units with these shares get any slot of a visit."""
        return 1.0 - (1.0 - np.clip(share, RARE, 1.0 - RARE)) ** self._slots[site]


def in_sample(rounds: int) -> bool:
    """Whether forecasts see a round where they do not see all: one in `SAMPLE`, irregularly."""
    return (rounds * 0x9E3779B1 >> 16) % SAMPLE == 0


def grown(matrix: NDArray, units: int, value: float, fill: float = 0) -> NDArray:
    """``matrix`` with one more row: ``value`` in its first ``units`` columns, ``fill`` behind."""
    rows, width = matrix.shape
    result = np.full((rows + 1, max(width, units)), fill, dtype=matrix.dtype)
    result[:rows, :width] = matrix
    result[rows, :units] = value
    return result
