"""Experts of a routed layer on several devices: expert parallelism by rewriting the graph.

before: route(index, E) -> routed_linear .. routed_linear(scatter) -> weigh, sum over a cell's slots
after:  for each device the same on its own experts' weights, whose route names no expert for the
        slots of others; what the devices make is added up

A slot without an expert is a row of zeros, so each slot is computed on one device and the sum of
the slots is exact. Where a cell's slots are weighed and added up right behind, each device does so
with its own slots, and only cells travel (as in GShard, Lepikhin et al., 2021, but for sizes that
are known before: all cells go to each device, instead of those that it has experts for).

Nothing here decides which device holds which expert, or where the parts run.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ..kernels import ops
from .annotations import annotate
from .base import copy_graph
from .ir import Rewriter, attribute
from .remarks import Remark

aten = torch.ops.aten
NAME = "divide-experts"
Shares = Mapping[str, Sequence[int]]
"""Experts of a layer by device, ascending. Copies of an expert take its slots in turn."""
ROUTED = "plait.routed_linear.default"
_ORDER = ("offsets", "order")
"""What of a route a routed product reads, by the names of its arguments."""
_VIEWS = {"aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"}
_ALONG = {
    f"aten.{name}": dim
    for name, dim in (
        ("slice.Tensor", 0), ("select.int", 0), ("split.Tensor", 0), ("chunk.default", 0),
        ("split_with_sizes.default", 0), ("cat.default", 0), ("softmax.int", None),
        ("unsqueeze.default", None), ("squeeze.dims", None), ("glu.default", -1),
    )
}  # fmt: skip
"""Operators that work along a dimension, and the one where they name none."""


@dataclass(frozen=True)
class Piece:
    """Rows of a weight of the graph that was divided."""

    target: str
    rows: tuple[int, ...]


@dataclass
class Divided:
    """The new graph; ``pieces`` are its weights on the meta device that are rows of others.

    ``routers`` names the layers that were divided. What is made for a device is annotated with its
    name, its routed products with the fraction of the slots that they are likely to get.
    """

    module: fx.GraphModule
    pieces: dict[str, Piece] = field(default_factory=dict)
    routers: list[str] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)


class _Refused(Exception):
    """Why the experts of a layer stay together."""


def divide_experts(
    module: fx.GraphModule,
    shares: Callable[[fx.Node], tuple[str, Shares | None]],
) -> Divided:
    """Divides the layers that there are ``shares`` for: it tells the name of the layer that a
    ``plait::route`` node belongs to, and None where its experts are to stay together.

    So do they, with the remark PLT-DST-015, where they cannot be told apart.
    """
    result = Divided(copy_graph(module))
    rewriter = Rewriter(result.module, NAME)
    for node in list(rewriter.graph.nodes):
        if str(node.target) != "plait.route.default":
            continue
        name, parts = shares(node)
        if parts is None:
            continue
        try:
            layer = _Layer(rewriter, node, result.pieces)
            layer.divide({d: tuple(e) for d, e in parts.items() if len(e)})
            result.routers.append(name)
        except _Refused as refused:
            hint = "the layer runs on one device: give one that holds it"
            reason = f"the experts of {name!r} stay together: {refused}"
            remark = Remark("PLT-DST-015", "missed", NAME, (node.name,), reason, hint)
            result.remarks.append(remark)
    rewriter.graph.eliminate_dead_code()
    result.module = rewriter.finish()
    result.module.recompile()
    return result


class _Layer:
    """One route and what runs in its order, up to the products that write back to slots."""

    def __init__(self, rewriter: Rewriter, route: fx.Node, pieces: dict[str, Piece]) -> None:
        self.rewriter, self.route, self.pieces = rewriter, route, pieces
        index: Any = route.args[0]
        experts: Any = route.args[1]
        self.index: fx.Node = index
        self.experts: int = experts
        self.slots = index.meta["val"].numel()
        self.inside: dict[fx.Node, None] = {route: None}
        self.results: list[fx.Node] = []
        self._grow()
        if not self.results:
            raise _Refused("no routed product writes back to slots")
        for node in self.inside:
            if node not in self.results and any(u not in self.inside for u in node.users):
                raise _Refused(f"{node.name} is read outside of the experts")
            self._check(node)
        self.tails = {x: self._tail(x) for x in self.results}

    def _grow(self) -> None:
        for node in self.rewriter.graph.nodes:
            sources = [x for x in node.all_input_nodes if x in self.inside]
            if node.op == "output" or all(x in self.results for x in sources):
                continue
            if any(x in self.results for x in sources):
                raise _Refused(f"{node.name} reads slots and experts' rows")
            self.inside[node] = None
            if str(node.target) == ROUTED and ops.argument(node, "scatter"):
                self.results.append(node)

    # -- what treats each row alone --------------------------------------------------------------

    def _check(self, node: fx.Node) -> None:
        """Refuses what may not treat rows alone: they come in another order on each device."""
        name = str(node.target)
        if node is self.route or (node.target is operator.getitem and node.args[0] is self.route):
            return
        if name == ROUTED:
            for weight in _weights(node):
                self._rows_of(weight, (0,))
            if not all(self._is(ops.argument(node, n), k) for k, n in enumerate(_ORDER)):
                raise _Refused(f"{node.name} reads rows in the order of another route")
            if (node.args[0] in self.inside) == (ops.argument(node, "share") == 0):
                return
        elif name == "plait.take.default":
            if node.args[0] not in self.inside:
                return
        elif self._keeps(node, name):
            return
        raise _Refused(f"{node.name} ({name}) may mix rows")

    def _is(self, node: Any, part: int) -> bool:
        """Whether a node is where experts' rows begin (0), or the order of slots (1)."""
        return node.target is operator.getitem and node.args == (self.route, part)

    def _keeps(self, node: fx.Node, name: str) -> bool:
        if node.target is operator.getitem:
            return True
        given = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]
        rows = [x for x in given if x in self.inside]
        if any(_first(x) != self.slots or self._is(x, 0) for x in rows):
            return False
        kind, rank = ops.CATEGORY.get(name), max(x.meta["val"].dim() for x in rows)
        alone = len(rows) == len(given)
        if name in _VIEWS:
            return _first(node) == self.slots
        if name in _ALONG:
            rank += name == "aten.unsqueeze.default"
        if name in _ALONG or kind == "reduce":
            dims = ops.argument(node, "dim")
            dims = _ALONG.get(name) if dims is None else dims
            dims = [dims] if isinstance(dims, int) else dims
            return alone and bool(dims) and all(d % rank for d in dims)
        if name in ("aten.layer_norm.default", "aten.rms_norm.default"):
            return rows == [node.args[0]] and len(node.args[1]) < rank  # type: ignore[arg-type]
        if name == "aten.linear.default":
            return rows == [node.args[0]] and rank > 1
        if kind == "pointwise":
            others = [x.meta["val"] for x in given if x not in self.inside]
            shared = all(x.dim() < rank or x.shape[0] == 1 for x in others)
            return shared and all(x.meta["val"].dim() == rank for x in rows)
        return False

    # -- weights of some experts -----------------------------------------------------------------

    def _rows_of(self, weight: fx.Node, rows: tuple[int, ...], make: bool = False) -> Any:
        """The node of the weights of experts ``rows``; without ``make`` only whether it can be."""
        name, args = str(weight.target), weight.args
        if _first(weight) != self.experts:
            raise _Refused(f"{weight.name} has no row for each expert")
        if weight.op == "get_attr":
            return self._piece(weight, rows) if make else None
        if name in ("aten.permute.default", "aten.transpose.int", "aten.clone.default"):
            rank = weight.meta["val"].dim()
            dims: Any = args[1] if name == "aten.permute.default" else args[1:]
            kept = dims[0] % rank == 0 if name == "aten.permute.default" else all(
                d % rank for d in dims
            )  # fmt: skip
            if kept:
                whole: Any = args[0]
                source = self._rows_of(whole, rows, make)
                return self._again(weight, {whole: source}) if make else None
        if name in _VIEWS and len(self._stacked(args[0])) == self.experts:
            parts = self._stacked(args[0])
            if not make:
                return None
            chosen = [parts[r] for r in rows]
            joined = self.rewriter.call(aten.cat.default, (chosen,), like=weight)
            shape = [len(rows), *weight.meta["val"].shape[1:]]
            return self.rewriter.call(aten.reshape.default, (joined, shape), like=weight)
        raise _Refused(f"{weight.name} ({name}) is computed")

    def _stacked(self, node: Any) -> list[fx.Node]:
        """The equal parts that a tensor is joined of along its first dimension."""
        if str(node.target) != "aten.cat.default" or (len(node.args) > 1 and node.args[1] != 0):
            return []
        parts: Any = node.args[0]
        return list(parts) if len({tuple(x.meta["val"].shape) for x in parts}) == 1 else []

    def _piece(self, weight: fx.Node, rows: tuple[int, ...]) -> fx.Node:
        value: Any = attribute(self.rewriter.graph_module, str(weight.target))
        if not value.is_meta:
            hint = f"{weight.target}_of_{rows[0]}"
            return self.rewriter.constant(value[list(rows)], hint, weight)
        shape = (len(rows), *value.shape[1:])
        piece = Piece(str(weight.target), rows)
        known = next((t for t, p in self.pieces.items() if p == piece), None)
        if known is None:
            hollow = torch.empty(shape, dtype=value.dtype, device="meta")
            node = self.rewriter.constant(hollow, f"{weight.target}_of_{rows[0]}", weight)
        else:  # layers may share weights
            with self.rewriter.graph.inserting_before(weight):
                node = self.rewriter.graph.create_node("get_attr", known)
        with self.rewriter.mode:
            node.meta["val"] = torch.empty(shape, dtype=value.dtype)
        self.pieces[str(node.target)] = piece
        return node

    def _again(self, node: fx.Node, instead: Mapping[Any, Any]) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda x: instead.get(x, x))
        return self.rewriter.call(node.target, args, kwargs, like=node)  # type: ignore[arg-type]

    # -- what weighs slots and adds them up ------------------------------------------------------

    def _tail(self, result: fx.Node) -> list[fx.Node]:
        """What follows a result that is linear in it, up to a sum over a cell's slots."""
        found: list[fx.Node] = []
        width, end, node = result.meta["val"].shape[1], 0, result
        while len(node.users) == 1 and not end:
            (user,) = node.users
            name, value = str(user.target), user.meta.get("val")
            if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[-1] != width:
                break
            if name in _VIEWS or (name == "aten.mul.Tensor" and user.args[0] is not user.args[1]):
                if math.prod(value.shape) != self.slots * width:
                    break
            elif name == "aten.sum.dim_IntList":
                dims: Any = user.args[1]
                rank = node.meta["val"].dim()
                if not dims or any(d % rank == rank - 1 for d in dims):
                    break
                end = len(found) + 1
            else:
                break
            found.append(user)
            node = user
        # Sums of sums round more often than a sum, which 16 bits would show.
        exact = bool(found) and found[-1].meta["val"].dtype in (torch.float32, torch.float64)
        return found[:end] if exact else []

    # -- dividing ---------------------------------------------------------------------------------

    def divide(self, shares: Mapping[str, tuple[int, ...]]) -> None:
        """Lets each device make the slots of its experts, and adds up what they make."""
        holders = [[d for d, held in shares.items() if e in held] for e in range(self.experts)]
        if not all(holders):
            raise _Refused(f"expert {holders.index([])} is on no device")
        made: dict[fx.Node, list[fx.Node]] = {x: [] for x in self.results}
        for device, held in shares.items():
            before = set(self.rewriter.graph.nodes)
            for result, node in self._part(device, held, holders).items():
                made[result].append(node)
            for node in self.rewriter.graph.nodes:
                if node not in before:
                    annotate(node, device=device)
        for result, parts in made.items():
            last = [result, *self.tails[result]][-1]
            total = parts[0]
            for part in parts[1:]:
                total = self.rewriter.call(aten.add.Tensor, (total, part), like=last)
                annotate(total, apart=True)  # or slots would travel, to be added up behind
            last.replace_all_uses_with(total)

    def _part(
        self, device: str, held: tuple[int, ...], holders: Sequence[Sequence[str]]
    ) -> dict[fx.Node, fx.Node]:
        """What one device makes: for each result its own slots, added up where they can be."""
        index = self._index(device, held, holders)
        route = self.rewriter.call(
            torch.ops.plait.route.default, (index, len(held)), like=self.route
        )
        likely = sum(1 / len(holders[e]) for e in held) / self.experts
        instead: dict[Any, Any] = {self.route: route}
        for node in self.inside:
            if node is self.route:
                continue
            if str(node.target) == ROUTED:
                weights = {w: self._rows_of(w, held, make=True) for w in _weights(node)}
                instead[node] = self._again(node, {**instead, **weights})
                annotate(instead[node], load=likely)
            else:
                instead[node] = self._again(node, instead)
        return {x: self._added(x, instead[x], index, len(held)) for x in self.results}

    def _index(
        self, device: str, held: tuple[int, ...], holders: Sequence[Sequence[str]]
    ) -> fx.Node:
        """The route of one device: the position of a slot's expert among its own, or one past
        them; below 0, or beyond, for slots that no device computes.
        """
        call, like = self.rewriter.call, self.route
        alone = all(len(holders[e]) == 1 for e in held)
        if alone and held == tuple(range(held[0], held[-1] + 1)):
            return call(aten.sub.Tensor, (self.index, held[0]), like=like)
        turns = math.lcm(*(len(holders[e]) for e in held))
        table = torch.full((turns, self.experts + 2), len(held), dtype=torch.int64)
        for turn in range(turns):
            for position, expert in enumerate(held):
                if holders[expert][turn % len(holders[expert])] == device:
                    table[turn, 1 + expert] = position
        known = call(aten.clamp.default, (self.index, -1, self.experts), like=like)
        entry = call(aten.add.Tensor, (known, 1), like=like)
        if turns > 1:  # slots take the copies of an expert in turn
            shape = self.index.meta["val"].shape
            turn = (torch.arange(self.slots) % turns * (self.experts + 2)).reshape(shape)
            turn_of = self.rewriter.constant(turn, "turns", like)
            entry = call(aten.add.Tensor, (entry, turn_of), like=like)
        flat = self.rewriter.constant(table.reshape(-1), "experts_held", like)
        return call(aten.index.Tensor, (flat, [entry]), like=like)

    def _added(self, result: fx.Node, made: fx.Node, index: fx.Node, count: int) -> fx.Node:
        """The tail of a result for one device's slots. Others' are zeros that stay zeros, whatever
        they are multiplied with.
        """
        tail, instead = self.tails[result], {result: made}
        before = result
        for node in tail:
            instead[node] = self._again(node, instead)
            if str(node.target) == "aten.mul.Tensor":
                call, value = self.rewriter.call, node.meta["val"]
                inside = call(aten.ge.Scalar, (index, 0), like=node)
                below = call(aten.lt.Scalar, (index, count), like=node)
                known = call(aten.logical_and.default, (inside, below), like=node)
                known = call(aten.reshape.default, (known, [*value.shape[:-1], 1]), like=node)
                options = {"dtype": value.dtype, "device": value.device}
                zero = call(aten.full.default, ([], 0.0), options, like=node)
                instead[node] = call(aten.where.self, (known, instead[node], zero), like=node)
            before = node
        return instead[before]


def _weights(product: fx.Node) -> list[fx.Node]:
    """The operands of a routed product that have a row for each expert."""
    own = (ops.argument(product, name) for name in ("weight", "bias"))
    return [x for x in own if x is not None]


def _first(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else None
