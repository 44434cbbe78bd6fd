"""Winograd's minimal filtering for convolutions of several taps along an axis.

A patch of the input gives ``high`` x ``wide`` outputs. Transformed by the `minimal_filtering` of
either axis, patch and weights are multiplied element by element, so that over all channels each of
the transform's points is a matrix product of its own: F(2x2, 3x3) has 16 points, that is 16
multiplications where the definition takes 36; 1x7 taps 23 for 42, 5x5 taps 49 for 100, and 3x3 taps
of stride 2 49 for 81. The transforms only add and halve, and the rounding error stays below twice
that of the direct sum (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR
2016).

A task takes ``tiles`` patches through all three steps while their transforms lie in the L2 cache:
``ri`` patches times ``nv`` vectors of output channels are held in registers. Weights are
transformed ahead and packed ``[panel, points, C / groups, nv * lanes]``. ``parts`` divides the
output channels among tasks where patches are few. The last patch of a row or column is moved back
inside the image and stores only what its neighbour did not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, Pack
from ..emit import Emitter, Expr
from ..group import HALF, IO, Group
from ..minimal_filtering import Additions, Filter, Matrix, additions, filter_of, filters
from ..packing_conv import vector_starts
from ..target import Target
from .conv_common import Epilogue, lane_count, loop, name_index, vector
from .conv_spec import ConvSpec, halo_of
from .conv_tiling import L2_BYTES, inner_unroll
from .sums import Sums
from .vectors import ramp

TILES = {  # vectors: patches
    4: (4, 5, 6),
    3: (4, 5, 6, 7, 8, 9),
    2: (6, 7, 9, 11, 12, 13, 14),
    1: (8, 10, 12, 16, 20, 25),
}
LEAST_CHANNELS = 16  # below, transforms cost more than the products save
LEAST_SAVED = 1.15  # of the multiplications, likewise
MOST_NOISE = 2.0  # of a pair of filters; F(2x2, 3x3) has 1.67
MOST_GROUPS = 8  # of ``ri`` patches in a task
BUFFER_BYTES = 768 << 10  # of a task's transforms, which live on its thread's stack
WORKERS = 4  # an assumption for balance only


def covers(spec: ConvSpec, io: IO, target: Target) -> bool:
    """Whether a filter saves multiplications; sizes are known and zeros around lie in memory."""
    sizes = (spec.n, spec.h, spec.w, spec.oh, spec.ow)
    if not all(isinstance(d, int) for d in sizes) or min(sizes) < 1 or not _pairs(spec):  # type: ignore[type-var]
        return False
    if min(spec.cg, spec.og) < max(LEAST_CHANNELS, target.vector_bytes // 4):
        return False
    if spec.strides(io[spec.x])[1] != 1:
        return False
    if io[spec.x].dtype in HALF:  # transformed inputs need more digits
        return False
    have = halo_of(io[spec.x], spec.rank)
    return all(h[s] >= n[s] for h, n in zip(have, spec.needed(), strict=True) for s in (0, 1))


@dataclass(frozen=True)
class _Pair:
    """Filters for columns and for rows, and what their transforms cost for a vector of channels."""

    down: Filter
    across: Filter
    points: int
    spread: int  # loads, additions and stores of a patch's input
    gather: int  # likewise of its products, and storing the outputs


@functools.cache
def _all_pairs(kh: int, kw: int, sh: int, sw: int) -> tuple[_Pair, ...]:
    """Filters whose product saves enough and keeps enough digits."""
    found = []
    for down in filters(kh, sh):
        for across in filters(kw, sw):
            if down.noise * across.noise > MOST_NOISE or down.saved * across.saved < LEAST_SAVED:
                continue
            points = down.products * across.products
            spread = down.span * across.span + points
            spread += _additions(down.span, down.inputs, across.inputs)
            gather = points + 8 * down.outputs * across.outputs
            gather += _additions(across.products, across.gather, down.gather)
            found.append(_Pair(down, across, points, spread, gather))
    return tuple(found)


def _additions(lines: int, first: Matrix, second: Matrix) -> int:
    """Additions of a 2-d transform: of every line, then of what results along the other axis."""
    return lines * len(additions(second).steps) + len(second) * len(additions(first).steps)


def _pairs(spec: ConvSpec) -> list[_Pair]:
    if (spec.dh, spec.dw) != (1, 1):
        return []
    return [
        pair
        for pair in _all_pairs(spec.kh, spec.kw, spec.sh, spec.sw)
        if pair.down.outputs <= spec.oh and pair.across.outputs <= spec.ow  # type: ignore[operator]
    ]


def estimates(spec: ConvSpec, target: Target) -> list[tuple[float, dict[str, Any]]]:
    """Configurations with their estimated cycles, fewest first.

    The best of each pair of filters comes before the second best of any.
    """
    lanes = lane_count(spec.og, target)
    best: list[list[tuple[float, dict[str, Any]]]] = []
    for pair in _pairs(spec):
        found: list[tuple[float, dict[str, Any]]] = []
        for nv, rows in TILES.items():
            if nv > -(-spec.og // lanes):
                continue
            fits = [ri for ri in rows if ri * nv + nv + 1 <= target.vector_registers]
            options = [o for ri in fits for o in _options(spec, lanes, ri, nv, pair)]
            found += sorted(options, key=lambda f: f[0])[:1]
        best.append(sorted(found, key=lambda f: f[0]))
    best.sort(key=lambda found: found[0][0] if found else math.inf)
    return [found[k] for k in range(len(TILES)) for found in best if len(found) > k]


def _options(
    spec: ConvSpec, lanes: int, ri: int, nv: int, pair: _Pair
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Estimated cycles of ways to cut the patches into tasks."""
    high, wide = pair.down.outputs, pair.across.outputs
    config = {"kind": "winograd", "high": high, "wide": wide, "ri": ri, "nv": nv}
    blocks = _blocks(spec, lanes, nv)
    for groups in range(1, min(MOST_GROUPS, _patches(spec, high, wide) // ri) + 1):
        for parts in _divisions(spec, blocks):
            whole = config | {"tiles": groups * ri, "parts": parts}
            cost = _cost(spec, lanes, blocks, pair, whole)
            if cost < math.inf:
                yield cost, whole


def _divisions(spec: ConvSpec, blocks: int) -> set[int]:
    """Among how many tasks the output channels may be divided: those of a group stay together."""
    if spec.groups > 1:
        return {p for p in range(1, spec.groups + 1) if spec.groups % p == 0}
    return {-(-blocks // k) for k in range(1, blocks + 1)}


def _blocks(spec: ConvSpec, lanes: int, nv: int) -> int:
    """Panels of weights in a group."""
    return len(vector_starts(spec.og, lanes, nv)) // nv


def _channels(spec: ConvSpec, parts: int) -> int:
    """Input channels that a task reads."""
    return spec.c if spec.groups == 1 else spec.c // parts


def _patches(spec: ConvSpec, high: int, wide: int) -> int:
    return spec.n * -(-spec.oh // high) * -(-spec.ow // wide)  # type: ignore[operator]


def _cost(spec: ConvSpec, lanes: int, blocks: int, pair: _Pair, config: dict[str, Any]) -> float:
    """Estimated cycles, what idle workers wait included; infinite for too large buffers."""
    ri, nv, tiles, parts = (config[k] for k in ("ri", "nv", "tiles", "parts"))
    channels, points = _channels(spec, parts), pair.points
    buffers = 4 * points * tiles * (channels + nv * lanes)
    if buffers > BUFFER_BYTES:
        return math.inf
    per_part = -(-blocks * spec.groups // parts)
    tasks = -(-_patches(spec, config["high"], config["wide"]) // tiles) * parts
    weights = 4 * points * spec.cg * nv * lanes
    step = max(ri * nv, ri + nv) + 0.04 * (ri + nv) + 0.5
    product = points * (tiles // ri) * (spec.cg * step + 24 + 2 * ri * nv)
    product = max(product, weights / _bandwidth(weights * blocks * spec.groups))
    # An addition takes a cycle, and so does a load; what is stored waits for the cache.
    spread = pair.spread * (1.5 if buffers > 384 << 10 else 1.0)
    task = tiles * (spread * channels / lanes + per_part * nv * pair.gather)
    return -(-tasks // WORKERS) * WORKERS * (task + per_part * product)


def _bandwidth(weights: int) -> int:
    """Bytes per cycle at which so many bytes of weights are read again and again."""
    if weights < L2_BYTES // 2:
        return 24
    return 10 if weights < L2_BYTES else 4


def lower(
    spec: ConvSpec, group: Group, io: IO, target: Target, config: dict[str, Any], name: str
) -> Kernel:
    """Lowers a group around a convolution with a configuration of `estimates`."""
    lanes, nv, parts = lane_count(spec.og, target), config["nv"], config["parts"]
    panels = _blocks(spec, lanes, nv) * spec.groups
    patches, tiles = _patches(spec, config["high"], config["wide"]), config["tiles"]
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    em = Emitter(name, inputs, outputs)
    with em.function() as task:
        body = _Body(em, spec, group, io, config, lanes)
        part = name_index(tir.truncmod(task, parts))
        first = name_index(tir.min(tir.truncdiv(task, parts) * tiles, em.i64(patches - tiles)))
        body.transform_input(first, part)
        per_part = -(-panels // parts)
        start = name_index(tir.min(part * per_part, em.i64(panels - per_part)))
        with loop(em, per_part) as p:
            body.multiply(start, p)
            body.transform_output(first, start + p)
    layout = (
        ("groups", spec.groups), ("lanes", lanes), ("vectors", nv),
        ("down", spec.sh), ("across", spec.sw), ("high", config["high"]), ("wide", config["wide"]),
    )  # fmt: skip
    pack = Pack("conv_winograd", layout)
    return em.kernel(
        -(-patches // tiles) * parts,
        config,
        flops=spec.flops,
        packs=tuple(pack if n is spec.weight else None for n in group.inputs),
    )


class _Body:
    """Emits the three steps of a task."""

    def __init__(
        self, em: Emitter, spec: ConvSpec, group: Group, io: IO, config: dict[str, Any], lanes: int
    ) -> None:
        self.em, self.spec, self.lanes = em, spec, lanes
        self.ri, self.nv, self.tiles = config["ri"], config["nv"], config["tiles"]
        self.width = self.nv * lanes
        self.blocks = _blocks(spec, lanes, self.nv)
        self.down = filter_of(spec.kh, spec.sh, config["high"])
        self.across = filter_of(spec.kw, spec.sw, config["wide"])
        self.points = self.down.products * self.across.products
        self.channels = _channels(spec, config["parts"])
        refs = dict(zip(group.inputs, em.inputs, strict=True))
        self.x, self.w = refs[spec.x], refs[spec.weight]
        self.bias = refs[spec.bias] if spec.bias is not None else None
        self.xs = [em.dim(s) for s in spec.strides(io[spec.x])]
        self.epilogue = Epilogue.of(em, group)
        self.source = em.scratch(self.points * self.tiles * self.channels, "float32")
        self.products = em.scratch(self.points * self.tiles * self.width, "float32")

    def _place(self, patch: Expr) -> tuple[Expr, Expr, Expr, Expr, Expr]:
        """Image, row and column of a patch's outputs, and row and column that its grid gives."""
        spec, high, wide = self.spec, self.down.outputs, self.across.outputs
        rows, cols = (-(-spec.oh // high), -(-spec.ow // wide))  # type: ignore[operator]
        line, across = tir.truncdiv(patch, cols), tir.truncmod(patch, cols)
        n, down = name_index(tir.truncdiv(line, rows)), tir.truncmod(line, rows)
        row, col = name_index(down * high), name_index(across * wide)
        last_row = self.em.i64(spec.oh - high)  # type: ignore[operator]
        last_col = self.em.i64(spec.ow - wide)  # type: ignore[operator]
        return n, name_index(tir.min(row, last_row)), name_index(tir.min(col, last_col)), row, col

    def transform_input(self, first: Expr, part: Expr) -> None:
        """``source[points, tiles, channels] = B d B'`` for every patch d."""
        em, spec, lanes, channels = self.em, self.spec, self.lanes, self.channels
        sn, _, sh, sw = self.xs
        begin = part * channels if channels < spec.c else em.i64(0)
        with T.serial(em.i64(0), em.i64(self.tiles)) as t:
            n, row, col, _, _ = self._place(first + t)
            top, left = row * spec.sh - spec.ph, col * spec.sw - spec.pw
            base = name_index(n * sn + top * sh + left * sw + begin)
            with loop(em, -(-channels // lanes)) as c0:
                c = c0 * lanes
                if channels % lanes:
                    c = tir.min(c, em.i64(channels - lanes))
                c = name_index(c)
                lines = [
                    _times(
                        additions(self.across.inputs),
                        [
                            self.x.load_flat(ramp(base + i * sh + j * sw + c, lanes))
                            for j in range(self.across.span)
                        ],
                    )
                    for i in range(self.down.span)
                ]
                for j in range(self.across.products):
                    column = _times(additions(self.down.inputs), [line[j] for line in lines])
                    for i, value in enumerate(column):
                        point = i * self.across.products + j
                        at = (point * self.tiles + t) * channels + c
                        T.buffer_store(self.source, value, [ramp(at, lanes)])

    def multiply(self, start: Expr, p: Expr) -> None:
        """``products[q] = source[q] @ weight[start + p, q]`` for all points q."""
        em, lanes, width, depth = self.em, self.lanes, self.width, self.spec.cg
        number = name_index(start + p)
        begin = em.i64(0)  # of the group's channels among those of the task
        if self.spec.groups > 1:
            begin = name_index(tir.truncdiv(p, self.blocks) * depth)
        with T.serial(em.i64(0), em.i64(self.points)) as q:
            panel = name_index((number * self.points + q) * (depth * width))
            with loop(em, self.tiles // self.ri) as g:
                first = name_index(q * self.tiles + g * self.ri)
                # Transformed inputs are sums themselves: their products' sums are cut sooner.
                sums = Sums(em, self.ri, self.nv, lanes, 2 * depth)
                unroll, parts = inner_unroll(depth), sums.parts(depth)
                with loop(em, parts) as part:
                    with loop(em, depth // parts // unroll) as k0, T.unroll(em.i64(unroll)) as k1:
                        k = part * (depth // parts) + k0 * unroll + k1
                        for i in range(self.ri):
                            value = self.source[(first + i) * self.channels + begin + k]
                            with T.unroll(em.i64(self.nv)) as v, vector(em, lanes) as j:
                                lane = v * lanes + j
                                weight = self.w.load_flat(panel + k * width + lane)
                                sums.add(i, lane, value * weight)
                    sums.flush(depth // parts)
                for i in range(self.ri):
                    with T.unroll(em.i64(self.nv)) as v, vector(em, lanes) as j:
                        lane = v * lanes + j
                        at = (first + i) * width + lane
                        T.buffer_store(self.products, sums.result(i, lane), [at])

    def transform_output(self, first: Expr, panel: Expr) -> None:
        """``A m A'``, bias and the rest of the group."""
        em, spec, lanes, down, across = self.em, self.spec, self.lanes, self.down, self.across
        rest_down = -spec.oh % down.outputs  # type: ignore[operator]
        rest_across = -spec.ow % across.outputs  # type: ignore[operator]
        group, block = tir.truncdiv(panel, self.blocks), tir.truncmod(panel, self.blocks)
        with T.serial(em.i64(0), em.i64(self.tiles)) as t:
            n, row, col, grid_row, grid_col = self._place(first + t)
            with loop(em, self.nv) as v:
                channel = block * self.width + v * lanes
                if spec.og % self.width:
                    channel = tir.min(channel, em.i64(spec.og - lanes))
                channel = name_index(group * spec.og + channel)
                columns = [
                    _times(
                        additions(down.gather),
                        [
                            self.products[ramp(self._product(i, j, t) + v * lanes, lanes)]
                            for i in range(down.products)
                        ],
                    )
                    for j in range(across.products)
                ]
                for i in range(down.outputs):
                    line = _times(additions(across.gather), [column[i] for column in columns])
                    for j, value in enumerate(line):
                        total = em.local(lanes)
                        T.buffer_store(total, value, [ramp(em.i64(0), lanes)])
                        conditions = []
                        if i < rest_down:
                            conditions.append(row + i >= grid_row)
                        if j < rest_across:
                            conditions.append(col + j >= grid_col)
                        if conditions:
                            with T.If(tir.all(*conditions)), T.Then():
                                self._store(total, channel, n, row + i, col + j)
                        else:
                            self._store(total, channel, n, row + i, col + j)

    def _product(self, i: int, j: int, t: Expr) -> Expr:
        """Where the products of a patch at one point lie."""
        return ((i * self.across.products + j) * self.tiles + t) * self.width

    def _store(self, total: Expr, channel: Expr, n: Expr, row: Expr, col: Expr) -> None:
        with vector(self.em, self.lanes) as lane:
            value = total[lane]
            if self.bias:
                value = value + self.bias.load([channel + lane])
            self.epilogue.store(self.spec.out_index(n, channel + lane, row, col), value)


def _times(sums: Additions, values: list[Expr]) -> list[Expr]:
    """A matrix times the vector of ``values``, each of them computed once."""
    values = [T.bind(v) for v in values]
    for i, j, sign in sums.steps:
        values.append(T.bind(values[i] + values[j] if sign > 0 else values[i] - values[j]))
    return [values[i] if sign > 0 else -values[i] for i, sign in sums.rows]
