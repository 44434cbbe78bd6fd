"""What a profile says about the routes of one router, batch by batch, and how likely that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from .route_regions import NONE

MIXED = -2
"""Cells of one batch went different ways."""
ANY = -3
"""No cell was routed: every bet on such a batch is won."""


class Loads(Protocol):
    """How often the branches of a router were taken; an entry for each batch in which it ran."""

    @property
    def loads(self) -> Sequence[Sequence[int]]:
        """Slots of each branch, per batch."""
        ...

    @property
    def cells(self) -> Sequence[int]:
        """Cells per batch."""
        ...

    @property
    def slots(self) -> Sequence[int]:
        """Slots per batch, those that name no branch included."""
        ...


Key = tuple[str, int]
Routes = Mapping[Key, tuple[Loads | None, Loads | None]]
"""The fitted and the held-out loads of each router, by its name and number of calls before."""


def outcomes(stats: Loads) -> list[int]:
    """For each batch the branch that all slots took, `NONE`, `MIXED` or `ANY`."""
    found = []
    for load, slots in zip(stats.loads, stats.slots, strict=True):
        whole = [b for b, count in enumerate(load) if count == slots]
        if not slots:
            found.append(ANY)
        elif whole:
            found.append(whole[0])
        else:
            found.append(MIXED if any(load) else NONE)
    return found


def likely_outcome(fitted: Loads, least: float) -> int:
    """The outcome of at least a share ``least`` of the batches that routed; `MIXED` if none."""
    counts = Counter(o for o in outcomes(fitted) if o != ANY)
    if not counts:
        return MIXED
    outcome, count = counts.most_common(1)[0]
    return outcome if outcome != MIXED and count >= least * counts.total() else MIXED


def joint(held: Mapping[Key, Loads], assumed: Mapping[Key, int]) -> list[bool]:
    """For each batch whether every router in ``assumed`` had that outcome.

    Empty where the routers did not all run in every batch.
    """
    columns = [outcomes(held[key]) for key in assumed if key in held]
    if len(columns) < len(assumed) or len({len(c) for c in columns}) != 1:
        return []
    wanted = list(assumed.values())
    return [
        all(o in (ANY, w) for o, w in zip(row, wanted, strict=True))
        for row in zip(*columns, strict=True)
    ]


def odds(won: int, of: int) -> float:
    """The probability of winning after ``won`` of ``of`` trials (Jeffreys' estimate): short of 0
    and 1 by what few trials leave unknown.
    """
    return (won + 0.5) / (of + 1)


def share(stats: Loads, branch: int) -> float:
    """The share of all slots that named ``branch``."""
    slots = sum(stats.slots)
    return sum(load[branch] for load in stats.loads) / slots if slots else 0.0


def capacity(counts: Sequence[int]) -> int:
    """The number of rows that, cut off in one piece where there are as many, covers the most rows
    of the batches with ``counts``; 0 for none. Of several the largest.
    """
    best = max(sorted(set(counts)), key=lambda c: (c * sum(n >= c for n in counts), c), default=0)
    return best if best > 0 else 0


def fractions(stats: Loads, batch: int) -> tuple[float, ...] | None:
    """Where in all slots each branch's end, for one batch; None where nothing was routed."""
    slots, total, ends = stats.slots[batch], 0, []
    if not slots:
        return None
    for count in stats.loads[batch]:
        total += count
        ends.append(total / slots)
    return tuple(ends)
