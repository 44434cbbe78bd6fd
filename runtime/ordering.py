"""Which worker has to wait for which other before it may start its share of a step.

Steps come one by one in the plan's order; each is cut into at most one part per worker. A part
waits for every earlier part that touches the same memory (one of the two writing) and ran
elsewhere, unless an earlier wait implies already that it is over: every worker keeps a vector clock
of how far it knows each other to be (Mattern, "Virtual Time and Global States of Distributed
Systems", 1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .spans import Span

Access = tuple[Span, bool]
"""Memory, and whether it is written."""


@dataclass(frozen=True)
class _Earlier:
    accesses: Sequence[Access]
    parts: tuple[tuple[int, int], ...]
    """(worker, number of the part on that worker)"""


class Ordering:
    """Follows the parts of all steps; says what each part has to wait for."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.counts = [0] * workers
        """Parts that each worker has so far."""
        self._known = [[0] * workers for _ in range(workers)]
        self._after: list[list[list[int]]] = [[] for _ in range(workers)]  # clock after each part
        self._earlier: list[_Earlier] = []

    def conflicts(self, accesses: Sequence[Access]) -> list[_Earlier]:
        """Earlier steps that must be over before a step with these accesses may start."""
        return [e for e in self._earlier if _conflict(e.accesses, accesses)]

    def waits(self, conflicts: Sequence[_Earlier], worker: int) -> list[tuple[int, int]]:
        """What ``worker`` has to wait for, as little as suffices: (other worker, its part)."""
        known = list(self._known[worker])
        needed: dict[int, int] = {}
        for step in conflicts:
            for other, number in step.parts:
                if other != worker and number > max(known[other], needed.get(other, 0)):
                    needed[other] = number
        # The most informed first: what it waited for itself need not be waited for again.
        order = sorted(needed.items(), key=lambda p: -sum(self._after[p[0]][p[1] - 1]))
        found = []
        for other, number in order:
            if number > known[other]:
                found.append((other, number))
                after = self._after[other][number - 1]
                known = [max(a, b) for a, b in zip(known, after, strict=True)]
        return found

    def wait(self, worker: int, waits: Sequence[tuple[int, int]]) -> None:
        """Notes that ``worker`` waits."""
        known = self._known[worker]
        for other, number in waits:
            known[:] = map(max, known, self._after[other][number - 1])

    def meet(self) -> None:
        """Notes that every worker waits for all others."""
        self._known = [list(self.counts) for _ in range(self.workers)]
        self._earlier.clear()

    def add(self, accesses: Sequence[Access], workers: Sequence[int]) -> None:
        """Adds a step with one part on each of ``workers``."""
        parts = []
        for worker in workers:
            self.counts[worker] += 1
            self._known[worker][worker] = self.counts[worker]
            self._after[worker].append(list(self._known[worker]))
            parts.append((worker, self.counts[worker]))
        least = [min(k[w] for k in self._known) for w in range(self.workers)]
        self._earlier = [
            e for e in self._earlier if any(number > least[w] for w, number in e.parts)
        ]
        self._earlier.append(_Earlier(accesses, tuple(parts)))


def _conflict(before: Sequence[Access], now: Sequence[Access]) -> bool:
    return any((written or writes) and a.overlaps(b) for a, written in before for b, writes in now)
