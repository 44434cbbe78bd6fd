"""Branches that always run together become one branch, in the graph for likely routes.

before: index [cells, share] names branches; each has rows, a graph and a place among the rows
after:  index [cells, 1] names groups of branches; a group's graph runs all its members on the same
        rows, and adds up what they made of a cell

Where a cell may take several groups, or none, the index is ``[cells, groups]`` instead. Cells are
moved once for each group and not for each branch, and a call has as many graphs to run as there are
groups with cells. Weights travel with the cells, in columns behind their own.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from ..kernels import ops
from .base import module_of
from .ir import attribute
from .outline_branches import is_bookkeeping
from .resize import copy_into, fitting
from .route_odds import Grouping
from .route_regions import ROUTER, Inliner, Region, aten


def regroup(inliner: Inliner, region: Region, grouping: Grouping, router: Any) -> fx.Node | None:
    """Lets groups take the place of the branches of ``region``, as a router of the name ``router``.

    Returns the node that tells whether every cell takes whole groups and nothing else (bool, no
    dimensions); None, and no result changed, where that cannot be.
    """
    combine = region.combine
    if combine is None or not inliner.has_digits(region, grouping.members):
        return None
    with inliner.graph.inserting_before(combine):
        rows = _Rows(inliner, region, grouping.members)
        names = [rows.graph_of(group) for group in grouping.groups] if rows.possible else [None]
        if None in names:
            return None
        index, held = _index(inliner, region, grouping)
        total = _run(inliner, region, names, index, rows.cells(), router)
    combine.replace_all_uses_with(total)
    inliner.graph.erase_node(combine)
    inliner.graph.erase_node(region.node)
    return held


def _index(inliner: Inliner, region: Region, grouping: Grouping) -> tuple[fx.Node, fx.Node]:
    """The groups that cells take ``[cells, slots]``, and whether these are all that they take."""
    call, full, count = inliner.call, inliner.full, len(grouping.groups)
    digits = inliner.digits(region, grouping.members)
    codes = [inliner.once(region, grouping.members, group) for group in grouping.groups]
    if grouping.whole:
        index = full(count, region.index)
        for number, code in enumerate(codes):
            taken = call(aten.eq.Scalar, digits, code)
            index = call(aten.where.self, taken, full(number, region.index), index)
        held = call(aten.all.default, call(aten.lt.Scalar, index, count))
        return call(aten.unsqueeze.default, index, 1), held
    firsts = inliner.constant("firsts", torch.tensor([group[0] for group in grouping.groups]))
    slots = call(aten.unsqueeze.default, region.index, 2)
    taken = call(aten.any.dim, call(aten.eq.Tensor, slots, firsts), 1)
    numbers = inliner.constant("groups", torch.arange(count))
    index = call(aten.where.self, taken, numbers, full(count, region.index))
    values = inliner.constant("codes", torch.tensor(codes))
    known = call(aten.where.self, taken, values, full(0, region.index))
    whole = call(aten.eq.Tensor, call(aten.sum.dim_IntList, known, [1]), digits)
    return index, call(aten.all.default, whole)


def _run(
    inliner: Inliner, region: Region, names: Any, index: fx.Node, cells: fx.Node, router: Any
) -> fx.Node:
    """What `outline-branches` makes of a router, with the graphs ``names``."""
    from ..kernels import routing_rows  # defines the operators

    call, graph, plait = inliner.call, inliner.graph, torch.ops.plait
    share = index.meta["val"].shape[1]
    route = call(plait.route.default, index, len(names))
    offsets, order = call(operator.getitem, route, 0), call(operator.getitem, route, 1)
    rows = call(plait.take.default, cells, order, share)
    graphs = tuple(graph.get_attr(name) for name in names)
    ran = graph.call_function(routing_rows.branches, (graphs, rows, offsets, region.operands))
    value = region.node.meta["val"]
    with inliner.mode:
        shape = (order.meta["val"].shape[0], *value.shape[1:])
        ran.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    ran.meta[ROUTER] = router
    place = call(plait.places.default, order)
    return call(plait.combine.default, ran, place, offsets, None, share)


class _Rows:
    """The cells of a region with the weights of its ``members`` behind them, and what reads them.

    ``possible`` is false where the two cannot be in one tensor.
    """

    def __init__(self, inliner: Inliner, region: Region, members: tuple[int, ...]) -> None:
        assert region.cells is not None
        self.inliner, self.region, self.members = inliner, region, members
        self.weight: Any = ops.argument(region.combine, "weight")
        value, result = region.cells.meta["val"], region.node.meta["val"]
        self.shape, self.width = value.shape[1:], 1
        sizes = [d for d in self.shape if isinstance(d, int)]
        for size in sizes:
            self.width *= size
        fits = value.dtype == result.dtype and value.is_floating_point()
        self.possible = self.weight is None or (fits and len(sizes) == len(self.shape))

    def cells(self) -> fx.Node:
        """The tensor that rows are taken from."""
        inliner, cells, weight = self.inliner, self.region.cells, self.weight
        assert cells is not None
        if weight is None:
            return cells
        call, value = inliner.call, cells.meta["val"]
        if weight.meta["val"].dtype != value.dtype:
            weight = inliner.call(aten._to_copy.default, weight, dtype=value.dtype)
        members = inliner.constant("members", torch.tensor(self.members))
        slots = call(aten.unsqueeze.default, self.region.index, 2)
        named = call(aten.eq.Tensor, slots, members)
        spread = call(aten.unsqueeze.default, weight, 2)
        chosen = call(aten.where.self, named, spread, inliner.full(0, weight))
        columns = call(aten.sum.dim_IntList, chosen, [1])
        if value.dim() != 2:
            count = call(aten.sym_size.int, cells, 0)
            cells = call(aten.reshape.default, cells, [count, self.width])
        return call(aten.cat.default, [cells, columns], 1)

    def graph_of(self, group: tuple[int, ...]) -> str | None:
        """An attribute with the graph that runs the branches of ``group``; None where one of them
        does not take the rows as they are.
        """
        outer, graph = self.inliner, fx.Graph()
        first = attribute(outer.module, str(self.region.graphs[group[0]].target))
        given: list[fx.Node] = []
        for node in first.graph.find_nodes(op="placeholder"):
            given.append(graph.placeholder(node.name))
            given[-1].meta = dict(node.meta)
        rows, value = given[0], given[0].meta["val"]
        if self.weight is not None:
            with outer.mode:
                wide = (value.shape[0], self.width + len(self.members))
                rows.meta["val"] = torch.empty(wide, dtype=value.dtype, device=value.device)
        output = graph.output((rows,))
        inner = Inliner(module_of(torch.nn.Module(), graph, "Group"))
        with graph.inserting_before(output):
            total = self._total(inner, group, given, value)
        if total is None:
            return None
        output.args = ((total,),)
        graph.lint()
        inner.module.recompile()
        name = "_".join(["group", *map(str, group)])
        return outer.attach(f"{self.region.node.name}_{name}", inner.module)

    def _total(
        self, inner: Inliner, group: tuple[int, ...], given: list[fx.Node], value: torch.Tensor
    ) -> Any:
        """What the branches of ``group`` make of cells like ``value``, added up."""
        rows, *operands = given
        arguments = [rows if self.weight is None else self._own(inner, rows, value), *operands]
        total: Any = None
        for b in group:
            source = attribute(self.inliner.module, str(self.region.graphs[b].target))
            inputs = source.graph.find_nodes(op="placeholder")
            sizes = fitting(inner.mode, inputs, [a.meta["val"] for a in arguments])
            if sizes is None:
                return None
            (part,) = copy_into(inner.graph, source, arguments, sizes, inner.attach, is_bookkeeping)
            if self.weight is not None:
                column = self.width + self.members.index(b)
                weight = inner.call(aten.slice.Tensor, rows, 1, column, column + 1)
                part = inner.call(aten.mul.Tensor, part, inner.per_cell(weight, part))
            total = part if total is None else inner.call(aten.add.Tensor, total, part)
        return total

    def _own(self, inner: Inliner, rows: fx.Node, value: torch.Tensor) -> fx.Node:
        """The cells among ``rows``, in their shape, like ``value``."""
        cells = inner.call(aten.slice.Tensor, rows, 1, 0, self.width)
        if value.dim() == 2:
            return cells
        count = inner.call(aten.sym_size.int, rows, 0)
        return inner.call(aten.reshape.default, cells, [count, *value.shape[1:]])
