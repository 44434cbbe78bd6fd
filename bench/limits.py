"""What a plan's time could be at best: by its kernels on so many workers, and by the machine.

The schedule's bounds take the kernels as they are, each with its measured time: no schedule ends
before the longest path of kernels that need each other does, nor before all work is done by all
workers together. The roofline takes only FLOPs, and the bytes that must come from memory or go
there: weights, inputs and outputs, each once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..compiler.measure.scheduling import segments, tasks_of
from ..passes.tasks import Schedule, Task, bounds, even, simulate
from ..runtime.executor import Executor
from ..runtime.plan import KernelStep, Plan, touched
from ..runtime.sizes import evaluate
from ..runtime.table import share
from ..runtime.trace import Event, typical
from .bounds import Machine, measure_machine

Planned = tuple[list[int], list[Task], Schedule]
"""Of one launch: its step numbers, their tasks with measured times, and when each should run."""


@dataclass(frozen=True)
class Limits:
    """Seconds of a traced run and what bounds it: ``path`` and ``work`` hold for these kernels,
    ``compute`` and ``memory`` for any.
    """

    measured: float
    planned: float
    path: float
    work: float
    compute: float
    memory: float


def limits(
    executor: Executor, tensors: Sequence[torch.Tensor], machine: Machine, rounds: int = 15
) -> Limits | None:
    """The limits of an executor's plan on flat inputs, for torch's number of threads; None for a
    plan that is not all kernels of known sizes.
    """
    plan = executor.plan
    if plan.symbols or not all(isinstance(step, KernelStep) for step in plan.steps):
        return None
    events = typical(executor, tensors, rounds)
    planned = planned_schedules(plan, {}, events)
    found = [bounds(tasks, torch.get_num_threads()) for _, tasks, _ in planned]
    steps = [s for s in plan.steps if isinstance(s, KernelStep)]
    return Limits(
        measured=max((e.end for e in events), default=0.0),
        planned=sum(s.seconds for _, _, s in planned),
        path=sum(b.path for b in found),
        work=sum(b.work for b in found),
        compute=sum(evaluate(s.flops, {}) for s in steps) / machine.flops,
        memory=_compulsory(plan) / machine.bandwidth,
    )


def machine_for(plan: Plan) -> Machine:
    """This machine's limits for the narrowest floating-point type of a plan's tensors."""
    used = {ref.dtype for step in plan.steps for ref in touched(step) if ref is not None}
    narrow = (torch.bfloat16, torch.float16)
    return measure_machine(next((t for t in narrow if str(t)[6:] in used), torch.float32))


def _compulsory(plan: Plan) -> int:
    """Bytes of weights, inputs and outputs."""
    used = {ref.buffer for step in plan.steps for ref in touched(step) if ref is not None}
    buffers = [plan.buffers[name] for name in used]
    return sum(evaluate(b.nbytes, {}) for b in buffers if b.kind != "arena")


def planned_schedules(
    plan: Plan, values: Mapping[str, int], events: Sequence[Event]
) -> list[Planned]:
    """For every launch what it holds and when it should run; nothing where sizes are free."""
    if values:
        return []
    workers = torch.get_num_threads()
    spent: dict[int, float] = {}
    for event in events:
        spent[event.step] = spent.get(event.step, 0.0) + event.end - event.begin
    found = []
    for numbers in segments(plan):
        tasks = [
            Task(t.name, spent.get(k, 0.0), t.pieces, t.after)
            for t, k in zip(tasks_of(plan.steps, numbers), numbers, strict=True)
        ]
        places = []
        for task, k in zip(tasks, numbers, strict=True):
            step = plan.steps[k]
            assert isinstance(step, KernelStep)
            placed = step.place if plan.workers == workers else ()
            places.append(placed or even(task.pieces, share(step, task.pieces, {}, workers)))
        found.append((numbers, tasks, simulate(tasks, range(len(tasks)), places, workers)))
    return found
