"""`outline-branches`: what lies between a scatter and its gather becomes a graph per branch.

before: parts = scatter(cells, index)
        a = ops of branch 0 on parts[0]
        b = ops of branch 1 on parts[1]
        y = gather([a, b], index, weight)
after:  offsets, order = route(index)
        rows = branches((graph 0, graph 1), take(cells, order), offsets)
        y = combine(rows, places(order), offsets, weight)

A branch's graph has an ordinary first dimension: it is compiled like any program whose batch
varies, runs on its part of ``rows`` in place, and does not run at all where no cell chose it (the
static counterpart of Brainstorm's cell routing, Cui et al., OSDI 2023). Tensors from outside that a
branch reads are operands of all. Nested routers, and routers in the graphs of a `torch.cond`, are
outlined there in turn.

A region stays as it is, with a remark, where it is not a function of its part alone: when branches
read each other's cells, or something behind the gather reads one branch's values.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, free_unbacked_symbols

from ..kernels import ops
from .base import Pass, PassResult, allow, copy_graph, module_of
from .ir import COND, attribute, branches_of, fake_mode_of, fake_result, same_size
from .remarks import Remark
from .resize import Sizes, at_sizes, attacher

HINT = 13  # a size to trace with; nothing may depend on it
INNER = "inner"
"""Key in a placeholder's ``meta`` that marks it as computed by an outer graph."""


@dataclass(frozen=True)
class OutlineBranches(Pass):
    """Turns routed regions into graphs of their own."""

    name: ClassVar[str] = "outline-branches"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        inner = branches_of(graph_module)
        if not inner and not any(
            _is_call(n, "plait.scatter.default") for n in graph_module.graph.nodes
        ):
            return PassResult(graph_module)
        result = copy_graph(graph_module)
        outliner = _Outliner(result, self.name)
        for name, graph in inner:
            nested = self.run(graph)
            branch = copy_graph(nested.graph_module)
            for node in branch.graph.find_nodes(op="placeholder"):
                node.meta[INNER] = True
            branch.recompile()
            setattr(result, name, branch)
            outliner.remarks += nested.remarks
        outliner.run()
        result.graph.lint()
        result.recompile()
        return PassResult(result, tuple(outliner.remarks))


class _Refused(Exception):
    """A region that cannot be outlined: remark and reason."""

    def __init__(self, remark: str, reason: str) -> None:
        super().__init__(reason)
        self.remark, self.reason = remark, reason


@dataclass
class _Region:
    """One branch: its part, the nodes that depend on it in order, and its result."""

    part: fx.Node
    nodes: list[fx.Node]
    result: fx.Node


