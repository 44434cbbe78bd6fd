"""Attention for many queries: lanes of a vector are queries.

A task handles ``nv`` vectors of queries of one head. Queries are transposed once, so that scores
come out as [key, query]: one broadcast of a key's element serves all of the task's queries, and the
softmax needs no operation across lanes. Keys are taken in blocks with a running maximum and sum
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
"FlashAttention", NeurIPS 2022). The second product holds tiles of [query, element] in registers and
broadcasts weights. A block's sum is added to the former result, scaled to the new maximum: one sum
over thousands of keys would lose digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from .. import math as kernel_math
from ..abi import Dim
from ..emit import Emitter, Expr
from ..ops.common import i64
from ..ops.scope import named, sharing
from .attention_spec import (
    AttentionSpec,
    Mask,
    Operand,
    lane_loop,
    task_index,
    vector_starts,
)
from .vectors import ramp, transposed

NEG_INF = -math.inf


class Block:
    """Emits one task. ``config`` has nv, rk (keys of a register tile), ri (queries of a tile of the
    second product), tb (keys of a block)."""

    def __init__(
        self, em: Emitter, spec: AttentionSpec, config: dict[str, Any], lanes: int,
        operands: dict[str, Operand], mask: Mask | None, store: Callable[..., None],
    ) -> None:  # fmt: skip
        self.em, self.spec, self.lanes, self.store = em, spec, lanes, store
        self.nv, self.rk, self.ri, self.tb = (config[c] for c in ("nv", "rk", "ri", "tb"))
        self.bq = self.nv * lanes
        self.q, self.k, self.v = (operands[n] for n in "qkv")
        self.mask = mask
        self.width, self.starts = vector_starts(spec.width, lanes)
        self.row = len(self.starts) * self.width  # a query's result, with overlap
        self.queries, self.keys = em.dim(spec.queries), em.dim(spec.keys)

    def task(self, number: Expr, blocks: Dim) -> None:
        em, spec = self.em, self.spec
        *lead, block = [named(i) for i in task_index(em, spec, number, blocks)]
        first = named(block * self.bq)
        self.lead = lead
        self.bases = {
            n: named(o.base(lead))
            for n, o in (("q", self.q), ("k", self.k), ("v", self.v), ("mask", self.mask))
            if o is not None
        }
        self.qt = em.local(spec.depth * self.bq)
        self.scores = em.local(self.tb * self.bq)
        self.out = em.local(self.bq * self.row)
        self.peak, self.total, self.decay = (em.local(self.bq) for _ in range(3))
        self.keys_staged = None if self.k.plain else em.local(self.tb * spec.depth)
        stage_v = not self.v.plain or self.v.scattered
        self.values_staged = em.local(self.tb * spec.width) if stage_v else None
        self._load_queries(first)
        self._clear()
        end = self.keys
        if spec.causal:
            end = named(tir.min(end, first + self.bq))
        with T.serial(i64(0), tir.floordiv(end + (self.tb - 1), i64(self.tb))) as b:
            start = named(b * self.tb)
            count = named(tir.min(i64(self.tb), end - start))
            self._stage(start, count)
            self._products(start, count)
            if spec.causal:
                with T.If(start + count > first + 1), T.Then():
                    self._causal(first, start, count)
            if self.mask is not None:
                self._apply_mask(first, start, count)
            self._softmax(count)
            self._weighted_sum(start, count)
        self._finish(first)

    def _vectors(self, body: Callable[[Expr], None]) -> None:
        """``body(query)`` for all queries of the task, in vectors."""
        for v in range(self.nv):
            with lane_loop(self.lanes) as j, sharing():
                body(v * self.lanes + j)

    def _load_queries(self, first: Expr) -> None:
        """Transposes the scaled queries; those past the last one repeat it."""
        depth, lanes = self.spec.depth, self.lanes
        scale = self.em.f32(self.spec.scale)
        with T.serial(i64(0), i64(self.bq)) as i:
            row = named(tir.min(first + i, self.queries - 1))

            def one(d: Expr) -> None:
                x = self.q.wide(self.bases["q"], row, d) * scale
                T.buffer_store(self.qt, x, [d * self.bq + i])

            self._along(depth, lanes, one)

    @staticmethod
    def _along(size: int, lanes: int, body: Callable[[Expr], None]) -> None:
        """``body(i)`` for i below ``size``: whole vectors, then one by one."""
        if size // lanes:
            with T.serial(i64(0), i64(size // lanes)) as c:
                with lane_loop(lanes) as j, sharing():
                    body(c * lanes + j)
        if size % lanes:
            with T.serial(i64(0), i64(size % lanes)) as c, sharing():
                body(size // lanes * lanes + c)

    def _clear(self) -> None:
        def start(i: Expr) -> None:
            T.buffer_store(self.peak, self.em.f32(NEG_INF), [i])
            T.buffer_store(self.total, self.em.f32(0.0), [i])

        self._vectors(start)
        with T.serial(i64(0), i64(self.bq * self.row // self.width)) as c:
            with lane_loop(self.width) as j:
                T.buffer_store(self.out, self.em.f32(0.0), [c * self.width + j])

    def _stage(self, start: Expr, count: Expr) -> None:
        """Copies keys and values that cannot be read in place."""
        for staged, operand, base, size in (
            (self.keys_staged, self.k, self.bases["k"], self.spec.depth),
            (self.values_staged, self.v, self.bases["v"], self.spec.width),
        ):
            if staged is None:
                continue
            with T.serial(i64(0), count) as t:

                def one(d: Expr, t: Expr = t, o: Operand = operand, b: Expr = base,
                        to: Any = staged, n: int = size) -> None:  # fmt: skip
                    T.buffer_store(to, o.wide(b, start + t, d), [t * n + d])

                self._along(size, self.lanes, one)

    def _products(self, start: Expr, count: Expr) -> None:
        """Scores of a block of keys: [key, query]. A last, partial tile repeats the last key."""
        em, depth, bq = self.em, self.spec.depth, self.bq
        with T.serial(i64(0), tir.floordiv(count + (self.rk - 1), i64(self.rk))) as tile:
            acc = em.local(self.rk * bq)
            rows = []
            for r in range(self.rk):
                t = tir.min(tile * self.rk + r, count - 1)
                if self.keys_staged is not None:
                    rows.append(named(t * depth))
                else:
                    rows.append(named(self.bases["k"] + (start + t) * self.k.row_stride))
                for v in range(self.nv):
                    with lane_loop(self.lanes) as j:
                        T.buffer_store(acc, em.f32(0.0), [r * bq + v * self.lanes + j])
            unroll = next(u for u in (4, 2, 1) if depth % u == 0)
            with T.serial(i64(0), i64(depth // unroll)) as d0, T.unroll(i64(unroll)) as d1:
                d = d0 * unroll + d1
                for r in range(self.rk):
                    if self.keys_staged is not None:
                        key = self.keys_staged[rows[r] + d]
                    else:
                        key = self.k.ref.load_flat(rows[r] + d)
                    for v in range(self.nv):
                        with lane_loop(self.lanes) as j:
                            at = r * bq + v * self.lanes + j
                            x = self.qt[d * bq + v * self.lanes + j]
                            T.buffer_store(acc, acc[at] + key * x, [at])
            for r in range(self.rk):
                for v in range(self.nv):
                    with lane_loop(self.lanes) as j:
                        at = v * self.lanes + j
                        where = (tile * self.rk + r) * bq + at
                        T.buffer_store(self.scores, acc[r * bq + at], [where])

    def _causal(self, first: Expr, start: Expr, count: Expr) -> None:
        with T.serial(i64(0), count) as t:

            def hide(i: Expr) -> None:
                x = self.scores[t * self.bq + i]
                seen = start + t <= first + i
                x = tir.Select(seen, x, self.em.f32(NEG_INF))
                T.buffer_store(self.scores, x, [t * self.bq + i])

            self._vectors(hide)

    def _apply_mask(self, first: Expr, start: Expr, count: Expr) -> None:
        mask, base = self.mask, self.bases["mask"]
        assert mask is not None
        done: Expr = i64(0)
        if self.lanes > 1 and mask.has_rows:
            squares = named(tir.floordiv(count, i64(self.lanes)))
            done = named(squares * self.lanes)
            self._apply_squares(first, start, squares)
        with T.serial(done, count) as t:

            def apply(i: Expr) -> None:
                row = i64(0) if mask.rows_broadcast else tir.min(first + i, self.queries - 1)
                x = self.scores[t * self.bq + i] + mask.addend(base, row, start + t)
                T.buffer_store(self.scores, x, [t * self.bq + i])

            self._vectors(apply)

    def _apply_squares(self, first: Expr, start: Expr, squares: Expr) -> None:
        """Applies as many keys of the mask as vectors have lanes at a time, turned in registers.

        Element by element each lane would take a line of its own, and where rows are a power of
        two apart those lines drive each other out of the cache.
        """
        mask, lanes = self.mask, self.lanes
        assert mask is not None
        for v in range(self.nv):
            last = self.queries - 1
            rows = [tir.min(first + (v * lanes + i), last) for i in range(lanes)]
            begins = [named(self.bases["mask"] + row * mask.row_stride) for row in rows]
            with T.serial(i64(0), squares) as square:
                at = named(start + square * lanes)
                loaded = [named(mask.addends(begin + at, lanes)) for begin in begins]
                for k, addends in enumerate(transposed(loaded)):
                    where = ramp((square * lanes + k) * self.bq + v * lanes, lanes)
                    T.buffer_store(self.scores, self.scores[where] + addends, [where])

    def _softmax(self, count: Expr) -> None:
        """Scores become weights; the running maximum, sum and scale of the result follow."""
        em, bq = self.em, self.bq
        new, sums = em.local(bq), em.local(bq)
        self._vectors(lambda i: T.buffer_store(new, self.peak[i], [i]))
        with T.serial(i64(0), count) as t:

            def peak(i: Expr) -> None:
                x = self.scores[t * bq + i]
                T.buffer_store(new, tir.Select(new[i] > x, new[i], x), [i])

            self._vectors(peak)

        def rescale(i: Expr) -> None:
            hidden = new[i] == em.f32(NEG_INF)  # all so far: any finite maximum will do
            x = tir.Select(hidden, em.f32(0.0), new[i])
            T.buffer_store(self.decay, kernel_math.exp(self.peak[i] - x), [i])
            T.buffer_store(self.peak, new[i], [i])
            T.buffer_store(new, x, [i])
            T.buffer_store(sums, em.f32(0.0), [i])

        self._vectors(rescale)
        with T.serial(i64(0), count) as t:

            def weigh(i: Expr) -> None:
                x = kernel_math.bind(kernel_math.exp(self.scores[t * bq + i] - new[i]))
                T.buffer_store(self.scores, x, [t * bq + i])
                T.buffer_store(sums, sums[i] + x, [i])

            self._vectors(weigh)
        self._vectors(
            lambda i: T.buffer_store(self.total, self.total[i] * self.decay[i] + sums[i], [i])
        )

    def _weighted_sum(self, start: Expr, count: Expr) -> None:
        """Adds weights times values to the scaled result, in tiles of ``ri`` queries."""
        per_tile = max(1, 24 // self.ri)
        slots = list(range(len(self.starts)))
        pieces = -(-len(slots) // per_tile)
        size = -(-len(slots) // pieces)
        for at in range(0, len(slots), size):
            with T.serial(i64(0), i64(self.bq // self.ri)) as tile:
                self._tile(tile * self.ri, slots[at : at + size], start, count)

    def _tile(self, query: Expr, slots: list[int], start: Expr, count: Expr) -> None:
        em, width, n = self.em, self.width, len(slots)
        acc = em.local(self.ri * n * width)

        def each(body: Callable[[int, int, Expr, Expr], None]) -> None:
            for r in range(self.ri):
                for c, slot in enumerate(slots):
                    with lane_loop(width) as j:
                        body(r, slot, (r * n + c) * width + j, j)

        def place(r: int, slot: int, j: Expr) -> Expr:
            return (query + r) * self.row + slot * width + j

        each(lambda r, s, at, j: T.buffer_store(acc, em.f32(0.0), [at]))
        with T.serial(i64(0), count) as t:
            if self.values_staged is not None:
                row = named(t * self.spec.width)
            else:
                row = named(self.bases["v"] + (start + t) * self.v.row_stride)

            def add(r: int, slot: int, at: Expr, j: Expr) -> None:
                weight = self.scores[t * self.bq + query + r]
                where = row + self.starts[slot] + j
                if self.values_staged is not None:
                    value = self.values_staged[where]
                else:
                    value = self.v.ref.load_flat(where)
                T.buffer_store(acc, acc[at] + weight * value, [at])

            each(add)

        def end(r: int, slot: int, at: Expr, j: Expr) -> None:
            former = self.out[place(r, slot, j)] * self.decay[query + r]
            T.buffer_store(self.out, former + acc[at], [place(r, slot, j)])

        each(end)

    def _finish(self, first: Expr) -> None:
        """Divides by the sums and stores; a query that sees no key gives zeros, as in torch."""
        em = self.em

        def invert(i: Expr) -> None:
            none = self.total[i] == em.f32(0.0)
            x = tir.Select(none, em.f32(0.0), em.f32(1.0) / self.total[i])
            T.buffer_store(self.decay, x, [i])

        self._vectors(invert)
        with T.serial(i64(0), tir.min(i64(self.bq), self.queries - first)) as i:
            scale = kernel_math.bind(self.decay[i])
            for slot, begin in enumerate(self.starts):
                with lane_loop(self.width) as j, sharing():
                    x = self.out[i * self.row + slot * self.width + j] * scale
                    self.store([*self.lead, first + i, begin + j], x)
