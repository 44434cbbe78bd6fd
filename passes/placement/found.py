"""What a search for placements ends at."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Ints


@dataclass(frozen=True)
class Found:
    """The best placement: devices by op, ops in starting order, and how it was found."""

    assign: Ints
    sequence: Ints
    cost: float
    bounds: dict[str, float]
    start: str
    moves: int
    stopped: str
    fits: bool = True
    mode: str = "priority"
