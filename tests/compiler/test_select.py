"""Choosing kernels: races, the library among the runners, and what happens to losers."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import plait
from plait.compiler.lowering import select
from plait.compiler.lowering.trial import Trial
from plait.kernels import build
from plait.kernels.abi import MOST_ARGUMENTS
from plait.kernels.database import Database
from plait.runtime import driver
from plait.runtime.plan import KernelStep, LibraryStep


@pytest.fixture
def fresh(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A database of its own, so that races are run."""
    store = Database(tmp_path)
    monkeypatch.setattr(select, "database", lambda: store)
    return store


def compiled_linear() -> tuple[plait.Compiled, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU()).eval()
    x = torch.randn(64, 128)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=x)
        torch.testing.assert_close(compiled(x), model(x))
    return compiled, model, x


def remarks(compiled: plait.Compiled) -> dict[str, str]:
    return {r.id: r.reason for r in compiled.remarks}


def test_the_library_is_timed_beside_the_kernels(fresh: Database) -> None:
    compiled, *_ = compiled_linear()
    (key,) = compiled.programs[0].executable.kernels.requests
    entry = fresh.lookup(key)
    assert entry.record["library_seconds"] > 0 and entry.seconds > 0 and entry.effort > 1


def test_races_do_not_count_the_time_that_others_have(
    fresh: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    def race(candidates, *, clock, **options):
        begin = clock()
        time.sleep(0.1)
        waited.append(clock() - begin)
        return run(candidates, clock=clock, **options)

    run = select.race.race
    monkeypatch.setattr(select.race, "race", race)
    compiled_linear()
    assert waited and max(waited) < 0.05


def test_a_faster_library_wins_and_stays_chosen(
    fresh: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "library_seconds", lambda self: 1e-9)
    for _ in range(2):  # raced, then from the database
        compiled, *_ = compiled_linear()
        assert "PLT-KER-007" in remarks(compiled)
        assert all(isinstance(s, LibraryStep) for s in compiled.plan.steps)


def test_wrong_candidates_never_run(fresh: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "error", lambda self: float("nan"))
    compiled, *_ = compiled_linear()
    assert "wrong result" in remarks(compiled)["PLT-KER-006"]
    assert all(isinstance(s, LibraryStep) for s in compiled.plan.steps)


def test_where_the_c_compiler_cannot_link_kernels_run_all_the_same(
    fresh: Database, monkeypatch: pytest.MonkeyPatch, kernels_win: None
) -> None:
    monkeypatch.setattr(build, "c_compiler", lambda: ("false",))
    compiled, model, x = compiled_linear()
    assert all(isinstance(s, KernelStep) for s in compiled.plan.steps)
    assert "linker failed" in remarks(compiled)["PLT-CAC-005"]
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_without_tuning_nothing_is_raced(fresh: Database) -> None:
    model = nn.Linear(128, 256).eval()
    x = torch.randn(64, 128)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=x, tune="off")
    assert compiled.programs[0].executable.kernels.raced == 0
    assert all(isinstance(s, KernelStep) for s in compiled.plan.steps)


def test_what_is_expanded_is_raced_like_anything_else(fresh: Database) -> None:
    """Relative positions of local attention: one matrix for all blocks."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(23, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.t()

    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(64, 8, 8, 32).transpose(1, 2)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=x)
        torch.testing.assert_close(compiled(x), model(x))
    assert compiled.programs and "PLT-CAP-015" not in remarks(compiled)


class Stacked(nn.Module):
    """A value of each row, and all of them again."""

    def forward(self, x):
        rows = [row.cumsum(0) for row in x.unbind(0)]
        return torch.stack(rows).exp()


def test_more_tensors_than_a_launch_passes_on_are_joined_by_the_library() -> None:
    assert driver.ARG_CLASSES[-1] == MOST_ARGUMENTS
    model, x = Stacked().eval(), torch.randn(MOST_ARGUMENTS, 5)
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert {"PLT-FUS-006", "PLT-KER-008"} <= remarks(compiled).keys()
