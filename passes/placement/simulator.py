"""plait's simulator of one step: what docs/placement.md defines, as a schedule to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .engine import DONE, Engine
from .errors import PlacementError
from .placement import Placement, check
from .problem import Floats, Ints, Problem


@dataclass(frozen=True)
class Transfer:
    """One tensor on one link, between ``start`` and ``end`` seconds."""

    source: str
    tensor: int
    bytes: float
    src: int
    dst: int
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """One step: start and end of each op (seconds, by op), transfers, peak bytes by device."""

    start: Floats
    end: Floats
    device: Ints
    transfers: tuple[Transfer, ...]
    peak: Floats
    makespan: float
    load: float
    """The largest load of a device or link for one input, in a pipeline."""

    def shortfall(self, problem: Problem) -> dict[str, float]:
        """Bytes by which peaks exceed devices, for those that they exceed."""
        over = zip(problem.devices, self.peak, strict=True)
        return {d.name: float(x - d.memory_bytes) for d, x in over if x > d.memory_bytes}


def simulate(problem: Problem, placement: Placement) -> Schedule:
    """Plays one step of a placement.

    Raises PlacementError where the placement is not one of the problem or its order deadlocks.
    """
    check(problem, placement)
    p = problem.arrays
    n = len(problem.ops)
    ops, devices = problem.op_index, problem.device_index
    engine = Engine(p, np.zeros((0, len(p.unit_ptr) - 1)), (np.zeros(1, int), np.zeros(0, int)))
    assign = np.array([devices[placement.assign[op.name]] for op in problem.ops], np.int32)
    if placement.order:
        position = np.full(n, -1, np.int32)
        for names in placement.order.values():
            for k, name in enumerate(names):
                position[ops[name]] = k
        priority = np.where(position < 0, -float(n), -position.astype(float))
    else:
        if placement.mode == "strict":
            raise PlacementError("order is missing, which mode 'strict' needs")
        position, priority = np.zeros(n, np.int32), engine.bottom_levels(assign)
    code, makespan = engine.simulate(
        assign, priority, position if placement.mode == "strict" else None
    )
    if code != DONE:
        stuck = set(range(n)) - set(engine.work.sequence[: engine.work.counts[0]].tolist())
        names = ", ".join(problem.ops[i].name for i in sorted(stuck)[:5])
        raise PlacementError(f"order: the devices wait for one another; never run: {names}")
    w, m = engine.work, engine.m
    transfers = tuple(
        Transfer(
            problem.ops[p.tensor_src[t]].name, int(t), float(p.tensor_bytes[t]),
            int(link // m), int(link % m), float(s), float(e),
        )
        for t, link, s, e in zip(
            *(x[: w.counts[1]] for x in
              (w.transfer_tensor, w.transfer_link, w.transfer_start, w.transfer_end)),
            strict=True,
        )
    )  # fmt: skip
    return Schedule(
        w.start.copy(), w.end.copy(), assign.astype(np.int64), transfers, w.top.copy(),
        makespan if n else 0.0, engine.pipeline_load(assign),
    )  # fmt: skip


def placement_of(
    problem: Problem,
    assign: Ints,
    sequence: Ints,
    report: dict[str, object],
    mode: str = "priority",
) -> Placement:
    """A placement from device numbers by op and the ops in the order in which they start."""
    names = [device.name for device in problem.devices]
    order: dict[str, list[str]] = {name: [] for name in names}
    for i in sequence.tolist():
        order[names[assign[i]]].append(problem.ops[i].name)
    placed = {op.name: names[d] for op, d in zip(problem.ops, assign, strict=True)}
    return Placement(placed, order, mode, report)
