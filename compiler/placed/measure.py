"""What units cost on this machine: each is compiled and timed on the values it really gets.

The model runs once, unit by unit, each with its weights alone in memory: data decide how much a
routed product has to do, so made-up inputs would not tell. A call costs something by itself, which
a unit inside of a segment does not pay: it is measured, and taken from each unit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ...runtime.sizes import evaluate
from ..capture.export import capture
from ..options import Options
from .capture import Whole
from .options import cores
from .part import SegmentRun
from .segments import _segment, extract
from .units import Units

ROUNDS, SECONDS = 5, 0.05
"""Least number of timed calls of a unit, and seconds after which there are no more than that."""
_CACHES = 1 << 27
"""Bytes written between calls: a step reads each weight once, so caches hold none of them."""


@dataclass(frozen=True)
class Costs:
    """By unit, seconds and the bytes of memory that it works in; seconds of a call, which each
    segment pays once and those of units leave out. ``alone`` and ``together`` are the bytes/s that
    the threads of one rank, and all cores, read.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    temporary: Mapping[str, float] = field(default_factory=dict)
    call: float = 0.0
    alone: float = math.inf
    together: float = math.inf


def measure(
    whole: Whole, units: Units, inputs: Mapping[str, torch.Tensor], options: Options, threads: int
) -> Costs:
    """Times a call of each unit on ``threads`` threads: the median of a few."""
    found: dict[str, float] = {}
    temporary: dict[str, float] = {}
    values: dict[fx.Node, torch.Tensor] = {}
    last = {x: u for u in units.units for n in u.nodes for x in n.all_input_nodes}
    flush = torch.zeros(_CACHES, dtype=torch.uint8)
    cpu = torch.device("cpu")
    with on_threads(threads):
        least = SegmentRun(capture(_Least(), (torch.zeros(1),), {}), {}, whole.source, options, cpu)
        _, call = _timed(least, [torch.zeros(1)], flush)
        for unit in units.units:
            for node in unit.nodes:
                if node.op == "placeholder":
                    values[node] = inputs[node.name]
            nodes = [n for n in unit.nodes if n.op == "call_function"]
            found[unit.name] = 0.0
            if nodes:
                segment = _segment(units, unit.name, 0, 0, nodes)
                captured = extract(units.module, segment)
                run = SegmentRun(captured, whole.names, whole.source, options, cpu)
                results, seconds = _timed(run, [values[x] for x in segment.inputs], flush)
                found[unit.name] = max(seconds - call, 0.0)
                temporary[unit.name] = float(evaluate(run.engine.plan.arena_bytes, {}))
                values.update(zip(segment.outputs, results, strict=True))
            for x in [x for x in values if last.get(x) is unit]:
                del values[x]
        alone = _reading(flush)
    with on_threads(cores()):
        together = max(_reading(flush), alone)
    return Costs(found, temporary, call, alone, together)


def _reading(memory: torch.Tensor) -> float:
    """Bytes/s that this process reads, the best of a few."""
    words, times = memory.view(torch.float32), []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        words.sum()
        times.append(time.perf_counter() - begin)
    return memory.nbytes / min(times)


class _Least(torch.nn.Module):
    """The least that a segment can do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


def _timed(
    run: SegmentRun, given: list[torch.Tensor], flush: torch.Tensor
) -> tuple[list[torch.Tensor], float]:
    results: Any = run(given)  # the first call pays for what is made once
    times: list[float] = []
    while len(times) < ROUNDS or (sum(times) < SECONDS and len(times) < 4 * ROUNDS):
        flush.add_(1)
        begin = time.perf_counter()
        run(given)
        times.append(time.perf_counter() - begin)
        if sum(times) > 20 * SECONDS and len(times) > 1:
            break
    return results, sorted(times)[len(times) // 2]


@contextmanager
def on_threads(count: int) -> Any:
    """Within it, torch and kernels run on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
