"""Graph coarsening: ops joined without ever making a cycle, and placements taken back to the ops.

An edge u -> v is contracted where v is all that reads u, or u is all that v reads. No cycle can
come of it: one through the joined op would leave it at u past v, or enter it at v past u, and there
is no such edge. This is the fusion of Baechi (Jeon et al., SoCC 2020), whose check for cycles is a
search, here as multilevel coarsening: the edges that carry most are contracted first, and groups
(co-placement) are joined with ops outside of groups only, so that nothing new must stay together.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .placement import Placement
from .problem import Edge, Floats, Ints, Op, Problem

_SHARE = 0.125
"""Of a device's share of work, and of the smallest memory: how large a joined op may become."""


@dataclass(frozen=True)
class Coarse:
    """A problem and a smaller one: ``member[i]`` is the op of ``problem`` that holds op i."""

    fine: Problem
    problem: Problem
    member: Ints

    def expand(self, placement: Placement) -> Placement:
        """A placement of the smaller problem as one of the original.

        Ops go where what holds them went, one after another where it stood. Sound in both modes:
        an order of joined ops that runs is one of their members that runs. Memory and makespan are
        those of another graph, though: simulate the original.
        """
        ops, names = self.fine.ops, [op.name for op in self.problem.ops]
        assign = {ops[i].name: placement.assign[names[c]] for i, c in enumerate(self.member)}
        order = placement.order
        if order is not None:
            index = self.problem.op_index
            order = {
                device: [ops[i].name for i in self.members([index[name] for name in listed])]
                for device, listed in order.items()
            }
        return Placement(assign, order, placement.mode, placement.report)

    def members(self, sequence: Sequence[int] | Ints) -> Ints:
        """The original's ops in the order of what holds them, sources first within one."""
        topo = self.fine.arrays.topo
        place = np.full(len(self.problem.ops), -1, np.int64)
        place[sequence] = np.arange(len(sequence))
        where = place[self.member[topo]]
        return topo[where >= 0][np.argsort(where[where >= 0], kind="stable")]


def coarsen(problem: Problem, target: int = 1) -> Coarse:
    """Contracts until ``target`` ops are left, or no edge that may be contracted.

    Joined ops run where each of their members may, and need what the members need together: a
    result that none outside reads is a temporary. None grows beyond an eighth of what a device can
    do or hold, so that there is something left to balance.
    """
    graph = _Graph(problem)
    graph.contract(target)
    roots = [graph.find(i) for i in range(len(problem.ops))]
    number: dict[int, int] = {}
    for root in roots:  # in the ops' own order, by which ties are decided
        number.setdefault(root, len(number))
    member = np.array([number[r] for r in roots], np.int64)
    return Coarse(problem, _joined(problem, member, len(number)), member)


