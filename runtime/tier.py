"""Keeps weights of a slower tier within a budget of bytes: what is wanted is loaded, what is worth
least is dropped, what is likely to be wanted next is loaded ahead by a side thread.

The worth of a unit is what loading it again would cost, over its bytes and over the time until it
is expected to be wanted (`forecast`). Where the future is known this is Belady's rule ("A study of
replacement algorithms for a virtual-storage computer", IBM Systems Journal 1966), weighted as in
GreedyDual-Size (Cao and Irani, "Cost-aware WWW proxy caching algorithms", USITS 1997).

Correctness does not hang on any of this: a bank's memory reads right whatever was loaded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import forked, load_costs
from .bank import Bank, drop, own_pidfd
from .forecast import Forecast, grown, in_sample
from .load_costs import LoadCosts
from .residency import Residency, Root
from .site import Counters, Site, bits

Evict = Literal["value", "lru"]
Key = tuple[int, int]  # a site and a unit, or a site and a set of units

GAIN = 1.25
"""How much more a unit must be worth than what makes room for it, to be loaded ahead."""
REST = 64
"""Rounds without launches that fetch, after one that could not."""


class Tier:
    """The banks of one compiled model, of which at most ``capacity`` bytes are resident.

    ``ahead`` false leaves out loading ahead; ``evict`` "lru" drops what was wanted longest ago.
    Calls take turns: `using` brackets one.

    Sets of a site's units are integers, bit u for unit u: what happens at every fetch must cost
    microseconds. Forecasts cost more; where loads are cheap they are made from a sample of calls.
    """

    def __init__(self, capacity: int, ahead: bool = True, evict: Evict = "value") -> None:
        self.capacity, self.ahead, self.evict = capacity, ahead, evict
        self.counters = Counters()
        self._count = self.counters  # those of the call whose turn it is
        self._trying: set[int] = set()  # threads
        self.record: list[tuple[int, tuple[int, ...]]] | None = None
        """Where it is a list, the number of the site and the units of every fetch are added."""
        self.forecast = Forecast()
        self.sites: list[Site] = []
        self._by_banks: dict[Any, Site] = {}
        self._leaving: deque[Site] = deque()
        self._begin_alone()
        forked.in_child(self._begin_alone)
        self._resident: list[int] = []  # of each site
        self._unused: set[Key] = set()  # loaded ahead and not wanted yet
        self._order: dict[Key, None] = {}  # all units, what is to be dropped first first
        self._stale = True
        self._sampled = -1  # the latest round of all sites that the forecast saw
        self._cost = LoadCosts()
        self._sizes = np.zeros((0, 0), dtype=np.int64)  # of units; a row per site
        self._bytes = 0
        self._waving = 0  # of them, those of waves in progress
        self._now = 0
        self._seen = 0  # fetches that the forecast was told of
        self._native = Residency()
        self._given = False  # what is resident is known to native code, and only there
        self._ranked = False  # native code knows the order, too
        self._rest = 0  # the number of the fetch before which no launch fetches

    def _begin_alone(self) -> None:
        """No thread is at work here: as made, and in a forked child."""
        self._turn = threading.RLock()
        self._state = threading.Condition()
        self._frames: list[Key | None] = []  # site and units in use, innermost call last
        self._loading: set[Key] = set()  # units that the side thread loads
        self._thread: ThreadPoolExecutor | None = None

    @property
    def resident_bytes(self) -> int:
        """What is resident now."""
        return int(self._native.root[Root.BYTES]) if self._given else self._bytes

    def limit(self, capacity: int) -> None:
        """Lets at most ``capacity`` bytes be resident from now on."""
        with self._turn, self._state:
            self._take_back()
            self.capacity = capacity
            self._make_room(0)

    def site(self, units: Sequence[Sequence[tuple[Bank, int]]], beside: Sequence[int] = ()) -> Site:
        """The place that fetches ``units``, the same one for the same banks, until `leave`; what it
        fetches ``beside`` each as in `Site`.
        """
        banks = (tuple((id(bank), number) for bank, number in unit) for unit in units)
        key = (*banks, tuple(beside))
        with self._turn, self._state:
            self._take_back()
            self._forget()
            found = self._by_banks.get(key)
            if found is None:
                number = self.forecast.add(len(units))
                sizes = [sum(bank.unit_bytes for bank, _ in unit) for unit in units]
                found = Site(number, units, sizes, beside)
                self.sites.append(found)
                self._resident.append(0)
                self._sizes = grown(self._sizes, len(units), 0)
                self._sizes[number, : len(units)] = sizes
                self._order.update(dict.fromkeys((number, u) for u in range(len(units))))
                self._ranked = False
                self._by_banks[key] = found
            found.users += 1
            return found

    def leave(self, sites: Sequence[Site]) -> None:
        """Takes back as many `site` calls; what nobody fetches any more is dropped later."""
        self._leaving.extend(sites)  # a garbage collector calls, in the midst of anything

    def _forget(self) -> None:
        while self._leaving:
            site = self._leaving.popleft()
            site.users -= 1
            if not site.users:
                self._drop([(site.number, unit) for unit in bits(self._resident[site.number])])
                self._by_banks = {k: s for k, s in self._by_banks.items() if s is not site}
                self._order = {k: None for k in self._order if k[0] != site.number}
                self._ranked = False
                site.units = ()

    @contextmanager
    def using(self) -> Iterator[None]:
        """A call, or a part of one: what it fetched last stays until it fetches again or ends."""
        with self._turn:
            if not self._frames:
                trial = threading.get_ident() in self._trying
                self._count = Counters() if trial else self.counters
            self._frames.append(None)
            try:
                yield
            finally:
                self._frames.pop()

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Calls of this thread within it, on inputs that are made up, count for nothing."""
        thread = threading.get_ident()
        self._trying.add(thread)
        try:
            yield
        finally:
            self._trying.discard(thread)

    # -- fetching -------------------------------------------------------------------------------

    def fetch(self, site: Site, counts: Sequence[int]) -> bool:
        """Makes the units with rows resident until the caller's next fetch; inside `using`.

        ``counts`` are rows per unit. False where they do not fit together: see `waves`. Raises
        BankError.
        """
        number, wanted, bit = site.number, 0, 1
        for count in counts:
            if count:
                wanted |= bit
            bit <<= 1
        reserved, wanted = site.reserved(bits(wanted)), wanted & site.mask
        counters = self._count
        with self._state:
            self._take_back()
            if self._leaving:
                self._forget()
            self._now += 1
            counters.fetches += 1
            self._frames[-1] = None
            trial = counters is not self.counters
            if not trial:
                self._observe(number, counts)
                if self.record is not None:
                    self.record.append((number, tuple(bits(wanted))))
            missing = wanted & ~self._resident[number]
            if missing or site.nested:  # what is resident needs no room
                if site.size(wanted) + reserved + self._held() > self.capacity:
                    return False
                counters.misses += missing.bit_count()
            self._frames[-1] = number, wanted
            counters.hits += (wanted & ~missing).bit_count()
            if self.evict == "lru":
                for unit in bits(wanted):
                    del self._order[number, unit]
                    self._order[number, unit] = None
            late = 0
            if self._unused:
                ours = {k for k in self._unused if k[0] == number and wanted >> k[1] & 1}
                counters.useful += len(ours)
                self._unused -= ours
                late = sum(1 << u for s, u in self._loading if s == number) & wanted
            if missing:
                self._make_room(site.size(missing))
                self._keep(site, missing)
        if missing | late:
            start = time.perf_counter()
            for unit in bits(missing | late):
                self._load(site, unit)
            counters.seconds += time.perf_counter() - start
        if self.ahead and not self._cost.cheap and not trial:
            self._look_ahead()
        return True

    def used(self) -> None:
        """The caller does not need any more what it has fetched last; inside `using`."""
        with self._state:
            self._frames[-1] = None

    def within(self) -> Residency | None:
        """What a launch needs to fetch by itself until `fetched`; None where `fetch` has to. Inside
        `using`.
        """
        plain = self._cost.cheap and self.evict == "value" and self.record is None
        if not plain or len(self._frames) > 1 or self._count is not self.counters:
            return None
        with self._state:
            sampled = in_sample(self._now // max(1, len(self.sites)))
            if sampled or self._now < self._rest or self._leaving or self._loading:
                return None
            self._unused.clear()
            native = self._native
            for site in self.sites[len(native.first) :]:
                native.add(site)
            if self._stale:
                self._rank()
            if not self._ranked:
                native.rank(self._order)
                self._ranked = True
            if not self._given:
                native.push(self._resident, self._bytes)
                self._given = True
            native.root[Root.CAPACITY], native.root[Root.PIDFD] = self.capacity, own_pidfd()
            return native

    def fetched(self) -> bool:
        """Counts what a launch has fetched; False where it stopped, and nothing came of it."""
        with self._state:
            counters, native = self._count, self._native
            fetches, hits, misses, dropped, moved, peak = native.counted()
            counters.dropped += dropped
            counters.bytes_moved += moved
            counters.peak_bytes = max(counters.peak_bytes, peak)
            if native.root[Root.STOP]:
                self._rest = self._now + REST * len(self.sites)
                return False
            self._now += fetches
            counters.fetches += fetches
            counters.hits += hits
            counters.misses += misses
            counters.inside += 1
            return True

    def _take_back(self) -> None:
        """What is resident, from native code; with the state locked and no launch under way."""
        if self._given:
            self._resident, self._bytes = self._native.pull()
            self._given = False

    def waves(
        self, site: Site, counts: Sequence[int], only: Sequence[Bank] | None = None
    ) -> Iterator[tuple[int, int]]:
        """For what `fetch` refused: ranges ``(begin, end)`` of units that together cover all, in
        order; a range's units with rows are resident while the caller has it.

        ``only`` names the banks that are wanted of them. A single unit that does not fit beside
        what outer calls hold is loaded all the same, and counted. Raises BankError.
        """
        sizes = [
            sum(b.unit_bytes for b, _ in unit if only is None or b in only) for unit in site.units
        ]
        room = self.capacity - self._held()
        wanted = [u for u, count in enumerate(counts) if count and (sizes[u] or site.nested)]
        begin, group = 0, wanted[:1]
        for unit in [*wanted[1:], None]:
            size = sum(sizes[u] for u in group)
            if unit is not None:
                reserved = site.reserved([*group, unit])
                if size + sizes[unit] + reserved <= room:
                    group.append(unit)
                    continue
            end = len(sizes) if unit is None else unit
            with self._wave(site, group, size, only):
                yield begin, end
            begin, group = end, [] if unit is None else [unit]

    @contextmanager
    def _wave(
        self, site: Site, units: Sequence[int], size: int, only: Sequence[Bank] | None
    ) -> Iterator[None]:
        parts = [part for u in units for part in site.units[u] if only is None or part[0] in only]
        with self._state:
            self._make_room(size)
            self._bytes += size
            self._waving += size
            self._count.peak_bytes = max(self._count.peak_bytes, self._bytes)
            self._count.waves += 1
            self._count.misses += len(units)
            self._count.bytes_moved += size
        start = time.perf_counter()
        try:
            for bank, number in parts:
                bank.load(number)
            self._count.seconds += time.perf_counter() - start
            yield
        finally:
            with self._state:
                self._bytes -= size
                self._waving -= size
                drop(parts)
                resident = self._resident[site.number]  # what is, lost a part
                self._drop([(site.number, unit) for unit in units if resident >> unit & 1])

    def _load(self, site: Site, unit: int) -> None:
        began = self._cost.begin()
        try:
            for bank, number in site.units[unit]:
                bank.load(number)
        except OSError:
            with self._state:
                if self._resident[site.number] >> unit & 1:
                    self._drop([(site.number, unit)])
            raise
        self._cost.end(began, site.bytes[unit])

    # -- the budget; with the state locked --------------------------------------------------------

    def _observe(self, site: int, counts: Sequence[int]) -> None:
        """Tells the forecast; where loads are cheap, of one round of all sites in `SAMPLE`."""
        rounds = self._round()
        if self._cost.cheap and not in_sample(rounds):
            return
        self._sampled = rounds
        self._seen += 1
        self.forecast.saw(site, np.asarray(counts), self._seen)
        self._stale = True

    def _round(self) -> int:
        """How often all sites have come round before the latest fetch."""
        return (self._now - 1) // max(1, len(self.sites))

    def _held(self) -> int:
        """Bytes that outer calls use."""
        if len(self._frames) < 2:
            return 0
        frames = [frame for frame in self._frames[:-1] if frame is not None]
        return self._waving + sum(self.sites[s].size(mask) for s, mask in frames)

    def _keep(self, site: Site, mask: int) -> None:
        self._resident[site.number] |= mask
        size = site.size(mask)
        self._bytes += size
        self._count.bytes_moved += size
        self._count.peak_bytes = max(self._count.peak_bytes, self._bytes)

    def _drop(self, keys: Sequence[Key]) -> None:
        parts: list[tuple[Bank, int]] = []
        for site, unit in keys:
            self._resident[site] &= ~(1 << unit)
            self._unused.discard((site, unit))
            self._bytes -= self.sites[site].bytes[unit]
            parts += self.sites[site].units[unit]
        self._count.dropped += len(keys)
        if parts:
            self._let_go(keys, parts)

    def _let_go(self, keys: Sequence[Key], parts: Sequence[tuple[Bank, int]]) -> None:
        """Gives up the memory of units, which are these ``parts`` of banks."""
        drop(parts)

    def _make_room(self, size: int) -> None:
        """Drops the least worthy units until ``size`` more bytes fit."""
        while self._bytes + size > self.capacity:
            self._drop(self._victims(self._bytes + size - self.capacity))
            if self._bytes + size <= self.capacity:
                return
            if not self._loading:
                self._count.over += 1  # an outer call holds the rest
                return
            self._state.wait()

    def _worth(self) -> NDArray[np.float64]:
        return self._cost.by_byte(self._sizes) / self.forecast.distance(self._seen)

    def _rank(self) -> None:
        worth = self._worth().tolist()  # whose elements are found sooner
        ranked = sorted(self._order, key=lambda key: worth[key[0]][key[1]])
        self._order = dict.fromkeys(ranked)
        self._stale = self._ranked = False

    def _victims(self, size: int) -> list[Key]:
        """The least worthy units that nobody uses, up to ``size`` bytes."""
        if self._stale and self.evict == "value":
            # Once for a round that forecasts see, where they do not see all.
            if not self._cost.cheap or self._sampled != self._round():
                self._rank()
        free = list(self._resident)
        for frame in self._frames:
            if frame is not None:
                free[frame[0]] &= ~frame[1]
        for site, unit in self._loading:
            free[site] &= ~(1 << unit)
        found: list[Key] = []
        for key in self._order:
            site, unit = key
            if free[site] >> unit & 1:
                found.append(key)
                size -= self.sites[site].bytes[unit]
                if size <= 0:
                    break
        return found

    # -- ahead ------------------------------------------------------------------------------------

    def _following(self) -> tuple[Site, NDArray[np.float64]] | None:
        """The next site to fetch, and of each unit the chance that it wants it; None if nobody
        knows.
        """
        following = self.forecast.next()
        return None if following is None else (self.sites[following[0]], following[1])

    def _look_ahead(self) -> None:
        """Lets the side thread load what the next site is likely to want, where that pays."""
        following = self._following()
        if following is None:
            return
        site, chance = following
        saved = chance * self._cost.of(site.bytes)
        lacking = ~self._resident[site.number]
        wanted = [
            unit
            for unit in np.argsort(-saved).tolist()
            if saved[unit] > load_costs.WAKE and lacking >> unit & 1
        ]
        if wanted:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "plait-weights")
            try:
                self._thread.submit(self._load_ahead, site, wanted, self._now)
            except RuntimeError:  # the process is ending, or may have no more threads
                self.ahead = False

    def _load_ahead(self, site: Site, units: Sequence[int], asked: int) -> None:
        for unit in units:
            key = (site.number, unit)
            with self._state:
                if self._given or self._now != asked or not site.units:
                    return
                if not self._displace(key):
                    return
                self._loading.add(key)
                self._keep(site, 1 << unit)
                self._unused.add(key)
                self._count.ahead += 1
            try:
                self._load(site, unit)
            except OSError:
                return  # the call that wants it meets the error, and tells
            finally:
                with self._state:
                    self._loading.discard(key)
                    self._state.notify_all()

    def _displace(self, key: Key) -> bool:
        """Makes room for a unit out of less worthy ones; False, and nothing done, where that is
        not possible.
        """
        site, unit = key
        if self._resident[site] >> unit & 1:
            return False
        lack = self._bytes + self.sites[site].bytes[unit] - self.capacity
        if lack <= 0:
            return True
        leaving = self._victims(lack)
        if sum(self.sites[s].bytes[u] for s, u in leaving) < lack:
            return False
        if self.evict == "value":
            worth = self._worth()
            if any(worth[gone] * GAIN > worth[key] for gone in leaving):
                return False
        self._drop(leaving)
        return True
