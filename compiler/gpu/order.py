"""Which steps of a plan for a GPU come after which others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...passes.gpu_tasks import GpuTask
from ...passes.streams import Streams
from ...runtime.plan import BranchStep, FetchStep, KernelStep, Step, TensorRef, cuts
from ...runtime.spans import span_of


def dependencies(steps: Sequence[Step], impure: set[str]) -> list[tuple[int, ...]]:
    """Which earlier steps each one must come after, by the memory that they touch.

    Steps named in ``impure`` keep their order among each other, and nothing passes a step at which
    a plan is cut.
    """
    seen: dict[str, list[tuple[int, Any, bool]]] = {}
    found = []
    last_impure = last_cut = -1
    cut = cuts(steps)
    for number, step in enumerate(steps):
        after = {last_cut} if last_cut >= 0 else set()
        if number in cut:
            after, last_cut = set(range(number)), number
        if step.name in impure:
            after |= {last_impure} if last_impure >= 0 else set()
            last_impure = number
        for ref, writes in _accesses(step):
            span = span_of(ref, ref.buffer, 0, {}) if ref.dtype else None
            known = seen.setdefault(ref.buffer, [])
            after |= {
                j
                for j, other, written in known
                if j != number
                and (written or writes)
                and (span is None or other is None or other.overlaps(span))
            }
            known.append((number, span, writes))
        found.append(tuple(sorted(after)))
    return found


def _accesses(step: Step) -> list[tuple[TensorRef, bool]]:
    if isinstance(step, KernelStep):
        return [(ref, k >= step.reads) for k, ref in enumerate(step.args)]
    if isinstance(step, FetchStep):
        return [(step.selector, False)]
    results = [(ref, True) for ref in step.results if ref is not None]
    read = (step.selector, *step.refs) if isinstance(step, BranchStep) else step.refs
    return [*((ref, False) for ref in read), *results]


def on_streams(tasks: Sequence[GpuTask], streams: Streams) -> list[GpuTask]:
    """The tasks with the order that streams add."""
    last: dict[int, int] = {}
    found = []
    for number, task in enumerate(tasks):
        stream = streams.of[number]
        before = {*task.after, *([last[stream]] if stream in last else [])}
        found.append(replace(task, after=tuple(sorted(before))))
        last[stream] = number
    return found
