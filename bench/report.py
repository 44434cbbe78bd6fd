"""Tables for people, 80 columns wide: one per workload, then the geometric means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .harness import Result


def _number(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits without an exponent; "-" for None."""
    if value is None:
        return "-"
    scaled = value * scale
    return f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def header(environment: dict[str, Any]) -> str:
    """The environment on a few lines."""
    e = environment
    versions = [f"{k} {v}" for k, v in e["versions"].items()]
    commit = f", commit {e['commit']}" if e["commit"] else ""
    return (
        f"{e['cpu']} ({e['capability']}), {e['cores']} cores, {e['threads']} threads, "
        f"load {e['load'][0]}{commit}\nPython {e['python']}, {', '.join(versions)}"
    )


def workload_table(results: Sequence[Result]) -> Group:
    """The engines on one workload, the fastest in bold; below, what went wrong with whom.

    "plait" is how many times faster plait is, "compile" seconds including the first call, "MiB"
    the growth of the resident set meanwhile, "eager" the error over that of PyTorch's eager mode.
    """
    first = results[0]
    table = Table(
        title=f"{first.workload} ({first.size}, {first.dtype})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("engine", no_wrap=True)
    for name in ("p50 ms", "p10", "p90", "plait", "compile", "MiB", "error", "eager"):
        table.add_column(name, justify="right", no_wrap=True)
    best = min((r.p50 for r in results if r.p50), default=None)
    notes = []
    for r in results:
        if r.status != "OK":
            notes.append(Text(f"  {r.peer}: {r.status}: {r.message}", style="dim"))
        if r.repeatable is False:
            notes.append(Text(f"  {r.peer}: not bit-identical across calls", style="dim"))
        if r.limits is not None:
            notes.append(Text(f"  {r.peer}: {_limits(r.limits)}", style="dim"))
        if r.error is None:
            continue
        table.add_row(
            r.peer,
            _number(r.p50, 1e3),
            _number(r.p10, 1e3),
            _number(r.p90, 1e3),
            "" if r.peer == "plait" else _times(r.ratio),
            f"{r.compile_seconds or 0:.2f}",
            f"{(r.compile_peak_bytes or 0) / 2**20:.0f}",
            f"{r.error:.1e}",
            _times(r.error_ratio),
            style="bold" if r.p50 is not None and r.p50 == best else None,
        )
    return Group(table, *notes)


def _limits(limits: dict[str, float]) -> str:
    """How far a traced run is from what bounds it."""
    path, work, measured = limits["path"], limits["work"], limits["measured"]
    by, least = ("critical path", path) if path > work else ("work", work)
    bound = max(limits["compute"], limits["memory"])
    kind = "FLOPs" if limits["compute"] >= limits["memory"] else "bytes"
    return (
        f"{_times(measured / least)} the schedule's bound ({by}, {_number(least, 1e3)} ms), "
        f"{_times(measured / bound)} the roofline ({kind}, {_number(bound, 1e3)} ms)"
    )


def summary_table(means: dict[str, float]) -> Table:
    """Geometric means of plait's speed-up."""
    table = Table(title="plait is faster", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("than")
    table.add_column("geometric mean", justify="right")
    for name, value in means.items():
        table.add_row(name, _times(value))
    return table


def budget_table(document: dict[str, Any], size: str) -> Table:
    """The times of models under a weight budget; rows have their ``size`` under that name."""
    table = Table(title=f"weight budget {document['budget']}", title_justify="left")
    for column in (size, "mode", "p50 ms", "slower", "hits", "MB a call"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in document["rows"]:
        table.add_row(
            str(row[size]),
            row["mode"],
            "-" if row["p50_seconds"] is None else f"{row['p50_seconds'] * 1e3:.3g}",
            "-" if row["slowdown"] is None else f"{row['slowdown']:+.1%}",
            f"{row['hit_rate']:.1%}",
            f"{row['moved_per_call'] / 1e6:.1f}",
        )
    return table


def budget_memory(document: dict[str, Any]) -> str:
    """What was resident at most under a weight budget, as a sentence."""
    memory = document["memory"]
    return (
        f"{document['weight_bytes'] / 1e6:.0f} MB of weights; resident at most: "
        f"{memory['resident'] / 1e6:.0f} MB with all of them, {memory['budget'] / 1e6:.0f} MB "
        f"under the budget, {memory['constant'] / 1e6:.0f} MB without any: the budget costs "
        f"{memory['share']:.1%} of the weights"
    )
