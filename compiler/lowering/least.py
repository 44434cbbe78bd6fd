"""How much of a plan's weights on a slower tier must be resident at once, whatever the budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx as fx

from ...passes.ir import attribute, branches_of
from ...passes.prefetch_weights import EXPERTS, TIERED
from ...runtime.plan import BranchStep
from .lowered import Lowered


def least(lowered: Lowered) -> int:
    """Bytes that the steps of a plan cannot do without at any one time: of routed products the
    largest expert's weights of one product, of branches all of one with what that needs in turn.
    Plans for a number of rows, which can be done without, do not count.
    """
    own = (n for n in lowered.banks if n not in lowered.plan.fetched)
    found = [lowered.banks[name].unit_bytes for name in own]
    for step in lowered.plan.steps:
        if isinstance(step, BranchStep):
            found += [of_branch(lowered, [name]) for name in step.plans]
    return max(found, default=0)


def of_branch(lowered: Lowered, names: Sequence[str]) -> int:
    """Bytes that one branch needs, whose plans are ``names``."""
    parts = [lowered.parts[name] for name in names if name in lowered.parts]
    banks = {id(b): b for part in parts for n in part.plan.fetched for b in (part.banks[n],)}
    within = [least(part) for part in parts]
    within += [_unpacked(lowered.deferred[name]) for name in names if name in lowered.deferred]
    return sum(bank.nbytes for bank in banks.values()) + max(within, default=0)


def held(part: Lowered) -> int:
    """Bytes that a part of a plan wants to be resident all the time that it runs."""
    return sum(part.banks[name].nbytes for name in part.plan.fetched)


def _unpacked(module: fx.GraphModule) -> int:
    """`least` of a branch that is not lowered yet, as far as its weights tell."""
    within = [_unpacked(inner) for _, inner in branches_of(module)]
    held: dict[str, int] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        if TIERED in node.meta:
            tensor = attribute(module, str(node.target))
            if node.meta[TIERED] == EXPERTS:
                within.append(tensor.nbytes // tensor.shape[0])
            else:
                held[str(node.target)] = tensor.nbytes
    return sum(held.values()) + max(within, default=0)


def marked_bytes(module: fx.GraphModule) -> int:
    """Bytes of the weights of a graph, and of those in it, that are marked for a slower tier."""
    nodes = (n for n in module.graph.find_nodes(op="get_attr") if TIERED in n.meta)
    own = {str(n.target): attribute(module, str(n.target)).nbytes for n in nodes}
    return sum(own.values()) + sum(marked_bytes(inner) for _, inner in branches_of(module))
