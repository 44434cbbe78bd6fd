"""A placed model as graphs, one or two for each stage of a device, and a program for each rank.

What others wait for comes first: where a stage has operators that no other device needs, they
become a segment of their own, which runs after the tensors were sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ...passes.base import copy_graph, with_graph
from ...runtime.pipeline import RankProgram, SegmentStep, Wire
from ..capture.captured import Captured, InputSpec
from ..capture.tree import LEAF
from .units import Unit, Units

_META = ("val", "stack_trace", "nn_module_stack")


@dataclass
class Segment:
    """Nodes that one device runs in one go, in topological order; what they read and hand on."""

    name: str
    rank: int
    stage: int
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def own_results(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with copies where it returned its own weights and constants."""
    result = copy_graph(module)
    (output,) = result.graph.find_nodes(op="output")
    for node in dict.fromkeys(output.all_input_nodes):
        if node.op == "get_attr":
            with result.graph.inserting_before(output):
                clone = result.graph.call_function(torch.ops.aten.clone.default, (node,))
            clone.meta = dict(node.meta)
            output.replace_input_with(node, clone)
    result.recompile()
    return result


def divide(units: Units, ranks: Mapping[str, int]) -> list[Segment]:
    """Segments in an order in which they can run; ``ranks`` maps units to ranks."""
    stage: dict[str, int] = {}
    readers: dict[str, list[Unit]] = {unit.name: [] for unit in units.units}
    for unit in units.units:
        before = [(units.of[x].name, x.op == "placeholder") for x in units.sources(unit)]
        far = [stage[n] + (ranks[n] != ranks[unit.name]) for n, given in before if not given]
        stage[unit.name] = max(far, default=0)
        for name, given in before:
            if not given:
                readers[name].append(unit)
    late = _late(units, ranks, stage, readers)
    members: dict[tuple[int, int, int], list[Unit]] = {}
    for unit in units.units:
        key = (stage[unit.name], int(unit.name in late), ranks[unit.name])
        members.setdefault(key, []).append(unit)
    found = []
    position = {node: k for k, node in enumerate(units.module.graph.nodes)}
    for (level, part, rank), inside in sorted(members.items(), key=lambda item: item[0]):
        nodes = [n for u in inside for n in u.nodes if n.op == "call_function"]
        if nodes:
            nodes.sort(key=position.__getitem__)
            name = f"stage{level}_rank{rank}" + "_rest" * part
            found.append(_segment(units, name, rank, level, nodes))
    return found


def _late(
    units: Units,
    ranks: Mapping[str, int],
    stage: Mapping[str, int],
    readers: Mapping[str, list[Unit]],
) -> set[str]:
    """Units that others on the same device and stage need not wait for: no tensor that leaves
    depends on them within the stage. None where nothing leaves.
    """
    early: set[str] = set()
    sends: set[tuple[int, int]] = set()
    for unit in reversed(units.units):
        mine = ranks[unit.name], stage[unit.name]
        for reader in readers[unit.name]:
            if ranks[reader.name] != mine[0]:
                early.add(unit.name)
                sends.add(mine)
            elif stage[reader.name] == mine[1] and reader.name in early:
                early.add(unit.name)
    return {
        u.name for u in units.units
        if u.name not in early and (ranks[u.name], stage[u.name]) in sends
    }  # fmt: skip


