"""`prefetch-weights`: weights of routed products lie on a slower tier, within a budget of bytes.

A routed product reads the matrices of those experts that the routes name, so only these must be in
memory. The pass marks the weights whose every reader is such a product; the lowering puts them into
a file, a fetch of what a route wants goes before the products, and the runtime keeps the budget
(`runtime/tier.py`): it loads what is likely to be wanted next ahead of time, everything else on
demand, and drops what is worth least. Results do not depend on any of it. The idea is Brainstorm's
(Cui et al., OSDI 2023), which loads weights speculatively to a GPU.

The budget of a graph lies in its ``meta["weight_budget"]``; without one nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from ..kernels import ops
from .base import Pass, PassResult, allow, copy_graph
from .ir import attribute, branches_of
from .remarks import Remark

BUDGET = "weight_budget"
"""Key of a graph module's ``meta``: bytes of weights that may be resident at once, or a share of
all as text such as "40%"; of a variant of a graph, what was decided for that (`Tiered`)."""
TIERED = "tiered"
"""Key of a graph module's ``meta``: what the pass found (`Tiered`). Of a ``get_attr`` node's: True
for weights on the slower tier."""


@dataclass(frozen=True)
class Tiered:
    """Weights of a graph in bytes, the ``budget`` that was asked for, and the pass's options."""

    total: int
    tiered: int
    budget: int
    ahead: bool
    evict: str
    cached: bool


@dataclass(frozen=True)
class PrefetchWeights(Pass):
    """Puts the weights of routed products on a slower tier where there is a budget.

    Attributes:
        ahead: a side thread loads what the next router is likely to want; else all is loaded on
            demand.
        evict: what makes room: "value" drops what is least likely to be wanted again for what
            loading it costs, "lru" what was wanted longest ago.
        cached: dropped weights may stay in the operating system's page cache, which gives them up
            when memory is short; else they leave the machine's memory at once.
    """

    name: ClassVar[str] = "prefetch-weights"
    ahead: bool = True
    evict: str = "value"
    cached: bool = True

    def __post_init__(self) -> None:
        if self.evict not in ("value", "lru"):
            raise ValueError(f"evict is value or lru, not {self.evict}")

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        wanted = graph_module.meta.get(BUDGET)
        if wanted is None:
            return PassResult(graph_module)
        if isinstance(wanted, Tiered):
            return self._decided(graph_module, wanted)
        weights = dict(_weights(graph_module))
        total = sum(weights.values())
        budget = bytes_of(wanted, total)
        result = copy_graph(graph_module)
        remarks: list[Remark] = []
        marked: dict[Any, int] = {}
        if total > budget:
            self._mark(result, marked, remarks)
        tiered = sum(marked.values())
        result.meta[TIERED] = Tiered(total, tiered, budget, self.ahead, self.evict, self.cached)
        result.recompile()
        share = f"{budget / 2**20:.1f} MiB of weights may be resident"
        if total <= budget:
            reason = f"{share}, there are {total / 2**20:.1f}: all of them stay"
            remarks.append(Remark("PLT-PRE-004", "note", self.name, (), reason))
        elif marked:
            reason = (
                f"{share}; {tiered / 2**20:.1f} of {total / 2**20:.1f} MiB lie on a slower tier"
            )
            remarks.insert(0, Remark("PLT-PRE-001", "done", self.name, (), reason))
        return PassResult(result, tuple(remarks))

    def _decided(self, graph_module: fx.GraphModule, tiered: Tiered) -> PassResult:
        """A variant of a graph leaves the same weights where they are."""
        result = copy_graph(graph_module)
        if tiered.tiered:
            self._mark(result, {}, [])
        result.meta[TIERED] = tiered
        result.recompile()
        return PassResult(result)

    def _mark(self, module: fx.GraphModule, marked: dict[Any, int], remarks: list[Remark]) -> None:
        """Marks the routed weights of a graph and of its branches, in place."""
        for node in module.graph.find_nodes(op="get_attr"):
            readers = [user for user in node.users if is_routed_weight(node, user)]
            if not readers:
                continue
            if len(readers) < len(node.users):
                other = next(user for user in node.users if user not in readers)
                reason = f"{other.name} reads all of the weights, so they stay resident"
                remarks.append(Remark("PLT-PRE-002", "missed", self.name, (node.name,), reason))
            elif allow("put weights on a slower tier", [node]):
                node.meta[TIERED] = True
                tensor = attribute(module, str(node.target))
                marked[_place(tensor)] = tensor.nbytes
        for name, inner in branches_of(module):
            copied = copy_graph(inner)
            self._mark(copied, marked, remarks)
            copied.recompile()
            setattr(module, name, copied)


def is_routed_weight(node: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` is a routed product that reads ``node`` as its matrices and nothing else."""
    return (
        str(user.target) == "plait.routed_linear.default"
        and ops.argument(user, "weight") is node
        and user.all_input_nodes.count(node) == 1
    )


def bytes_of(budget: int | str, total: int) -> int:
    """A budget in bytes. ``budget`` is bytes, or a share of ``total`` as text such as "40%".

    Raises:
        ValueError: it is neither, or not positive.
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    if isinstance(budget, str) and budget.strip().endswith("%"):
        try:
            share = float(budget.strip()[:-1])
        except ValueError:
            share = 0.0
        if 0.0 < share <= 100.0:
            return int(total * share / 100.0)
    raise ValueError(f"a budget is a number of bytes or a share such as '40%', not {budget!r}")


def _weights(module: fx.GraphModule) -> Iterator[tuple[Any, int]]:
    """Where every constant of a graph and its branches lies, and its bytes."""
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = attribute(module, str(node.target))
        if isinstance(tensor, torch.Tensor):
            yield _place(tensor), tensor.nbytes
    for _, inner in branches_of(module):
        yield from _weights(inner)


def _place(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.nbytes
