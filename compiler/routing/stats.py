"""What is known of a model's routes: counts per router and per batch, and what follows from them.

Everything here is plain counts, so statistics of two runs add up to those of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ...passes.route_odds import Key, label_of

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
Counts = tuple[int, ...]
Table = tuple[Counts, ...]


@dataclass(frozen=True)
class RouterStats:
    """One router over some batches.

    ``name`` is the qualified name of the module that routed ("" for the model itself), ``call``
    counts its routings within one run of the model from 0. ``cells``, ``slots`` and ``loads`` have
    an entry per batch in which it ran; ``loads[i][b]`` is the number of slots that named branch b.
    ``together[a][b]`` counts the cells that went to both a and b; the diagonal those that went to
    a at all.
    """

    name: str
    call: int
    branches: int
    cells: Counts
    slots: Counts
    loads: Table
    together: Table

    @property
    def key(self) -> Key:
        """What tells it from the model's other routers."""
        return self.name, self.call

    @property
    def label(self) -> str:
        """Its key as text."""
        return label_of(self.key)

    @cached_property
    def load(self) -> Counts:
        """Slots per branch over all batches."""
        return tuple(map(sum, zip(*self.loads, strict=True))) or (0,) * self.branches

    @property
    def dead(self) -> Counts:
        """The branches that no slot named."""
        return tuple(b for b, count in enumerate(self.load) if not count)

    @property
    def unrouted(self) -> int:
        """Slots that named no branch."""
        return sum(self.slots) - sum(self.load)

    @property
    def exit_rate(self) -> float:
        """The share of slots that named no branch: of an early exit, how many left there."""
        return self.unrouted / sum(self.slots) if any(self.slots) else 0.0

    @cached_property
    def shares(self) -> tuple[tuple[float, ...], ...]:
        """Slots of each branch per cell, a row for each batch that had cells.

        A branch that every cell takes once has 1.0; of a router with top_k = 2 they sum to 2.
        """
        batches = zip(self.loads, self.cells, strict=True)
        return tuple(tuple(x / cells for x in load) for load, cells in batches if cells)

    def quantile(self, q: float) -> tuple[float, ...]:
        """Each branch's ``q``-quantile of its `shares` over batches (linear between two).

        Zeros where no batch had cells. Raises ValueError for a ``q`` outside [0, 1].
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"a quantile is between 0 and 1, not {q}")
        if not self.shares or not self.branches:
            return (0.0,) * self.branches
        table = torch.tensor(self.shares, dtype=torch.float64)
        return tuple(torch.quantile(table, q, dim=0).tolist())

    @property
    def quantiles(self) -> dict[float, tuple[float, ...]]:
        """`quantile` for 0, 0.5, 0.9, 0.99 and 1."""
        return {q: self.quantile(q) for q in QUANTILES}

    @property
    def peak(self) -> tuple[float, ...]:
        """Each branch's largest share of a batch."""
        return self.quantile(1.0)

    def plus(self, other: RouterStats) -> RouterStats:
        """The statistics of both. Raises ValueError if the numbers of branches differ."""
        if self.branches != other.branches:
            raise ValueError(
                f"router {self.label} has {self.branches} branches in one and {other.branches} in "
                "the other"
            )
        return RouterStats(
            self.name,
            self.call,
            self.branches,
            self.cells + other.cells,
            self.slots + other.slots,
            self.loads + other.loads,
            added(self.together, other.together),
        )


