"""Measures for `merge-parallel-ops` whether operators run faster merged or apart.

Both forms are lowered like any graph and run in turns on made-up inputs. What was measured is kept
in the kernel database, so it is measured once for a machine and a number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.fx as fx

from ...kernels.database import Database
from ...passes.ir import attribute
from ...passes.manager import PassManager
from ...passes.merge_parallel import Judge, Verdict
from ...passes.pipeline_print import print_pipeline
from ...runtime.executor import Executor
from ...runtime.trace import made_up
from .bets import TIMES, timed

Build = Callable[[fx.GraphModule], Executor]
"""Makes what runs a graph that has been through the passes."""


def judge(rest: PassManager, build: Build, database: Database, measure: bool) -> Judge:
    """A judge that compiles with the passes ``rest``; without ``measure`` it only tells what was
    measured before.
    """

    def compare(apart: fx.GraphModule, merged: fx.GraphModule) -> Verdict | str:
        (source,) = apart.graph.find_nodes(op="placeholder")
        if not all(isinstance(size, int) for size in source.meta["val"].shape):
            return "sizes are known only when the model is called"
        key = _key((apart, merged), rest)
        found = database.progress(key)
        if found is None:
            if not measure:
                return "nothing is measured with tune='off'"
            found = {"seconds": _measured((apart, merged), rest, build)}
            database.set_progress(key, found)
        before, after = found["seconds"]
        return before, after

    return compare


def _measured(
    graphs: Sequence[fx.GraphModule], rest: PassManager, build: Build
) -> tuple[float, float]:
    """Seconds of both graphs; of several measurements the one that speaks least for the second."""
    executors = [build(rest.run(graph).graph_module) for graph in graphs]
    inputs = made_up(executors[0].plan)
    calls = [lambda e=executor: e.run(inputs) for executor in executors]
    with torch.random.fork_rng(devices=[]):
        found = [timed(calls) for _ in range(TIMES)]
    before, after = min(found, key=lambda t: t[0] / t[1])
    return before, after


def _key(graphs: Sequence[fx.GraphModule], rest: PassManager) -> str:
    """Names the comparison: operators, shapes, layouts and types, but not what weights hold."""
    text = [
        print_pipeline(rest.passes),
        str(torch.get_num_threads()),
        "1",
    ]  # the last: version of the comparison
    for graph in graphs:
        numbers: dict[fx.Node, str] = {}
        for node in graph.graph.nodes:
            numbers[node] = f"%{len(numbers)}"
            value = node.meta.get("val")
            if node.op == "get_attr":
                value = attribute(graph, str(node.target))
            kind = ""
            if isinstance(value, torch.Tensor):
                kind = f"{value.dtype}{tuple(value.shape)}{value.stride()}"
            target = "" if node.op == "get_attr" else str(node.target)
            operands = fx.map_arg((node.args, dict(node.kwargs)), numbers.__getitem__)
            text.append(f"{node.op} {target} {operands} {kind}")
    return "merge " + hashlib.sha256("\n".join(text).encode()).hexdigest()[:32]
