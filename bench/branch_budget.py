"""Branches of routers under a weight budget: time, hit rate, bytes moved, resident memory.

The model is `domain_experts`'s, its features widened until an expert, which is a branch with a plan
of its own, has 4 MiB of weights: 4 blocks of 8, 134 MB in all. Requests are samples of four
domains, drawn by Zipf's law; every block sends a sample to the two experts of its domain.

Modes and columns are those of `weight_budget`, and so is how memory is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import report
from .environment import environment
from .routes import zipf_shares
from .weight_budget import BUDGET, MODES, compile_modes, memory, times
from .workloads.common import SEED, finish
from .workloads.domain_experts import PAIRS, Tower

HIDDEN = 512
SAMPLES = (1, 4)
NARROW = 32  # features of a model whose weights do not count


def model(hidden: int = HIDDEN) -> torch.nn.Module:
    """Features ``[N, hidden]`` and domains ``[N]`` to features."""
    from .. import Router

    return finish(Tower(hidden, lambda experts, gate: Router(experts, gate, top_k=2)))


def requests(samples: int, count: int, hidden: int = HIDDEN) -> list[tuple[Tensor, Tensor]]:
    """``count`` requests of so many samples each."""
    generator = torch.Generator().manual_seed(SEED)
    shares = zipf_shares(len(PAIRS))
    found = []
    for _ in range(count):
        domains = torch.multinomial(shares, samples, replacement=True, generator=generator)
        found.append((torch.randn(samples, hidden, generator=generator), domains))
    return found


def run(rounds: int, seconds: float, parts: str = "all") -> dict[str, Any]:
    """The ``parts`` "times", "memory" or "all" as a JSON document in `weight_budget`'s form.

    Raises AssertionError where a mode's answers are not the resident one's.
    """
    network = model()
    document: dict[str, Any] = {"budget": BUDGET, "rows": []}
    document["weight_bytes"] = sum(p.nbytes for p in network.parameters())
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        if parts != "memory":
            modes = {name: MODES[name] for name in ("resident", "budget", "demand")}
            batch = torch.export.Dim("batch")
            shapes = {"x": {0: batch}, "domain": {0: batch}}
            compiled = compile_modes(network, requests(6, 1)[0], modes, dynamic_shapes=shapes)
            for samples in SAMPLES:
                rows = times(compiled, requests(samples, 64), rounds, seconds)
                document["rows"] += [{"samples": samples, **row} for row in rows]
        if parts != "times":
            wide, narrow = (requests(max(SAMPLES), 1, h)[0] for h in (HIDDEN, NARROW))
            slim = model(NARROW), narrow
            document["memory"] = memory((network, wide), slim, Path(scratch))
    return document


def main() -> None:
    """Prints what `run` measures."""
    parser = argparse.ArgumentParser(
        prog="python -m plait.bench.branch_budget", description=__doc__
    )
    parser.add_argument("part", nargs="?", choices=("all", "times", "memory"), default="all",
                        help="what to measure")  # fmt: skip
    parser.add_argument("--threads", type=int, help="to use (torch's default)")
    parser.add_argument("--rounds", type=int, default=5, help="in which modes take turns")
    parser.add_argument("--json", type=Path, help="write the outcome here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    header = environment()
    console.print(report.header(header), highlight=False)
    document = run(options.rounds, 0.25, options.part)
    if document["rows"]:
        console.print(report.budget_table(document, "samples"))
    if "memory" in document:
        console.print(report.budget_memory(document), highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps({"environment": header, **document}, indent=1))


if __name__ == "__main__":
    main()
