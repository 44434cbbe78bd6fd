"""`prefetch-weights`: weights that routes choose lie on a slower tier, within a budget of bytes.

A routed product reads the matrices of those experts that the routes name, a branch of a router its
own weights if any cell goes there, and of a `torch.cond` one side runs, which is a branch, too. So
only these must be in memory. The pass marks the weights whose every reader is such a product, and
those that only branches read; the lowering puts them into files (for a GPU, those of products into
host memory), what a route wants is fetched before it is read, and the runtime keeps the budget
(`runtime/tier.py`): it loads what is likely to be wanted next ahead of time, everything else on
demand, and drops what is worth least. Results do not depend on any of it. The idea is Brainstorm's
(Cui et al., OSDI 2023), which loads weights speculatively to a GPU.

The budget of a graph lies in its ``meta["weight_budget"]``; without one nothing happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.fx as fx

from ..kernels import ops
from .base import Pass, PassResult, allow, copy_graph
from .ir import COND, attribute, branches_of
from .outline_branches import INNER
from .placement.devices import parse_bytes
from .placement.errors import PlacementError
from .remarks import Remark
from .route_regions import is_region

BUDGET = "weight_budget"
"""Key of a graph module's ``meta``: bytes of weights that may be resident at once, or a share of
all as text such as "40%"; of a variant of a graph, what was decided for that (`Tiered`)."""
TIERED = "tiered"
"""Key of a graph module's ``meta``: what the pass found (`Tiered`). Of a ``get_attr`` node's, for
weights on the slower tier: `EXPERTS` or `BRANCH`."""
EXPERTS = "experts"
"""Weights of routed products, of which each expert's are wanted on their own."""
BRANCH = "branch"
"""Weights that are wanted as a whole where the branch that reads them has rows."""
LEAST = 1 << 16
"""Bytes below which a branch's weights are not worth the system call that fetches them."""

Place = tuple[int, int]
"""Address and bytes of a tensor."""


@dataclass(frozen=True)
class Tiered:
    """What was decided: bytes of all weights and ``places`` of those on the slower tier, the
    ``budget`` that was asked for, and the pass's options.
    """

    total: int
    places: frozenset[Place]
    budget: int
    ahead: bool
    evict: str
    cached: bool

    @property
    def tiered(self) -> int:
        """Bytes of the weights on the slower tier."""
        return sum(size for _, size in self.places)


