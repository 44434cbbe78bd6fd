"""Workspaces: executors that share an arena give the same, in the memory of the largest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import plait
from plait.runtime.executor import Executor
from plait.runtime.workspace import Arena, aligned_empty


def _executor(width: int) -> tuple[nn.Module, Executor, torch.Tensor]:
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(16, width), nn.Softmax(-1), nn.Linear(width, 4)).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        program: Any = plait.compile(model, example_inputs=(x,)).programs[-1]
    return model, program.executable.executor, x


def test_executors_take_turns_in_the_memory_of_the_largest() -> None:
    found = [_executor(width) for width in (64, 512, 32)]
    arena = Arena()
    for _, executor, x in found:
        executor.run([x])  # what ran before is forgotten
        executor.share(arena)
    for _ in range(2):
        for model, executor, x in found:
            with torch.no_grad(), arena.lock:
                torch.testing.assert_close(executor.run([x])[0], model(x))
    most = max(executor.plan.arena_bytes for _, executor, _ in found)
    assert isinstance(most, int) and arena.take(most).numel() == most
    spaces = [i._free[0].arena for _, e, _ in found for i in e._instances.values()]
    assert len({space.data_ptr() for space in spaces}) == 1


def test_an_arena_in_use_does_not_grow() -> None:
    arena = Arena()
    arena.reserve(100)
    arena.reserve(50)
    assert arena.take(80).numel() == 80
    with pytest.raises(RuntimeError, match="in use cannot grow"):
        arena.reserve(10)


def test_memory_starts_at_a_cache_line() -> None:
    assert all(aligned_empty(n).data_ptr() % 64 == 0 for n in (0, 1, 63, 4096))
