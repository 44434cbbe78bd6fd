"""The placement problem of a captured model: what must stay together, what it costs and weighs.

A *unit* is what runs as a whole on one device: a fusion group with the views of its results, or an
operator alone. Tensors whose sizes depend on data do not leave their unit. What needs no input
(weights, their views, constants, sizes) belongs to no unit: each device that reads it has its own.
All readers of one weight are one colocation group, so that it is loaded once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
import torch.fx as fx

from ...passes.annotations import annotation
from ...passes.fuse_vertical import FuseVertical, groups_of
from ...passes.ir import alias_root, attribute, is_pure
from ...passes.placement.problem import Device, Edge, Link, Op, Problem
from ..sizes import is_backed
from .graph import bytes_of, flops_of, is_view, values_of, width_of


@dataclass
class Unit:
    """Nodes in topological order; ``results`` are those that others read, or the caller."""

    name: str
    nodes: list[fx.Node]
    results: list[fx.Node] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)


class Units:
    """The units of a graph (functional, static sizes at its borders).

    ``of`` maps each node that is not free to its unit; ``free`` are the others.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.free = _free(module.graph)
        self.units = _units(module, self.free)
        self.of = {node: unit for unit in self.units for node in unit.nodes}
        for unit in self.units:
            inside = set(unit.nodes)
            for node in unit.nodes:
                if any(user not in inside for user in node.users) and values_of(node):
                    unit.results.append(node)
            unit.weights = sorted({t for n in unit.nodes for t in self._weights(n)})

    def _weights(self, node: fx.Node) -> list[str]:
        """Weights (on the meta device) that a node reads through free nodes or branches."""
        found: list[str] = []
        stack = list(node.all_input_nodes)
        while stack:
            x = stack.pop()
            if x not in self.free:
                continue
            stack += x.all_input_nodes
            if x.op == "get_attr":
                found += [t for t, _ in _held(self.module, str(x.target))]
        return found

    def nbytes(self, target: str) -> float:
        """Bytes of a weight."""
        value = attribute(self.module, target)
        return float(value.numel() * value.element_size())

    def sources(self, unit: Unit) -> list[fx.Node]:
        """Nodes of other units that a unit reads, each once."""
        read = dict.fromkeys(x for node in unit.nodes for x in node.all_input_nodes)
        return [x for x in read if x in self.of and self.of[x] is not unit]

    def problem(
        self,
        name: str,
        devices: tuple[Device, ...],
        link: Link,
        seconds: Callable[[Unit], float | tuple[float, ...]],
        temporary: Mapping[str, float],
    ) -> Problem:
        """The problem of placing the units on ``devices``; ``seconds`` prices a unit, ``temporary``
        are the bytes that it works in, by name, where they are known.
        """
        group = self._groups()
        held = self._holders()
        ops, edges = [], []
        last: Any = next(iter(self.module.graph.find_nodes(op="output")))
        wanted = {alias_root(x) for x in last.all_input_nodes}
        for unit in self.units:
            roots = {alias_root(x) for x in unit.results if x in self.of}
            own = [x for x in roots if self.of.get(x) is unit]
            size = sum(map(bytes_of, own))
            keep = not wanted.isdisjoint(own)
            param = sum(self.nbytes(t) for t in unit.weights if held[t] is unit)
            temp = temporary.get(unit.name, 0.0)
            ops.append(Op(unit.name, seconds(unit), param, temp, size, group.get(unit.name), keep))
            edges += [
                Edge(self.of[x].name, unit.name, bytes_of(x), x.name) for x in self.sources(unit)
            ]
        return Problem(name, "dynamic", devices, link, {}, tuple(ops), tuple(edges))

    def _holders(self) -> dict[str, Unit]:
        """The first reader of each weight, which its bytes are counted at."""
        held: dict[str, Unit] = {}
        for unit in self.units:
            for target in unit.weights:
                held.setdefault(target, unit)
        return held

    def _groups(self) -> dict[str, str]:
        """Colocation groups by unit: units that read one weight."""
        graph = nx.Graph()
        for unit in self.units:
            graph.add_node(unit.name)
            graph.add_edges_from((("weight", t), unit.name) for t in unit.weights)
        groups: dict[str, str] = {}
        for part in nx.connected_components(graph):
            names = sorted(x for x in part if isinstance(x, str))
            if len(names) > 1:
                groups.update(dict.fromkeys(names, names[0]))
        return groups


