"""Routes learned from live calls, and what happens when they change: never another result."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.compiler.capture.export import EXCLUSIVE
from plait.compiler.lowering import lower
from plait.compiler.measure import bets
from plait.compiler.routing import online
from plait.compiler.routing.drift import LiveLoads, drift

CELLS = 12


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        branches = [nn.Sequential(nn.Linear(6, w), nn.GELU(), nn.Linear(w, 6)) for w in (8, 12, 16)]
        self.router = plait.Router(branches, lambda x: x[:, 0].long(), combine="sum")

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x).relu() + x


def batch(branch: int) -> Tensor:
    x = torch.rand(CELLS, 6) * 0.9
    x[:, 0] += branch
    return x


@pytest.fixture
def model() -> Routed:
    torch.manual_seed(0)
    return Routed().eval()


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Special plans pay, and a new plan is worth its cost at once."""

    def timed(calls):
        for call in calls:
            call()
        return [1.0] * (len(calls) - 1) + [0.1]

    monkeypatch.setattr(bets, "timed", timed)
    monkeypatch.setattr(online, "PATIENCE", 0.0)


def monitor_of(compiled) -> online.Monitor:
    monitor = compiled.programs[-1].executable.monitor
    assert monitor is not None
    return monitor


def ids(compiled) -> list[str]:
    return [r.id for r in compiled.remarks if r.id.startswith("PLT-SPC")]


def call(compiled, model: nn.Module, branch: int, times: int) -> None:
    with torch.no_grad():
        for _ in range(times):
            x = batch(branch)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    monitor_of(compiled).wait()


def test_the_first_calls_are_learned_from(model: Routed) -> None:
    compiled = plait.compile(model, profile="online", tune="off")
    call(compiled, model, 1, online.WINDOW - 1)
    executable = compiled.programs[-1].executable
    assert executable.speculation is None and "learning" in compiled.explain()
    call(compiled, model, 1, 2)
    assert executable is compiled.programs[-1].executable
    assert executable.speculation.bet.assumed == {("router", 0): (1,)}
    assert {"PLT-SPC-005", "PLT-SPC-012"} <= set(ids(compiled))
    call(compiled, model, 1, 3)
    call(compiled, model, 2, 1)
    assert executable.speculation.hits >= 3 and executable.speculation.misses == 1
    assert "plans made anew 1 times" in compiled.explain()


def test_drift_is_noticed_and_answered(model: Routed) -> None:
    compiled = plait.compile(model, profile="online", tune="off")
    call(compiled, model, 0, online.WINDOW)
    executable, monitor = compiled.programs[-1].executable, monitor_of(compiled)
    assert monitor.rebuilt == 1
    call(compiled, model, 0, 2 * online.WINDOW)
    assert monitor.rebuilt == 1, "nothing has changed"
    call(compiled, model, 2, online.WINDOW)
    assert monitor.rebuilt == 2 and "PLT-SPC-011" in ids(compiled)
    assert executable.speculation.bet.assumed == {("router", 0): (2,)}
    assert "went from 1.00 of the slots to 0.00" in compiled.explain()


