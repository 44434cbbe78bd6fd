"""Depthwise convolution, and grouped convolution with groups narrower than a vector register.

A vector of output channels spans several groups, so the lanes need different inputs. One vector
load at the matching input channels brings all of them; for every channel ``c`` within a group an
in-register permutation gives each lane its group's channel ``c`` (for depthwise there is nothing
to permute). A tile is ``ri`` output pixels of one row by ``nv`` vectors; each loaded and permuted
input is used for every tap of the row of taps that it feeds, so that permutations and loads are
``KW`` times fewer than multiply-adds. Weights are packed ``[block, KH, KW, C/groups, nv * lanes]``,
those of 16 bits, of which there are few, as float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, Pack, ceil_div, symbol_names
from ..emit import Emitter, Expr
from ..group import HALF, IO, Group
from ..ops.common import convert_expr
from ..packing_conv import vector_starts
from ..target import Target
from .conv_common import Epilogue, clip, inside, lane_count, name_index, vector
from .conv_spec import ConvSpec, halo_of
from .half_factors import Wide
from .vectors import ramp

TASK_STEPS = 1 << 15  # vector multiply-adds of one task: some ten microseconds of one core
MIN_TASKS = 16
PERMUTED = 4  # channels of a group permuted at once, bounded by the weights' registers


def covers(spec: ConvSpec, io: IO, target: Target) -> bool:
    """Whether the groups are narrow enough, and channels adjacent in memory."""
    lanes = lane_count(spec.oc, target)
    return (
        spec.groups > 1
        and spec.og < lanes
        and lanes % spec.og == 0
        and lanes // spec.og * spec.cg <= 4 * lanes
        and spec.strides(io[spec.x])[1] == 1
    )


def skips_rows(spec: ConvSpec) -> bool:
    """Whether leaving out rows of taps in the padding saves more than the loop bounds cost."""
    rows = spec.oh if isinstance(spec.oh, int) else 1 << 20
    return sum(spec.needed()[0]) > 0.04 * rows * spec.sh


def configs(spec: ConvSpec, io: IO, target: Target) -> list[dict[str, Any]]:
    """Tile sizes ordered by estimated cycles."""
    lanes = lane_count(spec.oc, target)
    found: list[tuple[float, dict[str, Any]]] = []
    for nv in range(1, min(4, -(-spec.oc // lanes)) + 1):
        for ri in range(1, 15 if isinstance(spec.ow, int) else 2):
            if isinstance(spec.ow, int) and ri > spec.ow:
                break
            cost = _cost(spec, lanes, ri, nv, target.vector_registers)
            found.append((cost, {"kind": "lanes", "ri": ri, "nv": nv}))
    found.sort(key=lambda f: f[0])
    return [
        config | {"rows": _rows_per_task(spec, lanes, config)}
        for cost, config in found[:4]
        if cost <= 1.3 * found[0][0]
    ]


def _cost(spec: ConvSpec, lanes: int, ri: int, nv: int, registers: int) -> float:
    """Estimated cycles of one row over all channels; an unknown length counts as 64."""
    width = spec.ow if isinstance(spec.ow, int) else 64
    taps = range(ri * spec.kw)
    if ri == spec.ow and isinstance(spec.w, int):
        kept = [inside(ri, k, spec.sw, spec.pw, spec.dw, spec.w) for k in range(spec.kw)]
        taps = range(sum(map(len, kept)))
    columns = min((ri - 1) * spec.sw + (spec.kw - 1) * spec.dw + 1, len(taps))
    together = math.gcd(spec.cg, PERMUTED)
    weights = spec.kw * together
    if not skips_rows(spec) and spec.kh * len(taps) * nv * spec.cg < 256:
        weights *= spec.kh  # LLVM unrolls the rows of taps and keeps all their weights
    # The inputs of a wide group are loaded once and live through all its channels.
    live = ri * nv + weights * nv + 3 + (columns * nv if together < spec.cg else 0)
    adds, loads = len(taps) * spec.cg, columns * (1 + (spec.cg if spec.cg > 1 else 0))
    step = nv * (max(adds, loads) + 0.2 * loads + 0.5 * spec.kw * spec.cg) + 4
    step += 5.0 * max(0, live - registers)  # spilled and filled for every row of taps
    blocks = len(vector_starts(spec.oc, lanes, nv)) // nv
    return -(-width // ri) * blocks * (spec.kh * step + 20 + 3 * ri * nv)


def _rows_per_task(spec: ConvSpec, lanes: int, config: dict[str, Any]) -> int:
    rows = spec.n * spec.oh
    if not isinstance(rows, int) or not isinstance(spec.ow, int):
        return 1
    blocks = -(-spec.oc // (lanes * config["nv"]))
    steps = spec.ow * config["nv"] * spec.kh * spec.kw * spec.cg
    wanted = min(TASK_STEPS / steps, rows * blocks / MIN_TASKS)
    chunk = max(1, min(rows, round(wanted)))
    return -(-rows // -(-rows // chunk))


def lower(
    spec: ConvSpec, group: Group, io: IO, target: Target, config: dict[str, Any], name: str
) -> Kernel:
    """Lowers a group around a convolution with ``config`` keys ri, nv, rows."""
    lanes, nv = lane_count(spec.oc, target), config["nv"]
    if isinstance(spec.ow, int) and spec.ow < config["ri"]:
        raise ValueError(f"tiles of {config['ri']} pixels do not fit rows of {spec.ow}")
    if not isinstance(spec.ow, int) and config["ri"] > 1:
        raise ValueError("rows of unknown length take tiles of one pixel")
    blocks = len(vector_starts(spec.oc, lanes, nv)) // nv
    rows, chunk = spec.n * spec.oh, config["rows"]
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    em = Emitter(name, inputs, outputs, symbol_names(inputs + outputs))
    with em.function() as task:
        body = _Body(em, spec, group, io, config, lanes)
        block = name_index(tir.truncmod(task, blocks))
        first = name_index(tir.truncdiv(task, blocks) * chunk)
        limit = em.dim(rows)
        exact = isinstance(rows, int) and rows % chunk == 0
        extent = em.i64(chunk) if exact else tir.min(em.i64(chunk), limit - first)
        with T.serial(em.i64(0), extent) as r:
            line = name_index(first + r)
            with T.serial(em.i64(0), em.dim(ceil_div(spec.ow, config["ri"]))) as wt:
                body.tile(block, line, wt)
    layout: list[tuple[str, int]] = [("groups", 1), ("lanes", lanes), ("vectors", nv)]
    if io[spec.x].dtype in HALF:
        layout.append(("widened", True))
    pack = Pack("conv_direct", tuple(layout))
    return em.kernel(
        ceil_div(rows, chunk) * blocks,
        config,
        flops=spec.flops,
        packs=tuple(pack if n is spec.weight else None for n in group.inputs),
    )


class _Body:
    """Emits the work of one register tile."""

    def __init__(
        self, em: Emitter, spec: ConvSpec, group: Group, io: IO, config: dict[str, Any], lanes: int
    ) -> None:
        self.em, self.spec, self.lanes = em, spec, lanes
        self.ri, self.nv = config["ri"], config["nv"]
        refs = dict(zip(group.inputs, em.inputs, strict=True))
        self.x, weight = Wide(refs[spec.x]), refs[spec.weight].buffer
        self.w = T.decl_buffer(weight.shape, "float32", data=weight.data)
        self.bias = refs[spec.bias] if spec.bias is not None else None
        self.xs = [em.dim(s) for s in spec.strides(io[spec.x])]
        self.h, self.wd, self.oh, self.ow = (em.dim(d) for d in (spec.h, spec.w, spec.oh, spec.ow))
        have, need = halo_of(io[spec.x], spec.rank), spec.needed()
        self.guard_h, self.guard_w = (
            h[0] < n[0] or h[1] < n[1] for h, n in zip(have, need, strict=True)
        )
        self.epilogue = Epilogue.of(em, group)
        # A tile that is a whole row knows which taps fall into padding.
        self.whole = self.ri == spec.ow and isinstance(spec.w, int)
        # Input channels that one vector of outputs needs, and for each channel of a group the
        # lane of those that every output lane takes.
        self.span = lanes // spec.og * spec.cg
        self.takes: list[list[Any]] = [
            [j // spec.og * spec.cg + c for j in range(lanes)] for c in range(spec.cg)
        ]

    def tile(self, block: Expr, line: Expr, wt: Expr) -> None:
        em, spec, (sn, _, sh, sw) = self.em, self.spec, self.xs
        rj = self.nv * self.lanes
        first = [name_index(self._channel(block, v)) for v in range(self.nv)]
        col = wt * self.ri
        if not (isinstance(spec.ow, int) and spec.ow % self.ri == 0):
            col = tir.min(col, self.ow - self.ri)
        col = name_index(col)
        n, row = name_index(tir.truncdiv(line, self.oh)), name_index(tir.truncmod(line, self.oh))
        top, left = name_index(row * spec.sh - spec.ph), name_index(col * spec.sw - spec.pw)
        base = name_index(n * sn + top * sh + left * sw)
        bases = [name_index(base + tir.truncdiv(f, spec.og) * spec.cg) for f in first]
        acc = [[em.local(self.lanes) for _ in range(self.nv)] for _ in range(self.ri)]
        for v in range(self.nv):
            for i in range(self.ri):
                with vector(em, self.lanes) as j:
                    T.buffer_store(acc[i][v], em.f32(0.0), [j])
        kh_lo, kh_hi = em.i64(0), em.i64(spec.kh)
        if self.guard_h or skips_rows(spec):
            kh_lo, kh_hi = clip(top, spec.kh, spec.dh, self.h)
        weights = block * (spec.kh * spec.kw * spec.cg * rj)

        def taps(check: bool) -> None:
            with T.serial(kh_lo, kh_hi) as kh:
                at = kh * (spec.dh * sh)
                self._row_of_taps(acc, [b + at for b in bases], left,
                                  weights + kh * (spec.kw * spec.cg * rj), check)  # fmt: skip

        if self.guard_w and not self.whole:
            right = left + ((self.ri - 1) * spec.sw + (spec.kw - 1) * spec.dw)
            with T.If(tir.all(left >= 0, right < self.wd)):
                with T.Then():
                    taps(check=False)
                with T.Else():
                    taps(check=True)
        else:
            taps(check=False)
        for i in range(self.ri):
            for v in range(self.nv):
                with vector(em, self.lanes) as j:
                    total = acc[i][v][j]
                    if self.bias:
                        bias = self.bias.load([first[v] + j])
                        total = total + convert_expr(bias, self.bias.arg.dtype, torch.float32)
                    self.epilogue.store(spec.out_index(n, first[v] + j, row, col + i), total)

    def _channel(self, block: Expr, v: int) -> Expr:
        start = block * (self.nv * self.lanes) + v * self.lanes
        if self.spec.oc % (self.nv * self.lanes):
            start = tir.min(start, self.em.i64(self.spec.oc - self.lanes))
        return start

    def _row_of_taps(
        self, acc: list[list[Expr]], bases: list[Expr], left: Expr, weights: Expr, check: bool
    ) -> None:
        """Adds one row of taps: every input column once, to all outputs that it feeds."""
        em, spec, rj = self.em, self.spec, self.nv * self.lanes
        feeds: dict[int, list[tuple[int, int]]] = {}
        for kx in range(spec.kw):
            some: Iterable[int] = range(self.ri)
            if self.whole:
                some = inside(self.ri, kx, spec.sw, spec.pw, spec.dw, spec.w)
            for i in some:
                feeds.setdefault(i * spec.sw + kx * spec.dw, []).append((i, kx))
        together = math.gcd(spec.cg, PERMUTED)
        # Channels are walked outermost so that the weights of a few stay in registers.
        for c0 in range(0, spec.cg, together):
            for column in sorted(feeds):
                for v in range(self.nv):
                    source = self._source(bases[v], left, column, check)
                    for c in range(c0, c0 + together):
                        value = source
                        if spec.cg > 1 or spec.og > 1:
                            enough = [source] * -(-self.lanes // self.span)
                            value = T.bind(tir.Shuffle(enough, self.takes[c]))
                        for i, kx in feeds[column]:
                            at = weights + ((kx * spec.cg + c) * rj + v * self.lanes)
                            weight = self.w[ramp(at, self.lanes)]
                            whole = [ramp(em.i64(0), self.lanes)]
                            T.buffer_store(acc[i][v], acc[i][v][whole[0]] + value * weight, whole)

    def _source(self, base: Expr, left: Expr, column: int, check: bool) -> Expr:
        """The input channels of one vector at one column, zero outside the input."""
        em = self.em
        at = base + column * self.xs[3]
        value = self.x.vector(at, self.span)
        if check:
            x = left + column
            inside = tir.all(x >= 0, x < self.wd)
            value = T.if_then_else(inside, value, _broadcast(em.f32(0.0), self.span))
        return T.bind(value)


def _broadcast(value: Expr, lanes: Any) -> Expr:
    return tir.Broadcast(value, lanes)
