"""`plait.place`: devices for the ops of a problem or a model, and an order on each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...passes.placement import plan
from ...passes.placement.devices import parse_devices, parse_link
from ...passes.placement.placement import Placement
from ...passes.placement.problem import Problem
from ...passes.placement.problem_file import problem_from_dict, read_problem
from ..errors import OptionError
from .device import Device, as_devices

if TYPE_CHECKING:
    from .graph import Graph


LINK = "50GB/s,10us"
"""Between the devices of a model, unless said."""


def place(
    problem: Problem | Graph | Mapping[str, Any] | str | Path | Any,
    *,
    algorithm: str = "best",
    objective: str = "latency",
    budget: float = 10.0,
    seed: int = 0,
    coarsen_to: int | None = None,
    recompute: bool = False,
    offload: str | None = None,
    devices: str | Sequence[Device | str] | None = None,
    link: str | None = None,
    host_link: str | None = None,
    example_inputs: Any = (),
    optimizer: str | None = None,
) -> Placement:
    """The best placement that ``budget`` seconds find; its ``report`` tells the proven gap.

    ``problem`` is a placement problem (an object, its JSON values, or a file's path), or a
    `torch.nn.Module` with its ``example_inputs`` (positional, or keywords in a mapping), which may
    be on the meta device: nothing is run. A module needs ``devices`` ("4xh100:80GB", or a list of
    `Device`) joined by equal links (``link``: "50GB/s,10us" unless said), but for ``host_link``
    between CPUs and others; with ``optimizer`` ("none", "sgd", "momentum" or "adam") a whole
    training step is placed. A problem has its devices and links, and takes none of these.

    ``algorithm`` is "best", "single", "min-cut", "m-topo", "m-etf", "m-sct" or "heft";
    ``objective`` "latency" (makespan of a step) or "throughput" (largest load of a device or link
    per input in a pipeline). ``coarsen_to`` first joins ops, never into a cycle, until about so
    many are left; the plan and its report are of the ops themselves. With ``recompute`` activations
    may be freed and computed again for late readers, with ``offload`` they may wait on the device
    of that name, where the plan gets better by it or only fits so; `Placement.alternatives` tells
    which.

    Raises PlacementError or OptionError (ValueErrors) for a problem or option without meaning,
    InfeasibleError where nothing fits, CaptureError where a module cannot be traced.
    """
    options: dict[str, Any] = {"algorithm": algorithm, "objective": objective, "budget": budget,
                               "seed": seed, "coarsen_to": coarsen_to, "recompute": recompute,
                               "offload": offload}  # fmt: skip
    if isinstance(problem, str | Path | Mapping | Problem):
        given = {"devices": devices, "link": link, "host_link": host_link, "optimizer": optimizer,
                 "example_inputs": None if example_inputs == () else example_inputs}  # fmt: skip
        wrong = ", ".join(name for name, value in given.items() if value is not None)
        if wrong:
            hint = "leave them out, or change the problem"
            raise OptionError("PLT-PLC-003", f"a problem does not take {wrong}", hint)
    if isinstance(problem, str | Path):
        began = time.perf_counter()
        return plan.place(read_problem(problem), began=began, **options)
    if isinstance(problem, Mapping):
        return plan.place(problem_from_dict(problem), **options)
    if isinstance(problem, Problem):
        return plan.place(problem, **options)
    if devices is None:
        raise OptionError("PLT-PLC-003", "a model needs devices", 'devices="4xh100:80GB"')
    from .graph import Graph, trace

    graph = problem
    if not isinstance(graph, Graph):
        keywords = isinstance(example_inputs, Mapping)
        args = () if keywords else _positional(example_inputs)
        graph = trace(problem, args, example_inputs if keywords else {}, optimizer)
    if isinstance(devices, str):
        found = parse_devices(devices)
    else:
        found = [x.placed(k) for k, x in enumerate(as_devices(devices))]
    host = None if host_link is None else parse_link(host_link)
    return plan.place(graph.problem(found, parse_link(link or LINK), host), **options)


def _positional(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
