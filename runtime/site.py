"""What a tier fetches for, and what it counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .bank import Bank


@dataclass
class Counters:
    """What a tier did so far.

    ``hits`` and ``misses`` count units that were wanted, by whether they were resident; ``ahead``
    units that the side thread loaded, of which ``useful`` were wanted before they were dropped.
    ``waves`` counts parts of steps that wanted more than fits; ``over`` fetches for which even that
    was not enough. ``bytes_moved`` are those of all loads, ``seconds`` how long calls waited for
    them, ``peak_bytes`` the most that was resident. ``inside`` counts calls of one launch that made
    its fetches itself; how long it waited for them is not known.
    """

    fetches: int = 0
    hits: int = 0
    misses: int = 0
    ahead: int = 0
    useful: int = 0
    dropped: int = 0
    waves: int = 0
    over: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    inside: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @property
    def hit_rate(self) -> float:
        """Hits among what was wanted; 1 where nothing was."""
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else 1.0

    def __str__(self) -> str:
        return (
            f"{self.fetches} fetches, {self.hit_rate:.1%} of {self.hits + self.misses} units were "
            f"resident, {self.ahead} loaded ahead ({self.useful} useful), {self.dropped} dropped, "
            f"{self.waves} waves, {self.over} over budget; {self.bytes_moved / 2**20:.1f} MiB "
            f"moved, {self.seconds * 1e3:.1f} ms waited for, peak {self.peak_bytes / 2**20:.1f} "
            f"MiB, {self.inside} calls in one launch"
        )


@dataclass
class Site:
    """A place that fetches: for each unit of work the (bank, number) that it reads, and bytes that
    what runs with it fetches ``beside`` it, one unit at a time.
    """

    number: int
    units: Sequence[Sequence[tuple[Bank, int]]]
    bytes: list[int]
    beside: Sequence[int] = ()
    users: int = 0

    def __post_init__(self) -> None:
        self.mask = sum(1 << unit for unit, size in enumerate(self.bytes) if size)
        """The units that have anything to load."""
        self.nested = any(self.beside)
        """Whether anything is fetched beside units."""

    def size(self, mask: int) -> int:
        """Bytes of the units whose bits are set."""
        return sum(self.bytes[unit] for unit in bits(mask))

    def reserved(self, units: Iterable[int]) -> int:
        """Bytes to be kept free while these units are in use."""
        return max((self.beside[unit] for unit in units), default=0) if self.nested else 0


def bits(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set, in ascending order."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
