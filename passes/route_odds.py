"""What a profile says about the routes of one router, batch by batch, and how likely that is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from .route_regions import Group

MIXED: Group = (-2,)
"""Cells of one batch went different ways."""
ANY: Group = (-3,)
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

    @property
    def together(self) -> Sequence[Sequence[int]]:
        """How many cells of all batches took branches a and b; empty where nobody counted."""
        ...


Key = tuple[str, int]
Routes = Mapping[Key, tuple[Loads | None, Loads | None]]
"""The fitted and the held-out loads of each router, by its name and number of calls before."""


@dataclass(frozen=True)
class Grouping:
    """Branches that cells take together or not at all: all that are taken, each in one group.

    ``whole`` tells that every cell takes exactly one group.
    """

    groups: tuple[Group, ...]
    whole: bool

    @cached_property
    def members(self) -> Group:
        """The branches of all groups."""
        return tuple(itertools.chain(*self.groups))

    @property
    def slots(self) -> int:
        """The slots of a cell."""
        return 1 if self.whole else len(self.groups)

    def loads(self, load: Sequence[int]) -> tuple[int, ...]:
        """The slots of each group, for those of each branch."""
        return tuple(load[group[0]] for group in self.groups)

    def branches(self, load: Sequence[int], count: int) -> tuple[int, ...]:
        """The slots of each of ``count`` branches, for those of each group."""
        slots = dict.fromkeys(range(count), 0)
        for group, taken in zip(self.groups, load, strict=True):
            slots.update(dict.fromkeys(group, taken))
        return tuple(slots.values())


def label_of(key: Key) -> str:
    """A router's key as text."""
    name, call = key
    return (name or "(model)") + (f" #{call + 1}" if call else "")


def outcomes(stats: Loads, share: int) -> list[Group]:
    """For each batch the branches that every cell took, `MIXED` or `ANY`.

    A cell has ``share`` slots. Counts are all there is to tell it: no cell is taken to name a
    branch twice.
    """
    found = []
    for load, slots in zip(stats.loads, stats.slots, strict=True):
        group = tuple(b for b, count in enumerate(load) if count)
        together = all(load[b] * share == slots for b in group)
        found.append(ANY if not slots else group if together else MIXED)
    return found


def likely_outcome(fitted: Loads, least: float, share: int) -> Group:
    """The outcome of at least a share ``least`` of the batches that routed; `MIXED` if none."""
    counts = Counter(o for o in outcomes(fitted, share) if o != ANY)
    if not counts:
        return MIXED
    outcome, count = counts.most_common(1)[0]
    return outcome if outcome != MIXED and count >= least * counts.total() else MIXED


def joint(
    held: Mapping[Key, Loads],
    assumed: Mapping[Key, Group],
    grouped: Mapping[Key, Grouping],
    shares: Mapping[Key, int],
) -> list[bool]:
    """For each batch whether every router in ``assumed`` had that outcome and those in ``grouped``
    kept to their groups; a cell has so many slots as ``shares`` tells.

    Which batch had the cells that left their groups is not known: each is counted as one batch of
    its own. Empty where the routers did not all run in every batch.
    """
    if any(key not in held for key in (*assumed, *grouped)):
        return []
    counts = {len(held[key].cells) for key in (*assumed, *grouped)}
    if len(counts) != 1:
        return []
    columns = {key: outcomes(held[key], shares[key]) for key in assumed}
    won = [
        all(columns[key][batch] in (ANY, group) for key, group in assumed.items())
        for batch in range(counts.pop())
    ]
    for key, grouping in grouped.items():
        for _ in range(min(broken(held[key], grouping), sum(won))):
            won[won.index(True)] = False
    return won


def grouping(fitted: Loads, least: float, share: int) -> Grouping | None:
    """Branches that run together although cells go different ways, in at least a share ``least`` of
    the batches; None where there are none. A cell has ``share`` slots.
    """
    table, groups = fitted.together, []
    allowed = (1.0 - least) * len(fitted.cells)
    for b in (b for b in range(len(table)) if table[b][b]):
        home = next((g for g in groups if _apart(table, g[0], b) <= allowed), None)
        if home is None:
            groups.append([b])
        else:
            home.append(b)
    if share == 1 or all(len(group) == 1 for group in groups):
        return None
    found = tuple(map(tuple, groups))
    for whole in (True, False):
        if broken(fitted, Grouping(found, whole)) <= allowed:
            return Grouping(found, whole)
    return None


def broken(stats: Loads, grouping: Grouping) -> int:
    """The number of cells that do not fit a grouping, at most: so many batches may be lost."""
    table = stats.together
    lost = sum(table[b][b] for b in range(len(table)) if b not in grouping.members)
    lost += sum(_apart(table, group[0], b) for group in grouping.groups for b in group[1:])
    if grouping.whole:
        firsts = [group[0] for group in grouping.groups]
        several = sum(table[a][b] for a, b in itertools.combinations(firsts, 2))
        # Cells without a group are those that groups lack, and more where cells have several.
        lost += max(0, sum(stats.cells) - sum(table[b][b] for b in firsts)) + 2 * several
    return lost


def _apart(table: Sequence[Sequence[int]], a: int, b: int) -> int:
    """Cells that took one of two branches."""
    return table[a][a] + table[b][b] - 2 * table[a][b]


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


def fractions(load: Sequence[int], slots: int) -> tuple[float, ...] | None:
    """Where in all slots each branch's end, for one batch; None where nothing was routed."""
    total, ends = 0, []
    if not slots:
        return None
    for count in load:
        total += count
        ends.append(total / slots)
    return tuple(ends)
