"""Pictures of a plan: what runs when, and how the workspace is shared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..compiler.api import compile
from ..compiler.capture_tree import flatten
from ..runtime.executor import Executor
from ..runtime.plan import KernelStep, Plan, touched
from ..runtime.profile import profile_steps
from ..runtime.sizes import evaluate
from .workloads import Workload


def draw(workload: Workload, path: Path) -> Path:
    """Compiles ``workload`` (from the cache, normally), times its steps and draws them."""
    import torch

    model, inputs = workload.build()
    with torch.no_grad():
        compiled = compile(model, example_inputs=inputs)
        program = compiled.programs[-1]
        executor = program.executable.executor  # type: ignore[attr-defined]
        leaves, _ = flatten((inputs, {}))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        times = profile_steps(executor, [*tensors, *program.captured.states])
    return picture(executor, [t.seconds for t in times], workload.name, path)


def picture(executor: Executor, seconds: Sequence[float], title: str, path: Path) -> Path:
    """Saves a PNG of two charts over the same time axis and returns its path.

    Above: one bar per step, as long as the step takes, coloured by operator. Below: every buffer of
    the workspace as a rectangle from its first use to its last, at its address.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    plan = executor.plan
    starts = [0.0]
    for duration in seconds:
        starts.append(starts[-1] + duration * 1e3)
    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    kinds = [_kind(step) for step in plan.steps]
    spent: dict[str, float] = {}
    for kind, duration in zip(kinds, seconds, strict=True):
        spent[kind] = spent.get(kind, 0.0) + duration
    common = sorted(spent, key=lambda k: -spent[k])[:9]
    palette = {kind: colormaps["tab10"](i) for i, kind in enumerate(common)}
    grey = (0.6, 0.6, 0.6, 1.0)
    colours = [palette.get(kind, grey) for kind in kinds]
    widths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    top.bar(starts[:-1], 1.0, widths, align="edge", color=colours, edgecolor="white", lw=0.3)
    top.set_yticks([])
    top.set_title(f"{title}: {len(plan.steps)} steps, {starts[-1]:.2f} ms one by one")
    entries = [Patch(color=palette[k], label=f"{k} {spent[k] * 1e3:.2f} ms") for k in common]
    if len(spent) > len(common):
        rest = sum(v for k, v in spent.items() if k not in palette)
        entries.append(Patch(color=grey, label=f"others {rest * 1e3:.2f} ms"))
    top.legend(handles=entries, ncols=5, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.02))
    peak = 0.0
    for name, (first, last) in lifetimes(plan).items():
        buffer = plan.buffers[name]
        low = evaluate(buffer.offset, {}) / 2**20
        height = evaluate(buffer.nbytes, {}) / 2**20
        peak = max(peak, low + height)
        colour = colours[first]
        left = starts[first]
        bottom.bar(
            left, height, starts[last + 1] - left, low, align="edge", color=colour, ec="k", lw=0.3
        )
    bottom.set_xlim(0, starts[-1])
    bottom.set_ylim(0, peak * 1.02 or 1)
    bottom.set_xlabel("ms")
    bottom.set_ylabel("workspace, MiB")
    figure.savefig(path, dpi=110)
    return path


def lifetimes(plan: Plan) -> dict[str, tuple[int, int]]:
    """For each buffer of the workspace the first and the last step that touches it."""
    spans: dict[str, tuple[int, int]] = {}
    for number, step in enumerate(plan.steps):
        for ref in touched(step):
            if ref is not None and plan.buffers[ref.buffer].kind == "arena":
                first, _ = spans.get(ref.buffer, (number, number))
                spans[ref.buffer] = (first, number)
    return spans


def _kind(step: object) -> str:
    name = step.name if isinstance(step, KernelStep) else getattr(step, "target", "library")
    words = str(name).removeprefix("aten.").split(".")[0].split("_")
    return "_".join(words[:2])