@dataclass(frozen=True)
class Statistics:
    """All routers over some batches, in the order in which they first ran.

    ``pairs[a, b][i][j]`` counts the cells that went to branch i of router a and to branch j of
    router b, which ran next and on as many cells.
    """

    batches: int = 0
    routers: tuple[RouterStats, ...] = ()
    pairs: dict[tuple[Key, Key], Table] = field(default_factory=dict)

    def __getitem__(self, name: str | Key) -> RouterStats:
        """The router of that name (its first call) or key. Raises KeyError with those there are."""
        key = (name, 0) if isinstance(name, str) else name
        for router in self.routers:
            if router.key == key:
                return router
        raise KeyError(f"no router {key}; there are {[r.key for r in self.routers]}")

    def __iter__(self) -> Iterator[RouterStats]:
        return iter(self.routers)

    def __len__(self) -> int:
        return len(self.routers)

    def plus(self, other: Statistics) -> Statistics:
        """The statistics of both. Raises ValueError where they differ in a router's branches."""
        routers = {r.key: r for r in self.routers}
        for router in other.routers:
            mine = routers.get(router.key)
            routers[router.key] = router if mine is None else mine.plus(router)
        pairs = dict(self.pairs)
        for key, table in other.pairs.items():
            pairs[key] = added(pairs[key], table) if key in pairs else table
        return Statistics(self.batches + other.batches, tuple(routers.values()), pairs)


def added(a: Table, b: Table) -> Table:
    """Two tables of one shape, entry by entry."""
    return tuple(tuple(x + y for x, y in zip(r, s, strict=True)) for r, s in zip(a, b, strict=True))


@dataclass(frozen=True)
class Route:
    """One routing that ran: its router's key, index ``[cells, k]`` (int64) and branches."""

    key: Key
    index: torch.Tensor
    branches: int


@dataclass
class _Sums:
    branches: int
    cells: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    loads: list[Counts] = field(default_factory=list)
    together: torch.Tensor | int = 0


class Tally:
    """Adds up the routes of batches."""

    def __init__(self) -> None:
        self._batches = 0
        self._routers: dict[Key, _Sums] = {}
        self._pairs: dict[tuple[Key, Key], torch.Tensor] = {}

    def add(self, routes: Sequence[Route]) -> None:
        """One batch's routes, in the order in which they ran.

        Raises ValueError where a router has another number of branches than before.
        """
        self._batches += 1
        before: tuple[Key, torch.Tensor] | None = None
        for route in routes:
            n = route.branches
            sums = self._routers.setdefault(route.key, _Sums(n))
            if sums.branches != n:
                raise ValueError(
                    f"router {route.key} had {sums.branches} branches before and has {n} now"
                )
            taken = _taken(route.index, n)
            flat = route.index.reshape(-1)
            named = flat[(flat >= 0) & (flat < n)]
            sums.cells.append(taken.shape[0])
            sums.slots.append(flat.numel())
            sums.loads.append(tuple(torch.bincount(named, minlength=n).tolist()))
            sums.together = sums.together + taken.T @ taken
            if before is not None and before[1].shape[0] == taken.shape[0]:
                key = before[0], route.key
                both = before[1].T @ taken
                self._pairs[key] = self._pairs[key] + both if key in self._pairs else both
            before = route.key, taken

    def result(self) -> Statistics:
        """The statistics of all batches added so far."""
        routers = tuple(
            RouterStats(
                *key, s.branches, tuple(s.cells), tuple(s.slots), tuple(s.loads), _table(s.together)
            )
            for key, s in self._routers.items()
        )
        pairs = {key: _table(table) for key, table in self._pairs.items()}
        return Statistics(self._batches, routers, pairs)


def _taken(index: torch.Tensor, branches: int) -> torch.Tensor:
    """Which cells take which branches: ones and zeros ``[cells, branches]``.

    In float64, whose sums of ones are exact and whose products are fast.
    """
    known = torch.where((index >= 0) & (index < branches), index, branches)
    taken = torch.zeros(index.shape[0], branches + 1, dtype=torch.float64)
    return taken.scatter_(1, known, 1.0)[:, :branches]


def _table(counts: torch.Tensor | int) -> Table:
    assert isinstance(counts, torch.Tensor)
    return tuple(tuple(row) for row in counts.to(torch.int64).tolist())
