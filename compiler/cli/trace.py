"""``plait trace`` and ``plait run --gantt``: what ran when on which worker, beside its plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from ...bench.bounds import Machine
from ...bench.limits import Planned, machine_for, planned_schedules
from ...bench.pictures import kind_of, memory, picture
from ...passes.tasks import bounds
from ...runtime.plan import KernelStep, Plan
from ...runtime.sizes import evaluate
from ...runtime.trace import Event, typical
from ..compiled import Compiled
from .console import Console
from .error import CliError, check_output, write_text, written
from .model import Loaded, compile_loaded, on_cpu

PLANNED, MEASURED = 1, 2
"""Process numbers of the trace: viewers group lanes by process."""


def trace(
    loaded: Loaded, output: Path, pipeline: str | None, threads: int | None, rounds: int
) -> None:
    """Writes a typical run in Chrome's trace format (Perfetto reads it) and prints its figures."""
    check_output(output)
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    compiled = compile_loaded(loaded, pipeline, "quick", console)
    plan, values, events = _ran(loaded, compiled, rounds)
    planned = planned_schedules(plan, values, events)
    document = {
        "displayTimeUnit": "ms",
        "otherData": {"model": loaded.name, "threads": torch.get_num_threads()},
        "traceEvents": [
            *_names(torch.get_num_threads()),
            *_planned(plan, planned),
            *_measured(plan, values, events),
        ],
    }
    write_text(output, json.dumps(document))
    console.print(_figures(plan, values, events, planned, machine_for(plan)))
    console.print(f"wrote {output}: open it at https://ui.perfetto.dev", highlight=False)


def gantt(loaded: Loaded, compiled: Compiled, output: Path) -> None:
    """Draws a typical run of a compiled model; the file's ending says the format."""
    plan, values, events = _ran(loaded, compiled, 15)
    if values:
        raise CliError("the workspace of a model of free sizes cannot be drawn", "use plait trace")
    with written(output) as scratch:
        picture(plan, events, loaded.name, scratch)


def _ran(
    loaded: Loaded, compiled: Compiled, rounds: int
) -> tuple[Plan, Mapping[str, int], list[Event]]:
    executor, tensors = on_cpu(loaded, compiled)
    values = {s: tensors[i].shape[d] for s, (i, d) in executor.plan.symbols.items()}
    with torch.no_grad():
        return executor.plan, values, typical(executor, tensors, rounds, values)


def _names(workers: int) -> Iterator[dict[str, Any]]:
    for process, name in ((PLANNED, "planned"), (MEASURED, "measured")):
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
        for worker in range(workers):
            lane = {"name": f"worker {worker}"}
            yield {
                "ph": "M", "name": "thread_name", "pid": process, "tid": worker, "args": lane,
            }  # fmt: skip


def _planned(plan: Plan, planned: Sequence[Planned]) -> Iterator[dict[str, Any]]:
    clock = 0.0
    for numbers, _, schedule in planned:
        for k, number in enumerate(numbers):
            for part in schedule.shares[k]:
                begin, end = clock + part.start, clock + part.finish
                yield _slice(PLANNED, part.worker, plan, number, begin, end, {})
        clock += schedule.seconds


def _measured(
    plan: Plan, values: Mapping[str, int], events: Sequence[Event]
) -> Iterator[dict[str, Any]]:
    for e in events:
        step, args = plan.steps[e.step], {"tasks": f"{e.lo} to {e.hi}"}
        if isinstance(step, KernelStep):
            args |= {
                "kernel": step.kernel,
                "flops": evaluate(step.flops, values),
                "bytes": evaluate(step.bytes, values),
            }
        yield _slice(MEASURED, e.worker, plan, e.step, e.begin, e.end, args)
    changes: list[tuple[float, int]] = []
    for name, (begin, end, _) in memory(plan, events).items():
        size = evaluate(plan.buffers[name].nbytes, values)
        changes += [(begin, size), (end, -size)]
    live = 0
    for when, size in sorted(changes):
        live += size
        yield {
            "ph": "C", "name": "live workspace", "pid": MEASURED, "ts": when * 1e6,
            "args": {"bytes": live},
        }  # fmt: skip


def _slice(
    process: int,
    worker: int,
    plan: Plan,
    number: int,
    begin: float,
    end: float,
    args: Mapping[str, Any],
) -> dict[str, Any]:
    step = plan.steps[number]
    return {
        "ph": "X",
        "name": step.name,
        "cat": kind_of(step),
        "pid": process,
        "tid": worker,
        "ts": begin * 1e6,
        "dur": (end - begin) * 1e6,
        "args": {"step": number, **args},
    }


def _figures(
    plan: Plan,
    values: Mapping[str, int],
    events: Sequence[Event],
    planned: Sequence[Planned],
    machine: Machine,
) -> Table:
    """How long the run took, and what bounds it."""
    workers = torch.get_num_threads()
    whole = max((e.end for e in events), default=0.0)
    busy = sum(e.end - e.begin for e in events)
    steps = [s for s in plan.steps if isinstance(s, KernelStep)]
    roofline = sum(
        machine.bound(evaluate(s.flops, values), evaluate(s.bytes, values)) for s in steps
    )
    rows = [("all workers busy", busy / workers)]
    if planned:
        limits = [bounds(tasks, workers) for _, tasks, _ in planned]
        rows = [
            ("planned", sum(s.seconds for _, _, s in planned)),
            ("bound: critical path", sum(b.path for b in limits)),
            ("bound: work", sum(b.work for b in limits)),
        ]
    rows.append((f"roofline ({machine})", roofline))
    return beside(whole, rows)


def beside(measured: float, rows: Sequence[tuple[str, float]]) -> Table:
    """Seconds of a run, and under other names what it could have taken; how far it is from each."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "ms", "measured is"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("measured", f"{measured * 1e3:.4g}", "")
    for name, seconds in rows:
        ratio = f"{measured / seconds:.2f}x" if seconds else "-"
        table.add_row(name, f"{seconds * 1e3:.4g}", ratio)
    return table
