"""``plait place-experts``: devices for the experts of a profiled model; prints a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ...passes.placement.experts import ExpertPlacement
from ..placed.experts import place_experts
from .console import Console
from .error import CliError, check_output


def run(
    profile: str, devices: str, output: Path | None, quiet: bool, options: dict[str, Any]
) -> None:
    """Places, prints what came out, and writes ``output``.

    ``devices`` is their number, or their names with commas. Raises CliError where it is neither.
    """
    check_output(output)
    names: int | list[str] = [x.strip() for x in devices.split(",")]
    if devices.strip().isdigit():
        names = int(devices)
    elif "" in names or _is_number(devices):
        raise CliError(f"devices {devices!r} are not understood", "write 4, or gpu0,gpu1")
    placed = place_experts(profile, devices=names, **options)
    if not quiet:
        show(placed)
    if output is not None:
        placed.write(output)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def show(placed: ExpertPlacement) -> None:
    """Prints what crosses, and where the experts of each layer are."""
    report = placed.report
    console = Console(highlight=False)
    console.print(_crossing("profiled", report))
    if "heldout" in report:
        console.print(_crossing("held out", report["heldout"]))
    if "copies" in report:
        console.print(f"{report['copies']} copies of experts")
    if "moved" in report:
        console.print(f"{report['moved']} experts moved")
    table = Table("layer", box=box.SIMPLE_HEAD)
    table.add_column("load / mean", justify="right")
    for name in placed.devices:
        table.add_column(name)
    for layer, where in placed.experts.items():
        held = [(x,) if isinstance(x, str) else x for x in where]
        cells = [" ".join(str(e) for e, d in enumerate(held) if x in d) for x in placed.devices]
        table.add_row(layer, f"{report['imbalance'][layer]:.2f}", *cells)
    console.print(table)


def _crossing(what: str, part: Any) -> str:
    total, cross, dealt = (part[k] for k in ("tokens", "cross_tokens", "round_robin_cross_tokens"))
    share = f" ({cross / total:.1%})" if total else ""
    less = f", {1 - cross / dealt:.1%} below round robin" if dealt else ""
    return f"{what}: {cross} of {total} tokens change devices{share}{less}"
