"""Tuning of a compiled graph: its kernels as tasks for `kernels.tune`, the slowest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...kernels.abi import Kernel
from ...kernels.database import Entry
from ...kernels.metaschedule import Bench
from ...kernels.race import Candidate
from ...kernels.tune import Outcome, Progress, Task, tune
from ...runtime.executor import Executor
from ...runtime.plan import KernelStep
from ...runtime.profile import profile_steps
from ...runtime.trace import made_up
from ..lowering import select
from ..lowering.trial import Trial
from ..pipeline import CompiledGraph


def tune_graph(
    graph: CompiledGraph,
    tensors: Sequence[torch.Tensor],
    *,
    budget: float,
    trials: int = 64,
    progress: Callable[[Progress], None] | None = None,
) -> list[Outcome]:
    """Spends ``budget`` seconds on the kernels that ``graph`` runs for ``tensors``.

    Winners go to the kernel database; a model compiled afterwards gets them. Kernels for sizes that
    are known only at run time are left alone. Raises ValueError for a budget that is not positive.
    """
    tasks = tasks_of(graph, tensors)
    return tune(
        tasks,
        graph.kernels.store,
        graph.kernels.target,
        budget=budget,
        trials=trials,
        progress=progress,
    )


def tasks_of(graph: CompiledGraph, tensors: Sequence[torch.Tensor]) -> list[Task]:
    """One task for each heavy kernel, weighed by the time that all of its steps take; those of
    branches whose sizes are known as if every branch ran.
    """
    weights: Counter[str] = Counter()
    names: dict[str, str] = {}
    with torch.no_grad():
        for executor, inputs in _profiled(graph.executor, tensors):
            for time in profile_steps(executor, inputs, rounds=5):
                step = executor.plan.steps[time.number]
                if isinstance(step, KernelStep):
                    weights[step.kernel] += time.seconds  # type: ignore[assignment] - no counts
                    names[step.kernel] = f"{step.name} {list(step.args[-1].shape)}"
    return [
        _task(key, names[key], float(weight), graph.kernels.requests[key])
        for key, weight in weights.most_common()
        if key in graph.kernels.requests
        and graph.kernels.requests[key].group.kind in select.HEAVY
        and not graph.kernels.requests[key].rename
    ]


def _profiled(
    executor: Executor, tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[Executor, Sequence[torch.Tensor]]]:
    """An executor with its inputs, and those of its branches of fixed sizes with made-up ones."""
    yield executor, tensors
    for part in executor.parts.values():
        if isinstance(part, Executor) and not part.plan.symbols:
            yield from _profiled(part, made_up(part.plan))


def _task(key: str, name: str, weight: float, request: select.Request) -> Task:
    group, io = request.group, request.io

    def bench() -> Bench:
        trial = Trial(group, io, {})

        def candidate(kernel: Kernel, address: int) -> Candidate:
            words = trial.words(kernel, kernel.packs or (None,) * len(group.inputs))
            touched = sum(t.nbytes for t in (*trial.inputs, *trial.outputs))
            assert isinstance(kernel.tasks, int)
            return Candidate.kernel(
                kernel.name, address, kernel.tasks, list(words), kernel.config, touched, trial
            )

        return Bench(candidate, trial.error, trial.spoil, trial.tolerance)

    def record(kernel: Kernel) -> dict[str, Any]:
        return select.record(group, kernel, request.rename)

    def revive(entry: Entry) -> Kernel:
        chosen = select.selected(entry.key, entry.record, {})
        assert isinstance(chosen.tasks, int)
        return Kernel(
            name=entry.symbol,
            func=None,
            inputs=tuple(io[n] for n in group.inputs),
            outputs=tuple(io[n] for n in group.outputs),
            symbols=(),
            tasks=chosen.tasks,
            packs=chosen.packs,
            config=chosen.config,
        )

    return Task(key, name, weight, group, io, bench, record, revive)
