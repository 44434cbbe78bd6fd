"""``plait tune``: spends a budget on a model's kernels and shows what it gained."""

from __future__ import annotations

import math

import torch
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...bench.measure import interleave
from ...kernels import tune as tuner
from ..api import load
from ..capture.tree import flatten_call
from ..measure.tuning import tune_graph
from ..pipeline import CompiledGraph
from .console import Console
from .error import CliError
from .model import Loaded, compile_loaded, newest

ROUNDS = 5


def tune(
    loaded: Loaded, pipeline: str | None, budget: float, trials: int, threads: int | None
) -> None:
    """Tunes the kernels of a model, heaviest first, and times the whole model before and after.

    What an earlier run has tried is not tried again.
    """
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    before = compile_loaded(loaded, pipeline, "quick", console)
    program = newest(before)
    graph = program.executable
    if not isinstance(graph, CompiledGraph):
        raise CliError("the compiled program cannot be tuned", "compile it again")
    leaves, _ = flatten_call((tuple(loaded.args), dict(loaded.kwargs)))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    outcomes = _watched(graph, [*tensors, *program.captured.states], budget, trials, console)
    console.print(_table(outcomes))
    if loaded.saved:
        after = load(loaded.name)  # lays it out again, with what is now in the database
    else:
        after = compile_loaded(loaded, pipeline, "quick", console)
    with torch.no_grad():
        timings = interleave(
            {
                "before": lambda: before(*loaded.args, **loaded.kwargs),
                "after": lambda: after(*loaded.args, **loaded.kwargs),
            },
            ROUNDS,
        )
    old, new = (timings[k].percentile(0.5) for k in ("before", "after"))
    console.print(
        f"the whole model: {old * 1e3:.4g} ms before, {new * 1e3:.4g} ms after ({old / new:.2f}x)"
    )


def _watched(
    graph: CompiledGraph,
    tensors: list[torch.Tensor],
    budget: float,
    trials: int,
    console: Console,
) -> list[tuner.Outcome]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} kernels, {task.fields[best]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("tuning", total=1, best="")

        def report(state: tuner.Progress) -> None:
            best = "" if math.isinf(state.seconds) else f", best {state.seconds * 1e6:.1f} us"
            bar.update(
                shown,
                total=state.count,
                completed=state.index + (state.stage == "done"),
                description=state.task,
                best=f"{state.stage}: {state.trials} tried{best}",
            )

        return tune_graph(graph, tensors, budget=budget, trials=trials, progress=report)


def _table(outcomes: list[tuner.Outcome]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("kernel", "before us", "after us", "from", "tried", ""):
        table.add_column(column, justify="left" if column in ("kernel", "from", "") else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.task,
            _micro(outcome.before),
            _micro(outcome.after),
            outcome.source,
            str(outcome.trials),
            outcome.remark,
        )
    return table


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"
