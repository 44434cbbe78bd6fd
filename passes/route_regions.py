"""Routed regions of an outlined graph, and what they become when their routes are known.

A region is what `outline-branches` made of a router: ``route``, ``take``, ``branches``, ``places``
and ``combine``. A `torch.cond` is one whose two branches take all or nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..kernels import ops
from ..kernels.ops.bounds import reads_by_index
from ..kernels.routes import by_branch
from .ir import COND, alias_root, attribute, branches_of, fake_mode_of, fake_result, is_random
from .outline_branches import is_bookkeeping
from .resize import attacher, copy_into, fitting

aten = torch.ops.aten
Group = tuple[int, ...]
"""An outcome of a router: the branches that every cell takes, once each, in ascending order. Of a
`torch.cond` the number of the side that runs."""
NONE: Group = ()
"""The outcome of a router that sends its cells to no branch."""
ROUTER = "router"
"""Key of a node's ``meta``: which router it is, as in the profile."""
MOST_UNIFORM = 1 << 20
"""Elements of a constant that are compared with each other."""


@dataclass(frozen=True)
class Region:
    """One router. ``index`` ``[cells]`` or ``[cells, share]`` names branches; of a `torch.cond` it
    is the predicate and ``graphs`` are (true, false).
    """

    node: fx.Node
    index: fx.Node
    graphs: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    cells: fx.Node | None = None
    combine: fx.Node | None = None
    share: int = 1

    @property
    def is_cond(self) -> bool:
        """Whether it is a `torch.cond`."""
        return self.combine is None


def is_region(node: fx.Node) -> bool:
    """Whether ``node`` runs graphs that routes choose."""
    return node.op == "call_function" and (
        str(node.target) == "plait_branches" or node.target is COND
    )


def region_of(node: fx.Node) -> Region | None:
    """The region around a node for which `is_region` holds; None where a pass changed its form."""
    args: Any = node.args
    if node.target is COND:
        known = isinstance(args[0], fx.Node) and all(
            u.target is operator.getitem and isinstance(u.args[1], int) for u in node.users
        )
        return Region(node, args[0], tuple(args[1:3]), tuple(args[3])) if known else None
    graphs, rows, offsets, operands = args
    users = [u for u in node.users if str(u.target) == "plait.combine.default"]
    if len(node.users) != 1 or not users or users[0].args[0] is not node:
        return None
    if str(rows.target) != "plait.take.default" or offsets.target is not operator.getitem:
        return None
    route: Any = offsets.args[0]
    order: Any = rows.args[1]
    if str(route.target) != "plait.route.default" or order.args[0] is not route:
        return None
    share: Any = rows.args[2]
    index: Any = route.args[0]
    return Region(node, index, tuple(graphs), tuple(operands), rows.args[0], users[0], share)


