"""Direct convolution by register tiles of pixels by output channels.

One tile holds ``ri`` output pixels times ``nv`` vectors of output channels in registers while all
taps and input channels stream past it: per input element one broadcast, per weight vector one
load. Weights are packed so that a tile reads them in one sequence
(``[block, KH, KW, C, nv * lanes]``); the input is read where it lies, at any strides. This is the
structure of Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD
Architectures" (SC 2018), with the blocked activation layout replaced by plain NHWC strides.

Three ways to cut the output into tiles:

* ``rows``: a tile lies in one output row. Pixel offsets are then constants, and rows of taps above
  or below the input are skipped, which on small images saves a tenth of the work. A tile as long
  as its row leaves out the multiplications with padding beside the row too.
* ``cols``: the same along the height: whole columns of taps are skipped.
* ``flat``: pixels of all rows and images are numbered through and the last tile is clamped to the
  last pixel. Wastes nothing on short rows and works for sizes known only at run time.

The last tile of a line is moved back to overlap its neighbour, or (``split``) gets a narrower body
of its own. Where the input's halo is too narrow, only tiles at a line's ends check bounds; ``flat``
tiles check every element.

In bfloat16 a step may be a pair of input channels (`half_factors`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, Pack, ceil_div, symbol_names
from ..emit import Emitter, Expr
from ..group import IO, Group
from ..ops.common import convert_expr
from ..packing_conv import vector_starts
from ..target import Target
from .conv_common import Epilogue, clip, inside, lane_count, loop, name_index, vector, within
from .conv_spec import ConvSpec, halo_of
from .conv_tiling import inner_unroll, tile_count
from .half_factors import LANES, words, words_at_even
from .sums import Sums
from .vectors import ramp

LONG_SUM = 64
"""Terms of a sum during which the cache lines for its result can be fetched."""


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


def in_pairs(spec: ConvSpec, io: IO, target: Target) -> bool:
    """Whether steps are pairs of input channels: these are neighbours, and pixels even distances
    apart.
    """
    n, c, h, w = spec.strides(io[spec.x])
    return (
        target.pairs(io[spec.x].dtype)
        and lane_count(spec.og, target) == LANES
        and words_at_even((n, h, w, c), spec.cg)
    )


def lower(
    spec: ConvSpec, group: Group, io: IO, target: Target, config: dict[str, Any], name: str
) -> Kernel:
    """Lowers a group around a convolution with a configuration of `conv_tiling.configs`."""
    ri, nv = config["ri"], config["nv"]
    lanes = config["lanes"]
    blocks = len(vector_starts(spec.og, lanes, nv)) // nv
    panels = spec.groups * blocks
    tiles = tile_count(spec, config["tile"], ri)
    chunk = config["chunk"]
    chunks = ceil_div(tiles, chunk)
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    symbols = symbol_names(inputs + outputs)
    pairs = in_pairs(spec, io, target)
    em = Emitter(name, inputs, outputs, symbols)
    with em.function() as task:
        body = _Body(em, spec, group, io, config, blocks, pairs)
        if config["order"] == "panel":  # consecutive tasks share a weight panel
            count = em.dim(chunks)
            panel, first = tir.truncdiv(task, count), tir.truncmod(task, count)
        else:  # consecutive tasks share input pixels
            panel, first = tir.truncmod(task, panels), tir.truncdiv(task, panels)
        panel, first = name_index(panel), name_index(first * chunk)
        limit = em.dim(tiles)
        exact = isinstance(tiles, int) and tiles % chunk == 0
        extent = em.i64(chunk) if exact else tir.min(em.i64(chunk), limit - first)
        with T.serial(em.i64(0), extent) as t:
            body.tile(panel, first + t)
    layout: list[tuple[str, int]] = [("groups", spec.groups), ("lanes", lanes), ("vectors", nv)]
    if pairs:
        layout.append(("pairs", True))
    packs = {spec.weight: Pack("conv_direct", tuple(layout))}
    return em.kernel(
        chunks * panels, config, flops=spec.flops, packs=tuple(packs.get(n) for n in group.inputs)
    )


class _Body:
    """Emits the work of one register tile."""

    def __init__(
        self, em: Emitter, spec: ConvSpec, group: Group, io: IO,
        config: dict[str, Any], blocks: int, pairs: bool,
    ) -> None:  # fmt: skip
        self.em, self.spec, self.blocks = em, spec, blocks
        self.lanes, self.ri, self.nv = config["lanes"], config["ri"], config["nv"]
        self.kind, self.split = config["tile"], config["split"]
        refs = dict(zip(group.inputs, em.inputs, strict=True))
        self.x, self.w = refs[spec.x], refs[spec.weight]
        self.x_words, self.w_words = (words(self.x), words(self.w)) if pairs else (None, None)
        self.together = 2 if pairs else 1  # input channels in a step
        self.steps = spec.cg // self.together
        self.bias = refs[spec.bias] if spec.bias is not None else None
        self.static_xs = spec.strides(io[spec.x])
        self.xs = [em.dim(s) for s in self.static_xs]
        self.h, self.wd, self.oh, self.ow = (em.dim(d) for d in (spec.h, spec.w, spec.oh, spec.ow))
        have, need = halo_of(io[spec.x], spec.rank), spec.needed()
        self.guard = [
            h[0] < n[0] or h[1] < n[1] for h, n in zip(have, need, strict=True)
        ]  # rows, columns
        self.epilogue = Epilogue.of(em, group)

    def tile(self, panel: Expr, number: Expr) -> None:
        """Computes and stores tile ``number`` of one panel of output channels."""
        em, spec = self.em, self.spec
        grp = tir.truncdiv(panel, self.blocks) if spec.groups > 1 else em.i64(0)
        block = tir.truncmod(panel, self.blocks) if spec.groups > 1 else panel
        first = [name_index(self._channel(grp, block, v)) for v in range(self.nv)]
        weights = panel * (spec.kh * spec.kw * self.steps * self.nv * self.lanes)
        if self.kind == "flat":
            self._compute(self._flat(number, grp), first, weights, self.guard[0] or self.guard[1])
            return
        length = spec.ow if self.kind == "rows" else spec.oh
        assert isinstance(length, int)
        per_line, rest = -(-length // self.ri), length % self.ri
        line = name_index(tir.truncdiv(number, per_line))
        part = name_index(tir.truncmod(number, per_line))
        if rest and self.split and per_line > 1:
            with T.If(part < per_line - 1):
                with T.Then():
                    self._on_line(line, part * self.ri, self.ri, grp, first, weights)
                with T.Else():
                    start = em.i64(length - rest)
                    self._on_line(line, start, rest, grp, first, weights)
            return
        start = part * self.ri
        if rest:
            start = tir.min(start, em.i64(length - self.ri))
        self._on_line(line, start, self.ri, grp, first, weights)

    def _on_line(
        self, line: Expr, start: Expr, count: int, grp: Expr, first: list[Expr], weights: Expr
    ) -> None:
        """A tile of ``count`` pixels of one row or column, from ``start`` on."""
        spec = self.spec
        tile = self._segment(line, start, count, grp)
        along = self.kind == "rows"
        if not self.guard[along] or self._whole(count):
            self._compute(tile, first, weights, check=False)
            return
        ends = tile.left if along else tile.top
        reach = (spec.kw - 1) * spec.dw if along else (spec.kh - 1) * spec.dh
        size = self.wd if along else self.h
        with T.If(tir.all(ends[0] >= 0, ends[-1] + reach < size)):
            with T.Then():
                self._compute(tile, first, weights, check=False)
            with T.Else():
                self._compute(tile, first, weights, check=True)

    def _channel(self, grp: Expr, block: Expr, v: int) -> Expr:
        """The first output channel of vector ``v`` of a block."""
        start = block * (self.nv * self.lanes) + v * self.lanes
        if self.spec.og % (self.nv * self.lanes):
            start = tir.min(start, self.em.i64(self.spec.og - self.lanes))
        return grp * self.spec.og + start

    def _segment(self, line: Expr, start: Expr, count: int, grp: Expr) -> _Tile:
        """Pixels of one line: all addresses are one base plus constants."""
        spec, (sn, sc, sh, sw), steps = self.spec, self.xs, range(count)
        rows = self.kind == "rows"
        across = self.oh if rows else self.ow
        n, fixed = name_index(tir.truncdiv(line, across)), name_index(tir.truncmod(line, across))
        start = name_index(start)
        row, col = (fixed, start) if rows else (start, fixed)
        top, left = name_index(row * spec.sh - spec.ph), name_index(col * spec.sw - spec.pw)
        base = name_index(n * sn + top * sh + left * sw + grp * spec.cg * sc)
        if rows:
            return _Tile(
                [(n, row, col + i) for i in steps],
                [base + i * spec.sw * sw for i in steps],
                [top for _ in steps],
                [left + i * spec.sw for i in steps],
            )
        return _Tile(
            [(n, row + i, col) for i in steps],
            [base + i * spec.sh * sh for i in steps],
            [top + i * spec.sh for i in steps],
            [left for _ in steps],
        )

    def _flat(self, number: Expr, grp: Expr) -> _Tile:
        """Pixels counted through all rows and images, each with an address of its own."""
        spec, (sn, sc, sh, sw) = self.spec, self.xs
        tile = _Tile([], [], [], [])
        pixels = spec.n * spec.oh * spec.ow
        last = self.em.dim(pixels) - 1
        for i in range(self.ri):
            p = number * self.ri + i
            if not (isinstance(pixels, int) and pixels % self.ri == 0):
                p = tir.min(p, last)
            p = name_index(p)
            line, col = name_index(tir.truncdiv(p, self.ow)), name_index(tir.truncmod(p, self.ow))
            n, row = (
                name_index(tir.truncdiv(line, self.oh)),
                name_index(tir.truncmod(line, self.oh)),
            )
            top, left = name_index(row * spec.sh - spec.ph), name_index(col * spec.sw - spec.pw)
            tile.pixel.append((n, row, col))
            tile.base.append(name_index(n * sn + top * sh + left * sw + grp * spec.cg * sc))
            tile.top.append(top)
            tile.left.append(left)
        return tile

    def _compute(self, tile: _Tile, first: list[Expr], weights: Expr, check: bool) -> None:
        """All taps, then bias and the rest of the group on the accumulators.

        The bias comes last: partial sums stay small, and with them their rounding errors.
        """
        em, lanes = self.em, self.lanes
        terms = self.spec.kh * self.spec.kw * self.steps
        run = terms if 1 in (self.spec.kh, self.spec.kw) else self.steps
        if terms >= LONG_SUM:
            for n, row, col in tile.pixel:
                for channel in first:
                    self.epilogue.prefetch(self.spec.out_index(n, channel, row, col))
        acc = Sums(em, len(tile.base), self.nv, lanes, terms, run)
        self._taps(acc, tile, weights, check)
        for i, (n, row, col) in enumerate(tile.pixel):
            for v in range(self.nv):
                with vector(em, lanes) as j:
                    index = self.spec.out_index(n, first[v] + j, row, col)
                    total = acc.result(i, v * lanes + j)
                    if self.bias:
                        bias = self.bias.load([first[v] + j])
                        total = total + convert_expr(bias, self.bias.arg.dtype, torch.float32)
                    self.epilogue.store(index, total)

    def _whole(self, count: int) -> bool:
        """Whether a tile of ``count`` pixels is a whole line, so that its ends are known."""
        size, length = (
            (self.spec.w, self.spec.ow) if self.kind == "rows" else (self.spec.h, self.spec.oh)
        )
        return self.kind != "flat" and count == length and isinstance(size, int)

    def _taps(self, acc: Sums, tile: _Tile, weights: Expr, check: bool) -> None:
        """Adds all taps of the tile; ``check`` reads zero outside the input."""
        em, spec, rows = self.em, self.spec, self.kind == "rows"
        needed = spec.needed()
        ys, xs = (em.i64(0), em.i64(spec.kh)), (em.i64(0), em.i64(spec.kw))
        if rows and any(needed[0]):
            ys = clip(tile.top[0], spec.kh, spec.dh, self.h)
        if self.kind == "cols" and any(needed[1]):
            xs = clip(tile.left[0], spec.kw, spec.dw, self.wd)
        count = len(tile.base)
        if self._whole(count) and any(needed[rows]):
            if rows:

                def row(ky: Expr) -> None:
                    for kx in range(spec.kw):
                        some = inside(count, kx, spec.sw, spec.pw, spec.dw, spec.w)
                        self._run(acc, tile, some, weights, ky, em.i64(kx), False)

                acc.loop(*ys, spec.kh, spec.kw * self.steps, row)
            else:

                def column(kx: Expr) -> None:
                    for ky in range(spec.kh):
                        some = inside(count, ky, spec.sh, spec.ph, spec.dh, spec.h)
                        self._run(acc, tile, some, weights, em.i64(ky), kx, False)

                acc.loop(*xs, spec.kw, spec.kh * self.steps, column)
        elif self._merges() and not check and self.kind != "cols":

            def run(ky: Expr) -> None:  # columns of taps and channels form one run in memory
                self._run(acc, tile, range(count), weights, ky, em.i64(0), False, spec.kw)

            acc.loop(*ys, spec.kh, spec.kw * self.steps, run)
        else:

            def row_by_taps(ky: Expr) -> None:
                def tap(kx: Expr) -> None:
                    self._run(acc, tile, range(count), weights, ky, kx, check)

                acc.loop(*xs, spec.kw, self.steps, tap)

            acc.loop(*ys, spec.kh, spec.kw * self.steps, row_by_taps)
        acc.flush(0)

    def _merges(self) -> bool:
        _, sc, _, sw = self.static_xs
        return (sc * self.spec.cg, self.spec.dw) == (sw, 1)

    def _run(
        self, acc: Sums, tile: _Tile, pixels: Iterable[int], weights: Expr,
        ky: Expr, kx: Expr, check: bool, columns: int = 1,
    ) -> None:  # fmt: skip
        """Adds all channels of one tap (or of ``columns`` adjacent ones) to some of the pixels."""
        em, spec, rj = self.em, self.spec, self.nv * self.lanes
        _, sc, sh, sw = self.xs
        depth = columns * self.steps
        shift = ky * (spec.dh * sh) + kx * (spec.dw * sw)
        row = weights + (ky * spec.kw + kx) * (self.steps * rj)
        pixels = list(pixels)
        at = {i: tile.base[i] + shift for i in pixels}
        valid: dict[int, Expr] = {}
        if check:  # outside the input, read any element of it and then ignore it
            for i in pixels:
                y, x = tile.top[i] + ky * spec.dh, tile.left[i] + kx * spec.dw
                flag = name_index(within(y, self.h) * within(x, self.wd))
                valid[i] = flag != tir.IntImm("int32", 0)
                at[i] = name_index(tir.Select(valid[i], at[i], em.i64(0)))
        if self.together == 2:
            at = {i: name_index(tir.truncdiv(offset, 2)) for i, offset in at.items()}
        # Where a run is itself long, it is cut into sums of some hundred terms.
        unroll, parts = inner_unroll(depth), acc.parts(depth)
        with loop(em, parts) as part:
            with loop(em, depth // parts // unroll) as k0, T.unroll(em.i64(unroll)) as k1:
                k = part * (depth // parts) + k0 * unroll + k1
                for i in pixels:
                    value = self._left(at[i], k, sc, valid.get(i))
                    if self.w_words is not None:
                        with T.unroll(em.i64(self.nv)) as v:
                            lane = v * self.lanes
                            weight = self.w_words[ramp(row + k * rj + lane, LANES)]
                            acc.add_pairs(i, lane, value, weight)
                        continue
                    with T.unroll(em.i64(self.nv)) as v, vector(em, self.lanes) as j:
                        lane = v * self.lanes + j
                        weight = self.w.load_flat(row + k * rj + lane)
                        weight = convert_expr(weight, self.w.arg.dtype, torch.float32)
                        acc.add(i, lane, value * weight)
            acc.flush(depth // parts, pixels)

    def _left(self, at: Expr, step: Expr, stride: Expr, valid: Expr | None) -> Expr:
        """What a weight vector meets: a float32 or a pair; zero where not ``valid``."""
        zero: Expr = self.em.f32(0.0)
        if self.x_words is not None:
            value, zero = self.x_words[at + step], tir.IntImm("int32", 0)
        else:
            value = self.x.load_flat(at + step * stride)
            value = convert_expr(value, self.x.arg.dtype, torch.float32)
        return value if valid is None else tir.Select(valid, T.bind(value), zero)
