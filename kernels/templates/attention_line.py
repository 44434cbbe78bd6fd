"""Attention for few queries: lanes of a vector are elements of a head.

A task is one query of one head, as in token-by-token decoding, where the work is to read keys and
values once. Scores of a block of keys are dot products; the softmax then has keys in its lanes,
with a running maximum and sum over blocks as in `attention_block`.
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

NEG_INF = -math.inf


class Line:
    """Emits one task. ``config`` has tb (keys of a block, a multiple of the lanes)."""

    def __init__(
        self, em: Emitter, spec: AttentionSpec, config: dict[str, Any], lanes: int,
        operands: dict[str, Operand], mask: Mask | None, store: Callable[..., None],
    ) -> None:  # fmt: skip
        self.em, self.spec, self.lanes, self.store = em, spec, lanes, store
        self.tb = config["tb"]
        self.q, self.k, self.v = (operands[n] for n in "qkv")
        self.mask = mask
        self.depth_width, self.depth_starts = vector_starts(spec.depth, lanes)
        self.width, self.starts = vector_starts(spec.width, lanes)
        self.keys = em.dim(spec.keys)

    def task(self, number: Expr, blocks: Dim) -> None:
        em, spec = self.em, self.spec
        *lead, row = [named(i) for i in task_index(em, spec, number, blocks)]
        self.row = row
        self.bases = {
            n: named(o.base(lead))
            for n, o in (("q", self.q), ("k", self.k), ("v", self.v), ("mask", self.mask))
            if o is not None
        }
        self.query = em.local(len(self.depth_starts) * self.depth_width)
        self.scores = em.local(self.tb)
        self.out = em.local(len(self.starts) * self.width)
        self.peak, self.total = em.local(1), em.local(1)
        T.buffer_store(self.peak, em.f32(NEG_INF), [i64(0)])
        T.buffer_store(self.total, em.f32(0.0), [i64(0)])
        self._load_query()
        for slot in range(len(self.starts)):
            with lane_loop(self.width) as j:
                T.buffer_store(self.out, em.f32(0.0), [slot * self.width + j])
        end = named(tir.min(self.keys, row + 1)) if spec.causal else self.keys
        with T.serial(i64(0), tir.floordiv(end + (self.tb - 1), i64(self.tb))) as b:
            start = named(b * self.tb)
            count = named(tir.min(i64(self.tb), end - start))
            self._products(start, count)
            if self.mask is not None:
                self._apply_mask(start)
            self._softmax()
            self._weighted_sum(start, count)
        self._finish([*lead, row])

    def _load_query(self) -> None:
        """The scaled query; elements that an overlapping vector repeats are zero there."""
        width = self.depth_width
        scale = self.em.f32(self.spec.scale)
        for slot, begin in enumerate(self.depth_starts):
            repeated = slot * width - begin
            with lane_loop(width) as j, sharing():
                x = self.q.wide(self.bases["q"], self.row, begin + j) * scale
                if repeated:
                    x = tir.Select(j >= i64(repeated), x, self.em.f32(0.0))
                T.buffer_store(self.query, x, [slot * width + j])

    def _products(self, start: Expr, count: Expr) -> None:
        em, width = self.em, self.depth_width
        with T.serial(i64(0), i64(self.tb // self.lanes)) as c:
            with lane_loop(self.lanes) as j:
                T.buffer_store(self.scores, em.f32(NEG_INF), [c * self.lanes + j])
        with T.serial(i64(0), count) as t:
            acc = em.local(width)
            for slot, begin in enumerate(self.depth_starts):
                with lane_loop(width) as j, sharing():
                    key = self.k.wide(self.bases["k"], start + t, begin + j)
                    x = self.query[slot * width + j] * key
                    T.buffer_store(acc, acc[j] + x if slot else x, [j + i64(0)])
            half = width
            while half > 1:
                half //= 2
                with lane_loop(half) as j:
                    T.buffer_store(acc, acc[j] + acc[j + half], [j + i64(0)])
            T.buffer_store(self.scores, acc[i64(0)], [t])

    def _key_vectors(self, body: Callable[[Expr], None]) -> None:
        with T.serial(i64(0), i64(self.tb // self.lanes)) as c:
            with lane_loop(self.lanes) as j, sharing():
                body(c * self.lanes + j)

    def _apply_mask(self, start: Expr) -> None:
        mask, base = self.mask, self.bases["mask"]
        assert mask is not None

        def apply(t: Expr) -> None:
            column = tir.min(start + t, self.keys - 1)
            x = self.scores[t] + mask.addend(base, self.row, column)
            # Past the last key scores stay what they are, whatever the mask says.
            x = tir.Select(start + t < self.keys, x, self.scores[t])
            T.buffer_store(self.scores, x, [t])

        self._key_vectors(apply)

    def _fold(self, start: Expr, body: Callable[[Expr, Expr], Expr]) -> Expr:
        """Folds scores over the block in lanes, then across lanes."""
        lanes = self.lanes
        acc = self.em.local(lanes)
        with lane_loop(lanes) as j:
            T.buffer_store(acc, start, [j + i64(0)])
        with T.serial(i64(0), i64(self.tb // lanes)) as c:
            with lane_loop(lanes) as j:
                T.buffer_store(acc, body(acc[j], self.scores[c * lanes + j]), [j + i64(0)])
        half = lanes
        while half > 1:
            half //= 2
            with lane_loop(half) as j:
                T.buffer_store(acc, body(acc[j + i64(0)], acc[j + half]), [j + i64(0)])
        return acc[i64(0)]

    def _softmax(self) -> None:
        em = self.em
        self.decay = em.local(1)
        shift = em.local(1)
        peak = self._fold(self.peak[i64(0)], lambda a, b: tir.Select(a > b, a, b))
        with T.serial(i64(0), i64(1)) as z, sharing():
            x = kernel_math.bind(peak)
            safe = kernel_math.bind(tir.Select(x == em.f32(NEG_INF), em.f32(0.0), x))
            T.buffer_store(self.decay, kernel_math.exp(self.peak[z] - safe), [z])
            T.buffer_store(self.peak, x, [z])
            T.buffer_store(shift, safe, [z])

        def weigh(t: Expr) -> None:
            T.buffer_store(self.scores, kernel_math.exp(self.scores[t] - shift[i64(0)]), [t])

        self._key_vectors(weigh)
        total = self._fold(em.f32(0.0), lambda a, b: a + b)
        new = self.total[i64(0)] * self.decay[i64(0)] + total
        T.buffer_store(self.total, new, [i64(0)])

    def _weighted_sum(self, start: Expr, count: Expr) -> None:
        width = self.width
        acc = self.em.local(len(self.starts) * width)
        for slot in range(len(self.starts)):
            with lane_loop(width) as j:
                T.buffer_store(acc, self.em.f32(0.0), [slot * width + j])
        with T.serial(i64(0), count) as t:
            for slot, begin in enumerate(self.starts):
                with lane_loop(width) as j, sharing():
                    at = slot * width + j
                    value = self.v.wide(self.bases["v"], start + t, begin + j)
                    T.buffer_store(acc, acc[at] + self.scores[t] * value, [at])
        for slot in range(len(self.starts)):
            with lane_loop(width) as j:
                at = slot * width + j
                former = self.out[at] * self.decay[i64(0)]
                T.buffer_store(self.out, former + acc[at], [at])

    def _finish(self, index: list[Expr]) -> None:
        em = self.em
        none = self.total[i64(0)] == em.f32(0.0)
        scale = em.local(1)
        inverse = tir.Select(none, em.f32(0.0), em.f32(1.0) / self.total[i64(0)])
        T.buffer_store(scale, inverse, [i64(0)])
        for slot, begin in enumerate(self.starts):
            with lane_loop(self.width) as j, sharing():
                x = self.out[slot * self.width + j] * scale[i64(0)]
                self.store([*index, begin + j], x)
