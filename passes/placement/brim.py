"""Contiguous splits that use devices up, found by simulation: memory at work is no sum of sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .clusters import depths
from .engine import Engine
from .problem import Arrays, Floats, Ints


def brim_splits(engine: Engine, orders: Ints) -> Iterator[Ints]:
    """Devices by unit: an order of the units cut where one unit more would be too much.

    One device after another is given as many units as its simulated peak has room for, while what
    comes later is on the next; and once more while it is where it then is. Splits that leave the
    last devices more than they can hold are not shown.
    """
    p = engine.arrays
    m = len(p.cap)
    stays = p.param + (p.out + p.temp if p.static else 0.0)
    always = np.bincount(p.unit, stays, len(p.unit_ptr) - 1)
    sequences = [np.arange(m), np.arange(m)[::-1], np.argsort(-p.cap, kind="stable")]
    sequences = list({tuple(s.tolist()): s for s in sequences}.values())
    for order in (_by_first(p), *orders):
        for devices in sequences:
            cuts = np.full(m, len(order))
            before = np.concatenate([[0.0], np.cumsum(always[order])])
            room = p.cap[devices]
            for _ in range(2):
                for k in range(m - 1):
                    _widen(engine, order, devices, cuts, k, before)
                    if before[-1] - before[cuts[k]] > room[k + 1 :].sum():
                        break
                else:
                    yield _devices(p, order, devices, cuts)
                    continue
                break


def _by_first(p: Arrays) -> Ints:
    """Units by the earliest of their ops: layers of a training graph in the order of its inputs."""
    place = np.empty(len(p.topo))
    place[p.topo] = np.arange(len(p.topo))
    first = np.full(len(p.unit_ptr) - 1, np.inf)
    np.minimum.at(first, p.unit, depths(p)[0] + 1e-12 * place)
    return np.argsort(first, kind="stable")


def _devices(p: Arrays, order: Ints, devices: Ints, cuts: Ints) -> Ints:
    """Devices by unit: of ``order``, device ``devices[k]`` has what lies before ``cuts[k]``."""
    device = np.empty(len(order), np.int64)
    ends = np.maximum.accumulate(cuts)
    device[order] = devices[np.searchsorted(ends, np.arange(len(order)), "right")]
    wrong = ~p.allowed[np.arange(len(order)), device]
    device[wrong] = np.argmax(p.allowed[wrong], axis=1)
    return device


def _widen(
    engine: Engine, order: Ints, devices: Ints, cuts: Ints, k: int, before: Floats
) -> None:  # fmt: skip
    """Moves the end of the k-th run as far as its device has room for; ``before[i]`` is what the
    first i units always take, in bytes.
    """
    p, d = engine.arrays, int(devices[k])
    low = int(cuts[k - 1]) if k else 0
    high = max(int(np.searchsorted(before, before[low] + p.cap[d], "right")) - 1, low)
    while low < high:
        cuts[k] = (low + high + 1) // 2
        assign = _devices(p, order, devices, cuts)[p.unit].astype(np.int32)
        engine.simulate(assign, engine.bottom_levels(assign))
        if engine.work.top[d] <= p.cap[d]:
            low = int(cuts[k])
        else:
            high = int(cuts[k]) - 1
    cuts[k] = low
