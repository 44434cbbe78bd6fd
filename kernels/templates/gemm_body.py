"""The loops of one matrix-product task.

A task is one panel of columns times one block of rows of one product of the batch. Inside it, the
inner dimension is cut into blocks; for each block, register tiles of ``ri`` rows by ``nv`` vectors
run down the rows while the panel's block stays in the second-level cache (Goto and van de Geijn,
TOMS 2008; the left factor is read where it lies, because a row block of it is used by one panel
only). Sums between blocks, and on their way to the epilogue, lie in a small scratch on the stack.

The right factor's panel is either packed ahead (a weight), or copied into scratch block by block:
rows of vectors where columns are neighbours in memory, transposed squares of vectors where the
inner dimension is. `half_factors` tells how factors of 16 bits are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import ceil_div
from ..emit import Emitter, Expr, Ref
from ..group import HALF
from ..ops.scope import named
from .gemm_epilogue import Epilogue
from .gemm_spec import GemmSpec, unravel
from .half_factors import LANES, Left, Wide, dot, words, words_at_even
from .vectors import ramp, transposed

LoadPanel = Callable[[Expr, Expr], Expr]
"""(step along the block, column within the panel) -> element."""


@dataclass(frozen=True)
class Tiling:
    """Sizes of the loops: ``ri`` rows by ``nv`` vectors of ``lanes`` columns in registers,
    ``mc`` rows (a multiple of ``ri``) in a task, ``kc`` steps in a block. A step is an element of
    the inner dimension, or a pair of them."""

    ri: int
    nv: int
    mc: int
    kc: int
    lanes: int

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.nv * self.lanes


class Body:
    """Emits the work of one task."""

    def __init__(
        self, em: Emitter, spec: GemmSpec, tiling: Tiling, epilogue: Epilogue, a: Ref, b: Ref,
        pairs: bool,
    ) -> None:  # fmt: skip
        self.em, self.spec, self.t, self.epilogue, self.a, self.b = em, spec, tiling, epilogue, a, b
        self.pairs, self.together = pairs, 2 if pairs else 1  # elements in a step
        steps = ceil_div(spec.k, self.together)
        self.m, self.n, self.k = em.dim(spec.m), em.dim(spec.n), em.dim(steps)
        self.blocked = not isinstance(steps, int) or steps > tiling.kc
        # Finish tile by tile while sums are in the first-level cache, unless tiles of many heights
        # would each bring their copy of the epilogue.
        self.at_once = not self.blocked and isinstance(spec.m, int)
        rows = tiling.ri if self.at_once else tiling.mc
        self.sums = em.local(rows * tiling.width)
        # One set of accumulators, which LLVM keeps in registers, for tiles of all heights.
        self.acc = [em.local(tiling.width) for _ in range(tiling.ri)]
        # Few rows do not repay a copy of whole vectors that can be read where they lie.
        few = isinstance(spec.m, int) and spec.m <= 2 * tiling.ri
        whole = isinstance(spec.n, int) and spec.n % tiling.width == 0
        self.direct = spec.b_const or (few and whole and spec.b_strides[-1] == 1)
        self.turns = not self.direct and spec.b_strides[-2] == 1 and spec.b_strides[-1] != 1
        self.panel = None if self.direct else em.local(tiling.kc * tiling.width)
        self.wide = Wide(b)
        self.a_words, self.b_words = (words(a), words(b)) if pairs else (None, None)
        self.left = None
        if spec.dtype in HALF and not (pairs and words_at_even(spec.a_strides, spec.k)):
            depth = tiling.kc if self.blocked else max(1, int(steps))
            self.left = Left(em, a, tiling.ri, depth, pairs)

    def task(self, number: Expr) -> None:
        """All rows of a block; row blocks of one panel are neighbouring tasks."""
        em, spec, t = self.em, self.spec, self.t
        row_blocks, panels = em.dim(ceil_div(spec.m, t.mc)), em.dim(ceil_div(spec.n, t.width))
        row0 = T.bind(tir.truncmod(number, row_blocks) * t.mc)
        rest = T.bind(tir.truncdiv(number, row_blocks))
        panel = T.bind(tir.truncmod(rest, panels))
        column0 = T.bind(panel * t.width)
        sizes = [em.dim(d) for d in spec.batch]
        batch = [T.bind(i) for i in unravel(tir.truncdiv(rest, panels), sizes)]
        strides = [em.dim(s) for s in spec.a_strides]
        a0 = T.bind(row0 * strides[-2] + _dot(batch, strides))
        rows, tails = self._rows(row0)
        if not self.blocked:
            load = self._block(batch, panel, column0, em.i64(0), self.k)

            def tile(first: Expr, count: int) -> None:
                at = em.i64(0) if self.at_once else first * t.width
                start = a0 + first * strides[-2]
                self._multiply(count, start, at, self.k, em.dim(spec.k), load, first=True)
                if self.at_once:
                    self._finish(batch, row0 + first, at, column0, em.i64(count))

            self._tiles(rows, tails, tile)
            if not self.at_once:
                self._finish(batch, row0, em.i64(0), column0, rows)
            return
        with T.serial(rows * t.nv) as i, T.vectorized(em.i64(t.lanes)) as j:
            T.buffer_store(self.sums, em.f32(0.0), [i * t.lanes + j])
        with T.serial(tir.truncdiv(self.k + (t.kc - 1), t.kc)) as block:
            k0 = T.bind(block * t.kc)
            depth = T.bind(tir.min(em.i64(t.kc), self.k - k0))
            load = self._block(batch, panel, column0, k0, depth)
            skipped = k0 * self.together
            elements = T.bind(tir.min(depth * self.together, em.dim(spec.k) - skipped))

            def partial(first: Expr, count: int) -> None:
                start = a0 + first * strides[-2] + skipped * strides[-1]
                self._multiply(count, start, first * t.width, depth, elements, load, first=False)

            self._tiles(rows, tails, partial)
        self._finish(batch, row0, em.i64(0), column0, rows)

    def _rows(self, row0: Expr) -> tuple[Expr, list[int]]:
        """(rows of this task, sizes that the last, smaller tile can have)."""
        m, t = self.spec.m, self.t
        if not isinstance(m, int):
            return T.bind(tir.min(self.em.i64(t.mc), self.m - row0)), list(range(1, t.ri))
        tails = [m % t.ri] if m % t.ri else []
        if m <= t.mc or m % t.mc == 0:
            return self.em.i64(min(m, t.mc)), tails
        return T.bind(tir.min(self.em.i64(t.mc), self.m - row0)), tails

    def _tiles(self, rows: Expr, tails: list[int], emit: Callable[[Expr, int], None]) -> None:
        """``emit(first row, rows)`` for the full tiles in a loop, then for the smaller one."""
        ri = self.t.ri
        full = tir.truncdiv(rows, ri)
        with T.serial(full) as i:
            emit(i * ri, ri)
        for tail in tails:
            with T.If(tir.truncmod(rows, ri) == tail), T.Then():
                emit(full * ri, tail)

    # -- the register tile --------------------------------------------------------------------

    def _multiply(
        self, rows: int, a0: Expr, sums0: Expr, depth: Expr, elements: Expr, load: LoadPanel,
        first: bool,
    ) -> None:  # fmt: skip
        """``sums += a @ panel`` for one tile, or ``sums =`` it if ``first``.

        ``depth`` steps are ``elements`` of the inner dimension. Every block is summed from zero, so
        rounding errors grow with the block, not with ``k``.
        """
        em, t = self.em, self.t
        stride_m = em.dim(self.spec.a_strides[-2])
        left = self._left([T.bind(a0 + i * stride_m) for i in range(rows)], elements)
        acc = self.acc
        for i in range(rows):
            with T.unroll(em.i64(t.nv)) as v, T.vectorized(em.i64(t.lanes)) as j:
                at = v * t.lanes + j
                T.buffer_store(acc[i], em.f32(0.0), [at])

        def step(k: Expr) -> None:
            for i in range(rows):
                value = left(i, k)
                if self.pairs:
                    with T.unroll(em.i64(t.nv)) as v:
                        at = ramp(v * t.lanes, LANES)
                        total = dot(em, acc[i][at], value, load(k, at))
                        T.buffer_store(acc[i], total, [at])
                    continue
                with T.unroll(em.i64(t.nv)) as v, T.vectorized(em.i64(t.lanes)) as j:
                    at = v * t.lanes + j
                    T.buffer_store(acc[i], acc[i][at] + value * _f32(load(k, at)), [at])

        # Few accumulators leave the loop's own instructions in the way; many fill a step.
        unroll = max(1, min(8, 16 // (rows * t.nv)))
        with T.serial(tir.truncdiv(depth, unroll)) as k0, T.unroll(em.i64(unroll)) as k1:
            step(k0 * unroll + k1)
        if not (isinstance(depth, tir.IntImm) and int(depth) % unroll == 0):
            with T.serial(tir.truncdiv(depth, unroll) * unroll, depth) as k:
                step(k)
        for i in range(rows):
            with T.unroll(em.i64(t.nv)) as v, T.vectorized(em.i64(t.lanes)) as j:
                at = v * t.lanes + j
                where = sums0 + i * t.width + at
                total = acc[i][at] if first else self.sums[where] + acc[i][at]
                T.buffer_store(self.sums, total, [where])

    def _left(self, starts: list[Expr], elements: Expr) -> Callable[[int, Expr], Expr]:
        """(row of a tile, step) -> what the panel's vector is multiplied with."""
        stride = self.em.dim(self.spec.a_strides[-1])
        if self.left is not None:
            self.left.fill(starts, stride, elements)
            return self.left.load
        if self.a_words is not None:
            source: Any = self.a_words
            halves = [T.bind(tir.truncdiv(start, 2)) for start in starts]
            return lambda i, k: source[halves[i] + k]
        return lambda i, k: self.a.load_flat(starts[i] + k * stride)

    # -- the right factor ---------------------------------------------------------------------

    def _block(
        self, batch: list[Expr], panel: Expr, column0: Expr, k0: Expr, depth: Expr
    ) -> LoadPanel:
        """Makes steps ``k0 .. k0 + depth`` of a panel readable."""
        em, spec, t = self.em, self.spec, self.t
        if spec.b_const:
            panels = -(-spec.n // t.width)  # type: ignore[operator]
            matrix = _dot(batch, [em.dim(s) for s in spec.b_matrix_strides])
            start = T.bind(((matrix * panels + panel) * self.k + k0) * t.width)
            if self.b_words is not None:
                source: Any = self.b_words
                return lambda k, j: source[_shifted(j, start + k * t.width)]
            return lambda k, j: self.b.load_flat(start + k * t.width + j)
        strides = [em.dim(s) for s in spec.b_strides]
        origin = T.bind(_dot(batch, strides) + k0 * strides[-2] + column0 * strides[-1])
        if self.direct:
            return lambda k, j: self.b.load_flat(origin + k * strides[-2] + j)
        limit = T.bind(tir.min(em.i64(t.width), self.n - column0))
        if self.turns:
            self._transpose_block(origin, depth, limit)
        else:
            self._copy_block(origin, depth, limit)
        scratch: Any = self.panel
        return lambda k, j: scratch[k * t.width + j]

    def _copy_block(self, origin: Expr, depth: Expr, limit: Expr) -> None:
        """Copies a block whose columns are neighbours in memory (or nothing is)."""
        em, t = self.em, self.t
        whole = tir.truncdiv(limit, t.lanes)
        with T.serial(depth) as k:
            with T.serial(whole) as v, T.vectorized(em.i64(t.lanes)) as j:
                self._put(origin, k, v * t.lanes + j)
            self._edge(origin, k, whole, limit)

    def _transpose_block(self, origin: Expr, depth: Expr, limit: Expr) -> None:
        """Copies a block whose steps are neighbours, in squares turned by vector shuffles."""
        em, t = self.em, self.t
        whole, squares = tir.truncdiv(limit, t.lanes), tir.truncdiv(depth, t.lanes)
        stride_n = em.dim(self.spec.b_strides[-1])
        with T.serial(whole) as v:
            with T.serial(squares) as s:
                corner = T.bind(origin + v * t.lanes * stride_n + s * t.lanes)
                starts = [corner + i * stride_n for i in range(t.lanes)]
                rows = [named(self.wide.vector(start, t.lanes)) for start in starts]
                for i, row in enumerate(transposed(rows)):
                    at = (s * t.lanes + i) * t.width + v * t.lanes
                    T.buffer_store(self.panel, row, [ramp(at, t.lanes)])
            with T.serial(squares * t.lanes, depth) as k, T.serial(em.i64(t.lanes)) as j:
                self._put(origin, k, v * t.lanes + j)
        with T.serial(depth) as k:
            self._edge(origin, k, whole, limit)

    def _edge(self, origin: Expr, k: Expr, whole: Expr, limit: Expr) -> None:
        """Columns past the last whole vector, and zeros up to the panel's width."""
        t = self.t
        if isinstance(self.spec.n, int) and self.spec.n % t.width == 0:
            return
        with T.serial(whole * t.lanes, limit) as j:
            self._put(origin, k, j)
        with T.serial(limit, self.em.i64(t.width)) as j:
            T.buffer_store(self.panel, self.em.f32(0.0), [k * t.width + j])

    def _put(self, origin: Expr, k: Expr, j: Expr) -> None:
        stride_k, stride_n = (self.em.dim(s) for s in self.spec.b_strides[-2:])
        value = self.b.load_flat(origin + k * stride_k + j * stride_n)
        T.buffer_store(self.panel, _f32(value), [k * self.t.width + j])

    # -- the result -----------------------------------------------------------------------------

    def _finish(
        self, batch: list[Expr], row0: Expr, sums0: Expr, column0: Expr, rows: Expr
    ) -> None:
        """Runs the epilogue over finished sums and stores the outputs."""
        em, spec, t = self.em, self.spec, self.t
        lanes = self.epilogue.lanes
        sizes = [em.dim(d) for d in spec.rows]
        with T.serial(rows) as i:
            index = [T.bind(x) for x in unravel(row0 + i, sizes)]
            sums = sums0 + i * t.width

            def vector(at: Expr, width: int) -> None:
                self.epilogue.store(
                    batch, index, T.bind(column0 + at), width, lambda j: self.sums[sums + at + j]
                )

            if isinstance(spec.n, int) and spec.n % t.width == 0:
                limit: Expr = em.i64(t.width)
            else:
                limit = tir.min(em.i64(t.width), self.n - column0)
            whole = tir.truncdiv(limit, lanes)
            static = spec.n if isinstance(spec.n, int) else None
            if lanes > 1 and (static is None or static >= lanes):
                with T.serial(whole) as v:
                    vector(v * lanes, lanes)
            if lanes == 1 or static is None or static % lanes:
                with T.serial(whole * lanes if lanes > 1 else em.i64(0), limit) as j:
                    vector(j, 1)


def _shifted(ramp: Expr, by: Expr) -> Expr:
    return tir.Ramp(ramp.base + by, ramp.stride, ramp.lanes)


def _f32(value: Expr) -> Expr:
    lanes = str(value.ty.dtype).partition("x")[2]
    if str(value.ty.dtype).startswith("float32"):
        return value
    return tir.Cast(f"float32x{lanes}" if lanes else "float32", value)


def _dot(index: list[Expr], strides: list[Expr]) -> Expr:
    total: Expr = tir.IntImm("int64", 0)
    for i, s in zip(index, strides, strict=False):
        total = total + i * s
    return total
