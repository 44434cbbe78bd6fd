"""Native fetches: what they leave resident, count and refuse, against sets in Python."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.runtime.bank import PAGE, SMALL, Bank, drop, own_pidfd
from plait.runtime.residency import Residency, Root, fetch_function
from plait.runtime.site import Site

UNITS, SITES = 5, 3
PIECE = SMALL  # of less, more is mapped than was asked for
FETCH = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> list[Site]:
    """Each unit has a piece of a bank of its own and one of a bank that all sites share."""
    folder: Path = tmp_path_factory.mktemp("banks")
    shared = Bank(folder, [torch.full((PIECE // 4,), float(k)) for k in range(SITES * UNITS)])
    found = []
    for number in range(SITES):
        own = Bank(folder, [torch.full((PIECE // 2,), float(k)) for k in range(UNITS)])
        units = [[(own, u), (shared, number * UNITS + u)] for u in range(UNITS)]
        found.append(Site(number, units, [3 * PIECE] * UNITS))
    return found


@pytest.fixture(params=[True, False], ids=["together", "one by one"])
def residency(sites: list[Site], request: pytest.FixtureRequest) -> Iterator[Residency]:
    result = Residency()
    for site in sites:
        result.add(site)
    result.root[Root.PIDFD] = own_pidfd() if request.param else -1
    yield result


def fetch(residency: Residency, site: Site, wanted: set[int]) -> bool:
    """One native fetch; False where it stopped."""
    offsets = np.cumsum([0, *(2 * (u in wanted) for u in range(UNITS))])
    residency.root[Root.STOP] = 0
    first = residency.first[site.number]
    call = FETCH(fetch_function())
    call(0, 1, offsets.ctypes.data, residency.address, first, UNITS)
    return not residency.root[Root.STOP]


def mapped(site: Site, unit: int) -> bool:
    """Whether the pages of a unit are in this process's memory: all of them, or none."""
    pages = [
        address + at
        for bank, number in site.units[unit]
        for address, length in [bank.pages(number)]
        for at in range(0, length, PAGE)
    ]
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        there = [os.pread(file.fileno(), 8, page // PAGE * 8)[7] >> 7 for page in pages]
    assert len(set(there)) == 1
    return bool(there[0])


def clear(residency: Residency, room: int, order: Sequence[tuple[int, int]]) -> None:
    """Nothing is resident, as far as the state goes; ``room`` units fit."""
    residency.push([0] * SITES, 0)
    residency.root[Root.CAPACITY] = room * 3 * PIECE
    residency.rank(order)
    residency.counted()


ORDERS = st.permutations([(s, u) for s in range(SITES) for u in range(UNITS)])
FETCHES = st.lists(
    st.tuples(st.integers(0, SITES - 1), st.sets(st.integers(0, UNITS - 1))), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, SITES * UNITS), ORDERS, FETCHES)
def test_what_is_wanted_is_resident_and_the_first_in_order_are_dropped(
    sites: list[Site], room: int, order: list[tuple[int, int]], fetches: list[tuple[int, set[int]]]
) -> None:
    residency = Residency()
    for site in sites:
        residency.add(site)
    residency.root[Root.PIDFD] = own_pidfd()
    clear(residency, room, order)
    held: set[tuple[int, int]] = set()
    hits = misses = dropped = made = 0
    for number, units in fetches:
        wanted = {(number, u) for u in units}
        well = fetch(residency, sites[number], units)
        assert well == (len(wanted) <= room or wanted <= held)
        if not well:
            break
        made += 1
        hits += len(wanted & held)
        misses += len(wanted - held)
        for key in order:
            if len(held | wanted) <= room:
                break
            if key in held - wanted:
                held.remove(key)
                dropped += 1
        held |= wanted
        resident, size = residency.pull()
        assert {(s, u) for s in range(SITES) for u in range(UNITS) if resident[s] >> u & 1} == held
        assert size == len(held) * 3 * PIECE
    else:
        counted = residency.counted()
        assert counted[:4] == (made, hits, misses, dropped)
        assert counted[4] == misses * 3 * PIECE
    residency.counted()
    assert residency.counted() == (0,) * 6


def test_the_system_agrees_on_what_is_resident(sites: list[Site], residency: Residency) -> None:
    drop([part for site in sites for unit in site.units for part in unit])
    order = [(s, u) for s in range(SITES) for u in range(UNITS)]
    clear(residency, 4, order)
    for number, units in [(0, {0, 1}), (1, {0, 4}), (2, {2}), (0, {1, 3}), (1, {0, 1, 2, 3})]:
        assert fetch(residency, sites[number], units)
        resident, _ = residency.pull()
        for site in sites:
            for unit in range(UNITS):
                assert mapped(site, unit) == bool(resident[site.number] >> unit & 1)
    for site in sites:  # dropped or not, what is read is right
        for bank, number in (part for unit in site.units for part in unit):
            assert (bank.tensor[number] == number).all()
    drop([part for site in sites for unit in site.units for part in unit])


def test_what_cannot_be_loaded_stops_and_is_not_taken_for_resident(sites: list[Site]) -> None:
    class Nowhere:
        """A bank whose third unit has no memory."""

        def __init__(self, bank: Any) -> None:
            self.bank = bank

        def span(self, unit: int) -> tuple[int, int]:
            return (0, PAGE) if unit == 2 else self.bank.span(unit)

        def pages(self, unit: int) -> tuple[int, int]:
            return self.bank.pages(unit)

    units = [[(Nowhere(bank), n) for bank, n in unit[:1]] for unit in sites[0].units]
    residency = Residency()
    residency.add(Site(0, units, [2 * PIECE] * UNITS))  # type: ignore[arg-type]
    residency.push([0], 0)
    residency.rank([(0, u) for u in range(UNITS)])
    residency.root[Root.CAPACITY], residency.root[Root.PIDFD] = 4 * PIECE, -1
    assert fetch(residency, sites[0], {0, 3})
    assert not fetch(residency, sites[0], {1, 2})
    assert residency.pull() == ([0b00010], 2 * PIECE)
    assert fetch(residency, sites[0], {1, 4})


def test_what_python_found_resident_is_taken_over(sites: list[Site], residency: Residency) -> None:
    clear(residency, 6, [])
    masks = [0b10010, 0b00001, 0b11111]
    residency.push(masks, 8 * 3 * PIECE)
    assert residency.pull() == (masks, 8 * 3 * PIECE)
    assert fetch(residency, sites[0], {1, 4})
    assert residency.counted()[:3] == (1, 2, 0)
    assert not fetch(residency, sites[0], {0})  # nothing may be dropped
