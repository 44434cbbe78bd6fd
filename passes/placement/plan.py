"""`place`: one call from a problem to a checked placement, by any algorithm."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from .alternatives_search import Answer, best_with_alternatives
from .best import best
from .bounds import lower_bounds
from .choices import Allowed
from .coarsen import coarsen
from .errors import InfeasibleError, PlacementError, shortages
from .feasible import refuse_hopeless
from .fitting import Progress
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
    coarsen_to: int | None = None,
    recompute: bool = False,
    offload: str | None = None,
    transfer_price: float = 0.0,
    progress: Progress | None = None,
    began: float | None = None,
) -> Placement:
    """A placement of ``problem`` that fits its devices.

    ``objective`` is "latency" (the makespan of one step) or "throughput" (the largest load of a
    device or link per input, in a pipeline). ``budget`` is in seconds of wall clock since ``began``
    (``time.perf_counter()``; now) and only "best" spends it. With ``coarsen_to`` ops are joined
    until about so many are left (`coarsen`) and those placed; the report is of the ops themselves.
    With ``recompute`` ops may run again for late readers, and with ``offload`` outputs may wait for
    theirs on that device, where that makes the plan better; the placement is then one of
    ``rewrite(problem, placement.alternatives).problem``, and so is its report, but the lower bound
    is one for all such choices.
    ``transfer_price``: a transfer must save so many seconds for "best" to make it, where sending
    costs more than links tell; no other algorithm knows of it.

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
    if coarsen_to is not None and (coarsen_to != int(coarsen_to) or coarsen_to < 1):
        raise PlacementError(f"coarsen_to must be a number of ops, is {coarsen_to!r}")
    if not 0 <= transfer_price < float("inf"):
        raise PlacementError(f"transfer_price must be seconds, is {transfer_price!r}")
    report: dict[str, object] = {"algorithm": algorithm, "objective": objective, "seed": seed}
    bounds: dict[str, float] | None = None
    if recompute or offload is not None:
        if coarsen_to is not None:
            raise PlacementError(
                "coarsen_to cannot be used with recompute or offload; leave one out"
            )
        if transfer_price:
            raise PlacementError(
                "transfer_price cannot be used with recompute or offload; leave one out"
            )
        allowed = Allowed(recompute, offload)
        placement, bounds, problem = _with_alternatives(
            problem, allowed, report, budget, progress, started
        )
    elif coarsen_to is None:
        placement, bounds = _planned(problem, report, budget, transfer_price, progress, started)
    else:
        target, price = int(coarsen_to), transfer_price
        placement = _coarsely(problem, target, report, budget, price, progress, started)
    if bounds is None:
        bounds = lower_bounds(problem.arrays, objective == "throughput")
    schedule = simulate(problem, placement)
    short = schedule.shortfall(problem)
    if short:
        raise InfeasibleError(
            f"{algorithm} answers with a placement that does not fit: {shortages(short)}; "
            + ("leave out coarsen_to" if coarsen_to else "algorithm 'best' searches further"),
            short,
            False,
        )
    report.update(_report(problem, schedule, bounds, objective))
    report["seconds"] = time.perf_counter() - started
    return replace(placement, report=report)


def _with_alternatives(
    problem: Problem,
    allowed: Allowed,
    report: dict[str, object],
    budget: float,
    progress: Progress | None,
    began: float,
) -> tuple[Placement, dict[str, float], Problem]:
    """A placement by `best_with_alternatives`, bounds, and the problem of which it is one."""
    if report["algorithm"] != "best":
        raise PlacementError("only algorithm 'best' can recompute and offload; leave one out")
    if problem.memory_model != "dynamic":
        raise PlacementError(
            "recompute and offload free nothing where memory_model is 'static'; leave them out"
        )
    if allowed.host is not None and allowed.host not in problem.device_index:
        names = ", ".join(device.name for device in problem.devices)
        raise PlacementError(f"offload: there is no device {allowed.host!r}; use one of {names}")
    objective, seed = str(report["objective"]), int(str(report["seed"]))
    answer = best_with_alternatives(problem, allowed, objective, budget, seed, progress, began)
    found, whole = answer.found, answer.rewritten.problem
    report.update(start=found.start, moves=found.moves, stopped=found.stopped)
    report.update(_copied(answer))
    placement = placement_of(whole, found.assign, found.sequence, report, found.mode)
    return replace(placement, alternatives=answer.alternatives), found.bounds, whole


def _copied(answer: Answer) -> dict[str, float]:
    """How much is recomputed (ops, seconds) and offloaded (ops, bytes)."""
    p, n = answer.rewritten.problem.arrays, len(answer.rewritten.original.ops)
    offloaded = np.array([x.kind == "offload" for x in answer.alternatives], bool)
    seconds = p.time[np.arange(len(p.time)), answer.found.assign][n:]
    return {
        "recomputed": int((~offloaded).sum()),
        "recompute_s": float(seconds[~offloaded].sum()),
        "offloaded": int(offloaded.sum()),
        "offload_bytes": float(p.out[n:][offloaded].sum()),
    }


def _planned(
    problem: Problem,
    report: dict[str, object],
    budget: float,
    price: float,
    progress: Progress | None,
    began: float,
) -> tuple[Placement, dict[str, float] | None]:
    """A placement by the algorithm that the report names; bounds where it computed them."""
    if report["algorithm"] != "best":
        refuse_hopeless(problem)
        return _simple(problem, str(report["algorithm"]), report), None
    seed = int(str(report["seed"]))
    found = best(problem, str(report["objective"]), budget, seed, progress, began, price)
    report.update(start=found.start, moves=found.moves, stopped=found.stopped)
    placement = placement_of(problem, found.assign, found.sequence, report, found.mode)
    return placement, found.bounds


def _coarsely(
    problem: Problem,
    target: int,
    report: dict[str, object],
    budget: float,
    price: float,
    progress: Progress | None,
    began: float,
) -> Placement:
    """The same of a coarser graph, taken back to the ops. What it misses proves nothing."""
    refuse_hopeless(problem)
    coarse = coarsen(problem, target)
    report["coarse_ops"] = len(coarse.problem.ops)
    try:
        return coarse.expand(_planned(coarse.problem, report, budget, price, progress, began)[0])
    except InfeasibleError as error:
        raise InfeasibleError(
            f"with ops joined, {error}; leave out coarsen_to", error.shortfall, False
        ) from None


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
