"""A race finds the fastest correct candidate whatever the noise."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from plait.kernels.race import Candidate, fastest, most_frugal, race


class World:
    """A clock that candidates move by what they cost, and an output they write."""

    def __init__(self, noise: float = 0.0, drift: float = 0.0) -> None:
        self.now, self.value = 0.0, math.nan
        self.random, self.noise, self.drift = random.Random(0), noise, drift
        self.calls: dict[str, int] = {}

    def clock(self) -> float:
        return self.now

    def reset(self) -> None:
        self.value = math.nan

    def check(self) -> float:
        return abs(self.value - 1.0)

    def candidate(self, name: str, seconds: float, value: float | None = 1.0, **kw) -> Candidate:
        def run() -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            slow = self.random.random() < self.noise
            self.now += seconds * (1 + self.drift * self.now) * (10 if slow else 1)
            if value is not None:
                self.value = value

        return Candidate(name, run, **kw)

    def race(self, *candidates: Candidate, **kw):
        kw = {"check": self.check, "tolerance": 1e-3, "reset": self.reset, **kw}
        return race(candidates, clock=self.clock, **kw)


def test_the_fastest_wins_and_order_is_kept() -> None:
    world = World()
    results = world.race(*(world.candidate(f"c{t}", t * 1e-3) for t in (3, 1, 2)))
    assert [r.candidate.name for r in results] == ["c3", "c1", "c2"]
    best = fastest(results)
    assert best is results[1] and best.seconds == pytest.approx(1e-3) and best.error == 0


def test_outliers_do_not_decide() -> None:
    for seed in range(20):
        world = World(noise=0.15)
        world.random.seed(seed)
        results = world.race(
            world.candidate("good", 1.00e-3), world.candidate("bad", 1.15e-3), rounds=11, min_time=0
        )
        best = fastest(results)
        assert best is not None and best.candidate.name == "good"


def test_a_machine_that_slows_down_is_fair_to_all() -> None:
    world = World(drift=50.0)
    results = world.race(world.candidate("bad", 1.1e-3), world.candidate("good", 1e-3), rounds=15)
    best = fastest(results)
    assert best is not None and best.candidate.name == "good"


def test_the_clearly_slower_drop_out_early() -> None:
    world = World()
    results = world.race(
        world.candidate("fast", 1e-3), world.candidate("slow", 2e-3), min_time=0, rounds=9
    )
    assert world.calls["slow"] == 4 and world.calls["fast"] == 11
    assert results[1].note == "dropped out after 2 rounds"
    assert results[1].seconds == pytest.approx(2e-3)


def test_wrong_nan_silent_and_raising_candidates_lose() -> None:
    world = World()

    def boom() -> None:
        raise RuntimeError("not supported")

    results = world.race(
        world.candidate("wrong", 1e-6, value=1.1),
        world.candidate("nan", 1e-6, value=math.nan),
        world.candidate("right", 1e-3),
        world.candidate("silent", 1e-6, value=None),
        Candidate("raises", boom),
    )
    assert [r.seconds is None for r in results] == [True, True, False, True, True]
    assert "wrong result: error 0.1 exceeds 0.001" in results[0].note
    assert results[4].note == "RuntimeError: not supported"
    assert fastest(results) is results[2]


def test_nobody_wins_a_race_of_failures() -> None:
    world = World()
    results = world.race(world.candidate("wrong", 1e-3, value=2.0))
    assert fastest(results) is None and most_frugal(results) is None
    assert fastest([]) is None and world.race() == []


def test_short_calls_are_repeated() -> None:
    world = World()
    world.race(world.candidate("tiny", 1e-6), rounds=3, min_time=1e-4)
    assert 300 <= world.calls["tiny"] - 2 <= 303


def test_the_budget_ends_the_race_after_a_round() -> None:
    world = World()
    results = world.race(*(world.candidate(n, 1.0) for n in "ab"), budget=5.5, rounds=100)
    assert [len(r.samples) for r in results] == [1, 1]
    assert all(r.seconds == pytest.approx(1.0) for r in results)


def test_the_most_frugal_may_be_another() -> None:
    world = World()
    results = world.race(
        world.candidate("fast", 1.0e-3, resources=2.0), world.candidate("small", 1.2e-3)
    )
    assert fastest(results) is results[0] and most_frugal(results) is results[1]


def test_spread_tells_the_noise() -> None:
    world, values = World(), itertools.cycle([1e-3, 2e-3, 3e-3, 4e-3, 5e-3])

    def run() -> None:
        world.now += next(values)
        world.value = 1.0

    (result,) = world.race(Candidate("c", run), rounds=5, min_time=0)
    assert result.seconds == pytest.approx(3e-3) and result.spread == pytest.approx(2 / 3)


def test_zero_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        World().race(rounds=0)
