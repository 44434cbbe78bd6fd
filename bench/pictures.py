"""Pictures of a plan as it ran: a lane for each worker, and how the workspace is shared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..compiler.api import compile
from ..compiler.capture.tree import flatten
from ..runtime.plan import KernelStep, Plan, touched
from ..runtime.sizes import evaluate
from ..runtime.trace import Event, typical
from .workloads import Workload


def draw(workload: Workload, path: Path) -> Path:
    """Compiles ``workload`` (from the cache, normally), runs it and draws a typical run."""
    import torch

    model, inputs = workload.build()
    with torch.no_grad():
        compiled = compile(model, example_inputs=inputs)
        program = compiled.programs[-1]
        executor = program.executable.executor  # type: ignore[attr-defined]
        leaves, _ = flatten((inputs, {}))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        events = typical(executor, [*tensors, *program.captured.states])
    return picture(executor.plan, events, workload.name, path)


def picture(plan: Plan, events: Sequence[Event], title: str, path: Path) -> Path:
    """Saves two charts over the same time axis and returns ``path``, whose ending says the format.

    Above: what each worker does, coloured by operator. Below: every buffer of the workspace as a
    rectangle from its first use to its last, at its address.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    kinds = [kind_of(step) for step in plan.steps]
    spent: dict[str, float] = {}
    for event in events:
        kind = kinds[event.step]
        spent[kind] = spent.get(kind, 0.0) + (event.end - event.begin) * 1e3
    common = sorted(spent, key=lambda k: -spent[k])[:9]
    palette = {kind: colormaps["tab10"](i) for i, kind in enumerate(common)}
    grey = (0.6, 0.6, 0.6, 1.0)
    colours = [palette.get(kind, grey) for kind in kinds]
    workers = 1 + max((e.worker for e in events), default=0)
    for event in events:
        left, width = event.begin * 1e3, (event.end - event.begin) * 1e3
        colour = colours[event.step]
        top.barh(event.worker, width, 0.9, left, color=colour, edgecolor="white", lw=0.2)
    top.set_yticks(range(workers), [f"worker {w}" for w in range(workers)])
    top.invert_yaxis()
    whole = max((e.end for e in events), default=0.0) * 1e3
    busy = sum(spent.values()) / (whole * workers) if whole else 0.0
    top.set_title(f"{title}: {len(plan.steps)} steps, {whole:.2f} ms, workers busy {busy:.0%}")
    entries = [Patch(color=palette[k], label=f"{k} {spent[k]:.2f} ms") for k in common]
    if len(spent) > len(common):
        rest = sum(v for k, v in spent.items() if k not in palette)
        entries.append(Patch(color=grey, label=f"others {rest:.2f} ms"))
    top.legend(handles=entries, ncols=5, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.02))
    peak = 0.0
    for name, (begin, end, first) in memory(plan, events).items():
        buffer = plan.buffers[name]
        low = evaluate(buffer.offset, {}) / 2**20
        height = evaluate(buffer.nbytes, {}) / 2**20
        peak = max(peak, low + height)
        left, width = begin * 1e3, (end - begin) * 1e3
        bottom.bar(left, height, width, low, align="edge", color=colours[first], ec="k", lw=0.3)
    bottom.set_xlim(0, whole or 1)
    bottom.set_ylim(0, peak * 1.02 or 1)
    bottom.set_xlabel("ms")
    bottom.set_ylabel("workspace, MiB")
    figure.savefig(path, dpi=110)
    return path


def memory(plan: Plan, events: Sequence[Event]) -> dict[str, tuple[float, float, int]]:
    """For each buffer of the workspace when it was first and last in use (seconds), and the step
    that made it.
    """
    times: dict[int, tuple[float, float]] = {}
    for event in events:
        begin, end = times.get(event.step, (event.begin, event.end))
        times[event.step] = (min(begin, event.begin), max(end, event.end))
    found: dict[str, tuple[float, float, int]] = {}
    for number, step in enumerate(plan.steps):
        for ref in touched(step) if number in times else ():
            if ref is not None and plan.buffers[ref.buffer].kind == "arena":
                begin, end, first = found.get(ref.buffer, (*times[number], number))
                begin, end = min(begin, times[number][0]), max(end, times[number][1])
                found[ref.buffer] = (begin, end, first)
    return found


def kind_of(step: object) -> str:
    """A short word for what a step does, for colours and legends."""
    name = step.name if isinstance(step, KernelStep) else getattr(step, "target", "branches")
    words = str(name).removeprefix("aten.").split(".")[0].split("_")
    return "_".join(words[:2])