class _Outliner:
    """Outlines the regions of one graph, in place."""

    def __init__(self, module: fx.GraphModule, pass_name: str) -> None:
        self.module, self.graph, self.pass_name = module, module.graph, pass_name
        self.remarks: list[Remark] = []

    def run(self) -> None:
        """Outermost regions first; a scatter inside one is outlined with its graph."""
        for node in list(self.graph.nodes):
            if node.graph is not self.graph or not _is_call(node, "plait.scatter.default"):
                continue
            if not node.users and node not in set(self.graph.nodes):
                continue  # went into a graph of its own
            if not allow("outline branches", [node]):
                continue
            try:
                self._outline(node)
            except _Refused as refused:
                self._remark(refused.remark, "missed", node, refused.reason)

    def _remark(self, remark: str, kind: Any, node: fx.Node, reason: str) -> None:
        self.remarks.append(Remark(remark, kind, self.pass_name, (node.name,), reason))

    # -- finding the regions ----------------------------------------------------------------------

    def _outline(self, scatter: fx.Node) -> None:
        gather = self._gather_of(scatter)
        regions = self._regions(scatter, gather)
        operands = self._operands(regions)
        graphs = [self._graph_of(r, operands, f"{scatter.name}_{b}") for b, r in enumerate(regions)]
        self._rewrite(scatter, gather, regions, operands, graphs)
        self._remark(
            "PLT-BRN-001", "done", scatter, f"{len(regions)} branches have graphs of their own"
        )

    def _gather_of(self, scatter: fx.Node) -> fx.Node:
        found = _gathers(scatter)
        if not found:
            raise _Refused("PLT-BRN-002", "no gather belongs to this scatter")
        first, *later = found  # routers one after another may share an index
        if any(first not in _above(n) for n in later):
            raise _Refused("PLT-BRN-002", f"{len(found)} gathers belong to this scatter, not one")
        return first

    def _regions(self, scatter: fx.Node, gather: fx.Node) -> list[_Region]:
        parts = {n.args[1]: n for n in scatter.users if n.target is operator.getitem}
        outs: Sequence[fx.Node] = ops.argument(gather, "outs")
        above = _above(gather)
        regions = []
        for b, out in enumerate(outs):
            part = parts.get(b)
            if part is None:
                raise _Refused("PLT-BRN-003", f"branch {b} does not read its cells")
            depends = _below(part)
            depends.add(part)
            if out not in depends:
                raise _Refused("PLT-BRN-003", f"branch {b} does not read its cells")
            inside = {n for n in depends if n in above and n is not part}
            inside -= {n for n in inside if is_bookkeeping(n)}
            regions.append(_Region(part, [n for n in self.graph.nodes if n in inside], out))
        self._check(regions, gather)
        return regions

    def _check(self, regions: list[_Region], gather: fx.Node) -> None:
        owner: dict[fx.Node, int] = {}
        for b, region in enumerate(regions):
            for node in (region.part, *region.nodes):
                if owner.setdefault(node, b) != b:
                    raise _Refused("PLT-BRN-004", f"{node.name} reads the cells of two branches")
        for b, region in enumerate(regions):
            for node in (region.part, *region.nodes):
                for user in node.users:
                    own = owner.get(user) == b or (user is gather and node is region.result)
                    if not own and not _is_idle(user):
                        reason = f"{user.name} reads {node.name} of branch {b} from outside"
                        raise _Refused("PLT-BRN-005", reason)

    def _operands(self, regions: list[_Region]) -> list[fx.Node]:
        """Tensors from outside that any branch reads, weights left out."""
        found: dict[fx.Node, None] = {}
        for region in regions:
            inside = {region.part, *region.nodes}
            for node in region.nodes:
                for arg in node.all_input_nodes:
                    if arg in inside or arg.op == "get_attr" or is_bookkeeping(arg):
                        continue
                    value = arg.meta.get("val")
                    if not isinstance(value, torch.Tensor):
                        raise _Refused("PLT-BRN-006", f"{node.name} needs {arg.name} from outside")
                    if any(free_unbacked_symbols(s) for s in value.shape):
                        raise _Refused(
                            "PLT-BRN-006", f"{arg.name} has a size that only the data tells"
                        )
                    found[arg] = None
        return list(found)

    # -- a branch's graph -------------------------------------------------------------------------

    def _graph_of(self, region: _Region, operands: list[fx.Node], name: str) -> fx.GraphModule:
        mode = fake_mode_of(self.graph)
        renamed = _renamed(mode, region.part, name)
        graph = fx.Graph()
        inner: dict[fx.Node, fx.Node] = {}
        for k, outer in enumerate([region.part, *operands]):
            node = graph.placeholder("rows" if k == 0 else f"operand{k}")
            node.meta = {"val": renamed.value(outer.meta["val"]), INNER: True}
            inner[outer] = node
        for node in region.nodes:
            for arg in node.all_input_nodes:
                if arg.op == "get_attr" and arg not in inner:
                    inner[arg] = self._constant_of(graph, arg, renamed)
            if is_bookkeeping(node):
                continue
            if node.target is COND:
                renamed.learn(self.module, node)
            copied = graph.node_copy(node, lambda a: inner[a] if a in inner else _lost(a))
            copied.meta["val"] = renamed.value(node.meta.get("val"))
            inner[node] = copied
        _check_rows(region, inner)
        graph.output((inner[region.result],))
        module = module_of(self.module, graph, "Branch")
        nested = _Outliner(module, self.pass_name)
        nested.run()
        self.remarks += nested.remarks
        graph.lint()
        module.recompile()
        return module

    def _constant_of(self, graph: fx.Graph, node: fx.Node, renamed: Sizes) -> fx.Node:
        """A constant for a branch's graph; the side of a `torch.cond` gets the branch's sizes."""
        value = attribute(self.module, str(node.target))
        if not isinstance(value, fx.GraphModule):
            return graph.node_copy(node)
        resized = at_sizes(value, renamed, is_bookkeeping)
        return graph.get_attr(attacher(self.module)(str(node.target), resized))

    # -- the outer graph --------------------------------------------------------------------------

    def _rewrite(
        self,
        scatter: fx.Node,
        gather: fx.Node,
        regions: list[_Region],
        operands: list[fx.Node],
        graphs: list[fx.GraphModule],
    ) -> None:
        from ..kernels import routing_rows  # defines the operators

        plait = torch.ops.plait
        cells, index = ops.argument(scatter, "cells"), ops.argument(scatter, "index")
        value = index.meta["val"]
        share = value.shape[1] if value.dim() == 2 else 1
        if not isinstance(share, int):
            raise _Refused("PLT-BRN-006", "the number of slots of a cell varies")
        if share == 0:
            raise _Refused("PLT-BRN-009", "a cell has no slots")
        call = self._call
        with self.graph.inserting_before(gather):
            route = call(plait.route.default, index, len(regions))
            offsets, order = call(operator.getitem, route, 0), call(operator.getitem, route, 1)
            rows = call(plait.take.default, cells, order, share)
            attributes = []
            for b, graph in enumerate(graphs):
                target = f"{scatter.name}_branch_{b}"
                self.module.add_submodule(target, graph)
                attributes.append(self.graph.get_attr(target))
            ran = self.graph.call_function(
                routing_rows.branches, (tuple(attributes), rows, offsets, tuple(operands))
            )
            if "nn_module_stack" in scatter.meta:  # tells which router this is
                ran.meta["nn_module_stack"] = scatter.meta["nn_module_stack"]
            first, out = order.meta["val"], regions[0].result.meta["val"]
            with fake_mode_of(self.graph):
                shape = (first.shape[0], *out.shape[1:])
                ran.meta["val"] = torch.empty(shape, dtype=out.dtype, device=out.device)
            place = call(plait.places.default, order)
            weight = ops.argument(gather, "weight")
            result = call(plait.combine.default, ran, place, offsets, weight, share)
        gather.replace_all_uses_with(result)
        self._erase(scatter, gather, regions)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = fake_result(node, fake_mode_of(self.graph))
        return node

    def _erase(self, scatter: fx.Node, gather: fx.Node, regions: list[_Region]) -> None:
        gone = {scatter, gather}
        for region in regions:
            gone |= {region.part, *region.nodes}
        grown = True
        while grown:  # what only looked at sizes and is read by nobody
            extra = {n for g in gone for n in g.users if n not in gone and _is_idle(n)}
            gone |= extra
            grown = bool(extra)
        for node in reversed(list(self.graph.nodes)):
            if node in gone or (node.op == "get_attr" and not node.users):
                self.graph.erase_node(node)


