"""Groups over rows: normalisations, softmax and reductions with the pointwise operators around
them.

A task is a block of rows. For each row, every reduction of the group is one sweep over the row, and
all outputs that span the space are stored by a last one. Values that several sweeps need and that
cost more than a load are kept on the stack (`keeps`). See `row_space` for what such a group may
hold and `row_engine` for the loops; `reduce` uses the same code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T
from tvm.sym import Analyzer

from ..abi import Dim, Kernel, TensorArg, ceil_div, contiguous_strides, product
from ..emit import Emitter, Expr, Ref
from ..group import IO, Group, Unsupported, symbols_of
from ..ops import category, evaluate
from ..ops.common import dims_of, i64, unravel
from ..ops.rows import RowContext
from ..target import Target
from ..value import Value
from .row_across import AcrossGroups, AcrossRows
from .row_engine import AlongRow, Engine
from .row_space import RowSpace, is_heavy, row_bound, row_space, size

TASK_ELEMENTS = 8192
MIN_TASKS = 16  # enough to balance a few workers, while a task still is a row or more
SCANNED = 8  # rows apart in memory that are scanned at a time
CHANNELS = -1  # as the axis of the lanes: channels of whole groups
MOST_VECTORS = 12  # of them, in flight
FEW_TASKS = 4
MIN_RUN = 64  # shorter runs are merged with the folded axis before them

# Folded results that need a second sweep over their operand, or that are as large as it.
_TWO_SWEEPS = ("var", "std", "softmax", "norm", "logsumexp")


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """One configuration: the axis of the lanes, vectors of ``width``, ``unroll`` of them at a time,
    ``grain`` rows to a task, ``merged`` axes walked as one run.

    Raises `Unsupported` for a group that `lower` would decline.
    """
    space = row_space(group, io)
    lane = space.order[-1]
    lanes = max(1, target.vector_bytes // 4)
    in_turn = lane in space.axes and any(category(n) == "scan" for n in group.nodes)
    if in_turn:
        lane = _lane_of_scan(space)
    if space.grouped and lane == 2 and (block := _block_of_groups(space, lanes)):
        return [{"lane": CHANNELS, **block, "grain": 1, "merged": 0}]
    if lane not in space.axes:
        width, unroll = _fit(space.dims[lane], *((SCANNED, 1) if in_turn else (lanes, 4)))
        return [{"lane": lane, "width": width, "unroll": unroll, "grain": 1, "merged": 0}]
    run, merged = (1, 0) if in_turn else _merge(space, lane, group, io)
    width, unroll = _fit(run, lanes, 4)
    count, rows = space.count, space.rows
    grain = max(1, TASK_ELEMENTS // max(1, count if isinstance(count, int) else 1024))
    if isinstance(rows, int):
        grain = max(1, min(grain, -(-rows // MIN_TASKS)))
    return [{"lane": lane, "width": width, "unroll": unroll, "grain": grain, "merged": merged}]


def _block_of_groups(space: RowSpace, lanes: int) -> dict[str, int] | None:
    """Vectors that cover the channels of whole groups; None where these are too few or too many."""
    images, groups, each = space.dims[:3]
    if not isinstance(groups, int) or not isinstance(each, int):
        return None
    while lanes > 1:
        block = math.lcm(lanes, each)
        if block <= min(groups * each, MOST_VECTORS * lanes):
            wider = 2 * block  # whose vectors hide each other's latency
            tasks = groups * each // wider * (images if isinstance(images, int) else 1)
            if tasks >= FEW_TASKS and wider <= 4 * lanes:
                block = wider
            return {"width": lanes, "unroll": block // lanes}
        lanes //= 2
    return None


def _lane_of_scan(space: RowSpace) -> int:
    """An axis for lanes that run along rows side by side, for the elements of a row come in turns;
    the rows' own where no other is long enough.
    """
    for axis in reversed(space.order):
        if axis not in space.axes and size(space.dims[axis]) >= SCANNED:
            return axis
    return space.order[-1]


def _merge(space: RowSpace, lane: int, group: Group, io: IO) -> tuple[Dim, int]:
    """The length of the lanes' run, and how many folded axes before ``lane`` it takes in.

    Where memory is contiguous over the axes, the longer the better; otherwise up to `MIN_RUN`.
    """
    run, merged = space.dims[lane], 0
    natural = space.order == tuple(range(len(space.dims)))
    while natural and lane == max(space.axes) and isinstance(run, int):
        before = lane - merged - 1
        if before not in space.axes or not isinstance(space.dims[before], int):
            break
        contiguous = not space.grouped and all(
            _is_contiguous(io[n], space.dims[before:]) for n in (*group.inputs, *group.outputs)
        )
        if run >= MIN_RUN and not contiguous:
            break
        run, merged = run * space.dims[before], merged + 1  # type: ignore[operator]
    return run, merged


def _is_contiguous(arg: TensorArg, trailing: tuple[Dim, ...]) -> bool:
    """Whether a tensor has these trailing dimensions contiguously, or one element for all."""
    k = len(trailing)
    if arg.shape[-k:] == trailing:
        return arg.strides[-k:] == contiguous_strides(trailing)
    return all(d == 1 for d in arg.shape[-k:])


def _fit(extent: Dim, lanes: int, unroll: int) -> tuple[int, int]:
    """(vector width, vectors at a time) that fit into ``extent`` elements."""
    if not isinstance(extent, int):
        return lanes, unroll
    while lanes > max(1, extent):
        lanes //= 2
    while unroll > 1 and lanes * unroll > extent:
        unroll //= 2
    return lanes, unroll


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers a group with reductions.

    Raises `Unsupported` for groups that `row_space` declines and operators without a converter.
    """
    if target.kind != "cpu":
        raise Unsupported("PLT-ROW-007", f"this template does not generate code for {target.kind}")
    space = row_space(group, io)
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    symbols = symbols_of(group, (*inputs, *outputs))
    em = Emitter(name, inputs, outputs, symbols)
    along = config["lane"] in space.axes
    with em.function() as task:
        if space.rows == 0:
            T.evaluate(0)
            tasks: Dim = 0
        else:
            tasks = (_along if along else _across)(em, group, space, config, task)
    elements = product(space.dims)
    return em.kernel(tasks, config, flops=elements * 2 * len(group.nodes))


