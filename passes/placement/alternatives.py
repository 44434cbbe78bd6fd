"""Recompute and offload of activations, as rewrites of one placement problem into another.

An activation that is made early and read late (by the backward half of a training step, say) may be

- kept: nothing changes;
- **recomputed**: a copy of its op runs again, and late readers read the copy (activation
  checkpointing: Griewank and Walther, 2000; Chen et al., 2016);
- **offloaded**: it is sent to a host as soon as it is made, and an op of no time that is pinned
  there sends it back to its late readers.

What comes out is an ordinary problem, so the simulator, the planner, the bounds and any other judge
of placements serve it as they are. Why it computes the same and never has a cycle: number the ops
of the original in any order that has sources first, put each copy right before the first op that
reads it, directly or through other copies, and order copies at one place as what they copy. A copy
reads inputs of what it copies, or copies of those, all of which come before it; what starts it
(`Alternative.after`) must come before that first reader, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .errors import PlacementError
from .problem import Edge, Op, Problem

KINDS = ("recompute", "offload")


@dataclass(frozen=True)
class Alternative:
    """What becomes of one op's output, other than being kept.

    ``late`` names the readers that take the copy's output instead; copies of readers do as well.
    The copy does not start before ``after``, an op of the original, has ended. ``host`` is the
    device that holds an offloaded output, None for one that is recomputed.
    """

    op: str
    kind: str
    late: tuple[str, ...] = ()
    after: str | None = None
    host: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {k: v for k, v in asdict(self).items() if v is not None}
        return {**values, "late": list(self.late)}


def alternative_from_dict(item: Any) -> Alternative:
    """An alternative from JSON values. Raises PlacementError naming the field at fault."""
    if not isinstance(item, Mapping) or not isinstance(item.get("op"), str):
        raise PlacementError(f"alternatives: an item must name an 'op', is {item!r:.60}")
    what = f"alternatives: op {item['op']!r}"
    if item.get("kind") not in KINDS:
        raise PlacementError(f"{what}: kind must be {' or '.join(KINDS)}, is {item.get('kind')!r}")
    late = item.get("late", [])
    if not isinstance(late, list) or not all(isinstance(x, str) for x in late):
        raise PlacementError(f"{what}: late must be a list of ops, is {late!r:.60}")
    for field in ("after", "host"):
        if not isinstance(item.get(field), str | None):
            raise PlacementError(f"{what}: {field} must be a name, is {item[field]!r:.60}")
    return Alternative(item["op"], item["kind"], tuple(late), item.get("after"), item.get("host"))


@dataclass(frozen=True)
class Rewritten:
    """A problem and the one with copies: the original's ops in their order, then the copies.

    ``copy_of`` maps each copy to the op that it copies. A placement of ``problem`` restricted to
    the ops that are no copies is one of ``original`` (same devices, groups together).
    """

    original: Problem
    problem: Problem
    copy_of: Mapping[str, str]


def rewrite(problem: Problem, alternatives: Sequence[Alternative]) -> Rewritten:
    """The problem in which the alternatives are taken, at most one for an op.

    A recomputed op that has parameters stays with its copy, which shares them. Raises
    PlacementError for an alternative that is none of the problem.
    """
    if not alternatives:
        return Rewritten(problem, problem, {})
    chosen: dict[str, Alternative] = {}
    for item in alternatives:
        if item.op in chosen:
            raise PlacementError(f"alternatives: op {item.op!r} is there twice; leave one out")
        _check(problem, item)
        chosen[item.op] = item
    taken = set(problem.op_index)
    copies = {name: _unused(f"{name}@{item.kind}", taken) for name, item in chosen.items()}
    edges, held = _edges(problem, chosen, copies)
    edges += _triggers(problem, chosen.values(), copies)
    ops = list(problem.ops)
    groups = {op.group for op in ops}
    for name, item in chosen.items():
        i = problem.op_index[name]
        if item.kind == "offload":
            time = tuple(0.0 if x.name == item.host else None for x in problem.devices)
            ops.append(Op(copies[name], time, output_bytes=sum(held.get(name, {}).values())))
            continue
        if ops[i].group is None and ops[i].param_bytes:
            ops[i] = replace(ops[i], group=_unused(copies[name], groups))
        ops.append(replace(ops[i], name=copies[name], param_bytes=0))
    rewritten = replace(problem, ops=tuple(ops), edges=tuple(edges))
    return Rewritten(problem, rewritten, {copy: name for name, copy in copies.items()})


def _edges(
    problem: Problem, chosen: Mapping[str, Alternative], copies: Mapping[str, str]
) -> tuple[list[Edge], dict[str, dict[str, float]]]:
    """Edges with late readers moved to copies; bytes by op and tensor of what hosts hold."""
    edges: list[Edge] = []
    held: dict[str, dict[str, float]] = {}
    p, names = problem.arrays, [op.name for op in problem.ops]
    late = {name: frozenset(item.late) for name, item in chosen.items()}
    for t, tensor in enumerate(problem.tensor_names):
        src, size = names[p.tensor_src[t]], float(p.tensor_bytes[t])
        sent = False
        for v in p.pair_dst[p.tensor_ptr[t] : p.tensor_ptr[t + 1]].tolist():
            readers = [(names[v], names[v] in late.get(src, ()))]
            if names[v] in chosen and chosen[names[v]].kind == "recompute":
                readers.append((copies[names[v]], src in chosen))
            for reader, moved in readers:
                edges.append(Edge(copies[src] if moved else src, reader, size, tensor))
                sent |= moved
        if sent and chosen[src].kind == "offload":
            held.setdefault(src, {})[tensor] = size
            edges.append(Edge(src, copies[src], size, tensor))
    return edges, held


def _triggers(
    problem: Problem, chosen: Iterable[Alternative], copies: Mapping[str, str]
) -> list[Edge]:
    """A tensor of no bytes from what must have run to each copy that waits for it."""
    names: dict[str, set[str]] = {item.after: set() for item in chosen if item.after is not None}
    for t, src in enumerate(problem.arrays.tensor_src.tolist()):
        if problem.ops[src].name in names:
            names[problem.ops[src].name].add(problem.tensor_names[t])
    tensor = {op: _unused("@after", used) for op, used in names.items()}
    return [
        Edge(item.after, copies[item.op], 0, tensor[item.after])
        for item in chosen
        if item.after is not None
    ]


def _check(problem: Problem, item: Alternative) -> None:
    what = f"alternatives: op {item.op!r}"
    index = problem.op_index
    if item.op not in index:
        raise PlacementError(f"{what} is not in the problem")
    op = problem.ops[index[item.op]]
    if item.kind not in KINDS:
        raise PlacementError(f"{what}: kind must be {' or '.join(KINDS)}, is {item.kind!r}")
    if op.keep:
        raise PlacementError(f"{what}: its output is kept to the end, so nothing would be freed")
    if item.kind == "recompute" and not op.recompute:
        raise PlacementError(f"{what} may not run twice (recompute is false)")
    if (item.kind == "offload") != (item.host is not None):
        raise PlacementError(f"{what}: a host belongs to offload, and only there")
    if item.host is not None and item.host not in problem.device_index:
        raise PlacementError(f"{what}: there is no device {item.host!r} to offload to")
    if item.after is not None and item.after not in index:
        raise PlacementError(f"{what}: there is no op {item.after!r} to run after")
    p, i = problem.arrays, index[item.op]
    readers = p.pair_dst[p.tensor_ptr[p.out_ptr[i]] : p.tensor_ptr[p.out_ptr[i + 1]]].tolist()
    for name in item.late:
        if index.get(name) not in readers:
            raise PlacementError(f"{what}: {name!r} does not read it, and so is no late reader")


def _unused(name: str, taken: set[Any]) -> str:
    """``name``, with as many more marks as make it new; it is taken from now on."""
    while name in taken:
        name += "@"
    taken.add(name)
    return name
