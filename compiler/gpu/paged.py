"""Experts of a graph for a GPU that lie in host memory: which, and where its plan fetches them.

`prefetch-weights` marks the weights that may lie on a slower tier. Of these `address` takes what
slots of one form can hold: all matrices of the experts of a route, in float32. Their products get a
table, which tells the slot of each expert's matrix. As made it tells that each lies at its own
number, so the graph means what it did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx

from ...kernels.ops import argument
from ...passes.ir import attribute, branches_of
from ...passes.prefetch_weights import EXPERTS, TIERED, Tiered, is_routed_weight
from ...passes.remarks import Remark
from ...runtime.plan import KernelStep, Step
from ...runtime.slots import Matrix
from ..lowering import fetches
from ..lowering.lowered import Lowered
from ..lowering.select import missed

SLOTS = "slots"
"""Key of a graph module's ``meta``: the routes whose experts lie in slots (`Route`)."""
Layout = tuple[Matrix, ...]


@dataclass(frozen=True)
class Route:
    """Names of the nodes of a route's table and of its experts' weights."""

    table: str
    weights: tuple[str, ...]


@dataclass
class Paged:
    """What a plan fetches: its steps with the fetches among them, the attributes of its graph that
    banks are made of, by the banks' names, and the bytes that stay on the GPU all the same.
    """

    steps: list[Step]
    banks: dict[str, str] = field(default_factory=dict)
    stayed: int = 0
    remarks: list[Remark] = field(default_factory=list)


def address(graph: fx.GraphModule, layout: Layout | None) -> tuple[Layout | None, list[Remark]]:
    """Has products of a graph, which is changed, find their matrices by tables, where these may lie
    in host memory; corrects what was decided of them (`Tiered`).

    Experts are of ``layout``, if that is given, else of the one that has most bytes; returns it.
    """
    tiered: Tiered | None = graph.meta.get(TIERED)
    if tiered is None or not tiered.places:
        return layout, []
    routes = {
        offsets: list(weights) for offsets, weights in _routes(graph) if _fits(graph, weights)
    }
    if layout is None:
        sizes: dict[Layout, int] = {}
        for weights in routes.values():
            own = _layout(graph, weights)
            sizes[own] = sizes.get(own, 0) + sum(_tensor(graph, w).nbytes for w in weights)
        layout = max(sizes, key=lambda found: sizes[found], default=None)
    chosen = {o: w for o, w in routes.items() if _layout(graph, w) == layout}
    graph.meta[SLOTS] = tuple(_add_table(graph, o, w) for o, w in chosen.items())
    taken = [_tensor(graph, w) for weights in chosen.values() for w in weights]
    places = frozenset((t.data_ptr(), t.nbytes) for t in taken)
    _unmark(graph)
    graph.meta[TIERED] = replace(tiered, places=places)
    graph.recompile()
    remarks = []
    left = tiered.tiered - sum(size for _, size in places)
    if left:
        reason = (
            f"{left / 2**20:.2f} MiB of weights of branches, and of experts that are not in float32"
            " or not of the form of the others, stay on the GPU"
        )
        remarks.append(Remark("PLT-PRE-011", "missed", "prefetch-weights", (), reason))
    return layout, remarks


def fetched(lowered: Lowered, graph: fx.GraphModule) -> Paged:
    """The fetches of a lowered graph. Experts stay on the GPU that a product has no kernel for."""
    routes: Sequence[Route] = graph.meta.get(SLOTS, ())
    result = Paged(lowered.plan.steps)
    nodes = {n.name: n for n in graph.graph.nodes}
    number = {n: k for k, group in enumerate(lowered.groups) for n in group.nodes}
    tables: dict[str, tuple[str, ...]] = {}
    for route in routes:
        own = [nodes[name] for name in route.weights]
        if all(number.get(user) in lowered.selected for user in nodes[route.table].users):
            tables[route.table] = route.weights
            result.banks |= {n.name: str(n.target) for n in own}
            continue
        result.stayed += sum(_tensor(graph, n).nbytes for n in own)
        reason = "a product that reads these weights is no kernel, so they stay on the GPU"
        result.remarks.append(missed("PLT-PRE-003", route.weights, reason))
    if not tables:
        return result
    result.steps = []
    for step in lowered.plan.steps:
        read = [a.buffer for a in step.args if a.buffer in tables] if _is_kernel(step) else []
        if read:
            group = lowered.groups[step.group]
            (user,) = [n for n in group.nodes if argument(n, "slots") is nodes[read[0]]]
            offsets = argument(user, "offsets")
            selector = step.args[group.inputs.index(offsets)]  # type: ignore[union-attr]
            fetches.add(result.steps, step, tables[read[0]], offsets, selector, read[0])  # type: ignore[arg-type]
        result.steps.append(step)
    return result


def _is_kernel(step: Step) -> bool:
    return isinstance(step, KernelStep)


def _routes(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, Sequence[fx.Node]]]:
    """Of every route, by its offsets, the weights of its products if all of them are marked."""
    found: dict[fx.Node, dict[fx.Node, None]] = {}
    whole: dict[fx.Node, bool] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or str(node.target) != "plait.routed_linear.default":
            continue
        offsets, weight = argument(node, "offsets"), argument(node, "weight")
        marked = weight.meta.get(TIERED) == EXPERTS and is_routed_weight(weight, node)
        found.setdefault(offsets, {})[weight] = None
        whole[offsets] = whole.get(offsets, True) and marked
    return ((offsets, list(own)) for offsets, own in found.items() if whole[offsets])


def _fits(graph: fx.GraphModule, weights: Sequence[fx.Node]) -> bool:
    """Whether slots can hold these weights' matrices: contiguous ones in float32."""
    tensors = [_tensor(graph, w) for w in weights]
    alike = {t.shape[0] for t in tensors}
    return len(alike) == 1 and all(
        t.dtype == torch.float32 and t.is_contiguous() and t.numel() for t in tensors
    )


def _layout(graph: fx.GraphModule, weights: Sequence[fx.Node]) -> Layout:
    tensors = (_tensor(graph, w) for w in weights)
    return tuple((tuple(t.shape[1:]), t.dtype) for t in tensors)


def _tensor(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    return attribute(graph, str(node.target)).detach()


def _add_table(graph: fx.GraphModule, offsets: fx.Node, weights: Sequence[fx.Node]) -> Route:
    first = _tensor(graph, weights[0])
    users = [u for w in weights for u in w.users if argument(u, "offsets") is offsets]
    name = f"slots_{offsets.name}"
    graph.register_buffer(name, torch.arange(first.shape[0], device=first.device).int())
    order = {node: k for k, node in enumerate(graph.graph.nodes)}
    with graph.graph.inserting_before(min(users, key=lambda u: order[u])):
        table = graph.graph.get_attr(name)
    units = first.shape[0]
    table.meta["val"] = weights[0].meta["val"].new_empty(units, dtype=torch.int32)
    for user in users:
        user.update_kwarg("slots", table)
    return Route(table.name, tuple(w.name for w in weights))


def _unmark(graph: fx.GraphModule) -> None:
    for node in graph.graph.find_nodes(op="get_attr"):
        node.meta.pop(TIERED, None)
    for _, inner in branches_of(graph):
        _unmark(inner)
