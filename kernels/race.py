"""Races between implementations of one kernel: correct first, then fast.

Candidates are timed in turns, so that a change of the machine's clock or a neighbour's load meets
all of them alike; the slower ones drop out as soon as that is clear. The figure reported is the
median of samples, each of which lasts long enough for the clock.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import loader


@dataclass(frozen=True)
class Candidate:
    """One implementation: ``run()`` does the kernel's whole work once, on memory set up before.

    ``resources`` is what it takes of the machine while it runs, in any unit that is the same for
    all candidates of a race (threads, bytes of cache); time times resources decides which
    candidate is the most frugal. ``keep`` holds what ``run`` needs alive.
    """

    name: str
    run: Callable[[], Any]
    config: dict[str, Any] = field(default_factory=dict)
    resources: float = 1.0
    keep: Any = None

    @staticmethod
    def kernel(
        name: str,
        address: int,
        tasks: int,
        words: Sequence[int],
        config: dict[str, Any] | None = None,
        resources: float = 1.0,
        keep: Any = None,
    ) -> Candidate:
        """A compiled kernel at ``address``; ``words`` are its pointers and symbol values."""
        call = loader.function(address, len(words))
        prepared = [ctypes.c_int64(w) for w in (0, tasks, *words)]

        alive = (words, keep)

        def run(alive: Any = alive) -> None:  # whoever has only the function has its memory, too
            call(*prepared)

        return Candidate(name, run, dict(config or {}), resources, alive)


@dataclass
class Measurement:
    """How a candidate did: ``seconds`` is the median, None when it was wrong or raised.

    ``error`` is what the check returned, ``spread`` the distance between the quartiles of the
    samples relative to the median, ``note`` why it failed or when it dropped out.
    """

    candidate: Candidate
    seconds: float | None = None
    error: float | None = None
    spread: float = 0.0
    note: str = ""
    samples: list[float] = field(default_factory=list, repr=False)

    @property
    def score(self) -> float:
        """Time times resources; infinite for a failure."""
        return math.inf if self.seconds is None else self.seconds * self.candidate.resources


def race(
    candidates: Sequence[Candidate],
    *,
    check: Callable[[], float],
    tolerance: float,
    reset: Callable[[], None] | None = None,
    rounds: int = 7,
    min_time: float = 2e-4,
    margin: float = 1.25,
    budget: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Races candidates; returns their measurements in the order given.

    Before a candidate is timed, ``reset()`` spoils the outputs, it runs once and ``check()``
    returns its error (against a reference in float64, say): above ``tolerance``, or not a number,
    it is out. A candidate whose best sample is ``margin`` times slower than the leader's median
    drops out early. A sample repeats the call until it takes ``min_time`` seconds. The race ends
    after ``rounds`` samples each, or before a round that would begin after ``budget`` seconds.
    Raises ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"a race needs at least one round, got {rounds}")
    started = clock()
    results = [Measurement(c) for c in candidates]
    repeats: dict[int, int] = {}
    for k, result in enumerate(results):
        once = _qualify(result, check, tolerance, reset, clock)
        if once is not None:
            # The first call pays for cold code and pages; a second tells how often to repeat.
            repeats[k] = max(
                1, math.ceil(min_time / max(min(once, _timed(result, 1, clock)), 1e-9))
            )
    running = list(repeats)
    for number in range(rounds):
        if number > 0 and clock() - started > budget:
            break
        for k in running:
            results[k].samples.append(_timed(results[k], repeats[k], clock))
        running = _survivors(results, running, margin, number + 1)
    for k in repeats:
        _summarise(results[k])
    return results


def fastest(results: Sequence[Measurement]) -> Measurement | None:
    """The measurement with the least time, None when every candidate failed."""
    ran = [r for r in results if r.seconds is not None]
    return min(ran, key=lambda r: r.seconds or 0.0, default=None)


def most_frugal(results: Sequence[Measurement]) -> Measurement | None:
    """The measurement with the least time times resources, None when every candidate failed."""
    return min((r for r in results if r.seconds is not None), key=lambda r: r.score, default=None)


def _qualify(
    result: Measurement,
    check: Callable[[], float],
    tolerance: float,
    reset: Callable[[], None] | None,
    clock: Callable[[], float],
) -> float | None:
    """Seconds of the first call, or None (with a note) when the candidate is wrong or raises."""
    try:
        if reset is not None:
            reset()
        begin = clock()
        result.candidate.run()
        seconds = clock() - begin
        result.error = float(check())
    except Exception as error:  # a library may raise anything; it merely loses the race
        result.note = f"{type(error).__name__}: {error}"
        return None
    if not result.error <= tolerance:  # catches NaN, too
        result.note = f"wrong result: error {result.error:.3g} exceeds {tolerance:.3g}"
        return None
    return seconds


def _timed(result: Measurement, repeats: int, clock: Callable[[], float]) -> float:
    run = result.candidate.run
    begin = clock()
    for _ in range(repeats):
        run()
    return (clock() - begin) / repeats


def _survivors(
    results: Sequence[Measurement], running: list[int], margin: float, rounds: int
) -> list[int]:
    """Those still in the race. The best sample counts for the slow: noise only ever adds time."""
    if rounds < 2 or len(running) < 2:
        return running
    leader = min(statistics.median(results[k].samples) for k in running)
    kept = []
    for k in running:
        if min(results[k].samples) > margin * leader:
            results[k].note = f"dropped out after {rounds} rounds"
        else:
            kept.append(k)
    return kept


def _summarise(result: Measurement) -> None:
    samples = sorted(result.samples)
    result.seconds = statistics.median(samples)
    if len(samples) > 1:
        quartiles = statistics.quantiles(samples, n=4, method="inclusive")
        result.spread = (quartiles[2] - quartiles[0]) / max(result.seconds, 1e-12)
