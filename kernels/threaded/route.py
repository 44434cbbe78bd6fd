"""Slots sorted by branch: a stable counting sort without atomic operations.

A block takes tiles of as many slots as it has threads. In a tile every thread counts the slots of
its branch before its own and after it: the count before is its place among them, and the thread
with none after it moves the branch's running place on, alone. With more tiles than one block is to
take, a first launch counts the slots of every block, and each block of the second adds up what the
blocks before it found.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import product
from ..definition import THREADS, Definition, Writer, exprs, known
from ..emit import Expr
from ..group import IO, Group, Unsupported
from ..math import i32
from ..ops import argument
from ..ops.common import i64, unravel
from ..target import Target
from .common import barrier, launch, local, narrow, shared, shared_out, when, wide, write

MOST_BRANCHES = 4096  # their places are kept in shared memory
MOST_BLOCKS = 128
_ROUNDS = (THREADS - 1).bit_length()  # in which running totals of all threads are made


def route(group: Group, io: IO, target: Target) -> Definition:
    """``plait.route`` with the parts of its result, or ``plait.places``.

    Raises `Unsupported` for other types, and for too many slots or branches.
    """
    head, *rest = group.nodes
    parts = str(head.target).startswith("plait.route")
    if any(n.target is not operator.getitem for n in rest) or (parts and head in group.outputs):
        raise Unsupported("PLT-RTE-002", "the routes are read as a whole")
    if io[group.inputs[0]].dtype != torch.int64:
        raise Unsupported("PLT-RTE-003", "branches are numbered in int64 only")
    slots = product(known(io[group.inputs[0]].shape))
    assert isinstance(slots, int)
    if slots >= 1 << 31:
        raise Unsupported("PLT-RTE-004", f"{slots} slots are not counted in 32 bits")
    if not parts:
        return write(group, io, target, lambda w, _: _places(w, slots), slots)
    branches = int(argument(head, "branches"))
    if branches > MOST_BRANCHES:
        raise Unsupported(
            "PLT-RTE-004", f"the places of more than {MOST_BRANCHES} branches are not kept"
        )
    made = _Route(group, slots, branches)
    return write(group, io, target, made.write, 2 * slots * THREADS)


def _places(w: Writer, slots: int) -> None:
    (order,), (result,) = (w.ctx.env[n] for n in w.group.inputs), w.out_buffers
    with launch(-(-slots // THREADS)) as (block, thread):
        row = block * THREADS + thread
        with when(row < slots):
            place = order.load([wide(row)])
            T.buffer_store(result, wide(row), w.outputs[0].index([place]))


class _Route:
    """Writes the launches. The last "branch" is that of the slots that name none."""

    def __init__(self, group: Group, slots: int, branches: int) -> None:
        self.group, self.slots, self.branches = group, slots, branches
        tiles = -(-slots // THREADS)
        self.turns = -(-tiles // MOST_BLOCKS)  # tiles of one block
        self.blocks = -(-tiles // self.turns)
        self.each = -(-(branches + 1) // THREADS)  # branches of one thread
        self.room = self.each * THREADS

    def write(self, w: Writer, _: bool) -> None:
        counts: Any = None
        if self.blocks > 1:
            size = self.blocks * self.room
            counts = T.sblock_alloc_buffer(list(exprs((size,))), "int32")
            with launch(self.blocks) as (block, thread):
                places = shared(self.room, "int32")
                self._clear(places, thread)
                self._tiles(w, block, thread, places, None)
                with shared_out(self.room, thread) as b:
                    at = wide(block * self.room + b)
                    T.buffer_store(counts, places[b], [at])
        with launch(self.blocks) as (block, thread):
            places, before = (shared(self.room, "int32") for _ in range(2))
            self._clear(places, thread)
            if counts is None:
                self._tiles(w, block, thread, places, None)
                with shared_out(self.room, thread) as b:
                    T.buffer_store(before, i32(0), [b])
            else:
                self._sums(counts, block, thread, places, before)
            barrier()
            self._begin(w, block, thread, places, before)
            parts = [n.args[1] for n in self.group.outputs]
            if 1 in parts:
                self._tiles(w, block, thread, places, parts.index(1))

    def _clear(self, places: Any, thread: Expr) -> None:
        with shared_out(self.room, thread) as b:
            T.buffer_store(places, i32(0), [b])
        barrier()

    def _tiles(self, w: Writer, block: Expr, thread: Expr, places: Any, out: int | None) -> None:
        """Moves the places of branches on by the slots of a block; with ``out``, stores those."""
        index = w.ctx.env[self.group.inputs[0]]
        tile = shared(THREADS, "int32")
        earlier, later = local(1, "int32"), local(1, "int32")
        with T.serial(i32(0), i32(self.turns)) as turn:
            slot = T.bind((block * self.turns + turn) * THREADS + thread)
            T.buffer_store(tile, i32(-1), [thread])
            with when(slot < self.slots):
                at = unravel(wide(slot), list(index.shape)) if index.shape else []
                named = T.bind(index.load(at))
                inside = tir.And(named >= i64(0), named < i64(self.branches))
                branch = tir.Select(inside, narrow(named), i32(self.branches))
                T.buffer_store(tile, branch, [thread])
            barrier()
            own = T.bind(tile[thread])
            T.buffer_store(earlier, i32(0), [0])
            T.buffer_store(later, i32(0), [0])
            with T.serial(i32(0), i32(THREADS)) as k:
                same = tir.EQ(tile[k], own)
                for count, side in ((earlier, k < thread), (later, k > thread)):
                    more = tir.Select(tir.And(same, side), i32(1), i32(0))
                    T.buffer_store(count, count[0] + more, [0])
            if out is not None:
                with when(own >= i32(0)):
                    place = wide(places[own] + earlier[0])
                    T.buffer_store(w.out_buffers[out], wide(slot), w.outputs[out].index([place]))
            barrier()
            with when(tir.And(own >= i32(0), tir.EQ(later[0], i32(0)))):
                T.buffer_store(places, places[own] + earlier[0] + i32(1), [own])
            barrier()

    def _sums(self, counts: Any, block: Expr, thread: Expr, places: Any, before: Any) -> None:
        """All slots of each branch, and those of the blocks before this one."""
        total, mine = local(1, "int32"), local(1, "int32")
        with shared_out(self.room, thread) as b:
            T.buffer_store(total, i32(0), [0])
            T.buffer_store(mine, i32(0), [0])
            with T.serial(i32(0), i32(self.blocks)) as other:
                count = T.bind(counts[wide(other * self.room + b)])
                T.buffer_store(total, total[0] + count, [0])
                T.buffer_store(mine, mine[0] + tir.Select(other < block, count, i32(0)), [0])
            T.buffer_store(places, total[0], [b])
            T.buffer_store(before, mine[0], [b])

    def _begin(self, w: Writer, block: Expr, thread: Expr, places: Any, before: Any) -> None:
        """Turns counts into the places where branches begin, for this block."""
        sums, total = shared(2 * THREADS, "int32"), local(1, "int32")
        T.buffer_store(total, i32(0), [0])
        with T.serial(i32(0), i32(self.each)) as k:
            T.buffer_store(total, total[0] + places[thread * self.each + k], [0])
        T.buffer_store(sums, total[0], [thread])
        barrier()
        for number in range(_ROUNDS):
            source, dest, reach = number % 2 * THREADS, (number + 1) % 2 * THREADS, 1 << number
            earlier = tir.if_then_else(
                thread >= reach, sums[source + tir.max(thread - reach, i32(0))], i32(0)
            )
            T.buffer_store(sums, sums[source + thread] + earlier, [dest + thread])
            barrier()
        # What is summed up to a thread, less its own, is where its first branch begins.
        begin = local(1, "int32")
        T.buffer_store(begin, sums[_ROUNDS % 2 * THREADS + thread] - total[0], [0])
        parts = [n.args[1] for n in self.group.outputs]
        with T.serial(i32(0), i32(self.each)) as k:
            b = thread * self.each + k
            if 0 in parts:
                out = parts.index(0)
                with when(tir.And(tir.EQ(block, i32(0)), b < self.branches + 1)):
                    at = w.outputs[out].index([wide(b)])
                    T.buffer_store(w.out_buffers[out], wide(begin[0]), at)
            count = T.bind(places[b])
            T.buffer_store(places, begin[0] + before[b], [b])
            T.buffer_store(begin, begin[0] + count, [0])
        barrier()
