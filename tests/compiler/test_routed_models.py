"""Models that route, drawn by chance: compiled in every way, they answer as the original does.

The seeds are fixed. More of them: `python tests/compiler/test_routed_models.py 0 500`.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.compiler.measure import bets

sys.path.insert(0, str(Path(__file__).parent))
from routed_models import Draw, cells, forms  # a plain module beside this file

SIZES = {"dynamic_shapes": ({0: torch.export.Dim("n", min=0)},), "tune": "off"}
USUAL = (1, 2)
"""The codes of most cells: bets are made on them."""


def timed(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Stands in for timing: every bet that can be won pays."""
    for call in calls:
        call()
    return [1.0] * (len(calls) - 1) + [0.1]


def inputs(seed: int) -> dict[str, Tensor]:
    """Batches of all kinds, by name."""
    sizes = {f"{n} cells": cells(n, seed + n) for n in (9, 3, 1, 0, 30)}
    usual = {"usual": cells(9, seed, USUAL), "hardly usual": cells(9, seed, USUAL)}
    usual["hardly usual"][4, :2] = torch.tensor([3.0, 0.0])
    return {**sizes, **usual, **forms(cells(9, seed + 1))}


def check(model: nn.Module, compiled: Any, seed: int) -> dict[str, Tensor]:
    """Compares answers; returns those of ``compiled``."""
    found: dict[str, Tensor] = {}
    for name, x in inputs(seed).items():
        before = x.clone()
        found[name] = compiled(x)
        torch.testing.assert_close(found[name], model(x), rtol=1e-3, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    assert not [r for r in compiled.remarks if r.id.startswith("PLT-CAP") and r.kind == "missed"]
    return found


def plain(model: nn.Module, seed: int) -> None:
    """Compiled, saved and loaded; then with other weights and buffers."""
    compiled = plait.compile(model, **SIZES)
    state = copy.deepcopy(model.state_dict())
    found = check(model, compiled, seed)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.plait"
        compiled.save(path)
        loaded = plait.load(path)
    for name, x in inputs(seed).items():
        torch.testing.assert_close(loaded(x), found[name], rtol=0, atol=0, equal_nan=True)
    compiled.load_state_dict({name: t * 0.5 + 0.25 for name, t in state.items()})
    for module in model.modules():
        if "scale" in module._buffers:
            module.scale = torch.linspace(-1, 1, len(module.scale))  # type: ignore[arg-type]
    check(model, compiled, seed)


def with_bets(model: nn.Module, seed: int) -> None:
    """Bets are won and lost; where they are lost, the answer is the general plan's."""
    general = plait.compile(copy.deepcopy(model), **SIZES)
    usual = [cells(9, k, USUAL if k % 8 or seed % 2 else None) for k in range(16)]
    profile = plait.profile(model, [(x,) for x in usual])
    compiled = plait.compile(model, profile=profile, **SIZES)
    check(model, compiled, seed)
    both = [p.executable.speculation for p in compiled.programs]
    for x in inputs(seed).values():
        before = sum(s.misses for s in both if s is not None)
        have, want = compiled(x), general(x)
        if sum(s.misses for s in both if s is not None) > before:
            torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


def without_passes(model: nn.Module, seed: int) -> None:
    """Passes left out change no answer."""
    names = ["normalize", "outline-branches", "speculate-routes", "fuse-vertical", "schedule"]
    kept = [name for k, name in enumerate(names) if (seed >> k) & 1 or name == "outline-branches"]
    check(model, plait.compile(model, pipeline=",".join(kept), **SIZES), seed)


WAYS = [plain, with_bets, with_bets, without_passes]


@pytest.mark.parametrize("seed", range(8))
def test_a_drawn_model_answers_as_the_original(seed: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(bets, "timed", timed)
    model = Draw(seed).model()
    with torch.no_grad():
        WAYS[seed % len(WAYS)](model, seed)


if __name__ == "__main__":
    bets.timed = timed
    for seed in range(*map(int, sys.argv[1:3])):
        with torch.no_grad():
            WAYS[seed % len(WAYS)](Draw(seed).model(), seed)
        print(seed, flush=True)
