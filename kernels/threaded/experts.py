"""Products of rows with the weights of their branch, where only the run knows who gets how many.

The grid holds for every routing: there are as many tiles of rows as any routing can need, and a
block finds its tile's branch by comparing with the offsets, which stay on the device. Tile t is
branch b's where ``offsets[b] // rows + b <= t < offsets[b + 1] // rows + b + 1``: these ranges
follow one another, and are at least as long as branch b has tiles. With few rows, tile t begins at
row t of the order instead, if a multiple of a tile lies between it and the first of its branch.
Blocks without rows end at once. Rows of no branch are one more branch, whose product has no steps.

Where a branch gets many rows, a block keeps a tile of both factors in shared memory. Where it gets
few, a warp reads each row of a weight once, side by side, for all rows of the tile.

Where weights lie in slots, a table tells the slot of each branch. A branch that has none is left
out, as if it had no rows, except that nothing is written for it: what runs later with another table
writes the rest.

Pointwise operators that follow run on the sums. A gate's two operands, which are columns of one
product, are made by the same thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import compulsory_bytes
from ..definition import THREADS, Definition, Writer, exprs, known
from ..emit import Expr
from ..gates import gate_of
from ..group import IO, Group, Unsupported
from ..math import f32, i32
from ..ops import argument, category, evaluate
from ..target import Target
from ..value import Value
from .common import (
    LANES,
    WARP,
    barrier,
    bytes_of,
    div,
    has_vectors,
    launch,
    local,
    mod,
    narrow,
    shared,
    shared_out,
    unrolled,
    when,
    wide,
    write,
)

FEW = 8
"""Rows of a branch, on average, up to which weights are read by warps."""
_STEPS = 16  # of rows that a tile in shared memory holds
_SIDE = 16  # threads along each side of a tile
_WARPS = THREADS // WARP


def experts(group: Group, io: IO, target: Target) -> Definition:
    """``plait.routed_linear`` and the pointwise operators after it.

    Raises `Unsupported` for other types than float32.
    """
    spec = _Spec(group, io)
    touched = min(spec.branches, spec.rows)  # branches that can get a row
    nbytes = compulsory_bytes([io[n] for n in (*group.inputs, *group.outputs) if n != spec.weight])
    assert isinstance(nbytes, int)
    nbytes += bytes_of(io[spec.weight]) * touched // known(io[spec.weight].shape)[0]
    flops = 2 * spec.rows * spec.columns * spec.depth

    def body(w: Writer, vectors: bool) -> None:
        (_Few if spec.few else _Tiled)(w, spec, vectors).write()

    return write(group, io, target, body, flops, nbytes)


class _Spec:
    """What a group computes. ``columns`` are the product's, ``stored`` the result's; ``halves`` a
    gate's operands in them, of which there are ``parts``.
    """

    def __init__(self, group: Group, io: IO) -> None:
        self.node = node = next(n for n in group.nodes if category(n) == "experts")
        self.x, self.weight, self.bias = (argument(node, k) for k in ("x", "weight", "bias"))
        self.offsets, self.order = argument(node, "offsets"), argument(node, "order")
        self.slots = argument(node, "slots")
        self.share, self.scatter = int(argument(node, "share")), bool(argument(node, "scatter"))
        self.transposed = bool(argument(node, "transposed"))
        operands = [n for n in (self.x, self.weight, self.bias) if n is not None]
        if any(io[n].dtype != torch.float32 for n in operands):
            raise Unsupported("PLT-EXP-002", "routed products have GPU kernels in float32 only")
        self.depth, self.columns = known(io[self.weight].shape)[1:]
        self.branches = known(io[self.offsets].shape)[0] - 1
        if not self.transposed:
            self.depth, self.columns = self.columns, self.depth
        self.rows = known(io[self.order].shape)[0]
        if self.rows * FEW >= 1 << 31:
            raise Unsupported("PLT-EXP-006", f"{self.rows} rows are not numbered in 32 bits")
        self.halves, self.alternate = gate_of(group, node)
        self.parts = 2 if self.halves else 1
        self.stored = self.columns // self.parts
        self.mean = self.rows / self.branches
        self.few = self.mean <= FEW

    def column(self, column: Expr, part: int) -> Expr:
        """The product's column of a column of one operand."""
        if self.alternate:
            return column * 2 + part
        return column + part * self.stored


