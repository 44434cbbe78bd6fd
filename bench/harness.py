"""Runs workloads on engines: correctness first, then interleaved timing.

An answer is compared with the same model in float64. ``error`` is the largest difference over all
outputs, each relative to its output's largest magnitude. An engine whose error passes `LIMIT` is
recorded as WRONG and not timed. In 16 bits it is compared with twice eager mode's own error, too: a
router's rounded scores choose other experts, whoever computes them.
"""

from __future__ import annotations

import copy
import functools
import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
from torch import nn

from .bounds import Machine, measure_machine
from .measure import PeakMemory, Timing, geometric_mean, interleave
from .peers import Call, NotApplicable, Peer, limits_of, tensors_of
from .workloads import Size, Workload

LIMIT = 1e-3
FORMAT = 1


@dataclass
class Result:
    """One engine on one workload. ``status``: OK, WRONG, SKIPPED or BASELINE_ERROR.

    Times in seconds, memory in bytes. ``compile_seconds`` includes the first call,
    ``warm_seconds`` is the same again with plait's cache filled. ``error_ratio`` is the error over
    that of eager in the same dtype, ``ratio`` how many times faster than this engine plait is,
    ``limits`` what bounds plait's time (`limits.Limits`).
    """

    workload: str
    size: str
    peer: str
    status: str = "OK"
    message: str = ""
    compile_seconds: float | None = None
    warm_seconds: float | None = None
    compile_peak_bytes: int | None = None
    run_peak_bytes: int | None = None
    error: float | None = None
    error_ratio: float | None = None
    repeatable: bool | None = None
    p10: float | None = None
    p50: float | None = None
    p90: float | None = None
    rounds: list[float] = field(default_factory=list)
    ratio: float | None = None
    limits: dict[str, float] | None = None
    dtype: str = "float32"


