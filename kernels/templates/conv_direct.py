"""Direct convolution by register tiles of pixels by output channels.

One tile holds ``ri`` output pixels times ``nv`` vectors of output channels in registers while all
taps and input channels stream past it: per input element one broadcast, per weight vector one
load. Weights are packed so that a tile reads them in one sequence
(``[block, KH, KW, C, nv * lanes]``); the input is read where it lies, at any strides. This is the
structure of Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD
Architectures" (SC 2018), with the blocked activation layout replaced by plain NHWC strides.

Two ways to cut the output into tiles:

* ``rows``: a tile lies in one output row, the last one of a row moved back to overlap its
  neighbour. Pixel offsets are then constants, and rows of taps above or below the input are
  skipped; where the input's halo is too narrow, only tiles at the row's ends check their columns.
* ``flat``: pixels of all rows and images are numbered through and the last tile is clamped to the
  last pixel. Wastes nothing on short rows and works for sizes known only at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Dim, Kernel, Pack
from ..emit import Emitter, Expr
from ..group import IO, Group
from ..packing_conv import vector_starts
from ..target import Target
from .conv_common import (
    Epilogue,
    ceil_div,
    compulsory_bytes,
    lane_count,
    loop,
    symbol_names,
)
from .conv_spec import ConvSpec, halo_of


L1_BYTES = 32 << 10
L2_BYTES = 1 << 20
TASK_FLOPS = 1.5e6  # some ten microseconds of one core
MIN_TASKS = 16


@dataclass
class _Tile:
    """The pixels of one register tile.

    ``pixel[i]`` is (n, row, col) of output pixel i; ``base[i]`` the element offset of its first
    tap in channel 0 of the group; ``top`` and ``left[i]`` the input coordinates of that tap.
    """

    pixel: list[tuple[Expr, Expr, Expr]]
    base: list[Expr]
    top: list[Expr]
    left: list[Expr]


def lower(
    spec: ConvSpec, group: Group, io: IO, target: Target, config: dict[str, Any], name: str
) -> Kernel:
    """Lowers a group around a convolution with ``config`` keys ri, nv, tile, order, chunk."""
    ri, nv = config["ri"], config["nv"]
    lanes = lane_count(spec.og, target)
    if config["tile"] == "rows" and not (isinstance(spec.ow, int) and spec.ow >= ri):
        raise ValueError(f"row tiles of {ri} pixels do not fit rows of {spec.ow}")
    blocks = len(vector_starts(spec.og, lanes, nv)) // nv
    panels = spec.groups * blocks
    if config["tile"] == "rows":
        tiles: Dim = spec.n * spec.oh * -(-spec.ow // ri)  # type: ignore[operator]
    else:
        tiles = ceil_div(spec.n * spec.oh * spec.ow, ri)
    chunk = config["chunk"]
    chunks = ceil_div(tiles, chunk)
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    symbols = symbol_names(inputs + outputs)
    em = Emitter(name, inputs, outputs, symbols)
    with em.function() as task:
        body = _Body(em, spec, group, io, config, lanes, blocks)
        if config["order"] == "panel":  # consecutive tasks share a weight panel
            count = em.dim(chunks)
            panel, first = tir.floordiv(task, count), tir.floormod(task, count)
        else:  # consecutive tasks share input pixels
            panel, first = tir.floormod(task, panels), tir.floordiv(task, panels)
        panel, first = T.bind(panel), T.bind(first * chunk)
        limit = em.dim(tiles)
        exact = isinstance(tiles, int) and tiles % chunk == 0
        extent = em.i64(chunk) if exact else tir.min(em.i64(chunk), limit - first)
        with T.serial(em.i64(0), extent) as t:
            body.tile(panel, first + t)
    packs = {
        spec.weight: Pack(
            "conv_direct", (("groups", spec.groups), ("lanes", lanes), ("vectors", nv))
        )
    }
    return Kernel(
        name=name,
        func=em.finish(),
        inputs=inputs,
        outputs=outputs,
        symbols=symbols,
        tasks=chunks * panels,
        packs=tuple(packs.get(n) for n in group.inputs),
        flops=spec.flops,
        bytes=compulsory_bytes(inputs + outputs),
        config=config,
    )


class _Body:
    """Emits the work of one register tile."""

    def __init__(
        self, em: Emitter, spec: ConvSpec, group: Group, io: IO,
        config: dict[str, Any], lanes: int, blocks: int,
    ) -> None:  # fmt: skip
        self.em, self.spec, self.lanes, self.blocks = em, spec, lanes, blocks
        self.ri, self.nv, self.rows = config["ri"], config["nv"], config["tile"] == "rows"
        refs = dict(zip(group.inputs, em.inputs, strict=True))
        self.x, self.w = refs[spec.x], refs[spec.weight]
        self.bias = refs[spec.bias] if spec.bias is not None else None
        self.xs = [em.dim(s) for s in spec.strides(io[spec.x])]
        self.static_xs = spec.strides(io[spec.x])
        self.h, self.wd, self.oh, self.ow = (
            em.dim(d) for d in (spec.h, spec.w, spec.oh, spec.ow)
        )
        have, need = halo_of(io[spec.x], spec.rank), spec.needed()
        self.guard_h, self.guard_w = (
            h[0] < n[0] or h[1] < n[1] for h, n in zip(have, need, strict=True)
        )
        self.epilogue = Epilogue.of(em, group)

    def tile(self, panel: Expr, number: Expr) -> None:
        em, spec, rj = self.em, self.spec, self.nv * self.lanes
        grp = tir.floordiv(panel, self.blocks) if spec.groups > 1 else em.i64(0)
        block = tir.floormod(panel, self.blocks) if spec.groups > 1 else panel
        first = [T.bind(self._channel(grp, block, v)) for v in range(self.nv)]
        tile = self._pixels(number, grp)
        acc = [em.local(rj) for _ in range(self.ri)]
        for i in range(self.ri):
            for v in range(self.nv):
                with T.vectorized(em.i64(self.lanes)) as j:
                    init = self.bias.load([first[v] + j]) if self.bias else em.f32(0.0)
                    T.buffer_store(acc[i], init, [v * self.lanes + j])
        weights = panel * (spec.kh * spec.kw * spec.cg * rj)
        if self.guard_w and self.rows:
            left, right = tile.left[0], tile.left[-1] + (spec.kw - 1) * spec.dw
            with T.If(tir.all(left >= 0, right < self.wd)):
                with T.Then():
                    self._taps(acc, tile, weights, check=False)
                with T.Else():
                    self._taps(acc, tile, weights, check=True)
        else:
            self._taps(acc, tile, weights, check=self.guard_w or self.guard_h)
        for i in range(self.ri):
            n, row, col = tile.pixel[i]
            for v in range(self.nv):
                with T.vectorized(em.i64(self.lanes)) as j:
                    index = spec.out_index(n, first[v] + j, row, col)
                    self.epilogue.store(index, acc[i][v * self.lanes + j])

    def _channel(self, grp: Expr, block: Expr, v: int) -> Expr:
        """The first output channel of vector ``v`` of a block."""
        start = block * (self.nv * self.lanes) + v * self.lanes
        if self.spec.og % (self.nv * self.lanes):
            start = tir.min(start, self.em.i64(self.spec.og - self.lanes))
        return grp * self.spec.og + start

    def _pixels(self, number: Expr, grp: Expr) -> _Tile:
        spec, (sn, sc, sh, sw) = self.spec, self.xs
        channel = grp * spec.cg * sc
        if self.rows:
            per_row = -(-spec.ow // self.ri)  # type: ignore[operator]
            line = T.bind(tir.floordiv(number, per_row))
            col = tir.floormod(number, per_row) * self.ri
            if spec.ow % self.ri:  # type: ignore[operator]
                col = tir.min(col, self.ow - self.ri)
            col = T.bind(col)
            n, row = T.bind(tir.floordiv(line, self.oh)), T.bind(tir.floormod(line, self.oh))
            top, left = T.bind(row * spec.sh - spec.ph), T.bind(col * spec.sw - spec.pw)
            base = T.bind(n * sn + top * sh + left * sw + channel)
            steps = range(self.ri)
            return _Tile(
                [(n, row, col + i) for i in steps],
                [base + i * spec.sw * sw for i in steps],
                [top for _ in steps],
                [left + i * spec.sw for i in steps],
            )
        tile = _Tile([], [], [], [])
        pixels = spec.n * spec.oh * spec.ow
        last = self.em.dim(pixels) - 1
        for i in range(self.ri):
            p = number * self.ri + i
            if not (isinstance(pixels, int) and pixels % self.ri == 0):
                p = tir.min(p, last)
            p = T.bind(p)
            line = T.bind(tir.floordiv(p, self.ow))
            col = T.bind(tir.floormod(p, self.ow))
            n, row = T.bind(tir.floordiv(line, self.oh)), T.bind(tir.floormod(line, self.oh))
            top, left = T.bind(row * spec.sh - spec.ph), T.bind(col * spec.sw - spec.pw)
            tile.pixel.append((n, row, col))
            tile.base.append(T.bind(n * sn + top * sh + left * sw + channel))
            tile.top.append(top)
            tile.left.append(left)
        return tile

    def _taps(self, acc: list[Expr], tile: _Tile, weights: Expr, check: bool) -> None:
        """Adds all taps of the tile; ``check`` reads zero outside the input."""
        em, spec, rj = self.em, self.spec, self.nv * self.lanes
        _, sc, sh, sw = self.xs
        clip_rows = self.rows and self.guard_h
        kh_lo, kh_hi = em.i64(0), em.i64(spec.kh)
        if clip_rows:  # every pixel of the tile has the same row, so whole taps drop out
            top = tile.top[0]
            kh_lo = T.bind(tir.max(kh_lo, tir.floordiv(-top + spec.dh - 1, spec.dh)))
            kh_hi = T.bind(
                tir.min(kh_hi, tir.floordiv(self.h - top + spec.dh - 1, spec.dh))
            )
        merged = not check and (self.static_xs[1] * spec.cg, spec.dw) == (self.static_xs[3], 1)
        if merged or spec.kw == 1:  # columns of taps and channels form one run
            kw, depth = 1, spec.kw * spec.cg
        else:
            kw, depth = spec.kw, spec.cg

        def step(kh: Expr, kx: Expr, k: Expr) -> None:
            shift = kh * (spec.dh * sh) + kx * (spec.dw * sw) + k * sc
            row = weights + ((kh * kw + kx) * depth + k) * rj
            for i in range(self.ri):
                value = self.x.load_flat(tile.base[i] + shift)
                if check:
                    x = tile.left[i] + kx * spec.dw
                    inside = tir.all(x >= 0, x < self.wd)
                    if not self.rows:
                        y = tile.top[i] + kh * spec.dh
                        inside = tir.all(inside, y >= 0, y < self.h)
                    value = T.if_then_else(inside, value, em.f32(0.0))
                with T.unroll(em.i64(self.nv)) as v:
                    with T.vectorized(em.i64(self.lanes)) as j:
                        at = v * self.lanes + j
                        term = value * self.w.load_flat(row + at)
                        T.buffer_store(acc[i], acc[i][at] + term, [at])

        with T.serial(kh_lo, kh_hi) as kh, loop(em, kw) as kx:
            unroll = inner_unroll(depth)
            with loop(em, depth // unroll) as k0, T.unroll(em.i64(unroll)) as k1:
                step(kh, kx, k0 * unroll + k1)


def inner_unroll(depth: int) -> int:
    """How many steps of the innermost loop to unroll."""
    if depth <= 8:
        return depth
    return next(u for u in (4, 3, 2, 1) if depth % u == 0)


def configs(spec: ConvSpec, io: IO, target: Target) -> list[dict[str, Any]]:
    """Configurations in the order of a cost model: cycles of all tiles, tails included."""
    lanes = lane_count(spec.og, target)
    guarded = any(
        have[side] < need[side]
        for have, need in zip(halo_of(io[spec.x], spec.rank), spec.needed(), strict=True)
        for side in (0, 1)
    )
    found: list[tuple[float, dict[str, Any]]] = []
    for nv in range(1, 8):
        if nv > 1 and (nv - 1) * lanes >= spec.og:
            break
        for ri in range(1, 17):
            if ri * nv + nv + 1 > target.vector_registers:
                break
            for tile in ("rows", "flat"):
                cost = _cost(spec, lanes, ri, nv, tile, guarded)
                if cost is not None:
                    found.append((cost, {"kind": "direct", "tile": tile, "ri": ri, "nv": nv}))
    found.sort(key=lambda f: (f[0], sorted(f[1].items(), key=str)))
    result: list[dict[str, Any]] = []
    for cost, config in found[:4]:
        if cost > 1.25 * found[0][0]:
            break
        result.append(config | _blocking(spec, lanes, config))
    other = "pixel" if result[0]["order"] == "panel" else "panel"
    return [*result[:2], result[0] | {"order": other}, *result[2:]]


def _cost(
    spec: ConvSpec, lanes: int, ri: int, nv: int, tile: str, guarded: bool
) -> float | None:
    """Estimated cycles of the convolution, or None where the tiling does not apply.

    Sizes known only at run time count as large; they leave only ``flat`` tiles, of few pixels.
    """
    static = all(isinstance(d, int) for d in (spec.n, spec.oh, spec.ow))
    vectors = len(vector_starts(spec.og, lanes, nv)) * spec.groups
    if tile == "rows":
        if not isinstance(spec.ow, int) or spec.ow < ri:
            return None
        tiles = -(-spec.ow // ri) * (spec.n * spec.oh if static else 1024)  # type: ignore[operator]
        setup = 24.0
    else:
        tiles = -(-spec.n * spec.oh * spec.ow // ri) if static else 65536 / ri  # type: ignore[operator]
        setup = 16.0 * ri + 2.0 * ri * spec.kh * spec.kw
    depth = spec.kh * spec.kw * spec.cg
    # One multiply-add a cycle, one load a cycle beside it, and at least four chains in flight.
    step = max(ri * nv, ri + nv, 6) + 0.04 * (ri + nv) + 0.5
    if depth * nv * lanes * 4 > L1_BYTES // 2:
        step = max(step, 2.5 * nv + 1)  # the weight panel comes from L2
    if guarded and tile == "flat":
        step += 6 * ri  # every input element is checked
    return float(tiles) * (vectors // nv) * (depth * step + setup + 4 * ri * nv)


def _blocking(spec: ConvSpec, lanes: int, config: dict[str, Any]) -> dict[str, Any]:
    """Tiles per task and the order of tasks: what is read again should be what stays in cache."""
    ri, nv = config["ri"], config["nv"]
    panels = len(vector_starts(spec.og, lanes, nv)) // nv * spec.groups
    depth = spec.kh * spec.kw * spec.cg
    pixels = spec.n * spec.oh * spec.ow
    if not isinstance(pixels, int):
        return {"chunk": 8, "order": "panel"}
    per_row = -(-spec.ow // ri)  # type: ignore[operator]
    tiles = spec.n * spec.oh * per_row if config["tile"] == "rows" else -(-pixels // ri)  # type: ignore[operator]
    wanted = TASK_FLOPS / (2 * ri * nv * lanes * depth)
    wanted = min(wanted, tiles * panels / MIN_TASKS)
    chunk = max(1, min(tiles, round(wanted)))
    if config["tile"] == "rows" and chunk > per_row:
        chunk = chunk // per_row * per_row
    chunk = -(-tiles // -(-tiles // chunk))
    chunks = -(-tiles // chunk)
    weights = 4 * panels * depth * nv * lanes
    source = 4 * spec.n * spec.c * spec.h * spec.w  # type: ignore[operator]
    by_panel = weights + source * (panels // spec.groups if source > L2_BYTES // 2 else 1)
    by_pixel = source + weights * (chunks if weights > L2_BYTES // 2 else 1)
    return {"chunk": chunk, "order": "panel" if by_panel <= by_pixel else "pixel"}
