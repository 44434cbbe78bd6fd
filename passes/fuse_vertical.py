"""`fuse-vertical`: operators become groups, one kernel each.

=============  ====================================================================================
kind           one group holds
=============  ====================================================================================
gemm, conv,    the heavy operator (*anchor*) and the pointwise operators that follow it on the same
pool,          shape: they run on the accumulators, before these reach memory. Its result is the
attention,     only one. Other operands (bias, residual) may be any tensors available in time. A
experts        routed product's columns may be two operands of a gate, one beside the other.
rows           normalisations and reductions over the trailing dimensions of one space, with the
               pointwise operators before, between and after them
reduce         one reduction, the pointwise operators before it that nobody else reads, and those
               after it; scans are the same, but of the kind rows
pointwise      pointwise operators over equally many elements, with views between them
view           one view that is only another address: free where the layout permits
concat         one concatenation that its producers write in place
library        one operator that has no kernel of ours, with the parts of its result
=============  ====================================================================================

A value that is read by other groups is written to memory once and never computed twice; only
constant fills are repeated in each kernel that reads them. Groups are convex (`contraction`), and
the nodes of the resulting graph are ordered so that each group stands in one piece. Operators on
sizes alone belong to no group. Mirrors what operator fusion does in TVM (Chen et al., OSDI 2018),
with kinds given by kernel templates.
"""

from __future__ import annotations

import copy
import heapq
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.fx as fx
from torch._ops import HigherOrderOperator

from ..kernels import ops
from ..kernels.abi import MOST_ARGUMENTS
from .annotations import annotate
from .base import Pass, PassResult, allow, copy_graph
from .contraction import Contraction
from .fusion_rules import (
    FILLS,
    RESHAPES,
    ROW_REDUCTIONS,
    STRIDED_VIEWS,
    Space,
    halves,
    is_strided_view,
    kept,
    parts,
    reads_one_to_one,
    row_space,
    space_of,
)
from .groups import groups_of, orderings, topological_groups
from .ir import aten, branches_of, fake_mode_of, is_call
from .remarks import Remark

__all__ = ["FuseVertical", "groups_of"]

_ANCHORS = ("gemm", "conv", "pool", "attention", "experts")
_KERNELS = (*_ANCHORS, "rows", "reduce", "pointwise")
_MOST_TENSORS = MOST_ARGUMENTS - 8  # which symbols of open sizes may take
_LOOKAHEAD = 32  # nodes inspected for one more step of an epilogue


@dataclass(frozen=True)
class FuseVertical(Pass):
    """Assign every operator to a group, in ``meta["plait"]``.

    Attributes:
        epilogues: let heavy operators absorb the pointwise operators that follow them.
        rows: fuse normalisations and reductions with pointwise operators.
        pointwise: fuse pointwise operators with each other.
        concat: let producers write concatenations in place.
        max_nodes: most nodes that one group may have.
    """

    name: ClassVar[str] = "fuse-vertical"
    # They make operators, each of which has to be in a group.
    follows: ClassVar[tuple[str, ...]] = (
        "normalize",
        "outline-branches",
        "speculate-routes",
        "merge-parallel-ops",
    )
    epilogues: bool = True
    rows: bool = True
    pointwise: bool = True
    concat: bool = True
    max_nodes: int = 64

    def __post_init__(self) -> None:
        if self.max_nodes < 1:
            raise ValueError(f"max_nodes must be at least 1, is {self.max_nodes}")

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        result = copy_graph(graph_module)
        fuser = _Fuser(self, result)
        fuser.run()
        remarks = list(fuser.remarks)
        for name, branch in branches_of(result):
            inner = self.run(branch)
            setattr(result, name, inner.graph_module)
            remarks += inner.remarks
        result.recompile()
        return PassResult(result, tuple(remarks))


