"""``plait check`` and ``plait run``: what a model is made of, and whether and how fast it runs."""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.fx as fx
from rich import box
from rich.table import Table
from torch._ops import HigherOrderOperator

from ...bench.harness import relative_error
from ...bench.measure import interleave
from ...bench.peers import tensors_of
from ...kernels.ops import category, library_reason
from ...passes.ir import branches_of
from ...passes.manager import PassManager
from ...passes.remarks import render
from ..errors import CaptureError
from ..guards.watch import modules_of
from ..pipeline import DEFAULT_PIPELINE
from ..specialise import deciding
from .console import Console
from .error import CliError, check_output
from .model import Loaded, captured_of, compile_loaded
from .trace import gantt as draw

PICTURES = (".svg", ".png", ".pdf")


def check(loaded: Loaded) -> None:
    """Prints inputs, operators by the kind of kernel that they get, library operators, remarks."""
    console = Console()
    if loaded.saved:
        raise CliError(f"{loaded.name} is compiled already", "plait run or plait explain takes it")
    try:
        captured = captured_of(loaded)
        with torch.no_grad():
            result = PassManager(DEFAULT_PIPELINE).run(captured.graph_module)
    except CaptureError as error:
        console.print(f"not captured: {error}", style="red", markup=False, highlight=False)
        console.print("plait.compile would run the original model.")
        sys.exit(1)
    nodes = list(_operators(result.graph_module))
    captured_whole = f"captured whole: {len(nodes)} operators after {DEFAULT_PIPELINE}"
    console.print(captured_whole, soft_wrap=True)
    for spec in captured.inputs[: captured.num_tensors]:
        console.print(f"  input {spec.name}: {spec}", markup=False, highlight=False)
    table = Table("kind of kernel", title="operators", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("count", justify="right")
    for kind, count in Counter(category(n) for n in nodes).most_common():
        table.add_row(kind, str(count))
    console.print(table)
    reasons = Counter((str(n.target), why) for n in nodes if (why := library_reason(n)))
    if reasons:
        table = Table("operator", title="run by library", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("count", justify="right")
        table.add_column("why")
        for (target, why), count in reasons.most_common():
            table.add_row(target, str(count), why)
        console.print(table)
    remarks = [*deciding(captured), *captured.remarks, *result.remarks]
    console.print(render(remarks), markup=False, highlight=False)
    if any(m.training for root in modules_of(loaded.model) for m in root.modules()):
        console.print("in training mode, so the original would run: call .eval() first")


def _operators(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The operators of a graph and of the graphs of its branches; parts of results are none."""
    for node in graph_module.graph.nodes:
        computes = node.op == "call_function" and node.target is not operator.getitem
        if computes and not isinstance(node.target, HigherOrderOperator):
            yield node
    for _, branch in branches_of(graph_module):
        yield from _operators(branch)


def run(
    loaded: Loaded,
    pipeline: str | None,
    tune: str,
    rounds: int,
    threads: int | None,
    save: Path | None,
    gantt: Path | None = None,
    weight_budget: int | str | None = None,
) -> None:
    """Compiles, checks against eager and prints times. Raises CliError where the answers differ."""
    check_output(save)
    check_output(gantt)
    if gantt is not None and gantt.suffix not in PICTURES:
        raise CliError(f"{gantt} is no picture", f"name it {', '.join(PICTURES)}")
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    compiled = compile_loaded(loaded, pipeline, tune, console, weight_budget)
    call = lambda: compiled(*loaded.args, **loaded.kwargs)  # noqa: E731 - one of two of a kind
    with torch.no_grad():
        calls = {"plait": call}
        if not loaded.saved:
            model = loaded.model
            calls["eager"] = lambda: model(*loaded.args, **loaded.kwargs)
            error = relative_error(tensors_of(call()), tensors_of(calls["eager"]()))
            console.print(f"largest difference from eager: {error:.2g} (relative)")
        timings = interleave(calls, rounds)
    table = Table("", box=box.SIMPLE_HEAD)
    for column in ("p50 ms", "p10", "p90"):
        table.add_column(column, justify="right")
    for name, timing in timings.items():
        table.add_row(name, *[f"{timing.percentile(q) * 1e3:.4g}" for q in (0.5, 0.1, 0.9)])
    console.print(table)
    if compiled.weight_tier is not None:
        console.print(f"weights: {compiled.weight_tier.counters}", highlight=False)
    if save is not None:
        compiled.save(save)
        console.print(f"saved {save}", highlight=False)
    if gantt is not None:
        draw(loaded, compiled, gantt)
        console.print(f"drew {gantt}", highlight=False)
    if not loaded.saved and not error < 1e-2:
        raise CliError("plait's answer differs from eager's", "please report it with the model")