class Inliner:
    """Replaces regions of ``module``, a copy, by what is left of them once routes are known."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.mode = fake_mode_of(module.graph)
        self.attach = attacher(module)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call where the graph inserts."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_result(node, self.mode)
        return node

    def taken(self, region: Region, outcome: Group) -> fx.Node | None:
        """Lets every cell take the branches of ``outcome``, and returns the node that tells whether
        it does (bool, no dimensions); None, and no result changed, where that cannot be.
        """
        first = region.node if region.combine is None else region.combine
        with self.graph.inserting_before(first):
            if region.combine is None:
                results = self._branch(region, outcome[0], region.operands)
                if results is None:
                    return None
                for user in list(region.node.users):
                    self._replace(user, results[user.args[1]])  # type: ignore[index]
                self.graph.erase_node(region.node)
                held = self.call(aten.reshape.default, region.index, [])
                if outcome == (1,):
                    held = self.call(aten.logical_not.default, held)
            else:
                result = self._result(region, outcome)
                if result is None:
                    return None
                held = self._all_of(region, outcome)
                self._replace(region.combine, result)
                self.graph.erase_node(region.node)
        return held

    def _result(self, region: Region, outcome: Group) -> Any:
        """What a router's gather gives when all cells take ``outcome``: each branch runs on the
        cells as they are, and a cell adds up what all of them made of it.
        """
        combine: Any = region.combine
        if outcome == NONE:
            value = combine.meta["val"]
            size: list[Any] = list(value.shape)
            if not isinstance(size[0], int):
                assert region.cells is not None
                size[0] = self.call(aten.sym_size.int, region.cells, 0)
            zeros = self.graph.call_function(
                aten.full.default, (size, 0), {"dtype": value.dtype, "device": value.device}
            )
            zeros.meta["val"] = value
            return zeros
        if region.cells is None or not self.has_digits(region, outcome):
            return None
        total: Any = None
        for b in outcome:
            results = self._branch(region, b, (region.cells, *region.operands))
            if results is None:
                return None
            rows = self._weighted(results[0], region, b)
            total = rows if total is None else self.call(aten.add.Tensor, total, rows)
        return total

    def dense(self, region: Region) -> bool:
        """Lets the only branch run on every cell, and chooses results after. False, and nothing
        changed, where that cannot be.
        """
        if region.combine is None or region.share != 1 or len(region.graphs) != 1:
            return False
        assert region.cells is not None
        with self.graph.inserting_before(region.combine):
            results = self._branch(region, 0, (region.cells, *region.operands))
            if results is None:
                return False
            rows = self._weighted(results[0], region, 0)
            known = self.per_cell(self.call(aten.eq.Scalar, region.index, 0), rows)
            chosen = self.call(aten.where.self, known, rows, self.full(0, rows))
            self._replace(region.combine, chosen)
            self.graph.erase_node(region.node)
        return True

    def fold(self, region: Region, index: torch.Tensor) -> bool:
        """Cuts the rows of each branch where the constant ``index`` says. False, and nothing
        changed, where that cannot be.
        """
        args: Any = region.node.args
        rows: fx.Node = args[1]
        route: Any = args[2].args[0]
        offsets, order = by_branch(index, len(region.graphs))
        bounds = offsets.tolist()
        value = region.node.meta["val"]
        parts: list[fx.Node] = []
        with self.graph.inserting_before(region.node):
            for b, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
                if begin == end:
                    continue
                part = self.call(aten.slice.Tensor, rows, 0, begin, end)
                results = self._branch(region, b, (part, *region.operands))
                if results is None:
                    return False
                parts.append(results[0])
            if bounds[-1] < index.numel() or not parts:
                shape = [index.numel() - bounds[-1], *value.shape[1:]]
                like = {"dtype": value.dtype, "device": value.device}
                parts.append(self.graph.call_function(aten.full.default, (shape, 0), like))
                parts[-1].meta["val"] = fake_result(parts[-1], self.mode)
            whole = parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, 0)
            constants = self._constant(offsets, region), self._constant(order, region)
        for user in list(route.users):
            self._replace(user, constants[user.args[1]])
        self._replace(region.node, whole)
        return True

    def _constant(self, tensor: torch.Tensor, region: Region) -> fx.Node:
        route: Any = region.node.args[2].args[0]  # type: ignore[union-attr]
        with self.graph.inserting_before(route):
            return self.constant(route.name, tensor)

    def _branch(
        self, region: Region, b: int, arguments: tuple[fx.Node | None, ...]
    ) -> list[Any] | None:
        """The results of a branch's operators on ``arguments``, copied to where they are needed."""
        source = attribute(self.module, str(region.graphs[b].target))
        inputs = source.graph.find_nodes(op="placeholder")
        given: Any = arguments
        sizes = fitting(self.mode, inputs, [a.meta["val"] for a in given])
        if sizes is None:
            return None
        results = copy_into(self.graph, source, given, sizes, self.attach, is_bookkeeping)
        lent = {alias_root(a) for a in given}
        # What a branch passes on unchanged must not become a result that shares memory.
        return [
            self.call(aten.clone.default, r)
            if (root := alias_root(r)) in lent or root.op != "call_function"
            else r
            for r in results
        ]

    def _weighted(self, rows: fx.Node, region: Region, b: int) -> fx.Node:
        """A branch's ``rows``, one per cell, times the weights of the slots that name it."""
        weight = ops.argument(region.combine, "weight")
        if weight is None:
            return rows
        if region.share != 1:
            named = self.call(aten.eq.Scalar, region.index, b)
            chosen = self.call(aten.where.self, named, weight, self.full(0, weight))
            weight = self.call(aten.sum.dim_IntList, chosen, [1])
        dtype = rows.meta["val"].dtype
        if weight.meta["val"].dtype != dtype:
            weight = self.call(aten._to_copy.default, weight, dtype=dtype)
        return self.call(aten.mul.Tensor, rows, self.per_cell(weight, rows))

    def full(self, number: int, like: fx.Node) -> fx.Node:
        """A number, without dimensions, in the dtype of a node."""
        value = like.meta["val"]
        return self.call(aten.full.default, [], number, dtype=value.dtype, device=value.device)

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A tensor that is part of the module."""
        node = self.graph.get_attr(self.attach(f"_plait_{name}", value))
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return node

    def per_cell(self, values: fx.Node, rows: fx.Node) -> fx.Node:
        """One value per cell, ``[cells]`` or ``[cells, 1]``, in as many dimensions as ``rows``."""
        rank = rows.meta["val"].dim()
        if rank < values.meta["val"].dim():
            return self.call(aten.squeeze.dim, values, 1)
        while values.meta["val"].dim() < rank:
            values = self.call(aten.unsqueeze.default, values, -1)
        return values

    def _all_of(self, region: Region, outcome: Group) -> fx.Node:
        """Whether every cell names each branch of ``outcome`` once and no other one."""
        digits, once = self.digits(region, outcome), self.once(region, outcome, outcome)
        return self.call(aten.all.default, self.call(aten.eq.Scalar, digits, once))

    def has_digits(self, region: Region, members: Group) -> bool:
        """Whether `digits` are numbers that 64 bits hold."""
        return (len(members) + 1) * math.log2(region.share + 1) < 62

    def digits(self, region: Region, members: Group) -> fx.Node:
        """A number for each cell (int64 ``[cells]``), of which digit p counts the slots that name
        ``members[p]`` and the digit behind them those that name another branch.
        """
        call, index, base = self.call, region.index, region.share + 1
        below = call(aten.lt.Scalar, index, 0)
        above = call(aten.ge.Scalar, index, len(region.graphs))
        none = call(aten.logical_or.default, below, above)
        other = self.full(base ** len(members), index)
        digits = call(aten.where.self, none, self.full(0, index), other)
        for place, b in enumerate(members):
            named = call(aten.eq.Scalar, index, b)
            digits = call(aten.where.self, named, self.full(base**place, index), digits)
        return call(aten.sum.dim_IntList, digits, [1]) if region.share != 1 else digits

    def once(self, region: Region, members: Group, group: Group) -> int:
        """What the `digits` of a cell are that takes each branch of ``group`` once, and no more."""
        return sum((region.share + 1) ** members.index(b) for b in group)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)


def may_fail(module: fx.GraphModule) -> bool:
    """Whether operators of a branch may raise, or read out of range, for cells not meant for it."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if reads_by_index(node) and ops.category(node) == "library":
            return True
        if str(node.target).startswith(("aten._assert_async", "aten._assert_scalar")):
            if not is_bookkeeping(node):
                return True
    return any(may_fail(inner) for _, inner in branches_of(module))