class _Body:
    """One block's work on ``high`` rows and ``across`` columns of each operand.

    ``begin``, ``count`` and ``branch`` are the tile's; ``source`` and ``dest`` hold, for each of
    its rows, that of ``x`` and that of the result.
    """

    high: int
    across: int

    def __init__(self, w: Writer, spec: _Spec, vectors: bool) -> None:
        self.w, self.spec = w, spec
        self.x, self.weight = w.ctx.env[spec.x], w.ctx.env[spec.weight]
        physical = dict(zip(w.group.inputs, w.inputs, strict=True))
        self.x_vectors = vectors and has_vectors(physical[spec.x], 1)
        beside = not spec.transposed or (not spec.alternate and spec.stored % LANES == 0)
        self.weight_vectors = vectors and beside and has_vectors(physical[spec.weight], 2)
        self._sums: list[Expr] = [f32(0.0)] * spec.parts

    def write(self) -> None:
        spec, high = self.spec, self.high
        by_row = spec.rows <= spec.rows // high + spec.branches + 1
        tiles = spec.rows if by_row else spec.rows // high + spec.branches + 1
        panels = -(-spec.stored // self.across)
        self._evaluate()
        with launch(tiles * panels) as (block, thread):
            self.thread = thread
            self.first_column = T.bind(div(block, tiles) * self.across)
            self._find(T.bind(mod(block, tiles)), by_row)
            self.source, self.dest = (shared(high, "int32") for _ in range(2))
            self._rows()
            inside = tir.And(self.count > 0, self.branch < spec.branches)
            self.active = T.bind(tir.Select(inside, i32(1), i32(0)))
            # A branch to read from, also where nothing is read.
            self.own = T.bind(wide(tir.min(self.branch, i32(spec.branches - 1))))
            self.matrix = self.own if spec.slots is None else T.bind(self._slot())
            self._product()

    def _product(self) -> None:
        raise NotImplementedError

    def _slot(self) -> Expr:
        """Where the branch's matrix lies, or some other one."""
        return wide(tir.max(self.w.ctx.env[self.spec.slots].load([self.own]), i32(0)))

    def _find(self, tile: Expr, by_row: bool) -> None:
        spec, high = self.spec, self.high
        offsets = self.w.ctx.env[spec.offsets]
        found = shared(3, "int32")  # begin, end, branch
        with shared_out(spec.branches + 1, self.thread) as b:
            low = T.bind(narrow(offsets.load([wide(b)])))
            stop = T.bind(
                tir.if_then_else(
                    b < spec.branches,
                    narrow(offsets.load([wide(tir.min(b + 1, i32(spec.branches)))])),
                    i32(spec.rows),
                )
            )
            first = low if by_row else div(low, high) + b
            last = stop if by_row else div(stop, high) + b + 1
            with when(tir.And(tile >= first, tile < last)):
                if by_row:
                    begin = tir.Select(tir.EQ(mod(tile - low, high), i32(0)), tile, stop)
                else:
                    begin = low + (tile - first) * high
                for k, value in enumerate((begin, stop, b)):
                    T.buffer_store(found, value, [k])
        barrier()
        self.begin, self.branch = T.bind(found[0]), T.bind(found[2])
        count = T.bind(tir.max(tir.min(found[1] - found[0], i32(high)), i32(0)))
        if spec.slots is None:
            self.count = count
            return
        # A branch without a slot is left out; rows of no branch are not.
        own = self.w.ctx.env[spec.slots].load([wide(tir.min(self.branch, i32(spec.branches - 1)))])
        absent = tir.And(self.branch < spec.branches, own < i32(0))
        self.count = T.bind(tir.Select(absent, i32(0), count))

    def _rows(self) -> None:
        """Rows beyond the last of the tile are the last one again."""
        spec, order = self.spec, self.w.ctx.env[self.spec.order]
        with when(self.thread < self.high):
            last = tir.max(self.count - 1, i32(0))
            place = T.bind(tir.min(self.begin + tir.min(self.thread, last), i32(spec.rows - 1)))
            slot = T.bind(narrow(order.load([wide(place)])))
            T.buffer_store(
                self.source, div(slot, spec.share) if spec.share else place, [self.thread]
            )
            T.buffer_store(self.dest, slot if spec.scatter else place, [self.thread])
        barrier()

    # -- factors ----------------------------------------------------------------------------------

    def load(
        self, into: Any, vectors: bool, at: Callable[[Expr], Expr], limit: int | None,
        read: Callable[[Expr], Expr], step: int = 1,
    ) -> None:  # fmt: skip
        """`LANES` elements ``read(at + lane * step)``, those from ``limit`` on being zeros."""
        if vectors:
            start = T.bind(at(i32(0)))

            def vector(zero: bool) -> None:
                with T.vectorized(i32(LANES)) as v:
                    T.buffer_store(into, f32(0.0) if zero else read(start + v), [v])

            _within(start, limit, vector)
            return
        with unrolled(LANES) as v:
            place = at(v * step)
            value = read(place)
            if limit is not None:
                value = tir.if_then_else(place < limit, value, f32(0.0))
            T.buffer_store(into, value, [v])

    def x_at(self, row: Expr, k: Expr) -> Expr:
        """The left factor at a row of the tile."""
        return self.x.load([wide(self.source[row]), wide(k)])

    def weight_at(self, k: Expr, column: Expr, part: int) -> Expr:
        """The right factor at a column of an operand, the last one where there are not so many."""
        spec = self.spec
        n = wide(spec.column(tir.min(column, i32(spec.stored - 1)), part))
        pair = [wide(k), n] if spec.transposed else [n, wide(k)]
        return self.weight.load([self.matrix, *pair])

    def take_columns(
        self, into: Any, k: Expr, column: Expr, step: int, part: int, limit: int | None
    ) -> None:
        """`LANES` columns of row ``k`` of a weight, zeros from row ``limit`` on."""
        spec, row = self.spec, T.bind(k)

        def fill(zero: bool) -> None:
            if zero:
                with unrolled(LANES) as v:
                    T.buffer_store(into, f32(0.0), [v])
            elif self.weight_vectors:  # all of a vector is inside or beyond the last column
                first = T.bind(tir.min(column, i32(spec.stored - LANES)))
                with T.vectorized(i32(LANES)) as v:
                    at = [self.matrix, wide(row), wide(spec.column(first + v, part))]
                    T.buffer_store(into, self.weight.load(at), [v])
            else:
                with unrolled(LANES) as v:
                    T.buffer_store(into, self.weight_at(row, column + v * step, part), [v])

        _within(row, limit, fill)

    # -- results ----------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        w, spec = self.w, self.spec
        shape = exprs((spec.rows, spec.stored))
        for k, part in enumerate(spec.halves or (spec.node,)):
            w.ctx.env[part] = Value(shape, torch.float32, lambda _, k=k: self._sums[k])
        w.ctx.env.setdefault(spec.node, None)
        evaluate([n for n in w.group.nodes if n not in w.ctx.env], w.ctx)
        self.result: Value = w.ctx.env[w.group.outputs[0]]

    def store(self, row: Expr, column: Expr, sums: list[Expr]) -> None:
        """Stores an element of the tile, if there is one, from the sums of the operands."""
        spec, w = self.spec, self.w
        with when(tir.And(row < self.count, column < spec.stored)):
            if spec.bias is not None:
                bias = w.ctx.env[spec.bias]
                sums = [
                    s
                    + tir.if_then_else(
                        self.branch < spec.branches,
                        bias.load([self.own, wide(spec.column(column, part))]),
                        f32(0.0),
                    )
                    for part, s in enumerate(sums)
                ]
            self._sums[:] = sums
            at = [T.bind(wide(self.dest[row])), T.bind(wide(column))]
            w.store(w.out_buffers[0], w.outputs[0], at, self.result)


class _Tiled(_Body):
    """A tile of both factors in shared memory; a thread sums up ``tm`` rows by ``tn`` columns."""

    def __init__(self, w: Writer, spec: _Spec, vectors: bool) -> None:
        super().__init__(w, spec, vectors)
        self.tm = 2 if spec.mean <= 32 else 4 if spec.mean <= 96 else 8
        self.tn = 8 if self.tm == 8 and spec.parts == 1 else 4
        self.high, self.across = _SIDE * self.tm, _SIDE * self.tn

    def _product(self) -> None:
        spec, tm, tn = self.spec, self.tm, self.tn
        # A row more than a power of two apart, in whole vectors, spreads stores over the banks.
        self.left_row, self.right_row = self.high + LANES, self.across + LANES
        self.left = shared(_STEPS * self.left_row)
        self.right = [shared(_STEPS * self.right_row) for _ in range(spec.parts)]
        sums = [local(tm * tn) for _ in range(spec.parts)]
        down, side = T.bind(div(self.thread, _SIDE)), T.bind(mod(self.thread, _SIDE))
        for buffer in sums:
            with unrolled(tm * tn) as i:
                T.buffer_store(buffer, f32(0.0), [i])
        a, b = local(tm), local(tn)
        self.limit = None if spec.depth % _STEPS == 0 else spec.depth
        with T.serial(i32(0), self.active * -(-spec.depth // _STEPS)) as step:
            first = T.bind(step * _STEPS)
            self._fill_along(
                self.left, self.left_row, self.high, first, self.x_vectors,
                lambda row: lambda k: self.x_at(row, k),
            )  # fmt: skip
            for part in range(spec.parts):
                self._fill_right(first, part)
            barrier()
            with T.serial(i32(0), i32(_STEPS)) as k:
                with unrolled(tm) as i:
                    T.buffer_store(a, self.left[k * self.left_row + down * tm + i], [i])
                for part, right in enumerate(self.right):
                    with unrolled(tn) as j:
                        T.buffer_store(b, right[k * self.right_row + j * _SIDE + side], [j])
                    with unrolled(tm) as i, unrolled(tn) as j:
                        at = i * tn + j
                        T.buffer_store(sums[part], sums[part][at] + a[i] * b[j], [at])
            barrier()
        with unrolled(tm) as i, unrolled(tn) as j:
            column = self.first_column + j * _SIDE + side
            self.store(down * tm + i, column, [s[i * tn + j] for s in sums])

    def _fill_along(
        self, tile: Any, pitch: int, rows: int, first: Expr, vectors: bool,
        reader: Callable[[Expr], Callable[[Expr], Expr]],
    ) -> None:  # fmt: skip
        """Rows whose steps lie side by side, stored with rows side by side."""
        taken = local(LANES)
        with shared_out(rows * _STEPS // LANES, self.thread) as number:
            row = T.bind(div(number, _STEPS // LANES))
            own = T.bind(mod(number, _STEPS // LANES) * LANES)
            self.load(taken, vectors, lambda v: first + own + v, self.limit, reader(row))
            with unrolled(LANES) as v:
                T.buffer_store(tile, taken[v], [(own + v) * pitch + row])

    def _fill_right(self, first: Expr, part: int) -> None:
        tile, pitch = self.right[part], self.right_row
        if not self.spec.transposed:
            self._fill_along(
                tile, pitch, self.across, first, self.weight_vectors,
                lambda row: lambda k: self.weight_at(k, self.first_column + row, part),
            )  # fmt: skip
            return
        taken = local(LANES)
        with shared_out(self.across * _STEPS // LANES, self.thread) as number:
            k = T.bind(div(number, self.across // LANES))
            own = T.bind(mod(number, self.across // LANES) * LANES)
            self.take_columns(taken, first + k, self.first_column + own, 1, part, self.limit)
            with unrolled(LANES) as v:
                T.buffer_store(tile, taken[v], [k * pitch + own + v])


class _Few(_Body):
    """A few rows: each row of a weight is read once, by a warp, for all of them."""

    def __init__(self, w: Writer, spec: _Spec, vectors: bool) -> None:
        super().__init__(w, spec, vectors)
        self.high = next(n for n in (1, 2, 4) if n >= 2 * spec.mean or n == 4)
        self.each = 4 // spec.parts  # columns of one operand that a warp reads together
        self.across = WARP * LANES if spec.transposed else _WARPS * self.each

    def _product(self) -> None:
        self.warp, self.lane = T.bind(div(self.thread, WARP)), T.bind(mod(self.thread, WARP))
        if self.spec.transposed:
            sums = self._columns_side_by_side()
        else:
            sums = self._steps_side_by_side()
        barrier()
        with shared_out(self.high * self.across, self.thread) as number:
            row, column = T.bind(div(number, self.across)), T.bind(mod(number, self.across))
            found = [T.bind(sums(part, row, column)) for part in range(self.spec.parts)]
            self.store(row, self.first_column + column, found)

    def _steps_side_by_side(self) -> Callable[[int, Expr, Expr], Expr]:
        """The lanes of a warp share out the steps of a column, whose sums they then add up."""
        spec, high, each = self.spec, self.high, self.each
        wide_step = WARP * LANES
        vectors = self.x_vectors and self.weight_vectors
        limit = None if spec.depth % wide_step == 0 else spec.depth
        sums = [local(high * each) for _ in range(spec.parts)]
        for buffer in sums:
            with unrolled(high * each) as i:
                T.buffer_store(buffer, f32(0.0), [i])
        left = [local(LANES) for _ in range(high)]
        right = local(LANES)
        column = T.bind(self.first_column + self.warp * each)

        def at(first: Expr) -> Callable[[Expr], Expr]:
            own = self.lane * LANES if vectors else self.lane
            return lambda v: first + own + v

        step = 1 if vectors else WARP
        with T.serial(i32(0), self.active * -(-spec.depth // wide_step)) as turn:
            first = T.bind(turn * wide_step)
            for row in range(high):
                read = lambda k, row=row: self.x_at(i32(row), k)  # noqa: E731
                self.load(left[row], vectors, at(first), limit, read, step)
            for part in range(spec.parts):
                for c in range(each):
                    read = lambda k, c=c, part=part: self.weight_at(k, column + c, part)  # noqa: E731
                    self.load(right, vectors, at(first), limit, read, step)
                    for row in range(high):
                        place = c * high + row
                        total = sums[part][place]
                        for v in range(LANES):
                            total = total + left[row][v] * right[v]
                        T.buffer_store(sums[part], total, [place])
        result = shared(spec.parts * high * self.across)
        with when(self.count > 0):
            for part, buffer in enumerate(sums):
                for c, row in itertools.product(range(each), range(high)):
                    place = c * high + row
                    for reach in (16, 8, 4, 2, 1):
                        T.buffer_store(
                            buffer, buffer[place] + _below(buffer[place], reach), [place]
                        )
                    with when(tir.EQ(self.lane, i32(0))):
                        start = (part * high + row) * self.across + c
                        T.buffer_store(result, buffer[place], [self.warp * each + start])
        return lambda part, row, column: result[
            part * (high * self.across) + row * self.across + column
        ]

    def _columns_side_by_side(self) -> Callable[[int, Expr, Expr], Expr]:
        """Every lane has columns of its own; the warps share out the steps."""
        spec, high = self.spec, self.high
        sums = [local(high * LANES) for _ in range(spec.parts)]
        for buffer in sums:
            with unrolled(high * LANES) as i:
                T.buffer_store(buffer, f32(0.0), [i])
        right = local(LANES)
        limit = None if spec.depth % _WARPS == 0 else spec.depth
        step = 1 if self.weight_vectors else WARP
        own = T.bind(self.lane * LANES if self.weight_vectors else self.lane)
        with T.serial(i32(0), self.active * -(-spec.depth // _WARPS)) as turn:
            k = T.bind(turn * _WARPS + self.warp)
            for part in range(spec.parts):
                self.take_columns(right, k, self.first_column + own, step, part, limit)
                for row in range(high):
                    x = self.x_at(i32(row), k)
                    if limit is not None:
                        x = tir.if_then_else(k < limit, x, f32(0.0))
                    x = T.bind(x)
                    with unrolled(LANES) as v:
                        at = row * LANES + v
                        T.buffer_store(sums[part], sums[part][at] + x * right[v], [at])
        each = high * self.across  # sums of a warp
        held = [shared(_WARPS * each) for _ in range(spec.parts)]
        for buffer, whole in zip(sums, held, strict=True):
            for row in range(high):
                with unrolled(LANES) as v:
                    at = self.warp * each + row * self.across + own + v * step
                    T.buffer_store(whole, buffer[row * LANES + v], [at])

        def total(part: int, row: Expr, column: Expr) -> Expr:
            at = row * self.across + column
            found = held[part][at]
            for warp in range(1, _WARPS):
                found = found + held[part][warp * each + at]
            return found

        return total


def _within(place: Expr, limit: int | None, fill: Callable[[bool], None]) -> None:
    """``fill(zero)``, with zeros from ``limit`` on."""
    if limit is None:
        fill(False)
        return
    with T.If(place < limit):
        with T.Then():
            fill(False)
        with T.Else():
            fill(True)


def _below(value: Expr, reach: int) -> Expr:
    """``value`` of the thread that stands so many lanes further in the warp."""
    everybody = tir.const(0xFFFFFFFF, "uint32")
    arguments = (everybody, value, i32(reach), i32(WARP))
    return tir.call_extern("float32", "__shfl_down_sync", *arguments)
