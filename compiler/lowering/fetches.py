"""Where a plan fetches weights of a slower tier: before the first product of each route."""

from __future__ import annotations

from dataclasses import replace

import torch.fx as fx

from ...kernels.group import Group
from ...kernels.ops import argument
from ...passes.prefetch_weights import is_routed_weight
from ...passes.speculate_routes import router_name
from ...runtime.plan import BranchStep, FetchStep, KernelStep, Step, TensorRef


def offsets_of(group: Group) -> fx.Node:
    """The offsets of the one route whose products a group with weights of a slower tier has."""
    (offsets,) = {
        argument(user, "offsets")
        for weight in group.inputs
        for user in weight.users
        if user in group.nodes and is_routed_weight(weight, user)
    }
    return offsets


def add(
    steps: list[Step],
    step: KernelStep,
    banks: tuple[str, ...],
    offsets: fx.Node,
    selector: TensorRef,
    table: str = "",
) -> None:
    """Appends what fetches ``banks``, which ``step`` reads, to ``steps``; or has the last fetch
    bring them, too, if it is by the same offsets (``selector`` in the plan). For a GPU ``table`` is
    where the step finds them.
    """
    number = next((i for i in range(len(steps))[::-1] if _fetches(steps[i])), None)
    last = None if number is None else steps[number]
    if number is not None and isinstance(last, FetchStep) and last.selector == selector:
        steps[number] = replace(last, banks=tuple(dict.fromkeys((*last.banks, *banks))))
        return
    name = router_name(offsets.args[0]) if offsets.args else None  # type: ignore[arg-type]
    call = sum(isinstance(s, FetchStep) and s.router.startswith(f"{name}#") for s in steps)
    router = "" if name is None else f"{name}#{call}"
    fetch = f"fetch_{step.name}_{len(steps)}"
    steps.append(FetchStep(fetch, banks, selector, router, table=table))


def _fetches(step: Step) -> bool:
    """Whether a step changes what is fetched: those of a part do, too."""
    return isinstance(step, FetchStep | BranchStep)