@dataclass(frozen=True)
class PrefetchWeights(Pass):
    """Puts the weights of routed products and of branches on a slower tier where there is a budget.

    Attributes:
        ahead: a side thread loads what the next router is likely to want; else all is loaded on
            demand.
        evict: what makes room: "value" drops what is least likely to be wanted again for what
            loading it costs, "lru" what was wanted longest ago.
        cached: dropped weights may stay in the operating system's page cache, which gives them up
            when memory is short; else they leave the machine's memory at once.
    """

    name: ClassVar[str] = "prefetch-weights"
    # They make weights, and decide what reads them.
    follows: ClassVar[tuple[str, ...]] = (
        "normalize",
        "outline-branches",
        "speculate-routes",
        "merge-parallel-ops",
    )
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
        total = sum(size for _, size in {place for _, place, _ in _weights(graph_module)})
        budget = bytes_of(wanted, total)
        result = copy_graph(graph_module)
        remarks: list[Remark] = []
        if total > budget:
            inside, outside = _places(result, True), _places(result, False)
            self._mark(result, False, inside - outside, remarks)
        marked = frozenset(place for node, place, _ in _weights(result) if TIERED in node.meta)
        found = Tiered(total, marked, budget, self.ahead, self.evict, self.cached)
        result.meta[TIERED] = found
        result.recompile()
        share = f"{budget / 2**20:.1f} MiB of weights may be resident"
        if total <= budget:
            reason = f"{share}, there are {total / 2**20:.1f}: all of them stay"
            remarks.append(Remark("PLT-PRE-004", "note", self.name, (), reason))
        elif marked:
            part = f"{found.tiered / 2**20:.1f} of {total / 2**20:.1f} MiB"
            reason = f"{share}; {part} lie on a slower tier"
            remarks.insert(0, Remark("PLT-PRE-001", "done", self.name, (), reason))
        return PassResult(result, tuple(remarks))

    def _decided(self, graph_module: fx.GraphModule, tiered: Tiered) -> PassResult:
        """A variant of a graph, or of a branch's, leaves the same weights where they are. What it
        reads as a whole outside of branches, such as a branch that became part of it, is resident.
        """
        result = copy_graph(graph_module)
        if tiered.places:
            branch = any(n.meta.get(INNER) for n in result.graph.find_nodes(op="placeholder"))
            self._mark(result, branch, tiered.places - _places(result, False, branch), [])
            weights = _weights(result, branch)
            resident = {place for node, place, _ in weights if TIERED not in node.meta}
            tiered = replace(tiered, places=tiered.places - resident)
        result.meta[TIERED] = tiered
        result.recompile()
        return PassResult(result)

    def _mark(
        self, module: fx.GraphModule, branch: bool, movable: Set[Place], remarks: list[Remark]
    ) -> None:
        """Marks weights of a graph (that of a ``branch``, or not) and of those in it, in place:
        routed ones, and those of branches that are among the ``movable``.
        """

        def stay(remark: str, node: fx.Node, reason: str) -> None:
            text = f"{reason}, so they stay resident"
            remarks.append(Remark(remark, "missed", self.name, (node.name,), text))

        for node in module.graph.find_nodes(op="get_attr"):
            readers = [user for user in node.users if is_routed_weight(node, user)]
            large = branch and _is_large(node, module)
            if readers and len(readers) == len(node.users):
                kind = EXPERTS
            elif large and _place(attribute(module, str(node.target))) in movable:
                kind = BRANCH
            elif readers:
                other = next(user for user in node.users if user not in readers)
                stay("PLT-PRE-002", node, f"{other.name} reads all of the weights")
                continue
            elif large:
                stay("PLT-PRE-006", node, "what is no branch reads these weights of one, too")
                continue
            else:
                continue
            if allow("put weights on a slower tier", [node]):
                node.meta[TIERED] = kind
        for node in () if branch else module.graph.find_nodes(op="call_function", target=COND):
            given = [attribute(module, str(a.target)) for a in node.args[3] if _is_large(a, module)]
            if given:
                size = sum(tensor.nbytes for tensor in given) / 2**20
                reason = f"both sides of a torch.cond are given {size:.2f} MiB of weights"
                stay("PLT-PRE-007", node, reason)
        chosen = _chosen(module)
        for name, inner in branches_of(module):
            copied = copy_graph(inner)
            self._mark(copied, name in chosen, movable, remarks)
            copied.recompile()
            setattr(module, name, copied)


def is_routed_weight(node: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` is a routed product that reads ``node`` as its matrices."""
    return (
        str(user.target) == "plait.routed_linear.default" and ops.argument(user, "weight") is node
    )


def bytes_of(budget: int | str, total: int) -> int:
    """A budget in bytes. ``budget`` is bytes, or text: a size such as "2GB" or "512MiB", or a share
    of ``total`` such as "40%".

    Raises:
        ValueError: it is none of them, or less than a byte.
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
    elif isinstance(budget, str) and any(map(str.isalpha, budget)):
        with contextlib.suppress(PlacementError):
            if size := int(parse_bytes(budget, "weight_budget")):
                return size
    raise ValueError(f"a budget is bytes, a size such as '2GB' or a share as '40%', not {budget!r}")


def _chosen(module: fx.GraphModule) -> set[str]:
    """Attributes of the graphs that are branches of routers, or sides of a `torch.cond`."""
    used = (a for node in module.graph.nodes if is_region(node) for a in node.all_input_nodes)
    return {str(a.target) for a in used if a.op == "get_attr"}


def _weights(module: fx.GraphModule, branch: bool = False) -> Iterator[tuple[fx.Node, Place, bool]]:
    """Every constant of a graph (that of a ``branch``, or not) and of those in it: the node, where
    it lies, and whether the graph that reads it is a branch's.
    """
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = attribute(module, str(node.target))
        if isinstance(tensor, torch.Tensor):
            yield node, _place(tensor), branch
    chosen = _chosen(module)
    for name, inner in branches_of(module):
        yield from _weights(inner, name in chosen)


def _places(module: fx.GraphModule, inside: bool, branch: bool = False) -> set[Place]:
    """Where the constants lie that branches read, if ``inside``, or else what is no branch."""
    return {place for _, place, read in _weights(module, branch) if read == inside}


def _is_large(node: Any, module: fx.GraphModule) -> bool:
    """Whether an argument is weights worth fetching."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    tensor = attribute(module, str(node.target))
    return isinstance(tensor, torch.Tensor) and tensor.nbytes >= LEAST


def _place(tensor: torch.Tensor) -> Place:
    return tensor.data_ptr(), tensor.nbytes
