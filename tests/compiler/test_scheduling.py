"""Scheduled plans: the same bits as in order, at any number of threads, kept and loaded again."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import plait
from plait.compiler.measure import contention, scheduling
from plait.passes.schedule import SchedulePass
from plait.passes.tasks import simulate
from plait.runtime.plan import KernelStep
from plait.runtime.trace import Event

PLAIN = "normalize,outline-branches,speculate-routes,fuse-vertical"
FORCED = PLAIN + ",schedule{least_gain=-1,rounds=5}"


class Woven(nn.Module):
    """A random graph of convolutions, poolings, sums and joins on small maps."""

    def __init__(self, seed: int, nodes: int = 14) -> None:
        super().__init__()
        chance = random.Random(seed)
        self.wiring: list[tuple[str, int, int]] = []
        layers = []
        for k in range(nodes):
            kind = chance.choice(["conv", "conv", "sum", "pool", "join"])
            a, b = chance.randint(max(0, k - 5), k), chance.randint(max(0, k - 5), k)
            self.wiring.append((kind, a, b))
            wide = 16 if kind == "join" else 8
            layers.append(nn.Conv2d(wide, 8, chance.choice([1, 3]), padding="same"))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for (kind, a, b), layer in zip(self.wiring, self.layers, strict=True):
            if kind == "conv":
                values.append(torch.relu(layer(values[a])))
            elif kind == "sum":
                values.append(values[a] + values[b].tanh())
            elif kind == "pool":
                values.append(nn.functional.max_pool2d(values[a], 3, 1, 1))
            else:
                values.append(layer(torch.cat([values[a], values[b]], 1)))
        return torch.cat(values[-4:], 1)


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a part of a kernel takes follows from its step's number, and all calls take the same:
    what is measured says how busy the machine is, and what schedules are found follows from it.
    Times that other tests left are not ``known``.
    """
    found = SimpleNamespace(
        of=lambda step: (1 + 37 * step % 11) * 1e-5, known=scheduling.KernelTimes.known
    )
    monkeypatch.setattr(scheduling.KernelTimes, "known", lambda *_: {})
    run, ticks = scheduling.Tracer.run, itertools.count()

    def told(self: Any, inputs: Any) -> list[Event]:
        return [replace(e, begin=0.0, end=found.of(e.step)) for e in run(self, inputs)]

    monkeypatch.setattr(scheduling.Tracer, "run", told)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) / 10)
    monkeypatch.setattr(scheduling, "time", clock)
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _compiled(model: Any, x: torch.Tensor, pipeline: str) -> plait.Compiled:
    with torch.no_grad():
        return plait.compile(model, example_inputs=(x,), pipeline=pipeline)


def _ids(compiled: plait.Compiled) -> set[str]:
    return {r.id for r in compiled.remarks if r.pass_name == "schedule"}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("algorithm", ["list", "ios"])
def test_whatever_the_schedule_the_bits_are_those_of_the_plan_in_order(
    seed: int, algorithm: str
) -> None:
    model = Woven(seed).eval()
    x = torch.randn(1, 8, 24, 24)
    plain = _compiled(model, x, PLAIN)
    pipeline = f"{PLAIN},schedule{{least_gain=-1,rounds=5,algorithm={algorithm}}}"
    scheduled = _compiled(model, x, pipeline)
    plan = scheduled.plan
    assert _ids(scheduled) == {"PLT-PAR-001"} and plan.workers == 2
    places = [s.place for s in plan.steps if isinstance(s, KernelStep)]
    assert all(places) and {w for p in places for w, _ in p} == {0, 1}
    _runs_as_simulated(scheduled, x)
    with torch.no_grad():
        for threads in (2, 1, 3, 2):
            torch.set_num_threads(threads)
            for _ in range(5):
                y = torch.randn(1, 8, 24, 24)
                assert torch.equal(scheduled(y), plain(y))


@pytest.mark.usefixtures("two_threads")
def test_a_saved_schedule_comes_back_with_the_model(tmp_path: Path) -> None:
    model, x = Woven(3).eval(), torch.randn(1, 8, 24, 24)
    compiled = _compiled(model, x, FORCED)
    assert _ids(compiled) == {"PLT-PAR-001"}
    compiled.save(tmp_path / "model.plait")
    loaded = plait.load(tmp_path / "model.plait")
    assert loaded.plan.steps == compiled.plan.steps and loaded.plan.workers == 2
    with torch.no_grad():
        assert torch.equal(loaded(x), compiled(x))


@pytest.mark.usefixtures("two_threads")
def test_a_search_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Woven(4).eval(), torch.randn(1, 8, 24, 24)
    first = _compiled(model, x, FORCED)

    def search(*_: Any) -> Any:
        raise AssertionError("searched again")

    monkeypatch.setattr(scheduling._Scheduler, "_search", search)
    again = _compiled(model, x, FORCED)
    assert [r.reason for r in again.remarks] == [r.reason for r in first.remarks]
    assert again.plan.steps == first.plan.steps
    assert again.plan.arena_bytes == first.plan.arena_bytes


