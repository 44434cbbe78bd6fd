"""How planning grows with the graph: ``python -m plait.bench.placement_scale --plot scale.png``.

Transformer-like training graphs of growing depth on 16 devices; for each size the wall time and
peak memory of one whole process that plans it, the makespan over its lower bound, and the same for
the best simple start.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..passes.placement.placement import write_text
from ..passes.placement.plan import place
from ..passes.placement.problem import Device, Edge, Link, Op, Problem

SIZES = (1_000, 3_000, 10_000, 25_000, 50_000)


def training_graph(ops: int, devices: int) -> Problem:
    """About ``ops`` operators: layers of attention and feed-forward, forward and backward.

    Each product's weights tie its op to its two gradients. Memory leaves a third to spare.
    """
    chain = ["ln1", "q", "k", "v", "qk", "softmax", "av", "o", "add1", "ln2", "up", "act", "down",
             "add2"]  # fmt: skip
    feeds = {"q": ["ln1"], "k": ["ln1"], "v": ["ln1"], "qk": ["q", "k"], "softmax": ["qk"],
             "av": ["softmax", "v"], "o": ["av"], "add1": ["o"], "ln2": ["add1"], "up": ["ln2"],
             "act": ["up"], "down": ["act"], "add2": ["down", "add1"]}  # fmt: skip
    products = {"q": 1.0, "k": 1.0, "v": 1.0, "o": 1.0, "up": 4.0, "down": 4.0}
    per_layer = 2 * len(chain) + len(products)
    layers = max(1, round(ops / per_layer))
    made: list[Op] = []
    edges: list[Edge] = []
    size = 16e6

    def add(name: str, seconds: float, params: float = 0.0, group: str | None = None) -> None:
        made.append(Op(name, seconds, params, 0.0, 0.0 if name.endswith(".dw") else size, group))

    for k in range(layers):
        for part in chain:
            work = products.get(part, 0.0)
            name, group = f"l{k}.{part}", f"l{k}.{part}" if work else None
            add(f"{name}.f", 200e-6 * work or 20e-6, 100e6 * work, group)
            sources = [f"l{k}.{x}" for x in feeds.get(part, [])]
            if part in ("ln1", "add1") and k:
                sources.append(f"l{k - 1}.add2")
            edges += [Edge(f"{x}.f", f"{name}.f", size) for x in sources]
    for k in reversed(range(layers)):
        for part in reversed(chain):
            work = products.get(part, 0.0)
            name, group = f"l{k}.{part}", f"l{k}.{part}" if work else None
            add(f"{name}.b", 200e-6 * work or 30e-6, 0.0, group)
            edges.append(Edge(f"{name}.f", f"{name}.b", size))
            sources = [f"l{k}.{x}" for x, froms in feeds.items() if part in froms]
            if part == "add2" and k + 1 < layers:
                sources += [f"l{k + 1}.ln1", f"l{k + 1}.add1"]
            edges += [Edge(f"{x}.b", f"{name}.b", size) for x in sources]
            if work:
                add(f"{name}.dw", 200e-6 * work, 0.0, group)
                edges += [Edge(f"{x}.b", f"{name}.dw", size) for x in sources]
    need = sum(op.param_bytes for op in made) + 0.75 * sum(op.output_bytes for op in made)
    found = tuple(Device(f"d{k}", 1.33 * need / devices) for k in range(devices))
    name = f"{layers} layers"
    return Problem(name, "dynamic", found, Link(10e-6, 100e9), {}, tuple(made), tuple(edges))


def measure(ops: int, devices: int, budget: float) -> dict[str, Any]:
    """Plans one size in this process; seconds are wall clock, memory is this process's peak."""
    problem = training_graph(ops, devices)
    began = time.perf_counter()
    report = place(problem, budget=budget, began=began).report
    return {
        "ops": len(problem.ops),
        "edges": len(problem.edges),
        "devices": devices,
        "seconds": time.perf_counter() - began,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "makespan_s": report["makespan_s"],
        "lower_bound_s": report["lower_bound_s"],
        "moves": report["moves"],
        "stopped": report["stopped"],
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds, memory and makespan over bound against the number of ops."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    series = {
        "seconds to plan": [r["seconds"] for r in rows],
        "peak memory, GB": [r["peak_rss_bytes"] / 1e9 for r in rows],
        "makespan / lower bound": [r["makespan_s"] / r["lower_bound_s"] for r in rows],
    }
    for axis, (title, values) in zip(figure.subplots(1, 3), series.items(), strict=True):
        axis.plot([r["ops"] for r in rows], values, marker="o")
        axis.set(xscale="log", xlabel="ops", title=title)
        axis.set_ylim(bottom=1.0 if "bound" in title else 0.0)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs each size in a process of its own, prints a table, and draws it."""
    parser = argparse.ArgumentParser(prog="plait.bench.placement_scale", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES),
                        help="of the graphs, in ops")  # fmt: skip
    parser.add_argument("--devices", type=int, default=16, help="how many")
    parser.add_argument("--budget", type=float, default=50.0, help="seconds for each size")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.sizes[0], options.devices, options.budget)))
        return
    rows = []
    print("    ops   edges  seconds   peak GB  makespan/bound   moves")
    for size in options.sizes:
        command = [sys.executable, "-m", "plait.bench.placement_scale", "--one"]
        command += ["--sizes", str(size), "--devices", str(options.devices)]
        command += ["--budget", str(options.budget)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        ratio = row["makespan_s"] / row["lower_bound_s"]
        memory = row["peak_rss_bytes"] / 1e9
        start = f"{row['ops']:7d} {row['edges']:7d} {row['seconds']:8.1f} {memory:9.2f}"
        print(f"{start} {ratio:15.3f} {row['moves']:7d}", flush=True)
    if options.json:
        write_text(options.json, json.dumps(rows, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
