"""plan-memory: lifetimes to offsets.

before: every intermediate buffer has memory of its own
after:  buffers share one arena; two buffers overlap only if their lifetimes do not

Buffers of fixed size are placed first by decreasing size, each at the lowest offset that is free
over its lifetime (the "greedy by size" method of Pisarchyk and Lee, "Efficient Memory Management
for Deep Neural Net Inference", MLSys 2020 workshop). Buffers whose size depends on symbols share a
slot with others of the same size expression, first come first served; slots follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .remarks import Remark

ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A buffer of ``nbytes`` needed from step ``start`` to step ``end``, both included."""

    name: str
    nbytes: int | str
    start: int
    end: int

    def overlaps(self, other: Lifetime) -> bool:
        return self.start <= other.end and other.start <= self.end


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets in bytes, the arena's size, and the largest sum of live bytes (a lower bound on it).

    ``lower_bound`` counts buffers of fixed size only.
    """

    offsets: dict[str, int | str]
    total: int | str
    lower_bound: int


def plan_memory(lifetimes: Sequence[Lifetime]) -> MemoryPlan:
    """Packs buffers into one arena. Deterministic. Raises ValueError on duplicate names."""
    if len({b.name for b in lifetimes}) != len(lifetimes):
        raise ValueError("two buffers have the same name")
    fixed = [b for b in lifetimes if isinstance(b.nbytes, int)]
    offsets: dict[str, int | str] = {}
    placed: list[tuple[int, int, Lifetime]] = []  # (offset, end offset, buffer), by offset
    peak = 0
    for buffer in sorted(fixed, key=lambda b: (-int(b.nbytes), b.start, b.name)):
        size = _align(int(buffer.nbytes))
        offset = 0
        for start, end, other in placed:
            if not buffer.overlaps(other):
                continue
            if start - offset >= size:
                break
            offset = max(offset, end)
        offsets[buffer.name] = offset
        placed.append((offset, offset + size, buffer))
        placed.sort(key=lambda p: (p[0], p[1]))
        peak = max(peak, offset + size)
    total: int | str = peak
    for size, names in _slots([b for b in lifetimes if not isinstance(b.nbytes, int)]):
        for name in names:
            offsets[name] = total
        total = f"{total} + (({size}) + {ALIGNMENT - 1})//{ALIGNMENT}*{ALIGNMENT}"
    return MemoryPlan(offsets, total, live_peak(fixed))


def describe(lifetimes: Sequence[Lifetime], plan: MemoryPlan) -> Remark:
    """What planning gained: the arena beside the sum of its buffers and the largest live set."""
    fixed = [b for b in lifetimes if isinstance(b.nbytes, int)]
    whole = sum(_align(int(b.nbytes)) for b in fixed)
    size = _bytes(plan.total) if isinstance(plan.total, int) else "an arena that grows with sizes"
    reason = (
        f"{size} for {len(lifetimes)} buffers of {_bytes(whole)}; "
        f"at most {_bytes(plan.lower_bound)} are alive at once"
    )
    if len(fixed) < len(lifetimes):
        reason += f" ({len(lifetimes) - len(fixed)} of unknown size not counted)"
    return Remark("PLT-MEM-001", "done", "plan-memory", (), reason)


def _bytes(count: int) -> str:
    return f"{count / (1 << 20):.2f} MiB" if count >= 1 << 20 else f"{count / 1024:.1f} KiB"


def _align(nbytes: int) -> int:
    return (max(nbytes, 1) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _slots(buffers: Sequence[Lifetime]) -> list[tuple[str, list[str]]]:
    """Interval colouring within each size expression."""
    slots: list[tuple[str, list[str], int]] = []
    for buffer in sorted(buffers, key=lambda b: (b.start, b.name)):
        for k, (size, names, end) in enumerate(slots):
            if size == buffer.nbytes and end < buffer.start:
                slots[k] = (size, [*names, buffer.name], buffer.end)
                break
        else:
            slots.append((str(buffer.nbytes), [buffer.name], buffer.end))
    return [(size, names) for size, names, _ in slots]


def live_peak(buffers: Sequence[Lifetime]) -> int:
    """The largest number of bytes alive at one step: no arena can be smaller."""
    events: dict[int, int] = {}
    for b in buffers:
        size = _align(int(b.nbytes))
        events[b.start] = events.get(b.start, 0) + size
        events[b.end + 1] = events.get(b.end + 1, 0) - size
    live = peak = 0
    for step in sorted(events):
        live += events[step]
        peak = max(peak, live)
    return peak