def reference(model: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """The outputs of a float64 copy of ``model``."""
    exact = copy.deepcopy(model).double()
    select = getattr(exact, "set_experts_implementation", None)
    if select is not None:  # transformers' grouped matrix product knows no float64
        select("eager")
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    return tensors_of(exact(*wide))


def relative_error(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Largest error relative to each output's largest magnitude; infinite where shapes differ or
    either side is not finite where the other is."""
    if len(got) != len(want):
        return float("inf")
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        if g.shape != w.shape:
            return float("inf")
        if not w.numel():
            continue
        g, w = g.double(), w.double()
        if not torch.equal(torch.isfinite(g), torch.isfinite(w)):
            return float("inf")
        finite = torch.isfinite(w)
        if not finite.any():
            continue
        scale = w[finite].abs().max().clamp_min(1e-30)
        worst = max(worst, float((g[finite] - w[finite]).abs().max() / scale))
    return worst


def run_workload(
    workload: Workload,
    peers: Sequence[Peer],
    size: Size = "cpu",
    rounds: int = 5,
    seconds: float = 0.25,
    report: Callable[[str], None] = lambda _: None,
    dtype: torch.dtype = torch.float32,
) -> list[Result]:
    """All engines on one workload; ``report`` is told what happens. Raises nothing of theirs.

    An engine for a form of the model that the workload does not have gives no result. Weights and
    inputs of floating point are converted to ``dtype``.
    """
    name = str(dtype).removeprefix("torch.")
    made = functools.partial(Result, workload.name, size, dtype=name)
    peers = [p for p in peers if p.form in ("", *workload.forms)]
    need = dict(workload.gib).get(size, 0.0)
    free = psutil.virtual_memory().available / 2**30
    if need > free:
        why = f"needs about {need:.0f} GiB of memory, {free:.0f} GiB are free"
        return [made(p.name, "SKIPPED", why) for p in peers]
    try:
        model, inputs = _converted(workload.build(size), dtype)
    except ImportError as error:
        why = f"{_line(error)}; pip install 'plait[bench]'"
        return [made(p.name, "SKIPPED", why) for p in peers]
    torch._dynamo.reset()
    with torch.no_grad():
        report("float64 reference")
        exact = reference(model, inputs)
        own_error = relative_error(tensors_of(model(*inputs)), exact)
        models = {"": model}
        results, calls = [], {}
        for peer in peers:
            report(f"{peer.name}: prepare")
            result = made(peer.name)
            results.append(result)
            if peer.form not in models:
                plain = workload.build_plain(size, peer.form)
                models[peer.form] = _converted(plain, dtype)[0]
            call = _prepare(peer, models[peer.form], inputs, exact, own_error, result)
            if call is not None:
                calls[peer.name] = call
        report(f"timing {rounds} rounds of {len(calls)}")
        timings = interleave(calls, rounds, seconds)
        report("limits")
        _bound(calls, [p.name for p in peers if p.family == "plait"], results, dtype)
    for result in results:
        if result.peer in timings:
            _record(result, timings[result.peer])
    own = next((r.p50 for r in results if r.peer == "plait"), None)
    for result in results:
        if own and result.p50:
            result.ratio = result.p50 / own
    return results


def _prepare(
    peer: Peer,
    model: nn.Module,
    inputs: tuple[Any, ...],
    exact: list[torch.Tensor],
    own_error: float,
    result: Result,
) -> Call | None:
    gc.collect()
    try:
        mine = copy.deepcopy(model)
        with PeakMemory() as memory:
            start = time.perf_counter()
            call = peer.prepare(mine, inputs)
            first = [x.clone() for x in tensors_of(call())]
            result.compile_seconds = time.perf_counter() - start
        result.compile_peak_bytes = memory.peak
        with PeakMemory() as memory:
            again = [x.clone() for x in tensors_of(call())]
        result.run_peak_bytes = memory.peak
        if peer.family == "plait":
            other = copy.deepcopy(model)
            start = time.perf_counter()
            peer.prepare(other, inputs)()
            result.warm_seconds = time.perf_counter() - start
    except NotApplicable as error:
        result.status, result.message = "SKIPPED", str(error)
        return None
    except Exception as error:  # an engine may fail in any way; that is a result, too
        result.status, result.message = "BASELINE_ERROR", f"{type(error).__name__}: {_line(error)}"
        return None
    result.error = relative_error(first, exact)
    result.error_ratio = result.error / own_error if own_error else None
    result.repeatable = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    limit = LIMIT if result.dtype == "float32" else max(LIMIT, 2 * own_error)
    if not result.error <= limit:
        result.status = "WRONG"
        result.message = f"relative error {result.error:.2g} is above {limit:.2g}"
        return None
    return call


def _converted(
    built: tuple[nn.Module, tuple[Any, ...]], dtype: torch.dtype
) -> tuple[nn.Module, tuple[Any, ...]]:
    model, inputs = built
    if dtype == torch.float32:
        return built
    wanted = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    return model.to(dtype), tuple(wanted)


def _bound(
    calls: dict[str, Call], names: Sequence[str], results: Sequence[Result], dtype: torch.dtype
) -> None:
    """Adds to the results of engines ``names`` what bounds their time."""
    machine: Machine | None = None
    for result in results:
        if result.peer in names and result.peer in calls:
            machine = machine or measure_machine(dtype)
            found = limits_of(calls[result.peer], machine)
            result.limits = None if found is None else asdict(found)


def _record(result: Result, timing: Timing) -> None:
    result.p10, result.p50, result.p90 = (timing.percentile(q) for q in (0.1, 0.5, 0.9))
    result.rounds = timing.rounds


def _line(error: BaseException) -> str:
    """The first line of an error's message, without terminal colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def summary(results: Sequence[Result], families: dict[str, str]) -> dict[str, float]:
    """Geometric means, over workloads, of how many times faster plait is.

    One entry for every engine, and for the best engine of each family per workload ("torch":
    PyTorch in all its modes; "engine": the other runtimes); "all" is the best of both.
    "eager (plait-profiled)" is how many times faster than eager that form of plait is.
    """
    means: dict[str, float] = {}
    others = [r for r in results if r.peer != "plait" and r.ratio]
    for peer in dict.fromkeys(r.peer for r in others):
        means[peer] = geometric_mean([r.ratio for r in others if r.peer == peer and r.ratio])
    for variant in dict.fromkeys(p for p, f in families.items() if f == "plait" and p != "plait"):
        times = {r.workload: r.p50 for r in results if r.peer == variant and r.p50}
        eager = [r for r in others if r.peer == "eager" and r.workload in times]
        if eager:  # the same workloads with and without what the variant adds
            ratios = [r.p50 / times[r.workload] for r in eager if r.p50]
            means[f"eager ({variant})"] = geometric_mean(ratios)
    for family in ("torch", "engine", "all"):
        best: dict[str, float] = {}
        for r in others:
            kind = families.get(r.peer)
            if r.ratio and kind != "plait" and family in (kind, "all"):
                best[r.workload] = min(best.get(r.workload, float("inf")), r.ratio)
        if best:
            means[f"best {family}"] = geometric_mean(list(best.values()))
    return means


def document(
    results: Sequence[Result], families: dict[str, str], header: dict[str, Any]
) -> dict[str, Any]:
    """Everything as one JSON-plain dictionary; ``header`` is what `environment` returned."""
    return {
        "format": FORMAT,
        "environment": header,
        "results": [asdict(r) for r in results],
        "speedups": summary(results, families),
    }
