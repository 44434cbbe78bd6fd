"""``plait place``: devices for the ops of a problem file or of a model. Loads torch for models."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..passes.placement.plan import place
from ..passes.placement.problem import Problem
from ..passes.placement.problem_file import read_problem
from .cli_error import CliError, check_output

if TYPE_CHECKING:
    from ..passes.placement.placement import Placement


def run(
    target: str,
    output: Path | None,
    algorithm: str,
    budget: float,
    objective: str,
    seed: int,
    quiet: bool,
    extras: dict[str, Path | None],
) -> None:
    """Plans, prints what came out, and writes the files asked for, all after planning."""
    began = _process_start()
    for path in (output, *extras.values()):
        check_output(path)
    problem = _problem(target)
    placement = plan(problem, algorithm, budget, objective, seed, quiet, began)
    if not quiet:
        show(problem, placement)
    if output is not None:
        placement.write(output)


def _problem(target: str) -> Problem:
    if not Path(target).is_file():
        raise CliError(f"there is no file {target}", "name a problem file")
    return read_problem(target)


def plan(
    problem: Problem,
    algorithm: str,
    budget: float,
    objective: str,
    seed: int,
    quiet: bool,
    began: float | None,
) -> Placement:
    """`place` behind a progress bar with the current cost and gap, where there is a terminal."""
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    columns = (TextColumn("planning"), BarColumn(), TextColumn("{task.fields[state]}"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=1.0, state="")

        def progress(used: float, cost: float, bound: float) -> None:
            state = "nothing fits yet"
            if cost < float("inf"):
                gap = f", gap {cost / bound - 1:.1%}" if bound else ""
                state = f"{_seconds(cost)}{gap}"
            bar.update(task, completed=used, state=state)

        return place(
            problem,
            algorithm=algorithm,
            objective=objective,
            budget=budget,
            seed=seed,
            progress=None if hidden else progress,
            began=began,
        )


def show(problem: Problem, placement: Placement) -> None:
    """Prints the report and a line for each device."""
    report = placement.report
    console = Console(highlight=False)
    cost = "load_s" if report["objective"] == "throughput" else "makespan_s"
    what = "seconds per input" if cost == "load_s" else "step"
    console.print(
        f"{what}: {_seconds(report[cost])}, lower bound {_seconds(report['lower_bound_s'])}, "
        f"gap {report['gap']:.1%} ({report['algorithm']}, {report['seconds']:.1f} s)"
    )
    table = Table("device", box=box.SIMPLE_HEAD)
    for column in ("ops", "busy", "peak memory", "of it"):
        table.add_column(column, justify="right")
    counts = {device.name: 0 for device in problem.devices}
    for device in placement.assign.values():
        counts[device] += 1
    for device in problem.devices:
        peak, busy = report["peak_bytes"][device.name], report["busy_s"][device.name]
        share = f"{peak / device.memory_bytes:.1%}" if device.memory_bytes else ""
        table.add_row(device.name, str(counts[device.name]), _seconds(busy), _bytes(peak), share)
    console.print(table)


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value / 1e-6:.4g} us"


def _bytes(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f} B"


def _process_start() -> float:
    """When this process began, on `time.perf_counter`'s clock: the budget includes imports."""
    age = time.time() - psutil.Process().create_time()
    # A clock that was set meanwhile must not eat the budget.
    return time.perf_counter() - (age if 0 <= age < 30 and "pytest" not in sys.modules else 0.0)
