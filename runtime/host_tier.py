"""Host memory as the slower tier of a GPU: what is wanted, is copied to slots of the GPU's memory.

The budget, its forecasts and what is dropped are those of `Tier`. Copies cost the host nothing but
to ask for them, so what the next router is likely to want is asked for at once, behind what is
wanted now, without a thread. When a call wants more than there are slots, experts come in *waves*,
those that have a slot first. A wave has at most half of the slots, so that the next one's copies
are made while it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .gpu_device import Device
from .site import Site, bits
from .slots import HostBank, Key, Matrix, Slots
from .tier import Evict, Tier

LIKELY = 0.3
"""Least chance of an expert to be wanted next at which it is copied ahead."""


class HostTier(Tier):
    """Banks of host memory, of which at most ``capacity`` bytes have slots on ``device``.

    All units are of one ``layout``: the matrices of an expert.
    """

    def __init__(
        self,
        capacity: int,
        device: Device,
        layout: Sequence[Matrix],
        ahead: bool = True,
        evict: Evict = "value",
    ) -> None:
        super().__init__(capacity, ahead, evict)
        self.slots = Slots(device, layout)
        self._fit()

    def limit(self, capacity: int) -> None:
        """See `Tier.limit`; where the number of slots changes, all are emptied."""
        with self._turn, self._state:
            if capacity // self.slots.nbytes != self.slots.count:
                self._drop([(s.number, u) for s in self.sites for u in bits(self._resident_of(s))])
            super().limit(capacity)
            self._fit()

    def _fit(self) -> None:
        self.slots.resize(self.capacity // self.slots.nbytes)

    def _resident_of(self, site: Site) -> int:
        return self._resident[site.number]

    def site_of(self, banks: Sequence[HostBank]) -> Site:
        """The place that fetches experts with a unit of each of ``banks``."""
        units: Any = [[(bank, u) for bank in banks] for u in range(banks[0].count)]
        return self.site(units)

    def keys(self, site: Site, units: Sequence[int]) -> list[Key]:
        """What slots know units by."""
        return [(site.number, unit) for unit in units]

    def waves(
        self, site: Site, counts: Sequence[int], only: Sequence[Any] | None = None
    ) -> Iterator[Sequence[int]]:  # type: ignore[override]
        """For what `fetch` refused: units with rows, which together are all of them; those that the
        caller has have slots.
        """
        resident = self._resident_of(site)
        wanted = [u for u, count in enumerate(counts) if count]
        wanted.sort(key=lambda u: not resident >> u & 1)
        most = max(1, self.slots.count // 2)
        before = 0
        for first in range(0, len(wanted), most):
            group = wanted[first : first + most]
            mask = sum(1 << u for u in group)
            with self._state:
                missing = mask & ~self._resident_of(site)
                kept = mask | before if 2 * most <= self.slots.count else mask
                self._frames[-1] = site.number, kept
                self._count.waves += 1
                self._count.misses += missing.bit_count()
                self._count.hits += (mask & ~missing).bit_count()
                self._make_room(site.size(missing))
                self._keep(site, missing)
                for unit in bits(missing):
                    self._load(site, unit)
            yield group
            before = mask

    # -- what `Tier` does otherwise ---------------------------------------------------------------

    def _load(self, site: Site, unit: int, ahead: bool = False) -> None:
        parts: Sequence[tuple[Any, int]] = site.units[unit]
        matrices = [bank.tensor[number] for bank, number in parts]
        self.slots.load((site.number, unit), matrices, ahead)

    def _let_go(self, keys: Sequence[Key], parts: Sequence[tuple[Any, int]]) -> None:
        for key in keys:
            self.slots.give(key)

    def _look_ahead(self) -> None:
        """Has the slots of unlikely units filled with what the next site is likely to want."""
        following = self._following()
        if following is None or not following[0].units:
            return
        site, chance = following
        with self._state:
            lacking = ~self._resident_of(site)
            for unit in np.argsort(-chance).tolist():
                if chance[unit] < LIKELY:
                    return
                if not lacking >> unit & 1:
                    continue
                key = (site.number, unit)
                if not self._displace(key):
                    return
                self._keep(site, 1 << unit)
                self._unused.add(key)
                self._count.ahead += 1
                self._load(site, unit, ahead=True)
