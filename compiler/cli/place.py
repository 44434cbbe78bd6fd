"""``plait place``: devices for the ops of a problem file or of a model. Loads torch for models."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...passes.placement.alternatives import rewrite
from ...passes.placement.devices import parse_devices, parse_link
from ...passes.placement.placement import write_text
from ...passes.placement.plan import place
from ...passes.placement.problem import Problem
from ...passes.placement.problem_file import problem_to_dict, read_problem
from ...passes.placement.schedule_trace import write_gantt, write_trace
from ...passes.placement.simulator import simulate
from .console import Console
from .error import CliError, check_apart, check_output

if TYPE_CHECKING:
    from ...passes.placement.placement import Placement
    from ..placed.graph import Graph


@dataclass(frozen=True)
class Files:
    """What to write, where."""

    placement: Path | None
    problem: Path | None
    rewritten: Path | None
    device_map: Path | None
    gantt: Path | None
    trace: Path | None


@dataclass(frozen=True)
class Model:
    """How a model becomes a problem; all None for a problem file."""

    devices: str | None
    link: str | None
    host_link: str | None
    train: str | None


def run(target: str, files: Files, options: dict[str, Any], quiet: bool, model: Model) -> None:
    """Plans, prints what came out, and writes the files asked for, all after planning."""
    began = _process_start()
    for path in vars(files).values():
        check_output(path)
    check_apart(Path(target), *vars(files).values())
    graph = None
    if Path(target).is_file() and not target.endswith(".py"):
        if any(vars(model).values()):
            raise CliError(
                "--devices, --link, --host-link and --train are for models", "leave them out"
            )
        if files.device_map:
            raise CliError(
                "--device-map needs a model, for a file names no modules", "leave it out"
            )
        problem = read_problem(target)
    else:
        graph, problem = _from_model(target, model)
        began = time.perf_counter()  # the budget is for planning, tracing comes on top
    placement = plan(problem, options, quiet, began)
    whole = rewrite(problem, placement.alternatives).problem
    if not quiet:
        show(whole, placement)
    schedule = simulate(whole, placement)
    if files.gantt is not None:
        write_gantt(whole, schedule, files.gantt)
    if files.trace is not None:
        write_trace(whole, schedule, files.trace)
    for path, shown in ((files.problem, problem), (files.rewritten, whole)):
        if path is not None:
            write_text(path, json.dumps(problem_to_dict(shown)) + "\n")
    if files.device_map is not None and graph is not None:
        write_text(files.device_map, json.dumps(graph.device_map(placement), indent=1) + "\n")
    if files.placement is not None:
        placement.write(files.placement)


def _from_model(target: str, model: Model) -> tuple[Graph, Problem]:
    if ":" not in target:
        raise CliError(f"there is no file {target}", "name a problem file, or module:function")
    if model.devices is None:
        raise CliError("a model needs --devices", "such as --devices 4xh100:80GB")
    from ..placed.graph import trace
    from ..placed.place import LINK
    from . import model as cli_model

    devices = parse_devices(model.devices)
    link = parse_link(model.link or LINK)
    host_link = None if model.host_link is None else parse_link(model.host_link)

    with torch_on_meta():
        loaded = cli_model.load(target, [])
    graph = trace(loaded.model, loaded.args, loaded.kwargs, model.train)
    return graph, graph.problem(devices, link, host_link)


def torch_on_meta() -> Any:
    """While it is open, new tensors have no memory: models are built without their weights."""
    import torch

    return torch.device("meta")


def plan(problem: Problem, options: dict[str, Any], quiet: bool, began: float | None) -> Placement:
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

        return place(problem, progress=None if hidden else progress, began=began, **options)


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
    if placement.alternatives:
        console.print(
            f"{report['recomputed']} ops recomputed in {_seconds(report['recompute_s'])}, "
            f"outputs of {report['offloaded']} offloaded, {_bytes(report['offload_bytes'])}"
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
