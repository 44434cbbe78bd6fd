"""Measures for `merge-parallel-ops` whether operators run faster merged or apart.

Both forms are lowered like any graph, and scheduled where the pipeline asks for it: the operators
apart may run side by side. Each form counts by the faster of in order and its best schedule, run in
turns on made-up inputs. Where kernels elsewhere in the graph can fill what a schedule of these few
leaves idle, a form may come down to its work divided by the workers, whatever the schedule; so
there a merger must save work, too.

What was measured is kept in the kernel database, so it is measured once for a machine and a number
of threads, unless other work kept the machine busy.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from ...kernels.database import Database
from ...passes.ir import attribute
from ...passes.manager import PassManager
from ...passes.merge_parallel import Judge, Verdict
from ...passes.pipeline_print import print_pipeline
from ...passes.schedule import SCHEDULE
from ...runtime.executor import Executor
from ...runtime.trace import made_up
from .bets import TIMES, timed
from .scheduling import BUSY, propose

FAR = 1.03
"""A merger predicted to take so many times as long is not run: predictions err less."""

Build = Callable[[fx.GraphModule], Executor]
"""Makes what runs a graph that has been through the passes."""


def judge(rest: PassManager, build: Build, database: Database, measure: bool) -> Judge:
    """A judge that compiles with the passes ``rest``; without ``measure`` it only tells what was
    measured before.
    """

    def compare(apart: fx.GraphModule, merged: fx.GraphModule, beside: bool) -> Verdict | str:
        (source,) = apart.graph.find_nodes(op="placeholder")
        if not all(isinstance(size, int) for size in source.meta["val"].shape):
            return "sizes are known only when the model is called"
        key = _key((apart, merged), rest)
        found = database.progress(key)
        if found is None:
            if not measure:
                return "nothing is measured with tune='off'"
            forms = [_form(rest.run(g).graph_module, build, database) for g in (apart, merged)]
            seconds, disturbed = _measured(forms)
            found = {"seconds": seconds, "work": [f.work for f in forms]}
            if not disturbed and not any(f.disturbed for f in forms):
                database.set_progress(key, found)
        alone, work = tuple(found["seconds"]), tuple(found["work"])
        if beside and None not in work:
            return min(alone, work, key=lambda t: t[0] / t[1])
        return alone

    return compare


@dataclass(frozen=True)
class _Form:
    """What may run one of two forms, and the seconds of its `Proposal`, where there is one."""

    executors: list[Executor]
    predicted: float | None = None
    work: float | None = None
    disturbed: bool = False


def _form(graph: fx.GraphModule, build: Build, database: Database) -> _Form:
    executor = build(graph)
    how = graph.meta.get(SCHEDULE)
    with torch.random.fork_rng(devices=[]):
        found = None if how is None else propose(executor, how, database)
    if found is None:
        return _Form([executor])
    scheduled = [] if found.executor is None else [found.executor]
    return _Form([executor, *scheduled], found.predicted, found.work, found.disturbed)


def _measured(forms: Sequence[_Form]) -> tuple[list[float], bool]:
    """Seconds of both forms, each at its fastest, and whether other work disturbed the runs: of
    several measurements the one that speaks least for the second form.

    One that is predicted to be slower is not run: a prediction can refuse a merger only.
    """
    before, after = (f.predicted for f in forms)
    if before is not None and after is not None and after > FAR * before:
        return [before, after], False
    executors = [e for f in forms for e in f.executors]
    inputs = made_up(executors[0].plan)
    calls = [functools.partial(e.run, inputs) for e in executors]
    first = len(forms[0].executors)
    with torch.random.fork_rng(devices=[]):
        times = [timed(calls) for _ in range(TIMES)]
    disturbed = any(max(own) > BUSY * min(own) for own in zip(*times, strict=True))
    found = [[min(own[:first]), min(own[first:])] for own in times]
    return min(found, key=lambda t: t[0] / t[1]), disturbed


def _key(graphs: Sequence[fx.GraphModule], rest: PassManager) -> str:
    """Names the comparison: operators, shapes, layouts and types, but not what weights hold."""
    text = [
        print_pipeline(rest.passes),
        str(torch.get_num_threads()),
        "2",
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
