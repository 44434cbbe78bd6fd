"""A planned step as a Perfetto (Chrome JSON) trace and as a Gantt chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .errors import PlacementError
from .placement import write_text, written
from .problem import Problem
from .simulator import Schedule


def memory_over_time(problem: Problem, schedule: Schedule) -> list[list[tuple[float, float]]]:
    """Per device, (seconds, bytes in use from then on); the largest is the peak.

    In the static memory model nothing changes over time.
    """
    p = problem.arrays
    n, m = p.time.shape
    base = np.bincount(schedule.device, p.param, m)
    if p.static:
        base = np.bincount(schedule.device, p.param + p.temp + p.out, m)
        return [[(0.0, float(x))] for x in base]
    changes: list[list[tuple[float, float]]] = [[] for _ in range(m)]

    def hold(device: int, start: float, end: float, size: float) -> None:
        changes[device] += [(start, size), (end, -size)]

    last = schedule.end.copy()
    src = p.tensor_src[p.pair_tensor]
    local = schedule.device[src] == schedule.device[p.pair_dst]
    np.maximum.at(last, src[local], schedule.end[p.pair_dst[local]])
    for x in schedule.transfers:
        u = p.tensor_src[x.tensor]
        last[u] = max(last[u], x.end)
        readers = p.pair_dst[p.tensor_ptr[x.tensor] : p.tensor_ptr[x.tensor + 1]]
        there = readers[schedule.device[readers] == x.dst]
        hold(x.dst, x.start, float(schedule.end[there].max()), x.bytes)
    last[p.keep] = schedule.makespan
    for i in range(n):
        d = int(schedule.device[i])
        hold(d, float(schedule.start[i]), float(last[i]), float(p.out[i]))
        hold(d, float(schedule.start[i]), float(schedule.end[i]), float(p.temp[i]))
    curves = []
    for d in range(m):
        curve = [(0.0, float(base[d]))]
        total: dict[float, float] = {}
        for when, size in changes[d]:
            total[when] = total.get(when, 0.0) + size
        for when in sorted(total):
            point = (when, curve[-1][1] + total[when])
            if curve[-1][0] == when:
                curve[-1] = point
            else:
                curve.append(point)
        curves.append(curve)
    return curves


def write_trace(problem: Problem, schedule: Schedule, path: Path) -> None:
    """Writes a trace for ui.perfetto.dev: ops per device, transfers per link, memory over time."""
    events: list[dict[str, Any]] = []

    def thread(pid: int, tid: int, name: str) -> None:
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid,
                       "args": {"name": name}})  # fmt: skip

    for pid, name in ((0, "devices"), (1, "links"), (2, "memory")):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
    m = len(problem.devices)
    for d, device in enumerate(problem.devices):
        thread(0, d, device.name)
    for i, op in enumerate(problem.ops):
        start, end = float(schedule.start[i]), float(schedule.end[i])
        events.append({"ph": "X", "name": op.name, "pid": 0, "tid": int(schedule.device[i]),
                       "ts": start * 1e6, "dur": (end - start) * 1e6})  # fmt: skip
    for link in sorted({x.src * m + x.dst for x in schedule.transfers}):
        names = problem.devices[link // m].name, problem.devices[link % m].name
        thread(1, link, " -> ".join(names))
    for x in schedule.transfers:
        events.append({"ph": "X", "name": x.source, "pid": 1, "tid": x.src * m + x.dst,
                       "ts": x.start * 1e6, "dur": (x.end - x.start) * 1e6,
                       "args": {"bytes": x.bytes}})  # fmt: skip
    for device, curve in zip(problem.devices, memory_over_time(problem, schedule), strict=True):
        for when, size in curve:
            events.append({"ph": "C", "name": device.name, "pid": 2, "ts": when * 1e6,
                           "args": {"bytes": size}})  # fmt: skip
    write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def write_gantt(problem: Problem, schedule: Schedule, path: Path) -> None:
    """Draws ops per device over time, and memory per device below, in the format of the suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    m = len(problem.devices)
    figure = Figure(figsize=(12, 2.5 + 0.9 * m), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1))
    scale = 1e3
    colours = [f"C{d % 10}" for d in range(m)]
    for d in range(m):
        mine = np.flatnonzero(schedule.device == d)
        bars = [[(schedule.start[i] * scale, d), (schedule.end[i] * scale, d)] for i in mine]
        top.add_collection(LineCollection(bars, colors=colours[d], linewidths=14, capstyle="butt"))
    for x in schedule.transfers:
        top.plot([x.start * scale, x.end * scale], [x.src, x.dst], color="0.4", lw=0.5, alpha=0.5)
    names = [device.name for device in problem.devices]
    top.set_yticks(range(m), names)
    top.set_ylim(m - 0.4, -0.6)
    top.set_xlim(0, max(schedule.makespan, 1e-12) * scale)
    top.set_title(f"{problem.name}: {schedule.makespan * scale:.4g} ms")
    for d, curve in enumerate(memory_over_time(problem, schedule)):
        when = [t * scale for t, _ in curve] + [schedule.makespan * scale]
        size = [x / 1e9 for _, x in curve]
        bottom.step(when, [*size, size[-1]], where="post", color=colours[d], label=names[d])
        bottom.axhline(problem.devices[d].memory_bytes / 1e9, color=colours[d], lw=0.5, ls="--")
    bottom.set_xlabel("ms")
    bottom.set_ylabel("GB")
    if m <= 16:
        bottom.legend(fontsize="small", ncols=4)
    suffix = path.suffix or ".png"
    if suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise PlacementError(f"{path}: pictures are written as .png, .svg or .pdf")
    with written(path) as scratch:
        figure.savefig(scratch, dpi=110, format=suffix[1:].lower())