def draws(module: fx.GraphModule) -> bool:
    """Whether a graph, or one of its branches, draws random numbers."""
    return any(map(is_random, module.graph.nodes)) or any(
        draws(inner) for _, inner in branches_of(module)
    )


def regions(module: fx.GraphModule) -> Iterator[Region]:
    """The regions of a graph, without those in its branches, in the order in which they run."""
    for node in list(module.graph.nodes):
        if is_region(node):
            region = region_of(node)
            if region is not None:
                yield region


def constant_index(region: Region) -> torch.Tensor | int | None:
    """A router's index where it depends on no input: the tensor itself, or the number that every
    element is; None where it is not known.
    """
    if region.is_cond:
        return None
    node = region.index
    if node.op == "get_attr":
        value = attribute(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]
        if isinstance(value, torch.Tensor) and value.dtype == torch.int64:
            return value.detach()
    known = uniform(node)
    return None if known is None else int(known)


def uniform(node: Any) -> torch.Tensor | None:
    """The value (no dimensions) that every element of ``node`` has whatever the inputs are."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    name = str(node.target)
    if node.op == "get_attr":
        value = attribute(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]
        if not 0 < value.numel() <= MOST_UNIFORM:
            return None
        first = value.detach().reshape(-1)[0]
        return first.clone() if bool((value == first).all()) else None
    if node.op != "call_function":
        return None
    args: Any = node.args
    if name == "aten.full.default" and isinstance(args[1], (int, float)):
        return torch.tensor(args[1], dtype=node.meta["val"].dtype)
    if name in _SPREAD:
        return uniform(args[0])
    if name not in _ELEMENTWISE:
        return None
    values = {a: uniform(a) for a in node.all_input_nodes}
    if any(v is None for v in values.values()):
        return None
    given = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    result = node.target(*given[0], **given[1])  # type: ignore[operator]
    return result if result.dtype == node.meta["val"].dtype else None


_SPREAD = frozenset(
    f"aten.{name}"
    for name in """expand.default view.default reshape.default unsqueeze.default squeeze.dim
    squeeze.dims clone.default permute.default repeat.default select.int slice.Tensor""".split()
)
"""Operators whose results hold values of their first argument only."""
_ELEMENTWISE = frozenset(
    f"aten.{name}"
    for name in """add.Tensor sub.Tensor mul.Tensor add.Scalar sub.Scalar mul.Scalar
    _to_copy.default bitwise_and.Tensor bitwise_and.Scalar bitwise_or.Tensor bitwise_xor.Tensor
    bitwise_xor.Scalar
    bitwise_right_shift.Tensor_Scalar bitwise_left_shift.Tensor_Scalar __rshift__.Scalar
    __lshift__.Scalar remainder.Scalar gt.Scalar ge.Scalar lt.Scalar le.Scalar eq.Scalar ne.Scalar
    where.self""".split()
)
