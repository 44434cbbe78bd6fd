"""`speculate-routes`: bets on how a model routes, from its profile.

One bet so far: a branch that no cell takes is *deferred*. Its graph stays in the plan, but it is
compiled, and its weights are packed, only when a cell first goes there. The guard is the count of
the branch's cells, which the plan computes anyway, so a miss costs that compilation and nothing
else: the results are the same all along.

A bet is made from the fitted batches of the profile and judged by the held-out ones: a branch is
deferred where at least ``min_cells`` fitted cells and none of the held-out batches went to it. The
profile of a graph lies in its ``meta["routes"]``; without one nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.fx as fx

from .base import Pass, PassResult, allow, copy_graph
from .ir import branches_of
from .remarks import Remark

ROUTES = "routes"
"""Key of a graph module's ``meta``: a mapping from router to its (fitted, held-out) `Loads`."""
DEFERRED = "deferred"
"""Key of a node's ``meta``: the branches that are compiled when they are first needed."""


class Loads(Protocol):
    """How often the branches of a router were taken."""

    @property
    def loads(self) -> tuple[tuple[int, ...], ...]:
        """Slots of each branch, per batch."""
        ...

    @property
    def cells(self) -> tuple[int, ...]:
        """Cells per batch."""
        ...


Routes = Mapping[tuple[str, int], tuple[Loads | None, Loads | None]]


@dataclass(frozen=True)
class SpeculateRoutes(Pass):
    """Defers branches that the profile says are dead.

    Attributes:
        min_cells: fitted cells below which a profile is too small to bet on.
    """

    name: ClassVar[str] = "speculate-routes"
    min_cells: int = 32

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        routes: Routes = graph_module.meta.get(ROUTES, {})
        if not routes or not any(_routers(graph_module)):
            return PassResult(graph_module)
        result = copy_graph(graph_module)
        remarks: list[Remark] = []
        seen: dict[str, int] = {}
        self._bet(result, routes, seen, remarks)
        result.recompile()
        return PassResult(result, tuple(remarks))

    def _bet(
        self, module: fx.GraphModule, routes: Routes, seen: dict[str, int], remarks: list[Remark]
    ) -> None:
        """Marks the routers of a graph and of its branches, in the order in which they run."""
        graphs = dict(branches_of(module))
        for node in list(module.graph.nodes):
            name = router_name(node)
            if name is not None:
                call = seen[name] = seen.get(name, -1) + 1
                if str(node.target) == "plait_branches":
                    self._judge(node, name, routes.get((name, call)), module, remarks)
            if node.op == "get_attr" and str(node.target) in graphs:
                inner = copy_graph(graphs[str(node.target)])
                self._bet(inner, routes, seen, remarks)
                inner.recompile()
                setattr(module, str(node.target), inner)

    def _judge(
        self,
        node: fx.Node,
        name: str,
        found: tuple[Loads | None, Loads | None] | None,
        module: fx.GraphModule,
        remarks: list[Remark],
    ) -> None:
        graphs: Any = node.args[0]
        fitted, held = found if found is not None else (None, None)
        if fitted is None or any(len(loads) != len(graphs) for loads in fitted.loads):
            self._say(remarks, "PLT-SPC-003", node, f"router {name!r} is not in the profile")
            return
        if sum(fitted.cells) < self.min_cells:
            reason = f"{sum(fitted.cells)} cells of router {name!r}, fewer than {self.min_cells}"
            self._say(remarks, "PLT-SPC-003", node, reason)
            return
        deferred = []
        for b, graph in enumerate(graphs):
            if any(loads[b] for loads in fitted.loads):
                continue
            taken = 0 if held is None else sum(bool(loads[b]) for loads in held.loads)
            if taken:
                batches = len(held.loads) if held else 0
                reason = f"branch {b} of {name!r}, dead when fitted, ran in {taken} of {batches}"
                self._say(remarks, "PLT-SPC-002", node, f"{reason} held-out batches")
            elif allow("defer branch", [node]):
                deferred.append(b)
                size = _weight_bytes(getattr(module, str(graph.target)))
                reason = f"branch {b} of {name!r} took none of {sum(fitted.cells)} cells"
                self._say(
                    remarks,
                    "PLT-SPC-001",
                    node,
                    f"{reason}: {size / 2**20:.2f} MiB deferred",
                    "done",
                )
        node.meta[DEFERRED] = tuple(deferred)

    def _say(
        self, remarks: list[Remark], remark: str, node: fx.Node, reason: str, kind: Any = "missed"
    ) -> None:
        remarks.append(Remark(remark, kind, self.name, (node.name,), reason))


def router_name(node: fx.Node) -> str | None:
    """The qualified name of the module that routes by ``node``; None for other operators."""
    if str(node.target) not in ("plait_branches", "plait.route.default", "plait.scatter.default"):
        return None
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None  # what a pass made of a router, which is counted itself
    path = str(list(stack.values())[-1][0])
    return "" if path == "target" else path.removeprefix("target.")


def _routers(module: fx.GraphModule) -> Iterator[fx.Node]:
    for node in module.graph.nodes:
        if str(node.target) == "plait_branches":
            yield node
    for _, branch in branches_of(module):
        yield from _routers(branch)


def _weight_bytes(module: fx.GraphModule) -> int:
    weights = {}
    for node in module.graph.nodes:
        value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor):
            weights[node.target] = value.nbytes
    return sum(weights.values())
