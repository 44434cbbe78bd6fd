"""Times the steps of a plan one by one: each kernel as a launch of its own, in the plan's order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .executor import Executor
from .plan import BranchStep, FetchStep, KernelStep, LibraryStep
from .sizes import evaluate


@dataclass(frozen=True)
class StepTime:
    """Median seconds of one step alone, and the work it does (FLOPs and bytes, 0 if unknown)."""

    number: int
    name: str
    kind: str
    seconds: float
    flops: int
    bytes: int


def profile_steps(
    executor: Executor, tensors: Sequence[torch.Tensor], rounds: int = 20
) -> list[StepTime]:
    """Runs the plan ``rounds`` times, step by step. A launch of its own costs a step
    microseconds.
    """
    plan = executor.plan
    single = _StepExecutor(executor)
    samples: list[list[float]] = [[] for _ in plan.steps]
    for _ in range(rounds):
        single.run(tensors)
        for sample, seconds in zip(samples, single.seconds, strict=True):
            sample.append(seconds)
    values = single.values
    return [
        StepTime(
            k,
            step.name,
            _KINDS[type(step)],
            statistics.median(sample),
            evaluate(step.flops, values) if isinstance(step, KernelStep) else 0,
            evaluate(step.bytes, values) if isinstance(step, KernelStep) else 0,
        )
        for k, (step, sample) in enumerate(zip(plan.steps, samples, strict=True))
    ]


_KINDS: dict[type, str] = {
    KernelStep: "kernel", LibraryStep: "library", BranchStep: "branches", FetchStep: "fetch",
}  # fmt: skip


class _StepExecutor(Executor):
    """An executor that launches every kernel on its own and notes the time of each step."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(
            replace(executor.plan),
            executor.constants,
            executor.functions,
            executor.calls,
            parts=executor.parts,
            tier=executor.tier,
            banks=executor.banks,
        )
        self.seconds: list[float] = []
        self.values: dict[str, int] = {}

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        key = (torch.get_num_threads(), *[tensors[i].shape[d] for _, (i, d) in self._symbols])
        instance = self._instances.get(key)
        if instance is None:
            instance = self._instantiate(key)
            instance.segments = [
                [step] if isinstance(step, KernelStep) else step for step in self.plan.steps
            ]
            instance.on_step = self._note
        self.values = dict(instance.values)
        self.seconds = []
        self._last = time.perf_counter()
        return instance.run(tensors)

    def _note(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
