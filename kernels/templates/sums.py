"""The accumulators of a register tile: sums of products, long ones cut into runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..emit import Emitter, Expr
from .conv_common import name_index, vector
from .conv_tiling import inner_unroll
from .half_factors import LANES, dot
from .vectors import ramp

CUT_SUM = 300  # longer sums are cut into shorter ones ...
CUT_RUN = 224  # ... as are those of a longer run of terms, which costs less to cut ...
LONG_SUM = 128  # ... of about so many terms


class Sums:
    """The accumulators of a tile, and their totals where a sum is cut into shorter ones.

    A plain sum of n products has a rounding error that grows like sqrt(n) beside its value's;
    summing runs of some hundred terms first, as pairwise summation does, keeps the error of long
    sums several times smaller at a cost of a few instructions per run. ``pixels`` are the rows of
    the tile, of ``nv`` vectors each; ``terms`` are those of one sum, ``run`` those that taps
    along one dimension add.
    """

    def __init__(
        self, em: Emitter, pixels: int, nv: int, lanes: int, terms: int, run: int = 0
    ) -> None:
        self.em, self.nv, self.lanes = em, nv, lanes
        self.cut = cut = terms > CUT_SUM or run > CUT_RUN
        self.sums = [em.local(nv * lanes) for _ in range(pixels)]
        self.totals = [em.local(nv * lanes) for _ in range(pixels)] if cut else self.sums
        for buffer in (*self.sums, *(self.totals if cut else ())):
            with T.unroll(em.i64(nv)) as v, vector(em, lanes) as j:
                T.buffer_store(buffer, em.f32(0.0), [v * lanes + j])
        self.pending = False

    def add(self, pixel: int, at: Expr, term: Expr) -> None:
        T.buffer_store(self.sums[pixel], self.sums[pixel][at] + term, [at])
        self.pending = True

    def add_pairs(self, pixel: int, at: Expr, pair: Expr, weights: Expr) -> None:
        lanes, sums = ramp(at, LANES), self.sums[pixel]
        T.buffer_store(sums, dot(self.em, sums[lanes], pair, weights), [lanes])
        self.pending = True

    def loop(
        self, low: Expr, high: Expr, most: int, terms: int, step: Callable[[Expr], None]
    ) -> None:
        """``step(i)`` adds ``terms`` products for each i in [low, high), which is in [0, most).

        Where ``terms`` are few, sums end after several steps.
        """
        some = max(1, LONG_SUM // terms)
        if not self.cut or most < 2 * some:
            with T.serial(low, high) as i:
                step(i)
            self.flush(most * terms)
            return
        with T.serial(self.em.i64(0), self.em.i64(-(-most // some))) as part:
            first = name_index(tir.max(part * some, low))
            with T.serial(first, name_index(tir.max(first, tir.min((part + 1) * some, high)))) as i:
                step(i)
            self.flush(some * terms)

    def parts(self, depth: int) -> int:
        """Into how many equal sums a run of ``depth`` terms is cut."""
        if not self.cut or depth <= CUT_RUN:
            return 1
        step = inner_unroll(depth)
        sizes = [d for d in range(step, depth + 1, step) if depth % d == 0]
        return depth // min(sizes, key=lambda d: abs(math.log(d / LONG_SUM)))

    def flush(self, terms: int, pixels: Iterable[int] | None = None) -> None:
        """Ends the sums if they have many terms; with 0 terms, ends what is still pending."""
        if not (self.cut and self.pending) or 0 < terms < LONG_SUM // 2:
            return
        for i in pixels if pixels is not None else range(len(self.sums)):
            total, part = self.totals[i], self.sums[i]
            with T.unroll(self.em.i64(self.nv)) as v, vector(self.em, self.lanes) as j:
                at = v * self.lanes + j
                T.buffer_store(total, total[at] + part[at], [at])
                T.buffer_store(part, self.em.f32(0.0), [at])
        self.pending = False

    def result(self, pixel: int, at: Expr) -> Expr:
        return self.totals[pixel][at]
