"""Timing is interleaved, percentiles are right, memory growth is seen."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from plait.bench.bounds import Machine, measure_machine
from plait.bench.measure import Timing, geometric_mean, interleave


class Clock:
    """Time that passes only inside the calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.order.append(name)
            self.now += seconds

        return run


def test_interleave_measures_each_call_and_rotates_the_order() -> None:
    clock = Clock()
    calls = {"a": clock.call("a", 0.010), "b": clock.call("b", 0.030)}
    timings = interleave(calls, rounds=2, seconds=0.1, clock=lambda: clock.now)
    assert timings["a"].median == pytest.approx(0.010)
    assert timings["b"].median == pytest.approx(0.030)
    assert len(timings["a"].rounds) == 2
    slices = [clock.order[0]]
    slices += [n for p, n in zip(clock.order, clock.order[1:], strict=False) if n != p]
    assert slices == ["a", "b", "a"]  # the second round starts with b, right after b


def test_short_calls_are_timed_in_batches() -> None:
    clock = Clock()
    timing = interleave({"a": clock.call("a", 1e-6)}, 1, 0.01, lambda: clock.now)["a"]
    assert timing.median == pytest.approx(1e-6)
    assert len(clock.order) > 50 * len(timing.samples)


def test_a_slice_ends_in_time_where_calls_get_slow() -> None:
    clock = Clock()
    fast, slow = clock.call("a", 1e-5), clock.call("a", 0.1)
    timing = interleave(
        {"a": lambda: (fast if len(clock.order) < 100 else slow)()}, 1, 0.25, lambda: clock.now
    )["a"]
    assert clock.now < 5
    assert len(timing.samples) > 2


def test_interleave_needs_a_round() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        interleave({}, 0)


def test_percentiles_interpolate() -> None:
    timing = Timing([4.0, 1.0, 3.0, 2.0])
    assert timing.percentile(0) == 1
    assert timing.median == 2.5
    assert timing.percentile(1) == 4
    with pytest.raises(ValueError, match="no samples"):
        Timing().percentile(0.5)


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2)
    for bad in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="positive"):
            geometric_mean(bad)


def test_peak_memory_sees_what_is_freed_again() -> None:
    code = (  # in a process of its own: here other tests' memory may be freed meanwhile
        "import torch\n"
        "from plait.bench.measure import PeakMemory\n"
        "with PeakMemory() as memory:\n"
        "    block = torch.ones(64 << 20, dtype=torch.uint8)\n"
        "    del block\n"
        "print(memory.peak if memory._linux else 64 << 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 48 << 20 < int(done.stdout) < 256 << 20


def test_the_roofline_takes_the_tighter_limit() -> None:
    machine = Machine(flops=100.0, bandwidth=10.0)
    assert machine.bound(1000, 10) == 10
    assert machine.bound_by(1000, 10) == "compute"
    assert machine.bound(1000, 1000) == 100
    assert machine.bound_by(1000, 1000) == "memory"


def test_measuring_the_machine_leaves_the_threads_alone() -> None:
    before = torch.get_num_threads()
    machine = measure_machine()
    assert torch.get_num_threads() == before
    assert machine.flops > 1e8
    assert machine.bandwidth > 1e8
