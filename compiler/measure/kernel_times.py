"""What kernels take within plans: measured once on a machine and shared between models."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from ...kernels.database import Database

FITS = 4
"""A later fit counts one in so many, so that the last few decide."""
BESIDE = "time beside others"

Kernel = tuple[str, int]
"""A kernel's hash, which tells its shapes and code, and how many pieces it is cut into."""


class KernelTimes:
    """Seconds of work of kernels that run on so many ``workers`` at once, kept in the database.

    A kernel waits longer for memory the more workers run, so a time holds for their number only.
    What was measured for one model holds for all others, so that only new kernels need a run.
    """

    def __init__(self, database: Database, workers: int) -> None:
        self.database, self.workers = database, workers

    def known(self, kernels: Iterable[Kernel]) -> dict[Kernel, float]:
        """The seconds of those kernels that were measured before."""
        found = {k: self.database.progress(self._name(k)) for k in set(kernels)}
        return {k: float(state["seconds"]) for k, state in found.items() if state}

    def keep(self, seconds: dict[Kernel, float]) -> None:
        """Keeps what was measured."""
        self.database.set_progresses({self._name(k): {"seconds": s} for k, s in seconds.items()})

    def beside(self, kernels: Iterable[Kernel]) -> dict[Kernel, float]:
        """Of kernels that schedules kept to some of the workers, what they took then as a multiple
        of their seconds.
        """
        found = {k: self.database.progress(self._name(k, BESIDE)) for k in set(kernels)}
        return {k: float(state["ratio"]) for k, state in found.items() if state}

    def refit(self, ratios: dict[Kernel, list[float]]) -> None:
        """Takes what kernels took beside others in one more schedule into account."""
        states = {}
        for kernel, fresh in ratios.items():
            name = self._name(kernel, BESIDE)
            known = self.database.progress(name) or {"ratio": 0.0, "fits": 0}
            fits = min(known["fits"] + 1, FITS)
            ratio = known["ratio"] + (statistics.median(fresh) - known["ratio"]) / fits
            states[name] = {"ratio": ratio, "fits": fits}
        self.database.set_progresses(states)

    def _name(self, kernel: Kernel, what: str = "time") -> str:
        name, pieces = kernel
        return f"{what} of {name} in {pieces} pieces on {self.workers} workers"
