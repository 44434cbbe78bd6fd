"""The benchmark of expert placement counts messages as defined, and runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from plait.bench import expert_placement as bench


def slow_messages(routes: bench.Routes, where: list[np.ndarray]) -> int:
    """The definition, token by token."""
    layers = list(routes.values())
    total = 0
    for n in range(len(layers) - 1):
        for before, after in zip(layers[n], layers[n + 1], strict=True):
            home = where[n][before[0]]
            total += len({where[n][e] for e in before} - {home})
            total += len({where[n + 1][e] for e in after} - {home})
    return total


@pytest.mark.parametrize("seed", range(4))
def test_messages_are_counted_as_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    routes = {f"l{k}": np.argsort(rng.random((50, 6)), axis=1)[:, :2] for k in range(3)}
    where = [rng.integers(0, 3, 6) for _ in routes]
    played = [place[route] for place, route in zip(where, routes.values(), strict=True)]
    assert bench.messages(played) == slow_messages(routes, where)
    assert bench.messages([np.zeros((50, 2), np.int64)] * 3) == 0


def test_hindsight_bounds_what_is_proven_and_rules_are_kept() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 400)
    taste = rng.gumbel(size=(3, 4, 6)) * 3
    routes = {f"l{k}": np.argsort(-(taste[k][kind] + rng.gumbel(size=(400, 6))), axis=1)[:, :2]
              for k in range(3)}  # fmt: skip
    held = {name: route[300:] for name, route in routes.items()}
    fitted = {name: route[:300] for name, route in routes.items()}
    case = bench.Case(experts=6, devices=2, seed=0, budget=0.1)
    rows = {(r["rule"], r["algorithm"]): r for r in bench.compare(case, fitted, held, [1])}
    for rule in bench.RULES:
        cross = {a: rows[rule, a]["cross_tokens"] for a in ("best", "hindsight", "round-robin")}
        assert rows[rule, "best"]["exact"]
        assert cross["hindsight"] <= cross["best"] < cross["round-robin"]
        assert all(r["model_cross_tokens"] == r["cross_tokens"] for r in rows.values()
                   if not r["copies"])  # fmt: skip
    copied = rows["even+1", "best"]
    assert copied["copies"] > 0 and not copied["exact"]
    assert copied["cross_tokens"] < rows["even", "best"]["cross_tokens"]
    assert rows["equal", "best"]["cross_tokens"] <= rows["equal", "quadratic-assignment"][
        "cross_tokens"] * 1.1  # fmt: skip


def test_it_runs_from_training_to_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "rows.json"
    words = ["x", "--steps", "3", "--batches", "1", "--held-out", "1", "--seeds", "0"]
    words += ["--devices", "2", "--copies", "1", "--budget", "0.1", "--json", str(path)]
    monkeypatch.setattr("sys.argv", words)
    bench.main()
    shown = capsys.readouterr().out
    assert "4 layers of 8 experts, 2048 held-out tokens, seeds 0" in shown
    assert "best*" in shown and "after a drift" in shown
    written = json.loads(path.read_text())
    assert {r["rule"] for r in written["rows"]} == {*bench.RULES, "even+1"}
    last = [r for r in written["drift"] if r["move_cost_share"] == 1.0]
    assert all(r["moved"] == 0 for r in last)  # nothing saves as much as all tokens