def work(unit: Unit) -> tuple[float, float, int]:
    """FLOPs, bytes read and written, and the narrowest width in bytes, for a roofline."""
    inside = set(unit.nodes)
    nodes = [n for n in unit.nodes if n.op == "call_function" and values_of(n) and not is_view(n)]
    nodes = [n for n in nodes if n.target is not operator.getitem]
    # What depends on data has no size to count by; the weights that it reads are counted.
    read_all = {x for n in nodes for x in n.all_input_nodes if x not in inside and _known(x)}
    nodes = [n for n in nodes if _known(n) and all(map(_known, n.all_input_nodes))]
    flops = sum(map(flops_of, nodes))
    read = {x for x in read_all if values_of(x)}
    nbytes = sum(map(bytes_of, read)) + (sum(map(bytes_of, unit.results)) if nodes else 0.0)
    widths = [width_of(x) for x in (*read, *nodes) if values_of(x)[0].is_floating_point()]
    return flops, nbytes, min(widths, default=4)


def _known(node: fx.Node) -> bool:
    """Whether all sizes of a node's tensors are known before the call."""
    return all(is_backed(d) for value in values_of(node) for d in value.shape)


def _held(module: fx.GraphModule, target: str) -> list[tuple[str, torch.Tensor]]:
    """Weights behind an attribute: itself, or those that a graph reads that it holds."""
    value = attribute(module, target)
    if isinstance(value, torch.Tensor):
        return [(target, value)] if value.is_meta else []
    if not isinstance(value, fx.GraphModule):
        return []
    names = {str(n.target) for n in value.graph.nodes if n.op == "get_attr"}
    return [(f"{target}.{t}", v) for n in sorted(names) for t, v in _held(value, n)]


def _free(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on no input: cheap to have on every device that reads them."""
    free: set[fx.Node] = set()
    returned = {x for node in graph.find_nodes(op="output") for x in node.all_input_nodes}
    for node in graph.nodes:
        if node.op == "get_attr":
            free.add(node)
        elif node.op == "call_function" and free.issuperset(node.all_input_nodes):
            light = not node.all_input_nodes or is_view(node) or not values_of(node)
            if light and is_pure(node) and node not in returned:
                free.add(node)
    return free


def _units(module: fx.GraphModule, free: set[fx.Node]) -> list[Unit]:
    """Units in topological order."""
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    nodes += [n for n in module.graph.nodes if n.op == "call_function" and n not in free]
    together = nx.Graph()
    together.add_nodes_from(nodes)
    inside = set(nodes)
    for names in _fused(module):
        members = [n for n in nodes if n.name in names]
        nx.add_path(together, members)
    for node in nodes:
        sources = [x for x in node.all_input_nodes if x in inside]
        if node.op != "call_function" or not sources:
            continue
        if node.target is operator.getitem or is_view(node) or not values_of(node):
            together.add_edge(sources[0], node)
        for x in sources:
            if not _sendable(x):
                together.add_edge(x, node)
    return _acyclic(nodes, together)


def _acyclic(nodes: list[fx.Node], together: nx.Graph) -> list[Unit]:
    """Units that need each other become one."""
    number = {n: k for k, part in enumerate(nx.connected_components(together)) for n in part}
    order = nx.DiGraph()
    for node in nodes:
        order.add_node(number[node])
        for x in node.all_input_nodes:
            if x in number and number[x] != number[node]:
                order.add_edge(number[x], number[node])
    whole = nx.condensation(order)
    part_of = {k: c for c, data in whole.nodes(data=True) for k in data["members"]}
    members: dict[int, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(part_of[number[node]], []).append(node)
    first = {c: k for k, node in reversed([*enumerate(nodes)]) for c in [part_of[number[node]]]}
    ordered = nx.lexicographical_topological_sort(whole, key=lambda c: first[c])
    return [Unit(members[c][0].name, members[c]) for c in ordered]


def _fused(module: fx.GraphModule) -> list[set[str]]:
    """Names of the nodes of each fusion group; nodes to be computed apart begin another."""
    fused = FuseVertical().run(module).graph_module
    found: list[set[str]] = []
    for group in groups_of(fused):
        if any(annotation(n).apart for n in group.nodes):
            found += _parts(group.nodes)
        else:
            found.append({n.name for n in group.nodes})
    return [names for names in found if len(names) > 1]


def _parts(nodes: Sequence[fx.Node]) -> list[set[str]]:
    """A group without what leads into its nodes that are computed apart."""
    parts = nx.Graph()
    parts.add_nodes_from(n.name for n in nodes)
    for node in nodes:
        for x in node.all_input_nodes:
            if x in nodes and annotation(x).apart >= annotation(node).apart:
                parts.add_edge(x.name, node.name)
    return [*nx.connected_components(parts)]


def _sendable(node: fx.Node) -> bool:
    """Whether a node is one tensor of a size that is known before it is computed."""
    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor) and all(map(is_backed, value.shape))
