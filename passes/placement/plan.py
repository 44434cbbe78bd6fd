"""`place`: one call from a problem to a checked placement, by any algorithm."""

from __future__ import annotations

import time

import numpy as np

from .best import Progress, best
from .bounds import lower_bounds
from .errors import InfeasibleError, PlacementError
from .feasible import refuse_hopeless
from .list_scheduling import Listed
from .placement import Placement
from .problem import Problem
from .simulator import Schedule, placement_of, simulate
from .starts import ALGORITHMS, BALANCED

OBJECTIVES = ("latency", "throughput")
NAMES = ("best", *ALGORITHMS)


def place(
    problem: Problem,
    *,
    algorithm: str = "best",
    objective: str = "latency",
    budget: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
    began: float | None = None,
) -> Placement:
    """A placement of ``problem`` that fits its devices.

    ``objective`` is "latency" (the makespan of one step) or "throughput" (the largest load of a
    device or link per input, in a pipeline). ``budget`` is in seconds of wall clock since ``began``
    (``time.perf_counter()``; now) and only "best" spends it.

    Raises PlacementError for options without meaning, InfeasibleError where nothing fits or the
    algorithm finds nothing that does.
    """
    started = time.perf_counter() if began is None else began
    if algorithm not in NAMES:
        raise PlacementError(f"algorithm {algorithm!r} is unknown; use one of {', '.join(NAMES)}")
    if objective not in OBJECTIVES:
        raise PlacementError(f"objective {objective!r} is unknown; use {' or '.join(OBJECTIVES)}")
    if not (0 < budget < float("inf")):
        raise PlacementError(f"budget must be a positive number of seconds, is {budget!r}")
    if seed != int(seed) or not 0 <= seed < 2**32:
        raise PlacementError(f"seed must be an integer from 0 to 2**32 - 1, is {seed!r}")
    report: dict[str, object] = {"algorithm": algorithm, "objective": objective, "seed": seed}
    if algorithm == "best":
        found = best(problem, objective, budget, seed, progress, started)
        bounds = found.bounds
        placement = placement_of(problem, found.assign, found.sequence, report)
        report.update(start=found.start, moves=found.moves, stopped=found.stopped)
    else:
        refuse_hopeless(problem)
        placement = _simple(problem, algorithm, report)
        bounds = lower_bounds(problem.arrays, objective == "throughput")
    schedule = simulate(problem, placement)
    short = schedule.shortfall(problem)
    if short:
        text = ", ".join(f"{name!r} is {x:.0f} bytes short" for name, x in short.items())
        raise InfeasibleError(
            f"{algorithm} answers with a placement that does not fit: {text}; "
            "algorithm 'best' searches further",
            short,
            False,
        )
    report.update(_report(problem, schedule, bounds, objective))
    report["seconds"] = time.perf_counter() - started
    return Placement(placement.assign, placement.order, placement.mode, report)


def _simple(problem: Problem, algorithm: str, report: dict[str, object]) -> Placement:
    """A simple algorithm's placement; with memory shared out evenly where that alone fits."""
    balanced = BALANCED.get(algorithm) if not problem.arrays.static else None
    try:
        placement = _listed(problem, ALGORITHMS[algorithm](problem), report)
        if balanced is None or not simulate(problem, placement).shortfall(problem):
            return placement
    except InfeasibleError:
        if balanced is None:
            raise
    return _listed(problem, balanced(problem), report)


def _listed(problem: Problem, listed: Listed, report: dict[str, object]) -> Placement:
    return placement_of(problem, listed.assign, listed.sequence, report)


def _report(
    problem: Problem, schedule: Schedule, bounds: dict[str, float], objective: str
) -> dict[str, object]:
    cost = schedule.load if objective == "throughput" else schedule.makespan
    bound = bounds["best"]
    names = [device.name for device in problem.devices]
    busy = np.bincount(schedule.device, schedule.end - schedule.start, len(names))
    return {
        "makespan_s": schedule.makespan,
        "load_s": schedule.load,
        "lower_bound_s": bound,
        "gap": max(cost / bound - 1, 0.0) if bound else 0.0,
        "bounds_s": bounds,
        "peak_bytes": dict(zip(names, schedule.peak.tolist(), strict=True)),
        "busy_s": dict(zip(names, busy.tolist(), strict=True)),
        "transfers": len(schedule.transfers),
        "bytes_moved": float(sum(x.bytes for x in schedule.transfers)),
    }
