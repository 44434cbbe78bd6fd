"""Traces: every task of every step once, in an order that the plan allows, on the right worker."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import plait
from plait.runtime.plan import KernelStep
from plait.runtime.trace import Tracer, typical


class Mixed(nn.Module):
    """Two branches of kernels, and an operator that only the library has between two launches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.a(x)) + self.b(x).relu()
        values, _ = torch.linalg.eigh(y.T @ y)
        return values.softmax(0) * 2


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_trace_holds_every_task_once_and_in_order(workers: int) -> None:
    x = torch.randn(64, 64)
    with torch.no_grad():
        compiled = plait.compile(Mixed().eval(), example_inputs=(x,))
        executor = compiled.programs[-1].executable.executor  # type: ignore[attr-defined]
        events = Tracer(executor, {}, workers).run([x])
    steps = executor.plan.steps
    assert {e.step for e in events} == set(range(len(steps)))
    assert any(not isinstance(s, KernelStep) for s in steps)
    assert [e.begin for e in events] == sorted(e.begin for e in events)
    assert all(0 <= e.begin <= e.end and 0 <= e.worker < workers for e in events)
    for number, step in enumerate(steps):
        own = sorted((e.lo, e.hi) for e in events if e.step == number)
        tasks = step.tasks if isinstance(step, KernelStep) else 1
        assert [lo for lo, _ in own] == [0, *(hi for _, hi in own[:-1])] and own[-1][1] == tasks
    library = next(k for k, s in enumerate(steps) if not isinstance(s, KernelStep))
    split = [e for e in events if e.step == library]
    assert all(e.end <= split[0].end for e in events if e.step < library)
    assert all(e.begin >= split[0].begin for e in events if e.step > library)


def test_tracing_does_not_change_results() -> None:
    x = torch.randn(64, 64)
    with torch.no_grad():
        compiled = plait.compile(Mixed().eval(), example_inputs=(x,))
        before = compiled(x)
        executor = compiled.programs[-1].executable.executor  # type: ignore[attr-defined]
        assert typical(executor, [x], rounds=3)
        assert torch.equal(compiled(x), before)
