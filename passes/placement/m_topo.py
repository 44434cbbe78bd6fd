"""m-TOPO: fills devices one after another along a topological order.

From Baechi (Jeon et al., SoCC 2020): each device takes ops until its share of the memory is used,
so that loads are balanced. Needs no costs, and knows nothing of time or transfers. Conditions: it
finds a placement only where the leftover of each device is as large as the next group.
"""

from __future__ import annotations

import numpy as np

from .list_scheduling import Ledger, Listed
from .problem import Problem


def m_topo(problem: Problem, balanced: bool = False) -> Listed:
    """Places ops by m-TOPO. Raises InfeasibleError where a group fits on no device."""
    ledger = Ledger(problem, balanced=balanced)
    # The balanced cap: an equal share, and room for the largest group, within each device.
    p = problem.arrays
    need = np.bincount(p.unit, weights=p.param + p.out + p.temp).tolist()
    share = sum(need) / ledger.m + max(need, default=0.0)
    limit = [min(share, room) if p.static else share for room in ledger.room]
    order = p.topo
    used = [0.0] * ledger.m
    device = 0
    for op in order.tolist():
        more = need[ledger.unit[op]]
        booked = ledger.unit_device[ledger.unit[op]] >= 0
        able = ledger.devices(op)
        if not able:
            raise ledger.stuck(op, "m-TOPO")
        if booked:
            ledger.place(op, able[0], 0.0)
            continue
        while device + 1 < ledger.m and used[device] + more > limit[device]:
            device += 1
        # Past the last share, or where the op may not go: the device with the most room.
        here = device if device in able else max(able, key=lambda d: ledger.room[d])
        used[here] += more
        ledger.place(op, here, 0.0)
    return Listed(np.array(ledger.assign, np.int64), order)
