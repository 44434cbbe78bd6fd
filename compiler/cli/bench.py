"""``plait bench``: workloads by engines, results as tables and JSON."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import cast

import torch
from rich.table import Table
from torch import nn

from ...bench import harness, peers, report, weight_budget, workloads
from ...bench.environment import environment
from .console import Console
from .error import CliError, check_output, write_text
from .model import load

DTYPES = ("float32", "bfloat16", "float16")


def show_registry() -> None:
    """Prints what can be measured and by which engines."""
    table = Table("workload", "groups", "what it is", title="workloads", title_justify="left")
    for w in workloads.WORKLOADS.values():
        table.add_row(w.name, ", ".join(w.groups), w.summary)
    engines = Table("engine", "what it is", title="engines", title_justify="left")
    for p in peers.PEERS.values():
        engines.add_row(p.name, p.summary)
    console = Console()
    console.print(table)
    console.print(engines)
    console.print(f"{weight_budget.NAME}: {weight_budget.SUMMARY}", highlight=False)


def bench(
    names: list[str],
    size: str,
    engines: str,
    rounds: int,
    seconds: float,
    threads: int | None,
    output: Path | None,
    warm: bool,
    dtype: str,
) -> None:
    """Measures and prints; a workload's table appears as soon as it is done.

    Unless ``warm``, plait compiles into an empty cache that is thrown away afterwards.
    """
    if weight_budget.NAME in names:
        if len(names) > 1:
            raise CliError("'weights' is measured alone", "plait bench weights")
        if dtype != "float32":
            raise CliError("'weights' is measured in float32", "leave --dtype out")
        _bench_weights(rounds, seconds, threads, output)
        return
    if dtype not in DTYPES:
        raise CliError(f"unknown dtype {dtype!r}", f"use {', '.join(DTYPES)}")
    if size not in workloads.SIZES:
        raise CliError(f"unknown size {size!r}", f"use {' or '.join(workloads.SIZES)}")
    check_output(output)
    own = [_own(name) for name in names if ":" in name]
    try:
        registered = [name for name in names if ":" not in name]
        chosen = [*(workloads.select(registered) if registered or not own else []), *own]
        engaged = peers.select([p.strip() for p in engines.split(",") if p.strip()])
    except ValueError as error:
        raise CliError(str(error), "plait bench --list shows what there is") from None
    if not engaged:
        raise CliError("--peers names no engine", f"use some of {', '.join(peers.PEERS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    console, progress = Console(), Console(stderr=True)
    header = environment()
    console.print(report.header(header), highlight=False)
    families = {p.name: p.family for p in engaged}
    results: list[harness.Result] = []
    with progress.status("") as status, contextlib.ExitStack() as stack:
        if not warm:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="plait-bench-"))
            os.environ["PLAIT_CACHE_DIR"] = folder
        for workload in chosen:
            rows = harness.run_workload(
                workload,
                engaged,
                cast(workloads.Size, size),
                rounds,
                seconds,
                lambda text, name=workload.name: status.update(f"{name}: {text}"),
                getattr(torch, dtype),
            )
            results += rows
            console.print(report.workload_table(rows))
            if output is not None:  # after every workload: a long run that is stopped loses little
                document = harness.document(results, families, header)
                write_text(output, json.dumps(document, indent=1))
    means = harness.summary(results, families)
    if means:
        console.print(report.summary_table(means))


def _own(name: str) -> workloads.Given:
    """The user's model that ``name`` (module:function or file.py:function) stands for."""
    loaded = load(name, ())
    if not isinstance(loaded.model, nn.Module):
        raise CliError(f"{name} gave no torch.nn.Module", "engines are compared on modules")
    if loaded.kwargs:
        raise CliError(
            f"{name} has named example inputs", "return (model, inputs) with a tuple of inputs"
        )
    return workloads.Given(name, name, model=loaded.model, inputs=tuple(loaded.args))


def _bench_weights(rounds: int, seconds: float, threads: int | None, output: Path | None) -> None:
    check_output(output)
    if threads is not None:
        torch.set_num_threads(threads)
    console, header = Console(), environment()
    console.print(report.header(header), highlight=False)
    document = weight_budget.run(rounds, seconds)
    console.print(report.budget_table(document, "tokens"))
    console.print(report.budget_memory(document), highlight=False)
    if output is not None:
        write_text(output, json.dumps({"environment": header, **document}, indent=1))
