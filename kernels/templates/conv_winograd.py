"""Winograd's minimal filtering for 3x3 convolutions of stride 1: F(2x2, 3x3).

A 4x4 patch of the input gives 2x2 outputs. Transformed, patch and weights are multiplied element by
element, so that over all channels each of the 16 positions is a matrix product of its own: 16
multiplications where the definition takes 36. With these small patches the transforms only add and
halve, and the rounding error stays that of the direct sum (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", CVPR 2016; larger patches save more and lose digits, so they are not
used).

A task takes ``tiles`` patches through all three steps while their transforms lie in the L2 cache:
``ri`` patches times ``nv`` vectors of output channels are held in registers. Weights are
transformed ahead and packed ``[block, 16, C, nv * lanes]``. ``parts`` divides the output channels
among tasks where patches are few. The last patch of a row or column is moved back inside the image
and stores only what its neighbour did not.
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, Pack
from ..emit import Emitter, Expr
from ..group import HALF, IO, Group
from ..packing_conv import vector_starts
from ..target import Target
from .conv_common import Epilogue, lane_count, loop, name_index, vector
from .conv_spec import ConvSpec, halo_of
from .conv_tiling import inner_unroll
from .sums import Sums
from .vectors import ramp

POINTS = 16
TILES = ((6, 4), (9, 3), (14, 2))  # pixels by vectors
LEAST_CHANNELS = 16  # below, transforms cost more than the products save
BUFFER_BYTES = 768 << 10  # of a task's transforms, which live on its thread's stack
WORKERS = 4  # an assumption for balance only


def covers(spec: ConvSpec, io: IO, target: Target) -> bool:
    """Whether the convolution is 3x3 at stride 1, of known size, with its zeros in memory."""
    sizes = (spec.n, spec.h, spec.w, spec.oh, spec.ow)
    if spec.rank != 2 or spec.groups != 1 or not all(isinstance(d, int) for d in sizes):
        return False
    if (spec.kh, spec.kw, spec.sh, spec.sw, spec.dh, spec.dw) != (3, 3, 1, 1, 1, 1):
        return False
    if min(spec.c, spec.oc) < max(LEAST_CHANNELS, target.vector_bytes // 4):
        return False
    if min(spec.n, spec.oh - 1, spec.ow - 1) < 1 or spec.strides(io[spec.x])[1] != 1:
        return False
    if io[spec.x].dtype in HALF:  # transformed inputs need more digits
        return False
    have = halo_of(io[spec.x], spec.rank)
    return all(h[s] >= n[s] for h, n in zip(have, spec.needed(), strict=True) for s in (0, 1))


def estimates(spec: ConvSpec, target: Target) -> list[tuple[float, dict[str, Any]]]:
    """Configurations with their estimated cycles, fewest first."""
    lanes = lane_count(spec.oc, target)
    patches = _patches(spec)
    best: dict[tuple[int, int], tuple[float, dict[str, Any]]] = {}
    for ri, nv in TILES:
        if ri * nv + nv + 1 > target.vector_registers or patches < ri:
            continue
        blocks = len(vector_starts(spec.oc, lanes, nv)) // nv
        for groups in range(1, patches // ri + 1):
            tiles = groups * ri
            if _buffer_bytes(spec, tiles, nv * lanes) > BUFFER_BYTES:
                break
            for parts in {-(-blocks // k) for k in range(1, blocks + 1)}:
                config = {"kind": "winograd", "ri": ri, "nv": nv, "tiles": tiles, "parts": parts}
                cost = _cost(spec, lanes, blocks, config)
                if (ri, nv) not in best or cost < best[ri, nv][0]:
                    best[ri, nv] = (cost, config)
    return sorted(best.values(), key=lambda f: f[0])


def _patches(spec: ConvSpec) -> int:
    return spec.n * -(-spec.oh // 2) * -(-spec.ow // 2)  # type: ignore[operator]


def _buffer_bytes(spec: ConvSpec, tiles: int, width: int) -> int:
    return 4 * POINTS * tiles * (spec.c + width)


def _cost(spec: ConvSpec, lanes: int, blocks: int, config: dict[str, Any]) -> float:
    """Estimated cycles, what idle workers wait included."""
    ri, nv, tiles, parts = (config[k] for k in ("ri", "nv", "tiles", "parts"))
    per_part = -(-blocks // parts)
    tasks = -(-_patches(spec) // tiles) * parts
    weights = 4 * POINTS * spec.c * nv * lanes
    step = max(ri * nv, ri + nv) + 0.04 * (ri + nv) + 0.5
    product = POINTS * (tiles // ri) * (spec.c * step + 24 + 2 * ri * nv)
    product = max(product, weights / (24 if weights * blocks < 512 << 10 else 10))
    transform = 64.0 * (1.5 if _buffer_bytes(spec, tiles, nv * lanes) > 384 << 10 else 1.0)
    task = tiles * transform * spec.c / lanes + per_part * (product + tiles * nv * 72.0)
    return -(-tasks // WORKERS) * WORKERS * task


def lower(
    spec: ConvSpec, group: Group, io: IO, target: Target, config: dict[str, Any], name: str
) -> Kernel:
    """Lowers a group around a convolution with a configuration of `estimates`."""
    lanes, nv, parts = lane_count(spec.oc, target), config["nv"], config["parts"]
    blocks = len(vector_starts(spec.oc, lanes, nv)) // nv
    patches, tiles = _patches(spec), config["tiles"]
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    em = Emitter(name, inputs, outputs)
    with em.function() as task:
        body = _Body(em, spec, group, io, config, lanes)
        part = name_index(tir.truncmod(task, parts))
        first = tir.min(tir.truncdiv(task, parts) * tiles, em.i64(patches - tiles))
        body.transform_input(name_index(first))
        per_part = -(-blocks // parts)
        start = tir.min(part * per_part, em.i64(blocks - per_part))
        with loop(em, per_part) as b:
            block = name_index(start + b)
            body.multiply(block)
            body.transform_output(name_index(first), block)
    pack = Pack("conv_winograd", (("lanes", lanes), ("vectors", nv)))
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
        refs = dict(zip(group.inputs, em.inputs, strict=True))
        self.x, self.w = refs[spec.x], refs[spec.weight]
        self.bias = refs[spec.bias] if spec.bias is not None else None
        self.xs = [em.dim(s) for s in spec.strides(io[spec.x])]
        self.epilogue = Epilogue.of(em, group)
        self.high, self.wide = -(-spec.oh // 2), -(-spec.ow // 2)  # type: ignore[operator]
        self.source = em.scratch(POINTS * self.tiles * spec.c, "float32")
        self.products = em.scratch(POINTS * self.tiles * self.width, "float32")

    def _place(self, patch: Expr) -> tuple[Expr, Expr, Expr, Expr, Expr]:
        """Image, row and column of a patch's outputs, and row and column that its grid gives."""
        line, across = tir.truncdiv(patch, self.wide), tir.truncmod(patch, self.wide)
        n, down = name_index(tir.truncdiv(line, self.high)), tir.truncmod(line, self.high)
        row, col = name_index(down * 2), name_index(across * 2)
        last = [self.em.i64(d - 2) for d in (self.spec.oh, self.spec.ow)]  # type: ignore[operator]
        return n, name_index(tir.min(row, last[0])), name_index(tir.min(col, last[1])), row, col

    def transform_input(self, first: Expr) -> None:
        """``source[16, tiles, C] = B' d B`` for every patch d."""
        em, spec, lanes = self.em, self.spec, self.lanes
        sn, _, sh, sw = self.xs
        with T.serial(em.i64(0), em.i64(self.tiles)) as t:
            n, row, col, _, _ = self._place(first + t)
            base = name_index(n * sn + (row - spec.ph) * sh + (col - spec.pw) * sw)
            with loop(em, -(-spec.c // lanes)) as c0:
                c = c0 * lanes
                if spec.c % lanes:
                    c = tir.min(c, em.i64(spec.c - lanes))
                c = name_index(c)
                rows = [
                    _filtered(
                        [
                            self.x.load_flat(ramp(base + i * sh + j * sw + c, lanes))
                            for j in range(4)
                        ]
                    )
                    for i in range(4)
                ]
                for j in range(4):
                    for i, value in enumerate(_filtered([rows[i][j] for i in range(4)])):
                        at = ((i * 4 + j) * self.tiles + t) * spec.c + c
                        T.buffer_store(self.source, value, [ramp(at, lanes)])

    def multiply(self, block: Expr) -> None:
        """``products[p] = source[p] @ weight[block, p]`` for all 16 positions p."""
        em, spec, lanes, width = self.em, self.spec, self.lanes, self.width
        with T.serial(em.i64(0), em.i64(POINTS)) as p:
            panel = name_index((block * POINTS + p) * (spec.c * width))
            with loop(em, self.tiles // self.ri) as g:
                first = name_index(p * self.tiles + g * self.ri)
                # Transformed inputs are sums themselves: their products' sums are cut sooner.
                sums = Sums(em, self.ri, self.nv, lanes, 2 * spec.c)
                unroll, parts = inner_unroll(spec.c), sums.parts(spec.c)
                with loop(em, parts) as part:
                    with (
                        loop(em, spec.c // parts // unroll) as k0,
                        T.unroll(em.i64(unroll)) as k1,
                    ):
                        k = part * (spec.c // parts) + k0 * unroll + k1
                        for i in range(self.ri):
                            value = self.source[(first + i) * spec.c + k]
                            with T.unroll(em.i64(self.nv)) as v, vector(em, lanes) as j:
                                lane = v * lanes + j
                                weight = self.w.load_flat(panel + k * width + lane)
                                sums.add(i, lane, value * weight)
                    sums.flush(spec.c // parts)
                for i in range(self.ri):
                    with T.unroll(em.i64(self.nv)) as v, vector(em, lanes) as j:
                        lane = v * lanes + j
                        at = (first + i) * width + lane
                        T.buffer_store(self.products, sums.result(i, lane), [at])

    def transform_output(self, first: Expr, block: Expr) -> None:
        """``A' m A``, bias and the rest of the group."""
        em, spec, lanes = self.em, self.spec, self.lanes
        with T.serial(em.i64(0), em.i64(self.tiles)) as t:
            n, row, col, grid_row, grid_col = self._place(first + t)
            with loop(em, self.nv) as v:
                channel = block * self.width + v * lanes
                if spec.oc % self.width:
                    channel = tir.min(channel, em.i64(spec.oc - lanes))
                channel = name_index(channel)
                folded = [
                    _gathered(
                        [
                            self.products[
                                ramp(((i * 4 + j) * self.tiles + t) * self.width + v * lanes, lanes)
                            ]
                            for i in range(4)
                        ]
                    )
                    for j in range(4)
                ]
                for i in range(2):
                    for j, value in enumerate(_gathered([folded[k][i] for k in range(4)])):
                        total = em.local(lanes)
                        T.buffer_store(total, value, [ramp(em.i64(0), lanes)])
                        conditions = []
                        if i == 0 and spec.oh % 2:  # type: ignore[operator]
                            conditions.append(row >= grid_row)
                        if j == 0 and spec.ow % 2:  # type: ignore[operator]
                            conditions.append(col >= grid_col)
                        if conditions:
                            with T.If(tir.all(*conditions)), T.Then():
                                self._store(total, channel, n, row + i, col + j)
                        else:
                            self._store(total, channel, n, row + i, col + j)

    def _store(self, total: Expr, channel: Expr, n: Expr, row: Expr, col: Expr) -> None:
        with vector(self.em, self.lanes) as lane:
            value = total[lane]
            if self.bias:
                value = value + self.bias.load([channel + lane])
            self.epilogue.store(self.spec.out_index(n, channel + lane, row, col), value)


def _filtered(d: list[Expr]) -> list[Expr]:
    """One dimension of the input's transform."""
    d = [T.bind(x) for x in d]
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _gathered(m: list[Expr]) -> list[Expr]:
    """One dimension of the output's transform."""
    m = [T.bind(x) for x in m]
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
