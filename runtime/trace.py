"""When every part of every step of a plan ran, and on which worker, by the machine's clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .executor import Executor
from .instance import Instance
from .plan import Plan
from .sizes import evaluate


@dataclass(frozen=True)
class Event:
    """Tasks [lo, hi) of step ``step`` ran on ``worker`` from ``begin`` to ``end``: seconds since
    the first event. Library and branch steps are one event on worker 0.
    """

    step: int
    worker: int
    lo: int
    hi: int
    begin: float
    end: float


class Tracer:
    """Runs a plan like its executor does, but with the clock read around every part (25 ns each).

    Not safe under threads. ``values`` bind the plan's symbols.
    """

    def __init__(self, executor: Executor, values: Mapping[str, int], workers: int) -> None:
        self._instance = Instance(executor, values, workers, stamped=True)
        self._instance.on_step = lambda: self._marks.append(time.monotonic_ns())
        self._marks: list[int] = []

    def run(self, tensors: Sequence[torch.Tensor]) -> list[Event]:
        """One call on flat inputs; its events in the order in which they began."""
        self._marks = [time.monotonic_ns()]
        self._instance.run(tensors)
        workspace = self._instance._free[-1]
        found: list[tuple[int, int, int, int, int, int]] = []
        number = 0
        for k, (segment, table) in enumerate(
            zip(self._instance.segments, workspace.tables, strict=True)
        ):
            if table is None:
                found.append((number, 0, 0, 1, self._marks[k], self._marks[k + 1]))
                number += 1
                continue
            assert table.stamps is not None and isinstance(segment, list)
            for part, (s, ns, s_end, ns_end) in zip(
                table.parts, table.stamps.tolist(), strict=False
            ):
                begin, end = s * 10**9 + ns, s_end * 10**9 + ns_end
                found.append((number + part.step, part.worker, part.lo, part.hi, begin, end))
            number += len(segment)
        found.sort(key=lambda e: e[4])
        zero = found[0][4] if found else 0
        return [Event(*e[:4], (e[4] - zero) * 1e-9, (e[5] - zero) * 1e-9) for e in found]


def made_up(plan: Plan, values: Mapping[str, int] | None = None) -> list[torch.Tensor]:
    """Inputs for a plan whose symbols have these ``values``: noise, and zeros for integers, which
    index any table.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for ref in plan.inputs:
        shape = [evaluate(d, values or {}) for d in ref.shape]
        dtype = getattr(torch, ref.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            made.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            made.append(torch.zeros(shape, dtype=dtype))
    return made


def typical(
    executor: Executor,
    tensors: Sequence[torch.Tensor],
    rounds: int = 15,
    values: Mapping[str, int] | None = None,
) -> list[Event]:
    """The events of the run of median length among ``rounds``, with torch's number of threads."""
    tracer = Tracer(executor, values or {}, torch.get_num_threads())
    tracer.run(tensors)
    runs = [tracer.run(tensors) for _ in range(rounds)]
    runs.sort(key=lambda events: max((e.end for e in events), default=0.0))
    return runs[len(runs) // 2]
