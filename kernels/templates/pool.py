"""Pooling: maximum and average over windows, vectorised over channels.

Two bodies. ``row`` computes ``ri`` neighbouring outputs of a row: first every input column is
reduced over the rows of the window, then the column results over the window's width, so that a
column's work is shared by all windows that contain it. ``window`` computes one output at a time
and serves adaptive pooling, large windows and sizes known only at run time.

Windows are cut at the input's edge, so no halo is needed and padding never wins a maximum. NaNs
win it, as in torch. Averages of long windows are summed row by row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, ceil_div, symbol_names
from ..emit import Emitter, Expr, compute_dtype
from ..group import IO, Group
from ..math import is_nan
from ..target import Target
from .conv_common import Epilogue, clip, inside, name_index, vector
from .pool_spec import POOLS, Axis, PoolSpec, parse

__all__ = ["POOLS", "candidates", "lower"]

MIN_TASKS = 16
TASK_LOADS = 1 << 13  # vector loads of one task: some ten microseconds of one core


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """At most six configurations for `lower`, the best analytic guess first.

    Raises `Unsupported` for groups that the template does not cover.
    """
    spec = parse(group, io)
    lanes = _lanes(spec, io, target)
    vectors = -(-spec.c // lanes)
    together = dict.fromkeys(min(nv, vectors) for nv in (4, 8, 1))
    windows = [{"kind": "window", "ri": 1, "nv": nv} for nv in together]
    rows: list[dict[str, Any]] = []
    if _rows_fit(spec) and int(spec.cols.out) > 1:  # type: ignore[arg-type]
        out, stride = int(spec.cols.out), spec.cols.stride  # type: ignore[arg-type]
        reach = (spec.cols.kernel - 1) * spec.cols.dilation + 1
        most = min(out, 16, (target.vector_registers - 4 - reach) // stride + 1)
        # Column loads per row: overlap between tiles and a last tile moved back cost the same.
        widths = list(range(1, most + 1))
        widths.sort(key=lambda w: (-(-out // w) * ((w - 1) * stride + reach), -w))
        rows = [{"kind": "row", "ri": w, "nv": 1} for w in widths[:3]]
    # Sharing columns saves loads; reading wide runs of channels saves cache misses, which counts
    # for more where windows overlap so much that their inputs stay in the first-level cache.
    found = windows + rows if spec.cols.stride == 1 else rows + windows
    return [c | {"rows": _rows_per_task(spec, vectors, c)} for c in found[:6]]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers ``group`` with one of the configurations of `candidates`.

    Raises `Unsupported` as `candidates` does, and ValueError for a configuration that does not
    fit the group.
    """
    spec = parse(group, io)
    if config["kind"] == "row" and not (_rows_fit(spec) and config["ri"] <= int(spec.cols.out)):  # type: ignore[arg-type]
        raise ValueError("row tiles need windows of fixed size in rows of known length")
    lanes, nv = _lanes(spec, io, target), config["nv"]
    vectors = -(-spec.c // lanes)
    blocks = -(-vectors // nv)
    rows, chunk = spec.n * spec.rows.out, config["rows"]
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    symbols = symbol_names(inputs + outputs)
    em = Emitter(name, inputs, outputs, symbols)
    with em.function() as task:
        body = _Body(em, spec, group, io, config, lanes)
        block = name_index(tir.truncmod(task, blocks))
        first = name_index(tir.truncdiv(task, blocks) * chunk)
        exact = isinstance(rows, int) and rows % chunk == 0
        extent = em.i64(chunk) if exact else tir.min(em.i64(chunk), em.dim(rows) - first)
        with T.serial(em.i64(0), extent) as r:
            line = name_index(first + r)
            with T.serial(em.i64(0), em.dim(ceil_div(spec.cols.out, config["ri"]))) as part:
                body.tile(block, line, part)
    return em.kernel(
        ceil_div(rows, chunk) * blocks,
        config,
        flops=spec.n * spec.c * spec.rows.out * spec.cols.out * _window(spec),
    )


def _rows_fit(spec: PoolSpec) -> bool:
    cols = spec.cols
    reach = (cols.kernel - 1) * cols.dilation + 1
    static = isinstance(cols.size, int) and isinstance(cols.out, int) and cols.out > 0
    return static and not cols.adaptive and not spec.rows.adaptive and reach <= 12


def _window(spec: PoolSpec) -> int:
    """Elements of a window; an adaptive one is estimated from the sizes where they are known."""
    count = 1
    for axis in (spec.rows, spec.cols):
        if not axis.adaptive:
            count *= axis.kernel
        elif isinstance(axis.size, int) and isinstance(axis.out, int) and axis.out:
            count *= -(-axis.size // axis.out)
    return count


def _rows_per_task(spec: PoolSpec, vectors: int, config: dict[str, Any]) -> int:
    rows = spec.n * spec.rows.out
    if not isinstance(rows, int) or not isinstance(spec.cols.out, int):
        return 1
    loads = max(1, spec.cols.out * config["nv"] * _window(spec))
    blocks = -(-vectors // config["nv"])
    chunk = max(1, min(round(min(TASK_LOADS / loads, rows * blocks / MIN_TASKS)), rows))
    return max(1, -(-rows // -(-rows // chunk))) if rows else 1


def _lanes(spec: PoolSpec, io: IO, target: Target) -> int:
    """Channels of one vector; one if channels are not adjacent in memory."""
    if spec.strides(io[spec.x])[1] != 1:
        return 1
    lanes = target.lanes(_sum_dtype(spec.dtype))
    while lanes > spec.c:
        lanes //= 2
    return lanes


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision values are reduced in single precision."""
    return torch.float32 if dtype.itemsize < 4 else dtype


class _Body:
    """Emits the work of one tile: some outputs of one row, by ``nv`` vectors of channels."""

    def __init__(
        self, em: Emitter, spec: PoolSpec, group: Group, io: IO, config: dict[str, Any], lanes: int
    ) -> None:
        self.em, self.spec, self.lanes = em, spec, lanes
        self.row_kind, self.ri, self.nv = config["kind"] == "row", config["ri"], config["nv"]
        self.x = dict(zip(group.inputs, em.inputs, strict=True))[spec.x]
        self.xs = [em.dim(s) for s in spec.strides(io[spec.x])]
        self.h, self.wd = em.dim(spec.rows.size), em.dim(spec.cols.size)
        self.oh, self.ow = em.dim(spec.rows.out), em.dim(spec.cols.out)
        self.dtype = compute_dtype(_sum_dtype(spec.dtype))
        self.identity = tir.const(0.0 if spec.kind == "avg" else -math.inf, self.dtype)
        self.epilogue = Epilogue.of(em, group)

    def tile(self, block: Expr, line: Expr, part: Expr) -> None:
        """Computes and stores outputs ``[part * ri, ...)`` of row ``line``."""
        spec = self.spec
        n, row = name_index(tir.truncdiv(line, self.oh)), name_index(tir.truncmod(line, self.oh))
        firsts = [name_index(self._channel(block, v)) for v in range(self.nv)]
        base = n * self.xs[0]
        bases = [name_index(base + f * self.xs[1]) for f in firsts]
        ys = self._range(spec.rows, row, self.h)
        if self.row_kind:
            start = part * self.ri
            if int(spec.cols.out) % self.ri:  # type: ignore[arg-type]
                start = tir.min(start, self.ow - self.ri)
            start = name_index(start)
            for first, at in zip(firsts, bases, strict=True):
                self._row(first, at, n, row, start, ys)
        else:
            self._windows(firsts, bases, n, row, part, ys)

    def _channel(self, block: Expr, v: int) -> Expr:
        start = block * (self.nv * self.lanes) + v * self.lanes
        if self.spec.c % (self.nv * self.lanes):
            start = tir.min(start, self.em.i64(self.spec.c - self.lanes))
        return start

    def _range(self, axis: Axis, o: Expr, size: Expr) -> tuple[Expr, Expr, Expr, int]:
        """Taps (first, last + 1) of output ``o``, the input position of tap 0, and the step."""
        if axis.adaptive:
            out = self.em.dim(axis.out)
            begin = name_index(tir.truncdiv(o * size, out))
            end = tir.truncdiv((o + 1) * size + out - 1, out)
            return self.em.i64(0), name_index(end - begin), begin, 1
        first = name_index(o * axis.stride - axis.pad)
        if not axis.padded():
            return self.em.i64(0), self.em.i64(axis.kernel), first, axis.dilation
        return (*clip(first, axis.kernel, axis.dilation, size), first, axis.dilation)

    def _load(self, at: Expr) -> Expr:
        value = self.x.load_flat(at)
        return (
            value if compute_dtype(self.spec.dtype) == self.dtype else tir.Cast(self.dtype, value)
        )

    def _join(self, total: Expr, value: Expr) -> Expr:
        if self.spec.kind == "avg":
            return total + value
        return tir.Select(tir.Or(value > total, is_nan(value)), value, total)

    # -- one output at a time ----------------------------------------------------------------

    def _windows(
        self, firsts: list[Expr], bases: list[Expr], n: Expr, row: Expr, col: Expr, ys: Any
    ) -> None:
        em, (_, sc, sh, sw) = self.em, self.xs
        xs = self._range(self.spec.cols, col, self.wd)
        totals = [em.local(self.lanes, self.dtype) for _ in firsts]
        lines = [em.local(self.lanes, self.dtype) for _ in firsts]
        for total in totals:
            with vector(em, self.lanes) as j:
                T.buffer_store(total, self.identity, [j])
        with T.serial(ys[0], ys[1]) as ky:
            y = (ys[2] + ky * ys[3]) * sh
            for part in lines:
                with vector(em, self.lanes) as j:
                    T.buffer_store(part, self.identity, [j])
            with T.serial(xs[0], xs[1]) as kx:
                at = name_index(y + (xs[2] + kx * xs[3]) * sw)
                for part, base in zip(lines, bases, strict=True):
                    with vector(em, self.lanes) as j:
                        value = self._load(base + at + j * sc)
                        T.buffer_store(part, self._join(part[j], value), [j])
            for total, part in zip(totals, lines, strict=True):
                with vector(em, self.lanes) as j:
                    T.buffer_store(total, self._join(total[j], part[j]), [j])
        scale = self._scale(row, ys, col, xs)
        for first, total in zip(firsts, totals, strict=True):
            with vector(em, self.lanes) as j:
                self._store(n, first + j, row, col, total[j], scale)

    # -- neighbouring outputs of a row -------------------------------------------------------

    def _row(self, first: Expr, base: Expr, n: Expr, row: Expr, start: Expr, ys: Any) -> None:
        axis = self.spec.cols
        size = axis.size
        left = name_index(start * axis.stride - axis.pad)
        reach = (self.ri - 1) * axis.stride + (axis.kernel - 1) * axis.dilation
        whole = self.ri == axis.out
        if not axis.padded():
            self._columns(first, base, n, row, start, left, ys, None)
        elif whole:  # the whole row: which columns exist is known
            assert isinstance(size, int)
            exist = {q for q in range(reach + 1) if 0 <= q - axis.pad < size}
            self._columns(first, base, n, row, start, left, ys, exist)
        else:
            with T.If(tir.all(left >= 0, left + reach < self.wd)):
                with T.Then():
                    self._columns(first, base, n, row, start, left, ys, None)
                with T.Else():
                    self._edge(first, base, n, row, start, ys)

    def _edge(self, first: Expr, base: Expr, n: Expr, row: Expr, start: Expr, ys: Any) -> None:
        """A tile some of whose windows reach outside: each output by itself."""
        with T.serial(self.em.i64(0), self.em.i64(self.ri)) as i:
            self._windows([first], [base], n, row, name_index(start + i), ys)

    def _columns(
        self, first: Expr, base: Expr, n: Expr, row: Expr, start: Expr, left: Expr, ys: Any,
        exist: set[int] | None,
    ) -> None:  # fmt: skip
        """The tile by column results; ``exist`` names the columns inside the input (None: all)."""
        em, axis, (_, sc, sh, sw) = self.em, self.spec.cols, self.xs
        taps: list[list[int]] = [[] for _ in range(self.ri)]
        for k in range(axis.kernel):
            some = range(self.ri)
            if exist is not None:
                some = inside(self.ri, k, axis.stride, axis.pad, axis.dilation, axis.size)
            for i in some:
                taps[i].append(i * axis.stride + k * axis.dilation)
        used = sorted({q for columns in taps for q in columns})
        columns = {q: em.local(self.lanes, self.dtype) for q in used}
        for column in columns.values():
            with vector(em, self.lanes) as j:
                T.buffer_store(column, self.identity, [j])
        with T.serial(ys[0], ys[1]) as ky:
            at = name_index(base + (ys[2] + ky * ys[3]) * sh + left * sw)
            for q, column in columns.items():
                with vector(em, self.lanes) as j:
                    value = self._load(at + q * sw + j * sc)
                    T.buffer_store(column, self._join(column[j], value), [j])
        total = em.local(self.lanes, self.dtype)
        for i in range(self.ri):
            with vector(em, self.lanes) as j:
                if not taps[i]:
                    T.buffer_store(total, self.identity, [j])
                for step, q in enumerate(taps[i]):
                    value = columns[q][j]
                    T.buffer_store(total, self._join(total[j], value) if step else value, [j])
            col = start + i
            known = em.i64(len(taps[i])) if exist is not None else em.i64(axis.kernel)
            scale = self._scale(row, ys, col, (em.i64(0), known, None, 1))
            with vector(em, self.lanes) as j:
                self._store(n, first + j, row, col, total[j], scale)

    # -- results ---------------------------------------------------------------------------

    def _scale(self, row: Expr, ys: Any, col: Expr, xs: Any) -> Expr | None:
        """What an average's sum is multiplied by."""
        spec = self.spec
        if spec.kind == "max":
            return None
        if spec.divisor is not None:
            return tir.const(1.0 / spec.divisor, self.dtype)
        count: Expr = self.em.i64(1)
        for axis, o, taps in ((spec.rows, row, ys), (spec.cols, col, xs)):
            if axis.adaptive or not (spec.include_pad and axis.padded()):
                count = count * (taps[1] - taps[0])
            else:  # windows count their padding, but not what ceil_mode adds beyond it
                begin = o * axis.stride - axis.pad
                size = self.em.dim(axis.size)
                count = count * (tir.min(begin + axis.kernel, size + axis.pad) - begin)
        if isinstance(count, tir.IntImm):
            return tir.const(1.0 / int(count), self.dtype)
        return T.bind(tir.const(1.0, self.dtype) / tir.Cast(self.dtype, count))

    def _store(
        self, n: Expr, channel: Expr, row: Expr, col: Expr, total: Expr, scale: Expr | None
    ) -> None:
        value = total if scale is None else total * scale
        if compute_dtype(self.spec.dtype) != self.dtype:
            value = tir.Cast(compute_dtype(self.spec.dtype), value)
        self.epilogue.store(self.spec.out_index(n, channel, row, col), value)