class _Graph:
    """The graph while it shrinks: neighbours of each op that stands for others, bytes between."""

    def __init__(self, problem: Problem) -> None:
        p = problem.arrays
        n = len(problem.ops)
        self.parent = list(range(n))
        self.after: list[dict[int, float]] = [{} for _ in range(n)]
        self.before: list[dict[int, float]] = [{} for _ in range(n)]
        for t, v in zip(p.pair_tensor.tolist(), p.pair_dst.tolist(), strict=True):
            u, size = int(p.tensor_src[t]), float(p.tensor_bytes[t])
            self.after[u][v] = self.before[v][u] = self.after[u].get(v, 0.0) + size
        self.group: list[str | None] = [op.group for op in problem.ops]
        self.allowed = [row.tobytes() for row in np.isfinite(p.time)]
        self.work = p.time.min(1).tolist()
        self.memory = (p.param + p.out + p.temp).tolist()
        devices = len(p.cap)
        self.most_work = _SHARE * float(p.time.min(1).sum()) / devices
        self.most_memory = _SHARE * float(p.cap.min())
        self.left = n

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def contract(self, target: int) -> None:
        """Heaviest edges first; what a contraction changes is looked at again."""
        heap = [(-size, u, v) for u, out in enumerate(self.after) for v, size in out.items()]
        heapq.heapify(heap)
        while heap and self.left > target:
            size, u, v = heapq.heappop(heap)
            # An entry whose ops or bytes have changed since was pushed again then.
            if self.after[u].get(v) != -size or not self._may(u, v):
                continue
            for edge in self._join(u, v):
                heapq.heappush(heap, edge)

    def _may(self, u: int, v: int) -> bool:
        if len(self.after[u]) > 1 and len(self.before[v]) > 1:
            return False
        a, b = self.group[u], self.group[v]
        return (
            (a == b or a is None or b is None)
            and self.allowed[u] == self.allowed[v]
            and self.work[u] + self.work[v] <= self.most_work
            and self.memory[u] + self.memory[v] <= self.most_memory
        )

    def _join(self, u: int, v: int) -> list[tuple[float, int, int]]:
        """Takes v into u, or u into v where u has fewer neighbours; returns the edges to look at.

        Those are of what had the fewer, and an only one: no other edge may be contracted that might
        not before. All of them would be a square where one op feeds thousands.
        """
        del self.after[u][v], self.before[v][u]
        if len(self.after[u]) + len(self.before[u]) < len(self.after[v]) + len(self.before[v]):
            u, v = v, u
        gone_after, gone_before = self.after[v], self.before[v]
        for w, size in gone_after.items():
            del self.before[w][v]
            self.after[u][w] = self.before[w][u] = self.after[u].get(w, 0.0) + size
        for w, size in gone_before.items():
            del self.after[w][v]
            self.before[u][w] = self.after[w][u] = self.before[u].get(w, 0.0) + size
        self.after[v], self.before[v] = {}, {}
        self.parent[v] = u
        self.group[u] = self.group[u] if self.group[u] is not None else self.group[v]
        self.work[u] += self.work[v]
        self.memory[u] += self.memory[v]
        self.left -= 1
        after, before = self.after[u], self.before[u]
        edges = [(-after[w], u, w) for w in (after if len(after) == 1 else gone_after)]
        return edges + [(-before[w], w, u) for w in (before if len(before) == 1 else gone_before)]


def _joined(problem: Problem, member: Ints, count: int) -> Problem:
    """The problem of the joined ops."""
    p = problem.arrays
    inside: list[list[int]] = [[] for _ in range(count)]
    for i in p.topo.tolist():
        inside[member[i]].append(i)
    crossing = member[p.tensor_src[p.pair_tensor]] != member[p.pair_dst]
    outward = np.ones(len(problem.ops), bool)  # also what nobody reads: it is a result
    outward[p.tensor_src] = False
    outward[p.tensor_src[p.pair_tensor[crossing]]] = True
    outward |= p.keep
    ops = [_op(problem, members, outward) for members in inside]
    names = [op.name for op in ops]
    edges = []
    for k in np.flatnonzero(crossing).tolist():
        t = int(p.pair_tensor[k])
        src, dst = int(p.tensor_src[t]), int(p.pair_dst[k])
        # Tensors keep apart by number: two members' may have the same name.
        edges.append(Edge(names[member[src]], names[member[dst]], float(p.tensor_bytes[t]), str(t)))
    return Problem(problem.name, problem.memory_model, problem.devices, problem.default_link,
                   problem.links, tuple(ops), tuple(edges))  # fmt: skip


def _op(problem: Problem, members: list[int], outward: np.ndarray) -> Op:
    p = problem.arrays
    ops = [problem.ops[i] for i in members]
    scalars = [op.time_s for op in ops if not isinstance(op.time_s, tuple)]
    time: float | tuple[float | None, ...] = float(sum(scalars))
    if len(scalars) < len(ops):
        rows: Floats = p.time[members].sum(0)
        time = tuple(float(x) if np.isfinite(x) else None for x in rows)
    held = float(p.out[members][outward[members]].sum())
    inner = float(p.out[members].sum()) - held
    temps = p.temp[members]
    temp = inner + float(temps.sum() if p.static else temps.max())
    keep = any(op.keep for op in ops)
    group = next((op.group for op in ops if op.group is not None), None)
    return Op(ops[0].name, time, float(p.param[members].sum()), temp, held, group, keep)
