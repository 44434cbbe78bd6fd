"""Tuning improves kernels within a budget, and an interrupted run goes on where it was."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.kernels import tune as tune_module
from plait.kernels.abi import Kernel, Pack
from plait.kernels.database import FRUGAL, Database, Entry
from plait.kernels.target import host
from plait.kernels.tune import Outcome, Progress, Task, tune

from .search_check import Problem, linear


def _record(kernel: Kernel) -> dict[str, Any]:
    packs = [p and [p.op, [list(item) for item in p.params]] for p in kernel.packs]
    return {"tasks": kernel.tasks, "packs": packs, "config": kernel.config}


def _revive(entry: Entry) -> Kernel:
    packs = tuple(p and Pack(p[0], tuple((k, v) for k, v in p[1])) for p in entry.record["packs"])
    return Kernel(entry.symbol, None, (), (), (), entry.record["tasks"], packs)


def task(made: Problem, key: str = "k", weight: float = 1.0) -> Task:
    return Task(key, key, weight, made.group, made.io, made.bench, _record, _revive)


def works(made: Problem, database: Database, key: str = "k", role: str = "fast") -> Entry:
    entry = database.lookup(key, role)
    assert entry is not None
    made.reset()
    made.candidate(_revive(entry), database.address(entry)).run()
    assert made.check() < 1e-5
    return entry


def test_templates_are_raced_and_schedules_searched(tmp_path: Path) -> None:
    made, seen = linear(96, 128, 128), list[Progress]()
    database = Database(tmp_path)
    (outcome,) = tune([task(made)], database, host(), budget=600, trials=8, progress=seen.append)
    entry = works(made, Database(tmp_path))
    works(made, Database(tmp_path), role=FRUGAL)
    assert outcome.before is None and outcome.after == entry.seconds and outcome.remark == ""
    assert outcome.source == entry.record["source"]
    assert outcome.source in ("template", "metaschedule")
    stages = [p.stage for p in seen]
    assert stages[0] == "templates" and "search" in stages and stages[-1] == "done"
    trials = [p.trials for p in seen]
    assert trials == sorted(trials) and trials[-1] == outcome.trials >= 8
    assert seen[-1].seconds == outcome.after and (seen[0].index, seen[0].count) == (0, 1)
    measured = database.measurements("k")
    assert measured and measured[0].seconds is not None and measured[0].config


def test_a_second_run_does_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = linear(64, 64, 128)
    tune([task(made)], Database(tmp_path), host(), budget=600, trials=4)
    entry = works(made, Database(tmp_path))

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tuned again")

    monkeypatch.setattr(tune_module, "build", forbidden)
    monkeypatch.setattr(tune_module, "search", forbidden)
    (again,) = tune([task(made)], Database(tmp_path), host(), budget=600, trials=4)
    assert again.before == again.after == entry.seconds


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    made = linear(64, 64, 128)

    def interrupt(progress: Progress) -> None:
        if progress.stage == "search":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune([task(made)], Database(tmp_path), host(), budget=600, trials=8, progress=interrupt)
    works(made, Database(tmp_path))  # the templates' winner is there already
    seen: list[Progress] = []
    tune([task(made)], Database(tmp_path), host(), budget=600, trials=8, progress=seen.append)
    assert [p.stage for p in seen if p.stage == "templates"] == []
    assert seen[-1].stage == "done" and seen[-1].trials >= 8
    works(made, Database(tmp_path))


def test_a_spent_budget_leaves_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, now = linear(), [0.0]
    monkeypatch.setattr(tune_module.time, "monotonic", lambda: now[0])

    def spend(progress: Progress) -> None:
        now[0] += 1000.0

    heavy, light = task(made, "heavy", 5.0), task(made, "light", 1.0)
    outcomes = tune([light, heavy], Database(tmp_path), host(), budget=10, progress=spend)
    assert [o.task for o in outcomes] == ["heavy", "light"]
    assert outcomes[0].after is not None and outcomes[0].remark == ""
    assert outcomes[1] == Outcome("light", None, None, "", 0, "the budget is spent")
    assert Database(tmp_path).lookup("light") is None


def test_what_no_template_covers_is_a_remark(tmp_path: Path) -> None:
    made = linear()
    node = made.group.inputs[0]
    made.io[node] = replace(made.io[node], dtype=torch.int32)
    (outcome,) = tune([task(made)], Database(tmp_path), host(), budget=10)
    assert outcome.after is None and "library" in outcome.remark


def test_a_wrong_kernel_never_wins(tmp_path: Path) -> None:
    made = linear()
    wrong = Task(
        "k", "k", 1.0, made.group, made.io,
        lambda: tune_module.Bench(made.candidate, lambda: math.nan, made.reset, 1e-5),
        _record, _revive,
    )  # fmt: skip
    (outcome,) = tune([wrong], Database(tmp_path), host(), budget=10, trials=2)
    assert outcome.after is None and Database(tmp_path).lookup("k") is None
    assert all(m.seconds is None for m in Database(tmp_path).measurements("k"))


def test_tuning_works_without_a_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    database, made = Database(tmp_path / "file"), linear(64, 64, 128)
    (outcome,) = tune([task(made)], database, host(), budget=600, trials=2)
    assert not database.persistent and outcome.after is not None
    works(made, database)


def test_budgets_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        tune([], Database(tmp_path), host(), budget=0)
    assert tune([], Database(tmp_path), host(), budget=1) == []


def test_an_interruption_that_tvm_turns_into_an_error_is_one_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), tune_module._interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RuntimeError("parallel_for_dynamic error") from None
    with pytest.raises(RuntimeError, match="its own"), tune_module._interruptible():
        raise RuntimeError("its own")
    assert signal.getsignal(signal.SIGINT) is before