def test_what_does_not_pay_is_left(model: Routed, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = plait.compile(model, profile="online", tune="off")
    call(compiled, model, 0, online.WINDOW)
    monkeypatch.setattr(online, "PATIENCE", 10.0)
    monkeypatch.setattr(monitor_of(compiled), "_cost", 1e9)  # seconds that a new plan takes
    call(compiled, model, 2, 2 * online.WINDOW)
    assert monitor_of(compiled).rebuilt == 1 and "PLT-SPC-011" in ids(compiled)


def test_a_given_profile_is_watched_too(model: Routed) -> None:
    profile = plait.profile(model, [(batch(0),)] * 16)
    compiled = plait.compile(model, profile=profile, tune="off")
    call(compiled, model, 0, online.WINDOW)
    assert monitor_of(compiled).rebuilt == 0
    call(compiled, model, 1, online.WINDOW)
    assert monitor_of(compiled).rebuilt == 1


def test_without_a_profile_nobody_watches(model: Routed) -> None:
    compiled = plait.compile(model, tune="off", example_inputs=(batch(0),))
    executable = compiled.programs[-1].executable
    assert executable.monitor is None and executable.executor.recorder is None
    assert executable.run == executable.executor.run


def test_what_was_learned_outlives_new_weights(model: Routed) -> None:
    compiled = plait.compile(model, profile="online", tune="off")
    call(compiled, model, 0, online.WINDOW)
    with torch.no_grad():
        model.router.branches[0][0].weight.mul_(2)
    call(compiled, model, 0, 2)
    executable = compiled.programs[-1].executable
    assert executable.speculation is not None and executable.speculation.hits == 2


def test_threads_call_while_plans_are_made(model: Routed) -> None:
    compiled = plait.compile(model, profile="online", tune="off", example_inputs=(batch(0),))
    inputs = [batch(b) for b in (0, 0, 1, 2)]
    with torch.no_grad():
        want = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for k in range(4 * online.WINDOW):
                # Everything goes to one branch, later to others, while plans are being replaced.
                number = first if k < 2 * online.WINDOW else (first + k) % 4
                have = compiled(inputs[number])
                if not torch.allclose(have, want[number], rtol=1e-4, atol=1e-5):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monitor_of(compiled).wait()
    assert not wrong and monitor_of(compiled).rebuilt >= 1


def test_a_failure_in_the_background_is_told(
    model: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PLAIT_DEBUG", raising=False)
    compiled = plait.compile(model, profile="online", tune="off", example_inputs=(batch(0),))

    def fails(routes):
        raise RuntimeError("no room")

    monitor_of(compiled)._specialise = fails
    call(compiled, model, 0, online.WINDOW)
    assert "PLT-SPC-013" in ids(compiled) and "no room" in compiled.explain()
    call(compiled, model, 1, 3)


def test_no_thread_to_be_had_is_told(model: Routed, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = plait.compile(model, profile="online", tune="off", example_inputs=(batch(0),))

    def fails(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fails)
        call(compiled, model, 0, online.WINDOW)
    assert "PLT-SPC-013" in ids(compiled) and "can't start new thread" in compiled.explain()
    call(compiled, model, 0, online.WINDOW)
    assert monitor_of(compiled).rebuilt == 1


def test_graphs_are_worked_on_by_one_thread_at_a_time(
    model: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one capture share the state of fake tensors. While plans are timed, calls may need
    to compile what they hold the tier for."""
    lowered: list[bool] = []
    timing: list[bool] = []
    real, timed = lower.lower, bets.timed

    def alone(*args, **named):
        lowered.append(EXCLUSIVE._is_owned())  # type: ignore[attr-defined]
        return real(*args, **named)

    def free(calls):
        timing.append(not EXCLUSIVE._is_owned())  # type: ignore[attr-defined]
        return timed(calls)

    monkeypatch.setattr(lower, "lower", alone)
    monkeypatch.setattr(bets, "timed", free)
    compiled = plait.compile(model, profile="online", tune="off", example_inputs=(batch(0),))
    call(compiled, model, 0, online.WINDOW)
    first = len(lowered)
    call(compiled, model, 2, 1)  # which was dead
    assert len(lowered) > first and all(lowered) and timing and all(timing)


def test_a_branch_that_cannot_be_compiled_runs_as_it_is(
    model: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PLAIT_DEBUG", raising=False)
    profile = plait.profile(model, [(batch(0),)] * 16)
    compiled = plait.compile(model, profile=profile, tune="off", example_inputs=(batch(0),))

    def fails(*args):
        raise RuntimeError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(lower, "lower", fails)
        call(compiled, model, 2, 2)
    assert ids(compiled).count("PLT-SPC-016") == 1 and "no room" in compiled.explain()
    call(compiled, model, 2, 1)


def test_another_word_is_refused(model: Routed) -> None:
    with pytest.raises(plait.OptionError, match="PLT-OPT-005"):
        plait.compile(model, profile="offline")


# -- the test for drift ----------------------------------------------------------------------------


def loads(generator: torch.Generator, shares: list[float], calls: int, slots: int) -> LiveLoads:
    rows = torch.multinomial(
        torch.tensor(shares).expand(calls, -1), slots, replacement=True, generator=generator
    )
    counts = [tuple(torch.bincount(row, minlength=len(shares)).tolist()) for row in rows]
    return LiveLoads(tuple(counts), (slots,) * calls)


@settings(max_examples=50, deadline=None, derandomize=True)  # chance may alarm, if rarely
@given(seed=st.integers(0, 1 << 30), slots=st.sampled_from([1, 4, 64]))
def test_chance_is_not_drift(seed: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = [0.5, 0.3, 0.2, 0.0]
    alarms = sum(
        drift([loads(generator, shares, 48, slots)], loads(generator, shares, 32, slots))
        is not None
        for _ in range(20)
    )
    assert alarms <= 1


def test_drift_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    before = loads(generator, [0.7, 0.2, 0.1], 48, 64)
    found = drift([before], loads(generator, [0.2, 0.2, 0.6], 32, 64))
    assert found is not None and found.branch in (0, 2) and found.errors > 4
    always = LiveLoads(((8, 0),) * 24, (8,) * 24)
    assert drift([always], LiveLoads(((0, 8),) * 32, (8,) * 32)) is not None
    assert drift([always], LiveLoads(((8, 0),) * 31 + ((7, 1),), (8,) * 32)) is None
    assert drift([always], LiveLoads((), ())) is None
