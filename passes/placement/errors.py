"""Errors of the placement planner: one cause and one mend each."""

from __future__ import annotations

import math
from collections.abc import Mapping


class PlacementError(ValueError):
    """A problem, placement or option that has no meaning; the message names op, device or field."""


class InfeasibleError(PlacementError):
    """No placement fits. ``shortfall`` maps devices to the bytes that they are short of.

    ``proven`` tells a proof (the message is its certificate) from a search that found nothing.
    """

    def __init__(self, message: str, shortfall: dict[str, float], proven: bool) -> None:
        super().__init__(message)
        self.shortfall, self.proven = shortfall, proven

    def __reduce__(self) -> tuple[type[InfeasibleError], tuple[str, dict[str, float], bool]]:
        return type(self), (str(self), self.shortfall, self.proven)


def shortages(shortfall: Mapping[str, float]) -> str:
    """Which devices are short of how many bytes, as messages say it; of many the first eight."""
    shown = list(shortfall.items())[:8]
    more = f" and {len(shortfall) - 8} more" if len(shortfall) > 8 else ""
    return ", ".join(f"{name!r} is {math.ceil(size)} bytes short" for name, size in shown) + more
