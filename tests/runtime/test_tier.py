"""The budget holds at every moment; what is wanted is resident; evictions follow what was seen."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.runtime import tier as tiers
from plait.runtime.tier import Tier

BYTES = 1000


class Pretended:
    """A bank that only notes what is mapped."""

    def __init__(self, count: int, unit_bytes: int = BYTES) -> None:
        self.count, self.unit_bytes = count, unit_bytes
        self.mapped: set[int] = set()

    def load(self, unit: int) -> None:
        self.mapped.add(unit)


@pytest.fixture(autouse=True)
def pretended_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(parts: Sequence[tuple[Any, int]]) -> None:
        for bank, unit in parts:
            bank.mapped.discard(unit)

    monkeypatch.setattr(tiers, "drop", drop)


def sites(tier: Tier, banks: Sequence[Any]) -> list[Any]:
    return [tier.site([[(bank, u)] for u in range(bank.count)]) for bank in banks]


def mapped(banks: Sequence[Any]) -> int:
    return sum(len(bank.mapped) * bank.unit_bytes for bank in banks)


def counts(units: Sequence[int], size: int) -> list[int]:
    return [units.count(unit) for unit in range(size)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=60),
    st.sampled_from(["value", "lru"]),
    st.booleans(),
)
def test_the_budget_holds_for_any_routes(
    room: int, routes: list[list[int]], evict: Any, ahead: bool
) -> None:
    banks = [Pretended(6, BYTES), Pretended(6, 700), Pretended(4, 1500)]
    capacity = room * BYTES
    tier = Tier(capacity, ahead, evict)
    places = sites(tier, banks)
    for number, route in enumerate(routes):
        bank, site = banks[number % 3], places[number % 3]
        wanted = counts([u % bank.count for u in route], bank.count)
        need = [u for u, count in enumerate(wanted) if count]
        with tier.using():
            if tier.fetch(site, wanted):
                assert set(need) <= bank.mapped
            else:
                assert len(need) * bank.unit_bytes > capacity
                seen: list[int] = []
                last = 0
                for begin, end in tier.waves(site, wanted):
                    assert begin == last
                    last = end
                    now = [u for u in need if begin <= u < end]
                    assert set(now) <= bank.mapped
                    assert mapped(banks) <= max(capacity, bank.unit_bytes)
                    seen += now
                assert seen == need and last == bank.count
        if not ahead:
            assert mapped(banks) == tier.resident_bytes <= capacity
    most = capacity if capacity >= 1500 else 1500
    assert tier.counters.peak_bytes <= most


def test_what_is_wanted_often_stays() -> None:
    bank = Pretended(8)
    tier = Tier(3 * BYTES, ahead=False)
    (site,) = sites(tier, [bank])
    for k in range(60):
        with tier.using():
            tier.fetch(site, counts([0], 8))
        with tier.using():
            tier.fetch(site, counts([1 + k % 7], 8))
    assert 0 in bank.mapped
    tier.counters.hits = tier.counters.misses = 0
    for _ in range(10):
        with tier.using():
            tier.fetch(site, counts([0], 8))
    assert tier.counters.misses == 0


def test_a_cycle_larger_than_the_budget_hits_where_lru_never_does() -> None:
    rates = {}
    for evict in ("value", "lru"):
        banks = [Pretended(1) for _ in range(10)]
        tier = Tier(5 * BYTES, ahead=False, evict=evict)
        places = sites(tier, banks)
        for _ in range(30):
            for site in places:
                with tier.using():
                    tier.fetch(site, counts([0], 1))
        rates[evict] = tier.counters.hit_rate
    assert rates["lru"] == 0.0
    assert rates["value"] > 0.35  # Belady's rule hits 4 times in 9


def test_an_inner_call_does_not_drop_what_the_outer_one_uses() -> None:
    outer, inner = Pretended(4), Pretended(4)
    tier = Tier(2 * BYTES, ahead=False)
    one, two = sites(tier, [outer, inner])
    with tier.using():
        assert tier.fetch(one, counts([0], 4))
        for unit in range(4):
            with tier.using():
                assert tier.fetch(two, counts([unit], 4))
                assert 0 in outer.mapped and unit in inner.mapped
        with tier.using():
            assert not tier.fetch(two, counts([0, 1], 4))
            assert list(tier.waves(two, counts([0, 1], 4))) == [(0, 1), (1, 4)]
    assert tier.counters.over == 0


def test_waves_leave_room_for_what_is_fetched_within_them() -> None:
    outer, inner = Pretended(4), Pretended(4, 700)
    tier = Tier(2 * BYTES, ahead=False)
    units: list[Any] = [[(outer, 0)], [], [(outer, 2)], [(outer, 3)]]
    one = tier.site(units, [0, 1100, 0, 0])  # the second has nothing of its own
    (two,) = sites(tier, [inner])
    seen = []
    with tier.using():
        assert tier.fetch(one, counts([0, 2], 4))
        assert tier.fetch(one, counts([1], 4))
        assert not tier.fetch(one, counts([0, 1], 4))  # would fit if nothing ran within
        for begin, end in tier.waves(one, counts([0, 1, 2, 3], 4)):
            seen.append((begin, end))
            with tier.using():
                assert tier.fetch(two, counts([3], 4)) == (end - begin == 1)
                if begin == 1:
                    assert not tier.fetch(two, counts([0, 1, 2], 4))
                    assert list(tier.waves(two, counts([0, 1, 2], 4))) == [(0, 2), (2, 4)]
            assert mapped([outer, inner]) <= 2 * BYTES
    assert seen == [(0, 1), (1, 2), (2, 4)]
    assert tier.counters.over == 0 and tier.counters.peak_bytes <= 2 * BYTES


def test_units_without_anything_to_load_are_neither_hits_nor_misses() -> None:
    bank = Pretended(1)
    tier = Tier(BYTES, ahead=False)
    site = tier.site([[], [(bank, 0)], []])
    for _ in range(3):
        with tier.using():
            assert tier.fetch(site, [4, 5, 6])
    assert (tier.counters.hits, tier.counters.misses) == (2, 1)
    assert tier.resident_bytes == BYTES


def test_a_lower_limit_drops_at_once() -> None:
    bank = Pretended(4)
    tier = Tier(4 * BYTES, ahead=False)
    (site,) = sites(tier, [bank])
    with tier.using():
        tier.fetch(site, counts([0, 1, 2], 4))
    tier.limit(BYTES)
    assert tier.resident_bytes == mapped([bank]) == BYTES and not tier.counters.over


def test_likely_units_are_loaded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.runtime.load_costs.WAKE", 0.0)
    banks = [Pretended(4), Pretended(4)]
    tier = Tier(3 * BYTES)
    first, second = sites(tier, banks)
    loaded = threading.Event()
    real = banks[1].load

    def load(unit: int) -> None:
        real(unit)
        if threading.current_thread().name.startswith("plait"):
            loaded.set()

    banks[1].load = load  # type: ignore[method-assign]
    for k in range(30):  # unit k of the first site is followed by unit k of the second
        with tier.using():
            tier.fetch(first, counts([k % 4], 4))
            if k > 20 and loaded.wait(1.0):
                break
            tier.fetch(second, counts([k % 4], 4))
    assert tier.counters.ahead > 0


def test_nothing_is_loaded_ahead_when_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.runtime.load_costs.WAKE", 0.0)
    banks = [Pretended(2), Pretended(2)]
    tier = Tier(BYTES)
    found = sites(tier, banks)

    def ending(*_: Any) -> None:
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(tiers.ThreadPoolExecutor, "submit", ending)
    for k in range(30):
        for site in found:
            with tier.using():
                assert tier.fetch(site, counts([k % 2], 2))
    assert not tier.ahead and not tier.counters.ahead


def test_a_failed_load_is_told_and_not_taken_for_resident() -> None:
    bank = Pretended(2)

    def fail(_: int) -> None:
        raise OSError("gone")

    tier = Tier(4 * BYTES, ahead=False)
    (site,) = sites(tier, [bank])
    bank.load = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="gone"), tier.using():
        tier.fetch(site, counts([0], 2))
    del bank.load
    with tier.using():
        assert tier.fetch(site, counts([0], 2))
    assert bank.mapped == {0}


def test_what_nobody_fetches_any_more_is_dropped() -> None:
    old, new = Pretended(4), Pretended(4)
    tier = Tier(2 * BYTES, ahead=False)
    one, two = sites(tier, [old, new])
    with tier.using():
        tier.fetch(one, counts([0, 1], 4))
    tier.leave([one])
    with tier.using():
        tier.fetch(two, counts([2], 4))
    assert not old.mapped and tier.resident_bytes == BYTES


def test_a_profile_tells_what_to_expect() -> None:
    tier = Tier(1, ahead=False)
    forecast = tier.forecast
    a, b = forecast.add(3), forecast.add(3)
    forecast.prior(a, [0, 10, 0])
    forecast.prior(b, [5, 0, 5])
    forecast.prior_pair(a, b, [[0, 0, 0], [0, 0, 9], [0, 0, 0]])
    forecast.saw(a, np.array([0, 1, 0]), 1)
    following = forecast.next()
    assert following is not None
    site, chance = following
    assert site == b and chance.argmax() == 2
    distance = forecast.distance(1)
    assert distance[a].argmin() == 1 and distance[b].argmax() == 1
    forecast.prior(a, [1, 2])  # of a router with other branches: ignored
    forecast.prior_pair(a, b, [[1.0]])


def test_calls_on_made_up_inputs_count_for_nothing() -> None:
    bank = Pretended(4)
    tier = Tier(2 * BYTES)
    (site,) = sites(tier, [bank])
    tier.record = []
    shares = tier.forecast.distance(1).copy()
    with tier.trying(), tier.using():
        for unit in (0, 1, 2, 0):
            tier.fetch(site, counts([unit], 4))
    assert tier.counters == tiers.Counters() and tier.record == []
    assert np.array_equal(tier.forecast.distance(1), shares)
    assert len(bank.mapped) == 2  # the budget holds all the same
    with tier.using():
        tier.fetch(site, counts([3], 4))
    assert (tier.counters.fetches, tier.counters.misses) == (1, 1) and len(tier.record) == 1
