"""Groups as the annotations of a graph tell them, for whoever lowers or checks the graph."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.fx as fx

from ..kernels.group import Group
from .annotations import annotation
from .ir import alias_root, is_pure, mutated_arguments


def orderings(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Calls that must stay in order although no value flows between them.

    Impure calls keep their order; a call that writes to memory comes after every earlier reader
    of that memory and before every later one. Maps a node to the nodes it must follow.
    """
    after: dict[fx.Node, list[fx.Node]] = {}
    if all(is_pure(node) for node in graph.nodes if node.op == "call_function"):
        return after
    last_impure: fx.Node | None = None
    touched: dict[Hashable, list[fx.Node]] = {}
    written: dict[Hashable, fx.Node] = {}

    def place(node: fx.Node) -> Hashable:
        root = alias_root(node)
        return root.target if root.op == "get_attr" else root

    for node in graph.nodes:
        if node.op != "call_function":
            continue
        needs = after.setdefault(node, [])
        if not is_pure(node):
            needs += [last_impure] if last_impure is not None else []
            last_impure = node
        for arg in {place(arg) for arg in node.all_input_nodes}:
            needs += [written[arg]] if arg in written else []
        for arg in {place(arg) for arg in mutated_arguments(node)}:
            needs += touched.get(arg, [])
            written[arg] = node
        for arg in {place(arg) for arg in node.all_input_nodes}:
            touched.setdefault(arg, []).append(node)
    return after


def topological_groups(
    nodes: Sequence[fx.Node],
    group_of: Callable[[fx.Node], Hashable],
    after: dict[fx.Node, list[fx.Node]],
) -> list[list[fx.Node]]:
    """Nodes by group, groups in dependence order, else in the order of their first node.

    Raises:
        ValueError: two groups need each other.
    """
    members: dict[Hashable, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(group_of(node), []).append(node)
    number = {key: i for i, key in enumerate(members)}
    known = set(nodes)
    needs: dict[Hashable, set[Hashable]] = {key: set() for key in members}
    readers: dict[Hashable, set[Hashable]] = {key: set() for key in members}
    for key, group in members.items():
        for node in group:
            for arg in (*node.all_input_nodes, *after.get(node, ())):
                if arg in known and (other := group_of(arg)) != key:
                    needs[key].add(other)
                    readers[other].add(key)
    waiting = {key: len(before) for key, before in needs.items()}
    keys = {i: key for key, i in number.items()}
    heap = [number[key] for key, count in waiting.items() if not count]
    heapq.heapify(heap)
    order: list[list[fx.Node]] = []
    while heap:
        key = keys[heapq.heappop(heap)]
        order.append(members[key])
        for reader in readers[key]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(heap, number[reader])
    if len(order) < len(members):
        stuck = [n.name for key, count in waiting.items() if count for n in members[key]]
        raise ValueError(f"groups need each other in a cycle, among: {', '.join(stuck[:10])}")
    return order


def groups_of(graph_module: fx.GraphModule) -> list[Group]:
    """The groups that `fuse-vertical` made, in an order they can run in.

    Where it did not run, every operator is the library's. Placeholders, constants and symbols are
    in no group. Raises ValueError for groups that need each other or whose nodes disagree about
    their kind.
    """
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    numbers: dict[fx.Node, Hashable] = {}
    for node in nodes:
        number = annotation(node).group
        numbers[node] = node if number is None else number
    ordered = topological_groups(nodes, numbers.__getitem__, orderings(graph_module.graph))
    groups = []
    for members in ordered:
        first = members[0]
        if annotation(first).group is not None:
            groups.append(_group(members, {annotation(node).kind for node in members}))
        elif first.meta.get("val") is not None and not is_symbol(first):
            groups.append(_group(members, {"library"}))
    return groups


def _group(members: list[fx.Node], kinds: set[str | None]) -> Group:
    inside = set(members)
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"nodes of one group differ in kind: {', '.join(n.name for n in members)}")
    inputs: dict[fx.Node, None] = {}
    for node in members:
        for arg in node.all_input_nodes:
            if arg not in inside and not is_symbol(arg):
                inputs[arg] = None
    outputs = [n for n in members if any(u not in inside for u in n.users)]
    anchors = [n for n in members if annotation(n).anchor]
    anchor = anchors[0] if anchors else None
    return Group(str(kinds.pop()), tuple(members), tuple(inputs), tuple(outputs), anchor)


def is_symbol(node: fx.Node) -> bool:
    """Whether a node yields a number or symbol instead of a tensor."""
    value: Any = node.meta.get("val")
    return isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)
