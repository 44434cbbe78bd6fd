"""``plait kernels``: a model's kernels compiled for a GPU, and how the model says they will run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ...kernels import cuda
from ...kernels.build import BuildError
from ...kernels.occupancy import Gpu, resident_blocks
from ...passes.remarks import render
from ...runtime.plan import BranchStep, LibraryStep, Step
from ..gpu.lower import GpuLowered
from ..gpu.pipeline import planned
from ..modes import plain_modes
from .console import Console
from .error import CliError, check_output, write_bytes, write_text
from .model import Loaded, captured_of, newest

_OLDEST = 70  # float atomics and independent threads, which DLight's schedules take for granted


def kernels(
    loaded: Loaded, pipeline: str | None, target: str, output: Path | None, report: Path | None
) -> None:
    """Prints every step with its launch, place and predicted time, bounds and remarks.

    Raises CliError without nvcc, for an unknown ``target``, and where ``output`` or ``report``
    cannot be written.
    """
    check_output(report)
    found = re.fullmatch(r"sm_(\d+)a?", target)
    if found is None or int(found[1]) < _OLDEST:
        raise CliError(f"--target {target!r} is no GPU generation", "write it as sm_90")
    if output is not None and output.exists() and not output.is_dir():
        raise CliError(f"{output} is no directory", "name another with --output")
    if not cuda.available():
        raise CliError("nvcc is not on the PATH", "install the CUDA toolkit")
    console = Console()
    if loaded.saved:
        captured = newest(loaded.model).captured
    else:
        captured = captured_of(loaded)
    try:
        with plain_modes():
            plan = planned(captured, pipeline, target)
            lowered = plan.lower()
    except NotImplementedError as error:
        raise CliError(
            f"{loaded.name} has no plan for a GPU: {error}", "use a model without"
        ) from error
    except BuildError as error:
        raise CliError(str(error), "choose another --target, or another toolkit") from error
    tables = _tables(lowered, plan.kernels.gpu)
    for name, (part, rows) in tables.items():
        if name:
            console.print(f"{name}, which runs where the data say so:", markup=False)
        console.print(_table(rows))
        for line in _figures(part, rows):
            console.print(line, markup=False, highlight=False)
    routed = [name for part, _ in tables.values() for name in part.rows]
    if routed:
        what = "of routers are compiled for so many rows as they get"
        console.print(f"{len(routed)} branches {what}, at the first call", markup=False)
    remarks = [*plan.remarks, *lowered.remarks]
    console.print(render(remarks), markup=False, highlight=False)
    if output is not None:
        _write(lowered, output)
        console.print(f"wrote {output}", highlight=False)
    if report is not None:
        document = {
            "version": 1,
            "target": target,
            "steps": tables[""][1],
            "branches": {name: rows for name, (_, rows) in tables.items() if name},
            "seconds": lowered.seconds,
            "bounds": vars(lowered.bounds),
            "remarks": [r.to_json() for r in remarks],
        }
        write_text(report, json.dumps(document, indent=1))


def _tables(
    lowered: GpuLowered, gpu: Gpu, name: str = ""
) -> dict[str, tuple[GpuLowered, list[dict[str, Any]]]]:
    """The steps of a plan and, by their names, of those that it chooses among."""
    found = {name: (lowered, [_row(lowered, k, gpu) for k in range(len(lowered.steps))])}
    for inner, part in lowered.parts.items():
        found |= _tables(part, gpu, f"{name}.{inner}" if name else inner)
    return found


def _row(lowered: GpuLowered, number: int, gpu: Gpu) -> dict[str, Any]:
    info, step, lane = lowered.steps[number], lowered.plan.steps[number], lowered.plan.lanes[number]
    row: dict[str, Any] = {
        "step": number,
        "name": step.name,
        "kernel": _what(step),
        "parts": list(info.parts),
        "launches": info.launches,
        "stream": lane.stream,
        "waits": list(lane.waits),
        "seconds": info.task.seconds,
        "share": info.task.share,
    }
    v = info.variant
    if v is not None:
        held = resident_blocks(v.threads, v.registers, v.shared_bytes, gpu)
        row |= {
            "kernel": lowered.kernels[step.kernel].kernel.name,  # type: ignore[union-attr]
            "blocks": v.blocks,
            "threads": v.threads,
            "registers": v.registers,
            "shared_bytes": v.shared_bytes,
            "occupancy": held * v.threads / gpu.threads,
        }
    return row


def _what(step: Step) -> str:
    if isinstance(step, BranchStep):
        return f"{step.kind} of {len(step.plans)}"
    return step.target if isinstance(step, LibraryStep) else ""


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("step", overflow="ellipsis", max_width=24)  # the one to narrow
    for name in ("runs", "blocks", "thr.", "regs", "shared", "occ.", "parts", "us"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("on", justify="right", no_wrap=True)
    table.add_column("after", no_wrap=True)
    for r in rows:
        ours = "blocks" in r
        table.add_row(
            str(r["step"]),
            r["name"] if ours else r["kernel"],
            str(r["launches"]) if ours else "host" if _is_choice(r) else "lib",
            *(
                [
                    str(r[k]) if ours else ""
                    for k in ("blocks", "threads", "registers", "shared_bytes")
                ]
            ),
            f"{r['occupancy']:.0%}" if ours else "",
            str(len(r["parts"])) if r["parts"] else "",
            f"{r['seconds'] * 1e6:.2f}",
            str(r["stream"]),
            " ".join(map(str, r["waits"])),
            style="bold" if r["parts"] else None,
        )
    return table


def _figures(lowered: GpuLowered, rows: list[dict[str, Any]]) -> list[str]:
    limits = lowered.bounds
    ours = [r for r in rows if "blocks" in r]
    parts = sum(max(1, len(r["parts"])) for r in ours)
    launches = sum(r["launches"] for r in ours)
    streams = len({r["stream"] for r in rows})
    choices = sum(map(_is_choice, rows))
    chosen = f" {choices} choices of the host's," if choices else ""
    calls = len(rows) - len(ours) - choices
    return [
        f"{len(rows)} steps: {calls} library calls,{chosen} {parts} kernels in {launches}"
        f" launches; {streams} streams, {sum(len(r['waits']) for r in rows)} events",
        f"predicted {_us(lowered.seconds)}; bounds: critical path {_us(limits.path)}, work over all"
        f" multiprocessors {_us(limits.work)}, bytes over bandwidth {_us(limits.memory)}"
        " (a model, not a measurement)",
        f"workspace {lowered.plan.arena_bytes} bytes",
    ]


def _is_choice(row: dict[str, Any]) -> bool:
    return row["kernel"].startswith(("cond of ", "rows of "))


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def _write(lowered: GpuLowered, directory: Path) -> None:
    """CUDA C and a cubin for each image, and the plan."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"cannot make {directory}: {error.strerror}", "name another") from error
    for k, (source, image) in enumerate(zip(lowered.sources, lowered.images, strict=True)):
        write_text(directory / f"kernels{k}.cu", source)
        write_bytes(directory / f"kernels{k}.cubin", image)
    launches = {name: asdict(found) for name, found in lowered.kernels.items()}
    write_text(directory / "plan.json", lowered.plan.to_json())
    write_text(directory / "launches.json", json.dumps(launches, indent=1))
    for name, part in lowered.parts.items():
        _write(part, directory / name)
