"""What an executor counts of its parts, where native code can count, too."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

_KINDS = ("taken", "missed", "spilled")


class Counts:
    """A count of each kind (taken, missed, spilled) for each of ``names``."""

    def __init__(self, names: Iterable[str]) -> None:
        keys = [(kind, name) for name in names for kind in _KINDS]
        self._place = {key: k for k, key in enumerate(keys)}
        self._words = array("q", [0] * max(1, len(keys)))

    def __getitem__(self, key: tuple[str, str]) -> int:
        return self._words[self._place[key]]

    def add(self, kind: str, name: str, by: int = 1) -> None:
        """Counts."""
        self._words[self._place[kind, name]] += by

    def address(self, kind: str, name: str) -> int:
        """Where the count is, for as long as this lives: a 64-bit word."""
        return self._words.buffer_info()[0] + 8 * self._place[kind, name]
