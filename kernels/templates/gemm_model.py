"""Which tile sizes suit a matrix product: a small cost model instead of a search.

The model counts cycles of one core that starts one vector multiply-add and up to two loads a
cycle. It knows four wastes: columns and rows that pad tiles, tiles too small to hide latency or the
panel's loads, the cost of entering a tile, and rows that fall into the same cache set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..abi import Dim, ceil_div
from ..target import Target
from .gemm_body import Tiling
from .gemm_spec import GemmSpec

LATENCY = 4  # cycles until a sum can be added to again
DEPTH = 256  # steps in a block: its panel fits the second-level cache, its sums stay accurate
SCRATCH = 48 << 10  # bytes of sums between blocks
SMALL_TASK = 1 << 19  # flops below which tasks are not made smaller
LARGE_TASK = 1 << 23  # flops above which tasks are made smaller
ENOUGH_TASKS = 128
CONFLICT = 4096  # rows this many bytes apart (or a multiple) share a first-level cache set
WAYS = 8


@dataclass(frozen=True)
class _Tile:
    ri: int
    nv: int


def in_pairs(spec: GemmSpec, target: Target) -> bool:
    """Whether a product's steps are pairs of elements."""
    return target.pairs(spec.dtype) and spec.b_const


def tilings(spec: GemmSpec, target: Target, limit: int = 6) -> list[Tiling]:
    """Tile sizes for a product, best first."""
    lanes = target.vector_bytes // 4
    if in_pairs(spec, target):  # a pair costs what an element of float32 does
        strides = (*(ceil_div(s, 2) for s in spec.a_strides[:-1]), spec.a_strides[-1])
        k = ceil_div(spec.k, 2)
        spec = replace(spec, k=k, a_strides=strides, dtype=torch.float32)
    tiles = {_best_rows(spec, target, lanes, nv) for nv in (1, 2, 3, 4, 6)}
    ranked = sorted(tiles, key=lambda t: (_cost(spec, lanes, t), t.nv, t.ri))
    return [_blocks(spec, lanes, t) for t in ranked[:limit]]


def _best_rows(spec: GemmSpec, target: Target, lanes: int, nv: int) -> _Tile:
    """The rows that go best with ``nv`` vectors."""
    # One register for each vector of the panel and one for the broadcast.
    most = max(1, min(14, (target.vector_registers - nv - 1) // nv))
    if not isinstance(spec.m, int):  # every tail has its own code: keep it short
        return _Tile(min(most, 8), nv)
    most = min(most, max(1, spec.m))
    choices = [_Tile(ri, nv) for ri in range(-(-most // 2), most + 1)]
    return min(choices, key=lambda t: (_cost(spec, lanes, t), -t.ri))


def _cost(spec: GemmSpec, lanes: int, tile: _Tile) -> float:
    """Cycles for one product, up to a common factor."""
    width = tile.nv * lanes
    k = spec.k if isinstance(spec.k, int) else 256
    n = spec.n if isinstance(spec.n, int) else 256
    m = spec.m if isinstance(spec.m, int) else 256
    panels = -(-n // width)
    full, tail = divmod(m, tile.ri)
    cycles = full * _tile_cycles(spec, tile.ri, tile.nv, k)
    if tail:
        cycles += _tile_cycles(spec, tail, tile.nv, k)
    if not spec.b_const:  # every panel is copied once per task
        cycles += k * tile.nv * 2
    tasks = panels * max(1, m // 64)
    idle = 1 + 0.02 * max(0, 16 - tasks) if n * k * m > 1 << 20 else 1
    return panels * cycles * idle


def _tile_cycles(spec: GemmSpec, rows: int, nv: int, k: int) -> float:
    itemsize = spec.dtype.itemsize
    step = max(rows * nv, (rows + nv) / 2, LATENCY, nv * itemsize / 2)
    stride = spec.a_strides[-2]
    aligned = isinstance(stride, int) and stride and stride * itemsize % CONFLICT == 0
    if rows >= WAYS and aligned:
        step *= 1.15
    return k * step + 20 + 3 * rows * nv


def _blocks(spec: GemmSpec, lanes: int, tile: _Tile) -> Tiling:
    """Cache blocks for a register tile."""
    width = tile.nv * lanes
    row_tiles: Dim = ceil_div(spec.m, tile.ri)
    if isinstance(spec.k, int):
        blocks = max(1, round(spec.k / DEPTH))
        kc = max(1, -(-spec.k // blocks))
    else:
        kc = DEPTH
    blocked = not isinstance(spec.k, int) or spec.k > kc
    most = max(1, SCRATCH // (4 * width * tile.ri)) if blocked else 1 << 30
    if not isinstance(row_tiles, int):
        rows = 64 if spec.b_const else 128
        return Tiling(tile.ri, tile.nv, tile.ri * min(most, max(1, rows // tile.ri)), kc, lanes)
    k = spec.k if isinstance(spec.k, int) else 256
    n = spec.n if isinstance(spec.n, int) else 256
    batches = spec.batches if isinstance(spec.batches, int) else 1
    flops = max(1, 2 * tile.ri * width * k)
    others = batches * -(-n // width)
    least = max(1, SMALL_TASK // flops) if spec.b_const else max(1, 96 // tile.ri)
    wanted = max(1, row_tiles * others // ENOUGH_TASKS)  # tiles a task for enough tasks
    count = max(1, min(max(wanted, least), max(least, LARGE_TASK // flops), most, row_tiles))
    blocks = max(1, -(-row_tiles // count))
    return Tiling(tile.ri, tile.nv, tile.ri * max(1, -(-row_tiles // blocks)), kc, lanes)
