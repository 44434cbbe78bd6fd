"""What it takes to load so many bytes of a slower tier, from loads that were timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bank import waits
from .forecast import SAMPLE

RATE = 2e9
"""Bytes a second that a load is taken to bring until one was measured."""
WAKE = 100e-6
"""Seconds that a load ahead must be likely to save: waking the side thread costs some of them."""
LASTING = 0.05
"""Weight of the latest load in what loads of its size cost."""

Began = tuple[float, float, int]
"""Wall time, the thread's time and its waits for disks when a load began."""


class LoadCosts:
    """Seconds of loads by size. Where they are cheap, one load in `SAMPLE` is timed."""

    def __init__(self) -> None:
        self.cheap = False
        """Whether loads take less than waking the side thread does."""
        self._loads = 0
        self._seconds: dict[int, float] = {}

    def begin(self) -> Began | None:
        """A load begins: when, if it is timed."""
        self._loads += 1
        if self.cheap and self._loads % SAMPLE:
            return None
        return time.perf_counter(), time.thread_time(), waits()

    def end(self, began: Began | None, size: int) -> None:
        """The load of ``size`` bytes has ended."""
        if began is None:
            return
        wall, spent, waited = began
        seconds = time.perf_counter() - wall
        if waits() == waited:  # for no disk: that others ran meanwhile is no cost of a load
            seconds = time.thread_time() - spent
        before = self._seconds.get(size, seconds)
        self._seconds[size] = before + LASTING * (seconds - before)
        self.cheap = max(self._seconds.values()) < WAKE

    def of(self, sizes: Sequence[int]) -> list[float]:
        """Seconds that loading units of these bytes takes, each."""
        return [self._seconds.get(size, size / RATE) for size in sizes]

    def by_byte(self, sizes: NDArray[Any]) -> NDArray[np.float64]:
        """Seconds a byte, for units of these bytes."""
        price = np.full(sizes.shape, 1.0 / RATE)
        for size, seconds in self._seconds.items():
            price[sizes == size] = seconds / size
        return price
