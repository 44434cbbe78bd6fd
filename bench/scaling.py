"""How schedules would scale: simulated makespans for more workers than this machine has.

Costs are measured: every kernel's seconds on one worker. For the worker counts that the machine has
the simulation is compared with the clock; beyond, it tells what independent kernels would give when
memory does not get slower, which real machines do, so these figures are upper bounds on the gain.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..compiler.api import compile
from ..compiler.measure.scheduling import predict
from ..runtime.trace import Tracer
from . import workloads
from .workloads import Workload

WORKERS = (1, 2, 4, 8, 16, 32, 64, 132)
ROUNDS = 11


@dataclass(frozen=True)
class Row:
    """Seconds of one workload on ``workers``: kernels in order, scheduled, the larger of the two
    lower bounds, and measured in order (None: the machine has fewer cores).
    """

    workload: str
    workers: int
    in_order: float
    scheduled: float
    bound: float
    measured: float | None


def main() -> None:
    """Prints a table for each workload."""
    parser = argparse.ArgumentParser(prog="python -m plait.bench.scaling", description=__doc__)
    parser.add_argument("names", nargs="*", default=["cnn"], help="workloads or groups")
    options = parser.parse_args()
    console = Console()
    for workload in workloads.select(options.names):
        console.print(_table(workload, scale(workload)))


def scale(workload: Workload, workers: Sequence[int] = WORKERS) -> list[Row]:
    """Simulates ``workload`` compiled without `schedule` on each number of workers."""
    model, inputs = workload.build()
    with torch.no_grad():
        pipeline = "normalize,outline-branches,fuse-vertical"
        compiled = compile(model, example_inputs=inputs, pipeline=pipeline)
        program = compiled.programs[-1]
        executor = program.executable.executor  # type: ignore[attr-defined]
        given = [*inputs, *program.captured.states]
        times, wholes = {}, {}
        for count in workers:
            if count <= (torch.get_num_threads() if count > 1 else 1):
                tracer = Tracer(executor, {}, count)
                runs = [tracer.run(given) for _ in range(ROUNDS)]
                wholes[count] = statistics.median(max(e.end for e in run) for run in runs)
                if count == 1:
                    for k in range(len(executor.plan.steps)):
                        spent = [sum(e.end - e.begin for e in r if e.step == k) for r in runs]
                        times[k] = statistics.median(spent)
    return [
        Row(workload.name, count, *predict(executor.plan, times, count), wholes.get(count))
        for count in workers
    ]


def _table(workload: Workload, rows: Sequence[Row]) -> Table:
    table = Table(title=workload.name, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("workers", "in order ms", "scheduled", "gain", "bound", "measured", "error"):
        table.add_column(column, justify="right")
    for r in rows:
        error = f"{r.in_order / r.measured - 1:+.0%}" if r.measured else "-"
        table.add_row(
            str(r.workers),
            f"{r.in_order * 1e3:.3g}",
            f"{r.scheduled * 1e3:.3g}",
            f"{r.in_order / r.scheduled:.2f}x",
            f"{r.bound * 1e3:.3g}",
            f"{r.measured * 1e3:.3g}" if r.measured else "-",
            error,
        )
    return table


if __name__ == "__main__":
    main()