def between(scatter: fx.Node) -> set[fx.Node]:
    """What depends on the cells of a scatter and goes into its gather: the operators of branches,
    those of routers within them included. Nothing where no gather belongs to it.
    """
    found = _gathers(scatter)
    return _below(scatter) & _above(found[0]) if found else set()


def _gathers(scatter: fx.Node) -> list[fx.Node]:
    """The gathers of a scatter's branches, in the graph's order."""
    index, count = ops.argument(scatter, "index"), ops.argument(scatter, "branches")
    found = [
        n
        for n in index.users
        if _is_call(n, "plait.gather.default")
        and ops.argument(n, "index") is index
        and len(ops.argument(n, "outs")) == count
    ]
    below = _below(scatter)
    return [n for n in scatter.graph.nodes if n in below and n in found]


def _renamed(mode: Any, part: fx.Node, name: str) -> Sizes:
    """Sizes in which that of a branch's part, which data tells, is an ordinary symbol."""
    old = part.meta["val"].shape[0].node.expr
    symbol = mode.shape_env.create_symbol(
        HINT, source=ConstantSource(f"rows_{name}"), dynamic_dim=DimDynamic.DYNAMIC,
        constraint_dim=None, positive=True, do_not_specialize_zero_one=True,
    )  # fmt: skip
    return Sizes(mode, {old: symbol})


def _check_rows(region: _Region, inner: dict[fx.Node, fx.Node]) -> None:
    """Raises _Refused unless a branch surely returns a row for each of its cells: a plan trusts it,
    while the gather raises where it is not so.
    """
    cells = inner[region.part].meta["val"].shape[0]
    shape = inner[region.result].meta["val"].shape
    if not shape or not same_size(shape[0], cells):
        reason = f"{region.result.name} may have another number of rows than its branch has cells"
        raise _Refused("PLT-BRN-007", reason)


def _lost(node: fx.Node) -> fx.Node:
    raise _Refused("PLT-BRN-006", f"{node.name} is needed inside a branch")


def _is_call(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and str(node.target) == name


def is_bookkeeping(node: fx.Node) -> bool:
    """Whether a node asserts something about sizes, or computes what only asserts read."""
    if _is_call(node, "aten._assert_scalar.default"):
        return True
    if str(node.target).startswith("aten.sym_constrain_range"):
        return True
    return isinstance(node.meta.get("val"), torch.SymBool)


def _is_idle(node: fx.Node) -> bool:
    """Whether a node has no effect on any tensor."""
    if node.op != "call_function":
        return False
    if is_bookkeeping(node):
        return True
    sized = (
        isinstance(node.meta.get("val"), (torch.SymInt, int)) and ops.category(node) == "symbolic"
    )
    return sized and all(_is_idle(u) for u in node.users)


def _below(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(node.users)
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo.extend(n.users)
    return found


def _above(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(node.all_input_nodes)
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo.extend(n.all_input_nodes)
    return found