def _along(em: Emitter, group: Group, space: RowSpace, config: dict[str, Any], task: Expr) -> Dim:
    """Emits tasks that are blocks of rows; returns how many there are."""
    grain = config["grain"]
    kept = [em.dim(space.dims[a]) for a in space.kept]
    rows = em.dim(space.rows)
    first = T.bind(task * grain)
    with T.serial(i64(0), tir.min(i64(grain), rows - first)) as row:
        index = [T.bind(i) for i in unravel(first + row, kept)] if kept else []
        engine = AlongRow(
            em, space, index, config["lane"], config["merged"], config["width"], config["unroll"]
        )
        _Body(em, group, space, engine).emit()
    return ceil_div(space.rows, grain)


def _across(em: Emitter, group: Group, space: RowSpace, config: dict[str, Any], task: Expr) -> Dim:
    """Emits tasks that are some vectors of rows; returns how many there are."""
    lane, width, unroll = config["lane"], config["width"], config["unroll"]
    block = width * unroll
    taken = (1, 2) if lane == CHANNELS else (lane,)
    length = product([space.dims[a] for a in taken])
    extent, blocks = em.dim(length), ceil_div(length, block)
    others = [a for a in space.kept if a not in taken]
    parts = unravel(task, [*(em.dim(space.dims[a]) for a in others), em.dim(blocks)])
    *outer, number = [T.bind(p) for p in parts]
    where = dict(zip(others, outer, strict=True))

    def emit(start: Expr, width: int, unroll: int) -> None:
        engine: Engine
        if lane == CHANNELS:
            engine = AcrossGroups(em, space, where, start, width, unroll)
        else:
            engine = AcrossRows(em, space, where, lane, start, width, unroll)
        _Body(em, group, space, engine).emit()

    # The last block is moved back to end where the axis ends: some rows are computed twice.
    start = tir.min(number * block, extent - block)
    if isinstance(length, int):
        emit(T.bind(start), width, unroll)
    else:
        with T.If(extent >= i64(block)):
            with T.Then():
                emit(T.bind(start), width, unroll)
            with T.Else(), T.serial(i64(0), extent) as one:
                emit(one, 1, 1)
    return product([space.dims[a] for a in others]) * blocks


