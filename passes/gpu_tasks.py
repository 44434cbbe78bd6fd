"""Kernels as tasks of one GPU: how long they take side by side, and how long they must take.

A task alone takes ``seconds`` on the ``share`` of the GPU that its blocks fill. Tasks that run at
the same time keep their speed while their shares fit, and slow down evenly where they do not. A
task starts a launch's delay after what it waits for has ended, and the GPU's front end starts one
after the other, as it does for the nodes of a CUDA graph. It is a model: it ranks alternatives, and
what it says of seconds is no more than an estimate.

The bounds are those of every schedule: the longest chain, and all work over the whole GPU (Graham,
"Bounds on Multiprocessing Timing Anomalies", 1969).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.occupancy import Gpu


@dataclass(frozen=True)
class GpuTask:
    """A kernel or library call.

    ``seconds`` it takes alone, on the ``share`` (above 0, at most 1) of the GPU; ``nbytes`` of
    memory that it must at least move; ``after`` numbers the tasks that must have ended before.
    """

    name: str
    seconds: float
    share: float = 1.0
    nbytes: float = 0.0
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class GpuBounds:
    """What no schedule of the tasks can beat, in seconds.

    ``path`` is the longest chain with its launches, ``work`` all tasks on the whole GPU at once,
    ``memory`` all bytes over the bandwidth.
    """

    path: float
    work: float
    memory: float

    @property
    def best(self) -> float:
        """The largest one."""
        return max(self.path, self.work, self.memory)


def check(tasks: Sequence[GpuTask]) -> None:
    """Raises ValueError for tasks that come after later ones, and for times that make no sense."""
    for number, task in enumerate(tasks):
        if any(not 0 <= k < number for k in task.after):
            raise ValueError(f"task {task.name} comes after one that is not before it")
        if not (math.isfinite(task.seconds) and task.seconds >= 0 and 0 < task.share <= 1):
            raise ValueError(f"task {task.name} takes {task.seconds} s of {task.share} of the GPU")


def bounds(tasks: Sequence[GpuTask], gpu: Gpu) -> GpuBounds:
    """Lower bounds on the time of ``tasks``, whatever the order."""
    path = max(bottom_levels(tasks, gpu), default=0.0)
    work = sum(t.seconds * t.share for t in tasks)
    return GpuBounds(path, work, sum(t.nbytes for t in tasks) / gpu.bandwidth)


def bottom_levels(tasks: Sequence[GpuTask], gpu: Gpu) -> list[float]:
    """Seconds from the launch of each task to the end of all, were the GPU large enough."""
    levels = [gpu.launch + t.seconds for t in tasks]
    for number in reversed(range(len(tasks))):
        task = tasks[number]
        for k in task.after:
            levels[k] = max(levels[k], gpu.launch + tasks[k].seconds + levels[number])
    return levels


def simulate(tasks: Sequence[GpuTask], gpu: Gpu) -> list[tuple[float, float]]:
    """Start and end of every task when each starts as soon as it may, earlier ones first."""
    check(tasks)
    left = [len(set(t.after)) for t in tasks]
    readers: list[list[int]] = [[] for _ in tasks]
    for number, task in enumerate(tasks):
        for k in set(task.after):
            readers[k].append(number)
    begun, ended = [0.0] * len(tasks), [0.0] * len(tasks)
    waiting = [(gpu.launch, k) for k, count in enumerate(left) if not count]
    heapq.heapify(waiting)
    running: dict[int, float] = {}  # what is left of each, in seconds alone
    now, free = 0.0, 0.0  # free: when the front end can start the next one
    while waiting or running:
        slow = max(1.0, sum(tasks[k].share for k in running))
        first = min(running, key=lambda k: (running[k], k)) if running else -1
        end = now + running[first] * slow if running else math.inf
        start = max(waiting[0][0], free) if waiting else math.inf
        then = min(start, end)
        for k in running:
            running[k] = max(0.0, running[k] - (then - now) / slow)
        now = then
        if start < end:
            _, number = heapq.heappop(waiting)
            running[number], begun[number] = tasks[number].seconds, now
            free = now + gpu.issue
            continue
        del running[first]
        ended[first] = now
        for reader in readers[first]:
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(waiting, (now + gpu.launch, reader))
    return list(zip(begun, ended, strict=True))


def seconds(tasks: Sequence[GpuTask], gpu: Gpu) -> float:
    """When the last task ends in `simulate`."""
    return max((end for _, end in simulate(tasks, gpu)), default=0.0)