class _Fuser:
    """The groups of one graph while they grow. Groups are named as in `Contraction`."""

    def __init__(self, options: FuseVertical, graph_module: fx.GraphModule) -> None:
        self.options, self.graph = options, graph_module.graph
        self.remarks: list[Remark] = []
        self._repeat_fills()
        self.nodes = [n for n in self.graph.nodes if n.op == "call_function"]
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.after = orderings(self.graph)
        self.category = [ops.category(n) for n in self.nodes]
        self.space = [space_of(n) for n in self.nodes]
        self.contraction = Contraction([self._before(n) for n in self.nodes])
        self.members: dict[int, list[int]] = {i: [i] for i in range(len(self.nodes))}
        self.kind = ["rows" if kind == "scan" else kind for kind in self.category]
        self.bent: set[int] = set()  # members whose elements are read in another order
        self.misses: dict[tuple[int, ...], str] = {}

    def _before(self, node: fx.Node) -> list[int]:
        args = (*node.all_input_nodes, *self.after.get(node, ()))
        return [self.index[arg] for arg in args if arg in self.index]

    # Small questions -------------------------------------------------------------------------

    def group(self, i: int) -> int:
        return self.contraction.find(i)

    def readers(self, i: int) -> list[int]:
        """Readers among the operators; the output node counts as -1."""
        return [self.index.get(user, -1) for user in self.nodes[i].users]

    def sources(self, i: int) -> list[int]:
        args = self.nodes[i].all_input_nodes
        return [self.index[arg] for arg in args if arg in self.index]

    def is_alone(self, i: int) -> bool:
        return len(self.members[self.group(i)]) == 1

    def outputs(self, group: int) -> list[int]:
        """The members of a group that are read outside of it."""
        inside = set(self.members[group])
        return [i for i in inside if any(r not in inside for r in self.readers(i))]

    # Merging ---------------------------------------------------------------------------------

    def fits(self, *nodes: int) -> bool:
        """Whether the groups of nodes may become one: not too large, and no cycle."""
        groups = {self.group(i) for i in nodes}
        if sum(len(self.members[g]) for g in groups) > self.options.max_nodes:
            self.misses.setdefault(nodes, "PLT-FUS-005")
            return False
        if self._tensors(groups) > _MOST_TENSORS:
            self.misses.setdefault(nodes, "PLT-FUS-006")
            return False
        if not self.contraction.can_merge(*nodes):
            self.misses.setdefault(nodes, "PLT-FUS-004")
            return False
        return True

    def _tensors(self, groups: set[int]) -> int:
        """At most how many tensors a kernel of these groups reads and writes."""
        members = [i for g in groups for i in self.members[g]]
        most = len(members) + sum(len(self.nodes[i].all_input_nodes) for i in members)
        if most <= _MOST_TENSORS:
            return most
        inside = {self.nodes[i] for i in members}
        read = {n for i in members for n in self.nodes[i].all_input_nodes} - inside
        written = sum(any(r not in inside for r in n.users) for n in inside)
        return len(read) + written

    def merge(self, kind: str, *nodes: int) -> None:
        """Make one group of the groups of ``nodes``, which `fits` has approved."""
        groups = {self.group(i) for i in nodes}
        members, *others = sorted((self.members.pop(g) for g in groups), key=len, reverse=True)
        for other in others:
            members += other
        group = self.contraction.merge(*nodes)
        self.members[group] = members
        self.kind[group] = kind

    def allow(self, what: str, i: int) -> bool:
        return allow(what, [self.nodes[i]])

    # The steps -------------------------------------------------------------------------------

    def run(self) -> None:
        self._tuples()
        self._views()
        if self.options.epilogues:
            for i, node in enumerate(self.nodes):
                if self.category[i] in _ANCHORS and node.target is not operator.getitem:
                    self._epilogue(i, self.category[i])
        if self.options.concat:
            self._concats()
        if self.options.rows:
            self._rows()
            self._reductions()
        if self.options.pointwise:
            self._pointwise()
        self._absorb_fills()
        self.finish()

    def _repeat_fills(self) -> None:
        """Give each reader of a constant fill a fill of its own; it will cost nothing there."""
        for node in list(self.graph.nodes):
            if not is_call(node, *FILLS):
                continue
            readers = [u for u in node.users if u.op == "call_function" and _is_plain(u)]
            for reader in readers[1:] if len(readers) == len(node.users) else readers:
                with self.graph.inserting_before(reader):
                    twin = self.graph.node_copy(node, lambda arg: arg)
                twin.meta = copy.copy(node.meta)
                reader.replace_input_with(node, twin)

    def _tuples(self) -> None:
        """The parts of a tuple belong to the group that makes it."""
        for i, node in enumerate(self.nodes):
            if node.target is operator.getitem and self.category[i] != "symbolic":
                for source in self.sources(i):
                    kind = self.kind[self.group(source)]
                    if kind in ("pointwise", "view") and len(node.args[0].users) > 1:  # type: ignore[union-attr]
                        kind = "library" if kind == "pointwise" else kind
                    self.merge(kind, source, i)

    def _views(self) -> None:
        """Tell views that are only addresses from views that copy, which are pointwise."""
        mode = fake_mode_of(self.graph)
        for i, node in enumerate(self.nodes):
            if self.category[i] == "view" and node.target is not operator.getitem:
                if not is_strided_view(node, mode):
                    self.kind[self.group(i)] = "pointwise"

    def _epilogue(self, anchor: int, kind: str) -> None:
        """Absorb pointwise followers as long as the group ends in a single value."""
        node = self.nodes[anchor]
        held = parts(node)
        if len(held) != 1 or self.space[self.index[held[0]]] is None:
            return
        tips = [self.index[held[0]]]
        if self.category[anchor] == "experts":
            tips = [self.index[n] for n in halves(node)] or tips
        while (step := self._next_step(*tips)) is not None:
            if not self.fits(anchor, *tips, *step) or not self.allow("epilogue", step[-1]):
                return
            self.merge(kind, anchor, *tips, *step)
            tips = step[-1:]

    def _next_step(self, *tips: int) -> list[int] | None:
        """The fewest pointwise followers of ``tips`` after which one value alone is read outside.

        None where there are none: another kind of reader, another shape, or several results.
        """
        tip = tips[0]
        order: list[int] = []
        # Values with their readers that are not in ``order``.
        loose = {t: set(self.readers(t)) for t in tips}
        heap = sorted(set.union(*loose.values()))
        seen = set(heap)
        while heap and len(order) < _LOOKAHEAD:
            i = heapq.heappop(heap)
            if i < 0 or not self._is_free(i, "pointwise") or self.space[i] != self.space[tip]:
                return None
            order.append(i)
            for value in [v for v, readers in loose.items() if i in readers]:
                loose[value].discard(i)
                if not loose[value]:
                    del loose[value]
            if not loose:
                return order
            loose[i] = set(self.readers(i))
            for reader in loose[i] - seen:
                seen.add(reader)
                heapq.heappush(heap, reader)
        return None

    def _is_free(self, i: int, category: str) -> bool:
        """Whether a node is of a category, makes a tensor and is in no group with others yet."""
        return self.category[i] == category and self.space[i] is not None and self.is_alone(i)

    def _concats(self) -> None:
        """Concatenations that a convolution or pooling writes into become free."""
        for i, node in enumerate(self.nodes):
            if not is_call(node, aten.cat.default) or self.category[i] != "view":
                continue
            kinds = {self.kind[self.group(s)] for s in self.sources(i)}
            if kinds & {"conv", "pool"} and self.allow("concat in place", i):
                self.kind[self.group(i)] = "concat"

    def _rows(self) -> None:
        """Grow a group around each operator on rows."""
        for seed, node in enumerate(self.nodes):
            if self.category[seed] not in ("rows", "reduce") or not self.is_alone(seed):
                continue
            found = row_space(node)
            if found is not None:
                self._grow_rows(seed, *found)

    def _grow_rows(self, seed: int, space: Space, k: int) -> None:
        inside = {seed}
        heap = [(abs(j - seed), j) for j in self._around(seed)]
        heapq.heapify(heap)
        while heap:
            _, i = heapq.heappop(heap)
            if i in inside or not self._joins_rows(i, space, k, inside):
                continue
            if not self.fits(seed, i) or not self.allow("fuse rows", i):
                continue  # comes up again when another neighbour has joined
            self.merge("rows", seed, i)
            inside.add(i)
            for j in self._around(i):
                heapq.heappush(heap, (abs(j - seed), j))
        self._name_rows(self.group(seed), space)

    def _around(self, i: int) -> Iterator[int]:
        yield from self.sources(i)
        yield from (r for r in self.readers(i) if r >= 0)

    def _joins_rows(self, i: int, space: Space, k: int, inside: set[int]) -> bool:
        """Whether a node works on the rows of a group, and reads from it only its own row."""
        if self._is_free(i, "pointwise"):
            shapes = (space, kept(space, k), space[: len(space) - k])
            if self.space[i] not in shapes or self.nodes[i].target in FILLS:
                return False
        elif self._is_free(i, "rows") or self._is_free(i, "reduce"):
            if row_space(self.nodes[i]) != (space, k):
                return False
        else:
            return False
        pairs = [(s, i) for s in self.sources(i) if s in inside]
        pairs += [(i, r) for r in self.readers(i) if r in inside]
        return all(self._same_row(s, r, space, k) for s, r in pairs)

    def _same_row(self, source: int, reader: int, space: Space, k: int) -> bool:
        """Whether ``reader`` needs, of ``source``, only the row that it works on itself."""
        a, b = self.space[source], self.space[reader]
        if self.category[reader] != "pointwise":
            return a == space and self.nodes[reader].args[0] is self.nodes[source]
        return a == b or (a == kept(space, k) and b == space)

    def _name_rows(self, group: int, space: Space) -> None:
        """One reduction whose operands nobody else reads is what the reduce template is for."""
        heavy = [i for i in self.members[group] if self.category[i] in ("rows", "reduce")]
        single = len(heavy) == 1 and self.nodes[heavy[0]].target in ROW_REDUCTIONS
        whole = any(self.space[i] == space for i in self.outputs(group))
        self.kind[group] = "reduce" if single and not whole else "rows"

    def _reductions(self) -> None:
        """Scans and every other reduction absorb what only they read, and what follows on their
        shape.
        """
        for i, category in enumerate(self.category):
            if category not in ("reduce", "rows", "scan") or not self.is_alone(i):
                continue
            kind = self.kind[self.group(i)]
            self._epilogue(i, kind)
            if category != "rows" and self.space[i] is not None:  # those read it several times
                self._prologue(i, kind)

    def _prologue(self, reduction: int, kind: str) -> None:
        """Absorb pointwise producers that are read inside the group alone, nearest first."""
        source = self.nodes[reduction].args[0]
        space = space_of(source) if isinstance(source, fx.Node) else None
        heap = [-s for s in self.sources(reduction)]
        seen = set(heap)
        heapq.heapify(heap)
        while heap:
            i = -heapq.heappop(heap)
            inside = self.members[self.group(reduction)]
            if not self._is_free(i, "pointwise") or self.space[i] != space:
                continue
            if self.nodes[i].target in FILLS or not all(r in inside for r in self.readers(i)):
                continue
            if not self.fits(reduction, i) or not self.allow("prologue", i):
                continue
            self.merge(kind, reduction, i)
            for s in self.sources(i):
                if -s not in seen:
                    seen.add(-s)
                    heapq.heappush(heap, -s)

    def _pointwise(self) -> None:
        """Merge pointwise groups along edges; views between two of them come along."""
        for i in range(len(self.nodes)):
            if self.kind[self.group(i)] == "pointwise" and self.space[i] is not None:
                for source in self.sources(i):
                    self._along(source, i)

    def _along(self, source: int, reader: int) -> None:
        """Merge the group of ``source`` into that of ``reader``, if that repeats no work."""
        views: list[int] = []
        here = reader
        while self.kind[self.group(source)] == "view" and self.is_alone(source):
            if not reads_one_to_one(self.nodes[here], self.nodes[source]):
                return
            below = self.sources(source)
            if len(below) != 1 or self.readers(source) != [here]:
                return
            views.append(source)
            here, source = source, below[0]
        group = self.group(source)
        if group == self.group(reader) or self.kind[group] != "pointwise":
            return
        if self.nodes[source].target in FILLS or self.space[source] is None:
            return
        if not reads_one_to_one(self.nodes[here], self.nodes[source]):
            return
        bends = self.category[here] != "pointwise" or here in self.bent
        if bends and (self.readers(source) != [here] or self.outputs(group) != [source]):
            return  # read in two orders, ``source`` would be computed twice
        if not self.fits(source, *views, reader) or not self.allow("fuse pointwise", reader):
            return
        if bends:
            self.bent.update(self.members[group], views)
        self.merge("pointwise", source, *views, reader)

    def _absorb_fills(self) -> None:
        """A fill is computed where it is read."""
        for i, node in enumerate(self.nodes):
            readers = {self.group(r) if r >= 0 else -1 for r in self.readers(i)}
            if node.target not in FILLS or len(readers) != 1 or not self.is_alone(i):
                continue
            (group,) = readers
            if (
                group < 0
                or self.kind[group] not in _KERNELS
                or self.kind[self.group(i)] != "pointwise"
            ):
                continue
            if all(_is_plain(user) for user in node.users) and self.fits(i, group):
                if self.allow("repeat fill", i):
                    self.merge(self.kind[group], group, i)

    # The result ------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write annotations, put the nodes in the order of their groups, and say what was done."""
        order = topological_groups(self.nodes, lambda n: self.group(self.index[n]), self.after)
        heads = [n for n in self.graph.nodes if n.op in ("placeholder", "get_attr")]
        at = self.graph._root
        for node in (*heads, *(node for members in order for node in members)):
            at.append(node)
            at = node
        number = 0
        for members in order:
            group = self.group(self.index[members[0]])
            kind = self.kind[group]
            if kind == "symbolic":
                continue
            for node in members:
                is_anchor = self._is_anchor(self.index[node], kind)
                annotate(node, group=number, kind=kind, anchor=is_anchor)
            number += 1
            self._tell(members, kind)
        for nodes, remark_id in self.misses.items():
            groups = {self.group(i): None for i in nodes}
            if len(groups) > 1:
                self._remark(
                    remark_id, "missed", [self.nodes[i] for i in nodes], _MISSES[remark_id]
                )

    def _is_anchor(self, i: int, kind: str) -> bool:
        is_heavy = kind in _ANCHORS or kind == "reduce"
        return (
            is_heavy and self.category[i] == kind and self.nodes[i].target is not operator.getitem
        )

    def _tell(self, members: list[fx.Node], kind: str) -> None:
        if isinstance(members[0].target, HigherOrderOperator):
            return  # its graphs tell for themselves
        if kind == "library":
            reason = ops.library_reason(members[0]) or "it has several results, which are all read"
            self._remark("PLT-FUS-002", "missed", members[:1], reason)
        elif sum(node.target is not operator.getitem for node in members) > 1:
            self._remark("PLT-FUS-001", "done", members, f"one {kind} kernel")

    def _remark(self, remark_id: str, kind: Any, nodes: list[fx.Node], reason: str) -> None:
        names = tuple(node.name for node in nodes)
        self.remarks.append(Remark(remark_id, kind, self.options.name, names, reason))


_MISSES = {
    "PLT-FUS-004": "one of them needs a result computed from the other",
    "PLT-FUS-005": "the group would have more than max_nodes nodes",
    "PLT-FUS-006": "the group would read and write too many tensors for one kernel",
}


def _is_plain(node: fx.Node) -> bool:
    """Whether a reader of a fill is evaluated element by element inside a kernel."""
    kind = ops.category(node)
    if kind == "view":
        return node.target not in STRIDED_VIEWS and node.target not in RESHAPES
    return kind == "pointwise"
