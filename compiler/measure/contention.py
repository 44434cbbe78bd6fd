"""What kernels take where others run beside them: fitted to traces of schedules that were raced.

Times of kernels come from runs in order, in which all workers share each kernel, so what its own
pieces cost each other is part of them. A schedule runs different kernels side by side, which
contend otherwise: they need different weights, but none of them reads what the other has brought
into the cache; a kernel in one piece reads everything itself, but nothing twice. The ratio of both
times (`Task.beside`) is measured wherever a schedule keeps a kernel to some of the workers.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from ...passes.tasks import Schedule, Task
from ...runtime.executor import Executor
from ...runtime.plan import KernelStep
from ...runtime.trace import Tracer

LEAST = 100e-6
"""Seconds of a kernel below which the ratio tells more about waking and the clock."""
RUNS = 5
"""Traced runs, of which the median counts."""
RANGE = (0.5, 2.0)
"""Ratios beyond are no contention but other work on the machine."""

Home = tuple[int, int]
"""A launch of a plan, and the number of a task in it."""


def kept_to_few(
    tasks: Sequence[Sequence[Task]], schedules: Sequence[Schedule], workers: int
) -> list[Home]:
    """Tasks that are worth a measurement and not dealt out to as many workers as can share them."""
    return [
        (launch, k)
        for launch, (ts, schedule) in enumerate(zip(tasks, schedules, strict=True))
        for k, task in enumerate(ts)
        if task.seconds >= LEAST and len(schedule.place(k)) < min(workers, task.pieces)
    ]


def ratios(
    executor: Executor,
    tasks: Sequence[Sequence[Task]],
    schedules: Sequence[Schedule],
    homes: Sequence[Home],
    inputs: Sequence[torch.Tensor],
) -> dict[Home, float]:
    """Of the tasks ``homes`` their seconds as ``executor`` runs the ``schedules``, as multiples of
    those in order.
    """
    kernels = [n for n, s in enumerate(executor.plan.steps) if isinstance(s, KernelStep)]
    order = [(launch, k) for launch, s in enumerate(schedules) for k in s.order]
    steps = dict(zip(order, kernels, strict=True))
    tracer = Tracer(executor, {}, schedules[0].workers)
    tracer.run(inputs)
    samples: dict[int, list[float]] = {steps[home]: [] for home in homes}
    for _ in range(RUNS):
        spent = dict.fromkeys(samples, 0.0)
        for event in tracer.run(inputs):
            if event.step in spent:
                spent[event.step] += event.end - event.begin
        for step, seconds in spent.items():
            samples[step].append(seconds)
    found = {}
    for launch, k in homes:
        ratio = statistics.median(samples[steps[launch, k]]) / tasks[launch][k].seconds
        if RANGE[0] <= ratio <= RANGE[1]:
            found[launch, k] = ratio
    return found
