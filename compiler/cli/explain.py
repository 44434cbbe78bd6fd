"""``plait explain``: every step of a compiled model with its time and bound, and every remark."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from ...bench.bounds import Machine
from ...bench.limits import Limits, limits, machine_for
from ...passes.remarks import render
from ...runtime.profile import StepTime, profile_steps
from .console import Console
from .error import check_output, write_text
from .model import Loaded, compile_loaded, newest, on_cpu
from .trace import beside


def explain(loaded: Loaded, pipeline: str | None, threads: int | None, output: Path | None) -> None:
    """Prints the steps in order, slowest marked, then totals, what bounds a run as a whole, and
    remarks; JSON where asked.
    """
    check_output(output)
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    compiled = compile_loaded(loaded, pipeline, "quick", console)
    program = newest(compiled)
    executor, tensors = on_cpu(loaded, compiled)
    with torch.no_grad():
        times = profile_steps(executor, tensors)
    lowered = getattr(program.executable, "lowered", None)  # a loaded program has none
    configs = {s.hash: s.config for s in lowered.selected.values()} if lowered else {}
    steps = program.executable.plan.steps
    machine = machine_for(program.executable.plan)
    rows = [_row(steps[t.number], t, machine, configs) for t in times]
    with torch.no_grad():
        whole = limits(executor, tensors, machine)
    total = sum(t.seconds for t in times)
    console.print(_table(rows, total))
    console.print(_configurations(rows), markup=False, highlight=False, soft_wrap=True)
    bound = sum(r["bound_seconds"] for r in rows)
    console.print(
        f"{len(rows)} steps, {total * 1e3:.3g} ms one by one; bound {bound * 1e3:.3g} ms "
        f"({machine})",
        markup=False,
        highlight=False,
    )
    if whole is not None:
        console.print(_bounds(whole))
    console.print(render(compiled.remarks), markup=False, highlight=False)
    if output is not None:
        remarks = [r.to_json() for r in compiled.remarks]
        document = {
            "version": 1,
            "steps": rows,
            "seconds": total,
            "limits": whole and asdict(whole),
            "remarks": remarks,
        }
        write_text(output, json.dumps(document, indent=1))


def _bounds(limits: Limits) -> Table:
    """A run of all steps beside what its schedule says, and what no schedule can beat."""
    rows = [
        ("planned", limits.planned),
        ("bound: critical path", limits.path),
        ("bound: work over workers", limits.work),
        ("bound: compulsory bytes", limits.memory),
        ("bound: FLOPs", limits.compute),
    ]
    return beside(limits.measured, rows)


def _row(
    step: Any, time: StepTime, machine: Machine, configs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "step": time.number,
        "name": time.name,
        "kind": time.kind,
        "kernel": getattr(step, "kernel", getattr(step, "target", "")),
        "config": configs.get(getattr(step, "kernel", ""), {}),
        "seconds": time.seconds,
        "bound_seconds": machine.bound(time.flops, time.bytes),
        "bound_by": machine.bound_by(time.flops, time.bytes),
        "flops": time.flops,
        "bytes": time.bytes,
    }


def _table(rows: list[dict[str, Any]], total: float) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("step", overflow="ellipsis", max_width=28)  # the one to narrow
    table.add_column("kernel", no_wrap=True)
    for name in ("us", "time", "bound us", "bound by", "reached"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        share = r["seconds"] / total if total else 0.0
        reached = r["bound_seconds"] / r["seconds"] if r["seconds"] else 0.0
        known = bool(r["flops"] or r["bytes"])
        table.add_row(
            str(r["step"]),
            r["kernel"] if r["kind"] == "library" else r["name"],
            r["kernel"][:8] if r["kind"] == "kernel" else r["kind"],
            f"{r['seconds'] * 1e6:.4g}",
            f"{share:.1%}",
            f"{r['bound_seconds'] * 1e6:.4g}" if known else "-",
            r["bound_by"] if known else "-",
            f"{reached:.0%}" if known else "-",
            style="bold" if share >= 0.05 else None,
        )
    return table


def _configurations(rows: list[dict[str, Any]]) -> str:
    """One line per kernel: the start of its hash, then what was chosen for it."""
    lines = {
        r["kernel"][:8]: " ".join(f"{k}={v}" for k, v in r["config"].items())
        for r in rows
        if r["config"]
    }
    return "\n".join(f"{name}  {text}" for name, text in sorted(lines.items()))