@pytest.mark.usefixtures("two_threads")
def test_kernels_are_timed_once(monkeypatch: pytest.MonkeyPatch, costs: SimpleNamespace) -> None:
    monkeypatch.setattr(scheduling.KernelTimes, "known", costs.known)
    runs, measured, waits = [], scheduling._Scheduler._measured, 0.0

    def count(self: Any, *given: Any) -> Any:
        runs.append(given)
        timed, plain, least = measured(self, *given)
        return timed, plain + waits, least + waits

    monkeypatch.setattr(scheduling._Scheduler, "_measured", count)
    model, x = Woven(7, nodes=8).eval(), torch.randn(1, 8, 20, 20)
    first = _compiled(model, x, FORCED)
    assert runs and _ids(first) == {"PLT-PAR-001"}
    runs.clear()
    again = _compiled(model, x, FORCED.replace("rounds=5", "rounds=6"))  # another search
    assert not runs and _ids(again) == {"PLT-PAR-001"}
    with torch.no_grad():
        assert torch.equal(first(x), again(x))
    waits = 0.2  # in order, where no simulation promises to save half
    doubtful = _compiled(model, x, PLAIN + ",schedule{least_gain=0.5,rounds=5}")
    assert runs and _ids(doubtful) == {"PLT-PAR-003"}
    _compiled(nn.Sequential(model, nn.Conv2d(again(x).shape[1], 24, 3)).eval(), x, FORCED)
    assert runs, "one kernel is new"
    runs.clear()
    torch.set_num_threads(3)
    _compiled(model, x, FORCED)
    assert runs, "times are those of two workers"


@pytest.mark.usefixtures("two_threads")
def test_what_kernels_take_beside_others_is_fitted_to_schedules(
    monkeypatch: pytest.MonkeyPatch, costs: SimpleNamespace
) -> None:
    """Dealt out to both workers each part takes 100 us; whole and beside others, 240 us."""
    monkeypatch.setattr(scheduling.KernelTimes, "known", costs.known)
    monkeypatch.setattr(contention, "LEAST", 50e-6)
    run, seen = scheduling.Tracer.run, []

    def told(self: Any, inputs: Any) -> list[Event]:
        events = run(self, inputs)
        parts = Counter(e.step for e in events)
        return [replace(e, end=100e-6 if parts[e.step] > 1 else 240e-6) for e in events]

    candidates = SchedulePass.candidates

    def kept(self: Any, tasks: Any, *given: Any) -> Any:
        seen.append(tasks)
        return candidates(self, tasks, *given)

    monkeypatch.setattr(scheduling.Tracer, "run", told)
    monkeypatch.setattr(SchedulePass, "candidates", kept)
    model, x = Woven(11, nodes=8).eval(), torch.randn(1, 8, 22, 22)
    first = _compiled(model, x, FORCED)
    again = _compiled(model, x, FORCED.replace("rounds=5", "rounds=6"))
    assert {t.beside for t in seen[0]} == {1.0}
    ratios = {t.beside for t in seen[1]}
    assert ratios > {1.0} and all(r in (1.0, pytest.approx(1.2)) for r in ratios)
    assert [t.seconds for t in seen[0]] == [t.seconds for t in seen[1]]
    with torch.no_grad():
        assert torch.equal(first(x), again(x))


@pytest.mark.usefixtures("two_threads")
def test_what_was_measured_on_a_busy_machine_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, searches, search = itertools.count(), [], scheduling._Scheduler._search
    slower = SimpleNamespace(perf_counter=lambda: next(ticks) ** 2 / 1e4)
    monkeypatch.setattr(scheduling, "time", slower)

    def count(self: Any, tasks: Any) -> Any:
        searches.append(tasks)
        return search(self, tasks)

    monkeypatch.setattr(scheduling._Scheduler, "_search", count)
    model, x = Woven(5, nodes=6).eval(), torch.randn(1, 8, 12, 12)
    for times in (1, 2, 2):  # the second time calls take about as long as each other
        told = _compiled(model, x, FORCED).remarks
        assert len(searches) == times
        assert any("measures anew" in r.reason for r in told) == (times == 1)