def _segment(units: Units, name: str, rank: int, stage: int, nodes: list[fx.Node]) -> Segment:
    inside = set(nodes)
    read = dict.fromkeys(x for node in nodes for x in node.all_input_nodes)
    inputs = [x for x in read if x not in inside and x in units.of]
    outputs = [n for n in nodes if any(u not in inside for u in n.users) and _is_tensor(n)]
    return Segment(name, rank, stage, nodes, inputs, outputs)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def extract(module: fx.GraphModule, segment: Segment) -> Captured:
    """A segment as a captured graph: its inputs are contiguous, its weights those of ``module``."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    specs = []
    for node in segment.inputs:
        value = node.meta["val"]
        placeholder = graph.placeholder(node.name)
        placeholder.meta = {"val": _contiguous(value)}
        env[node] = placeholder
        shape = tuple(int(d) for d in value.shape)
        specs.append(InputSpec(node.name, value.dtype, shape, value.device))
    wanted = _with_free(segment)
    for node in module.graph.nodes:
        if node in wanted:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = {k: node.meta[k] for k in _META if k in node.meta}
    results = tuple(env[x] for x in segment.outputs)
    graph.output(results).meta = {"val": tuple(x.meta["val"] for x in segment.outputs)}
    graph.lint()
    return captured_of(with_graph(module, graph), specs)


def captured_of(module: fx.GraphModule, specs: list[InputSpec]) -> Captured:
    """A graph of static sizes as the compiler takes it."""
    count = len(list(module.graph.find_nodes(op="output"))[0].args[0])  # type: ignore[arg-type]
    return Captured(
        graph_module=module, inputs=specs, states=[], mutations=[], symbols={}, ranges={},
        guards=[], in_tree=LEAF, in_leaves=[None] * len(specs), out_tree=LEAF,
        out_leaves=list(range(count)),
    )  # fmt: skip


def _with_free(segment: Segment) -> set[fx.Node]:
    """The segment's nodes and what they read that belongs to no unit."""
    wanted = set(segment.nodes)
    given = set(segment.inputs)
    stack = list(segment.nodes)
    while stack:
        for x in stack.pop().all_input_nodes:
            if x not in wanted and x not in given:
                wanted.add(x)
                stack.append(x)
    return wanted


def _contiguous(value: torch.Tensor) -> torch.Tensor:
    if value.is_contiguous():
        return value
    mode: Any = value.fake_mode  # type: ignore[attr-defined]
    with mode:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def programs(
    segments: Sequence[Segment], ranks: int, results: Sequence[fx.Node]
) -> list[RankProgram]:
    """What each rank does. ``results`` are the nodes that the caller gets."""
    maker = {x: s for s in segments for x in s.outputs}
    sends: dict[str, list[Wire]] = {s.name: [] for s in segments}
    receives: dict[str, list[Wire]] = {s.name: [] for s in segments}
    number = 0
    known: dict[tuple[fx.Node, int], Wire] = {}
    for segment in segments:
        for x in segment.inputs:
            source = maker.get(x)
            if source is None or source.rank == segment.rank:
                continue
            if (x, segment.rank) not in known:
                value = x.meta["val"]
                wire = Wire(
                    x.name, source.rank, segment.rank, source.stage, -1,
                    str(value.dtype)[6:], tuple(int(d) for d in value.shape),
                )  # fmt: skip
                known[x, segment.rank] = wire
                sends[source.name].append(wire)
            receives[segment.name].append(known[x, segment.rank])
    numbered: dict[Wire, Wire] = {}
    for segment in segments:  # in the order in which each rank sends
        for wire in sends[segment.name]:
            numbered[wire] = Wire(**{**vars(wire), "number": number})
            number += 1
    wanted = {x.name for x in results}
    found = []
    for rank in range(ranks):
        mine = [s for s in segments if s.rank == rank]
        last = {x.name: k for k, s in enumerate(mine) for x in (*s.inputs, *s.outputs)}
        steps = []
        for k, s in enumerate(mine):
            drops = tuple(n for n, at in last.items() if at == k)
            steps.append(
                SegmentStep(
                    s.name,
                    s.stage,
                    tuple(x.name for x in s.inputs),
                    tuple(x.name for x in s.outputs),
                    tuple(numbered[w] for w in receives[s.name]),
                    tuple(numbered[w] for w in sends[s.name]),
                    drops,
                )  # fmt: skip
            )
        given = {x.name: None for s in mine for x in s.inputs if x not in maker}
        made = tuple(x.name for s in mine for x in s.outputs if x.name in wanted)
        stages = 1 + max((s.stage for s in segments), default=0)
        found.append(RankProgram(rank, ranks, stages, number, tuple(steps), tuple(given), made))
    return found
