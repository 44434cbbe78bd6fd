"""Timing and memory: interleaved rounds, percentiles, peak resident set."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SLICE = 0.25  # seconds of calls of one engine in one round
SETTLE = 0.02  # pause between engines: idle threads of the last one stop spinning
SHORTEST = 1e-4  # shorter calls are timed several at a time
PATIENCE = 4  # a slice ends after so many times its seconds, however many calls have been made


@dataclass
class Timing:
    """Seconds of single calls, over all rounds; ``rounds`` holds the median of each round."""

    samples: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    def percentile(self, q: float) -> float:
        """The ``q``-quantile (0 to 1), interpolated. Raises ValueError without samples."""
        if not self.samples:
            raise ValueError("no samples")
        ordered = sorted(self.samples)
        at = q * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)

    @property
    def median(self) -> float:
        return self.percentile(0.5)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = SLICE,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times ``calls`` against each other.

    Every round gives each call a slice of about ``seconds``; the order rotates from round to round,
    so that drift of the machine and what the predecessor left behind touch all of them alike. A
    slice starts with warming calls, which also tell how many timed calls fit into it; where the
    machine gets busy, so that they take a thousand times as long, it ends early.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    timings = {name: Timing() for name in calls}
    order = list(calls)
    for number in range(rounds):
        shift = number % max(1, len(order))
        for name in order[shift:] + order[:shift]:
            time.sleep(SETTLE)
            samples = _slice(calls[name], seconds, clock)
            timings[name].samples += samples
            timings[name].rounds.append(statistics.median(samples))
    return timings


def _slice(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> list[float]:
    call()
    began = clock()
    call()
    once = max(clock() - began, 1e-7)
    batch = max(1, math.ceil(SHORTEST / once))
    count = min(1000, max(2, round(seconds / (once * batch))))
    samples = []
    for _ in range(count):
        start = clock()
        for _ in range(batch):
            call()
        now = clock()
        samples.append((now - start) / batch)
        if now - began > PATIENCE * seconds:
            break
    return samples


def geometric_mean(values: Sequence[float]) -> float:
    """Raises ValueError for no values or a value that is not positive."""
    if not values or min(values) <= 0:
        raise ValueError("the geometric mean needs positive values")
    return math.exp(sum(map(math.log, values)) / len(values))


class PeakMemory:
    """Growth of this process's resident set inside a ``with`` block, in bytes.

    ``peak`` is the highest point above the start. Linux can reset and read the high-water mark;
    elsewhere ``peak`` is the growth at the end of the block.
    """

    peak = 0

    def __enter__(self) -> PeakMemory:
        self._linux = _reset_high_water()
        self._start = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *_: object) -> None:
        end = (high_water() if self._linux else None) or psutil.Process().memory_info().rss
        self.peak = max(0, end - self._start)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak resident set size
    except OSError:
        return False
    return True


def high_water() -> int | None:
    """The most that was resident of this process, in bytes; None where the system does not say."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
