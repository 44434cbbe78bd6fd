"""Tables for people: one per workload, then the geometric means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from .harness import Result


def duration(seconds: float | None) -> str:
    """Seconds in the unit that reads best; "-" for None."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f} MiB"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def header(environment: dict[str, Any]) -> str:
    """The environment on two lines."""
    e = environment
    versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items())
    commit = f", commit {e['commit']}" if e["commit"] else ""
    return (
        f"{e['cpu']} ({e['capability']}), {e['cores']} cores, {e['threads']} threads, "
        f"load {e['load'][0]}{commit}\n{versions}, Python {e['python']}"
    )


def workload_table(results: Sequence[Result]) -> Table:
    """The engines on one workload; the fastest row is bold."""
    first = results[0]
    table = Table(title=f"{first.workload} ({first.size})", title_justify="left")
    table.add_column("engine")
    for name in ("p50", "p10", "p90", "plait is", "compile", "compile peak", "error", "of eager's"):
        table.add_column(name, justify="right")
    table.add_column("note")
    best = min((r.p50 for r in results if r.p50), default=None)
    for r in results:
        notes = [] if r.status == "OK" else [f"{r.status}: {r.message}"]
        if r.repeatable is False:
            notes.append("not bit-identical across calls")
        table.add_row(
            r.peer,
            duration(r.p50),
            duration(r.p10),
            duration(r.p90),
            "" if r.peer == "plait" else _times(r.ratio),
            duration(r.compile_seconds),
            mebibytes(r.compile_peak_bytes),
            "-" if r.error is None else f"{r.error:.1e}",
            _times(r.error_ratio),
            "; ".join(notes),
            style="bold" if r.p50 is not None and r.p50 == best else None,
        )
    return table


def summary_table(means: dict[str, float]) -> Table:
    """Geometric means of plait's speed-up."""
    table = Table(title="plait is faster by (geometric mean)", title_justify="left")
    table.add_column("against")
    table.add_column("times", justify="right")
    for name, value in means.items():
        table.add_row(name, _times(value))
    return table


def tables(results: Sequence[Result], means: dict[str, float]) -> Group:
    """All tables of a run."""
    names = list(dict.fromkeys((r.workload, r.size) for r in results))
    parts: list[Any] = [
        workload_table([r for r in results if (r.workload, r.size) == name]) for name in names
    ]
    if means:
        parts.append(summary_table(means))
    return Group(*parts)