class _Body:
    """Emits everything that is done for the rows an engine stands at."""

    def __init__(self, em: Emitter, group: Group, space: RowSpace, engine: Engine) -> None:
        self.em, self.group, self.space, self.engine = em, group, space, engine
        self.env = {n: _input(r) for n, r in zip(group.inputs, em.inputs, strict=True)}
        self.ctx = RowContext(em, self.env, engine)

    def emit(self) -> None:
        kept, bound = keeps(self.group, self.space), row_bound(self.group)
        for node in self.group.nodes:
            try:
                evaluate([node], self.ctx)
            except NotImplementedError as error:
                raise Unsupported("PLT-ROW-008", str(error)) from error
            if node in kept:
                self.env[node] = self.engine.keep(self.env[node])
            elif node in bound and self._is_row_value(node):
                self.env[node] = self._once(self.env[node])
        self._store()

    def _is_row_value(self, node: fx.Node) -> bool:
        """Whether a node computes on folded values."""
        if category(node) != "pointwise":
            return False
        shape = dims_of(node)
        return shape != self.space.shape and self.space.is_row_shape(shape)

    def _once(self, value: Value) -> Value:
        def compute() -> Expr:
            index = self.space.row_index(self.engine.row_here(), len(value.shape))
            return value.load(index)

        scalar = self.engine.define(value.dtype, compute)
        return Value(value.shape, value.dtype, lambda _: scalar.load(()))

    def _store(self) -> None:
        pairs = list(zip(self.group.outputs, self.em.outputs, strict=True))
        whole = [p for p in pairs if dims_of(p[0]) == self.space.shape]
        single = [p for p in pairs if dims_of(p[0]) != self.space.shape]

        def elements() -> None:
            at = self.engine.here()
            results = [self.env[n].load(at) for n, _ in whole]
            for (_, ref), result in zip(whole, results, strict=True):
                ref.store_flat(result, _simple(ref.offset(at)))

        def rows() -> None:
            for node, ref in single:
                value = self.env[node]
                at = self.space.row_index(self.engine.row_here(), len(value.shape))
                ref.store(value.load(at), at)

        if whole:
            self.engine.sweep(elements)
        if single:
            self.engine.each_row(rows)


def _input(ref: Ref) -> Value:
    """The value that reads a tensor argument, at an offset that says when lanes are contiguous."""

    def load(index: Sequence[Expr]) -> Expr:
        return ref.load_flat(_simple(ref.offset(index)))

    return Value(tuple(ref.shape), ref.arg.dtype, load)


def _simple(offset: Expr) -> Expr:
    """An offset without the quotients and remainders of merged axes.

    TVM would simplify it only after it has become a vector of offsets, which is too late.
    """
    return Analyzer().simplify(offset)


def keeps(group: Group, space: RowSpace) -> set[fx.Node]:
    """The values to remember: needed by several sweeps, and dearer than reading them again.

    A value is needed by the sweeps of the reductions that read it and, where it leads to an output,
    by the last sweep. Of a chain of such values the last one is kept.
    """
    sweeps: dict[fx.Node, frozenset[Any]] = {}
    inside = set(group.nodes)
    for node in reversed(group.nodes):
        need: set[Any] = {"out"} if node in group.outputs else set()
        for user in node.users:
            if user not in inside:
                continue
            if is_heavy(user) and user.args[0] is node:
                need |= {(user, 0)}
                if any(word in str(user.target) for word in _TWO_SWEEPS):
                    need |= {(user, 1)} | _parts(user, sweeps)
            else:
                need |= sweeps.get(user, frozenset())
        sweeps[node] = frozenset(need)
    chosen: set[fx.Node] = set()
    cost: dict[fx.Node, int] = {}
    for node in group.nodes:
        if not _spans(node, space) or is_heavy(node):
            continue
        sources = [a for a in node.all_input_nodes if _is_tensor(a)]
        far = sum(1 for a in sources if a not in inside)
        near = sum(cost.get(a, 0) for a in sources if a in inside and a not in chosen)
        cost[node] = 1 + max(0, far - 1) + near
        frontier = node in group.outputs or any(
            u in inside and (is_heavy(u) or sweeps[u] != sweeps[node]) for u in node.users
        )
        if len(sweeps[node]) > 1 and frontier and cost[node] > 1:
            chosen.add(node)
    return chosen


def _parts(node: fx.Node, sweeps: dict[fx.Node, frozenset[Any]]) -> set[Any]:
    """The sweeps that need a heavy node's result."""
    need = set(sweeps.get(node, frozenset()))
    for user in node.users:
        if user.target is operator.getitem:
            need |= sweeps.get(user, frozenset())
    return need


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _spans(node: fx.Node, space: RowSpace) -> bool:
    return _is_tensor(node) and dims_of(node) == space.shape