@pytest.mark.usefixtures("two_threads")
def test_buffers_of_steps_side_by_side_lie_apart(costs: SimpleNamespace) -> None:
    """Two chains of their own: in order they could take turns in the same memory."""
    costs.of = lambda step: 1e-4

    class Chains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))
            self.b = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for layer in self.a:
                y = layer(y).relu()
            z = x
            for layer in self.b:
                z = layer(z).relu()
            return y + z

    model, x = Chains().eval(), torch.randn(1, 16, 32, 32)
    plain, scheduled = _compiled(model, x, PLAIN), _compiled(model, x, FORCED)
    assert scheduled.plan.arena_bytes > plain.plan.arena_bytes
    table = _tables(scheduled, x)[0]
    assert table.waits <= 6  # the chains start and meet; between, neither waits for the other
    with torch.no_grad():
        assert torch.equal(scheduled(x), plain(x))


def _runs_as_simulated(compiled: plait.Compiled, x: torch.Tensor) -> None:
    """Every worker's list holds the shares that the simulation gives it, in the same order."""
    tables = _tables(compiled, x)
    launches = scheduling.segments(compiled.plan)
    assert len(tables) == len(launches)
    for table, numbers in zip(tables, launches, strict=True):
        tasks = [
            replace(t, seconds=1e-6) for t in scheduling.tasks_of(compiled.plan.steps, numbers)
        ]
        places = [compiled.plan.steps[k].place for k in numbers]  # type: ignore[union-attr]
        simulated = simulate(tasks, range(len(tasks)), places, compiled.plan.workers)
        for worker in range(compiled.plan.workers):
            due = [
                (share.start, k, share.end)
                for k, shares in enumerate(simulated.shares)
                for share in shares
                if share.worker == worker
            ]
            runs = [(p.step, p.hi) for p in table.parts if p.worker == worker]
            assert runs == [(k, end) for _, k, end in sorted(due)]


def _tables(compiled: plait.Compiled, x: torch.Tensor) -> list[Any]:
    executor = compiled.programs[-1].executable.executor  # type: ignore[attr-defined]
    executor.run([x])
    (instance,) = executor._instances.values()
    return [t for t in instance._free[0].tables if t is not None]


def test_what_cannot_be_scheduled_says_why(two_threads: None) -> None:
    model, x = Woven(1).eval(), torch.randn(1, 8, 24, 24)
    pair = torch.randn(2, 8, 24, 24)
    torch.set_num_threads(1)
    one = _compiled(model, x, FORCED)
    assert [r.reason for r in one.remarks if r.id == "PLT-PAR-004"] == ["there is one thread only"]
    torch.set_num_threads(2)
    with torch.no_grad():
        off = plait.compile(Woven(7).eval(), example_inputs=(x,), tune="off", pipeline=FORCED)
        free = plait.compile(
            model, example_inputs=(pair,), pipeline=FORCED, dynamic_shapes={"x": {0: "batch"}}
        )
        layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        chain = _compiled(layers.eval(), x, FORCED)
        assert torch.allclose(free(pair), model(pair), atol=1e-4)
    assert _ids(off) == _ids(free) == {"PLT-PAR-004"}
    assert _ids(chain) == {"PLT-PAR-002"}


def test_inputs_that_do_not_run_leave_the_plan_in_order(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> Any:
        raise RuntimeError("index 7 is out of bounds")

    monkeypatch.setattr(scheduling.Tracer, "run", run)
    model, x = Woven(6).eval(), torch.randn(1, 8, 24, 24)
    compiled = _compiled(model, x, FORCED)
    (remark,) = [r for r in compiled.remarks if r.pass_name == "schedule"]
    assert remark.id == "PLT-PAR-005" and "index 7" in remark.reason
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-4)


@pytest.mark.usefixtures("two_threads")
def test_calls_that_take_long_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "LONGEST", 0.0)
    compiled = _compiled(Woven(8).eval(), torch.randn(1, 8, 24, 24), FORCED)
    (remark,) = [r for r in compiled.remarks if r.pass_name == "schedule"]
    assert remark.id == "PLT-PAR-004" and "too long" in remark.reason


@pytest.mark.usefixtures("two_threads")
def test_one_call_that_takes_long_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    late = SimpleNamespace(perf_counter=lambda: (n := next(ticks)) / 10 + 9 * (n > 2))
    monkeypatch.setattr(scheduling, "time", late)
    compiled = _compiled(Woven(3).eval(), torch.randn(1, 8, 20, 20), FORCED)
    assert _ids(compiled) == {"PLT-PAR-001"}


@pytest.mark.usefixtures("two_threads")
def test_of_large_workspaces_one_candidate_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    raced: list[int] = []
    race = scheduling._Scheduler._race

    def count(self: Any, mixed: Any, inputs: Any) -> Any:
        raced.append(len(mixed))
        return race(self, mixed, inputs)

    monkeypatch.setattr(scheduling._Scheduler, "_race", count)
    x = torch.randn(1, 8, 24, 24)
    _compiled(Woven(9).eval(), x, FORCED)
    monkeypatch.setattr(scheduling, "LARGEST", 0)
    _compiled(Woven(10).eval(), x, FORCED)
    assert raced[0] > 1 and raced[1] == 1
