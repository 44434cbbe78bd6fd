"""The main job: two models compiled, checked, timed, and their schedules drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from . import peers, report, workloads
from .environment import environment
from .harness import run_workload
from .pictures import draw

MODELS = ("inception_v3", "mixtral")
ENGINES = ("plait", "eager", "compile")


def main() -> int:
    """Returns 0 where plait compiled every model and every answer was right."""
    parser = argparse.ArgumentParser(prog="python -m plait.bench.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="folder for the pictures")
    parser.add_argument("--rounds", type=int, default=5, help="in which engines take turns")
    options = parser.parse_args()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    console.print(report.header(environment()), highlight=False)
    good = True
    for workload in workloads.select(MODELS):
        console.print(f"\n{workload.summary}", style="bold")
        results = run_workload(
            workload, peers.select(ENGINES), rounds=options.rounds, report=console.log
        )
        console.print(report.workload_table(results))
        own = results[0]
        good &= own.status == "OK"
        if own.status == "OK":
            path = draw(workload, options.out / f"{workload.name}.png")
            console.print(f"schedule: {path}", highlight=False)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
