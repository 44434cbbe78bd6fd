"""Which register tiles, task sizes and task orders suit a direct convolution.

A configuration has ``tile`` (rows, cols or flat; see `conv_direct`), ``ri`` pixels by ``nv``
vectors of ``lanes`` channels, ``split`` (a body of its own for the rest of a line), ``chunk`` tiles
per task, and ``order``: consecutive tasks share a weight "panel", or input "pixel"s.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

from ..abi import Dim, ceil_div
from ..group import IO
from ..packing_conv import vector_starts
from ..target import Target
from .conv_common import lane_count
from .conv_spec import ConvSpec, halo_of

L1_BYTES, WAYS, LINE = 32 << 10, 8, 64
L2_BYTES = 1 << 20
TASK_FLOPS = 1.5e6  # some ten microseconds of one core
MIN_TASKS = 16
SHAPES = (("rows", False), ("cols", False), ("rows", True), ("cols", True), ("flat", False))
"""Kinds of tiles, each with its ``split``; simpler code first."""


def configs(spec: ConvSpec, io: IO, target: Target, pairs: bool = False) -> list[dict[str, Any]]:
    """Configurations in the order of a cost model: cycles of all tiles, tails included.

    With ``pairs``, two input channels are one step that costs what one channel of float32 does.
    """
    if pairs:
        spec = replace(spec, c=spec.c // 2)
    found = _estimates(spec, io, target)
    result: list[dict[str, Any]] = []
    tiles: set[tuple[int, int]] = set()
    for cost, config in found:
        if len(result) == 4 or cost > 1.25 * found[0][0]:
            break
        tile = config["ri"], config["nv"]
        if tile not in tiles:  # a race of tiles: their kinds differ less
            tiles.add(tile)
            result.append(config | _blocking(spec, config))
    other = "pixel" if result[0]["order"] == "panel" else "panel"
    return [*result[:2], result[0] | {"order": other}, *result[2:]]


def least_cycles(spec: ConvSpec, io: IO, target: Target) -> float:
    """Estimated cycles of the best configuration."""
    return _estimates(spec, io, target)[0][0]


def _estimates(spec: ConvSpec, io: IO, target: Target) -> list[tuple[float, dict[str, Any]]]:
    """Tiles with their estimated cycles, fewest first."""
    lanes = lane_count(spec.og, target)
    have, need = halo_of(io[spec.x], spec.rank), spec.needed()
    guarded = any(h[side] < n[side] for h, n in zip(have, need, strict=True) for side in (0, 1))
    _, _, down, across = spec.strides(io[spec.x])
    found: list[tuple[float, dict[str, Any]]] = []
    for nv in range(1, min(7, -(-spec.og // lanes)) + 1):
        for ri in range(1, 18):
            if ri * nv + nv + 1 > target.vector_registers:
                break
            for tile, split in SHAPES:
                cost = _cost(spec, lanes, ri, nv, tile, split, guarded)
                stride = down * spec.sh if tile == "cols" else across * spec.sw
                cost *= _crowding(stride * io[spec.x].dtype.itemsize, ri)
                if ri * nv + nv + 3 > target.vector_registers:  # some registers may be spilled,
                    cost *= 2.0 if spec.kh * spec.kw == 1 and ri > 10 else 1.02  # or all
                if tile == "flat" and guarded and ri > 6:
                    continue  # every pixel of a checked tile adds to the code
                if cost < math.inf:
                    config = {"kind": "direct", "lanes": lanes, "tile": tile, "split": split}
                    found.append((cost, config | {"ri": ri, "nv": nv}))
    found.sort(key=lambda f: f[0])  # stable: simpler tiles first among equals
    return found


def _crowding(stride: Dim, ri: int) -> float:
    """How much slower a tile is because lines of its pixels, ``stride`` bytes apart, take each
    other's place in the cache.

    A few more than a set has ways do no harm, for each serves some steps. The factor is what was
    measured of pixels 4096 bytes apart, all of one set: 0.83 of the rate for 11 of them, 0.5 for
    14.
    """
    if not isinstance(stride, int):
        return 1.0
    sets = L1_BYTES // (WAYS * LINE)
    lines = {i * stride // LINE for i in range(ri)}
    most = max(Counter(line % sets for line in lines).values())
    return 1.0 + 0.22 * max(0, most - WAYS - 2)


def tile_count(spec: ConvSpec, kind: str, ri: int) -> Dim:
    """How many tiles cover the output pixels; ValueError if the tile is longer than a line."""
    if kind == "flat":
        return ceil_div(spec.n * spec.oh * spec.ow, ri)
    length, across = (spec.ow, spec.oh) if kind == "rows" else (spec.oh, spec.ow)
    if not isinstance(length, int) or length < ri:
        raise ValueError(f"{kind} tiles of {ri} pixels do not fit {length} pixels")
    return spec.n * across * -(-length // ri)


@functools.lru_cache(4096)
def _taps_done(size: Dim, out: Dim, kernel: int, stride: int, pad: int, dilation: int) -> float:
    """The part of the taps along one dimension that does not fall into padding."""
    if not (isinstance(size, int) and isinstance(out, int)) or out == 0:
        return 1.0
    hits = sum(
        0 <= o * stride - pad + k * dilation < size for o in range(out) for k in range(kernel)
    )
    return hits / (out * kernel)


def _cost(
    spec: ConvSpec, lanes: int, ri: int, nv: int, tile: str, split: bool, guarded: bool
) -> float:
    """Estimated cycles of the convolution, infinite where the tiling does not apply.

    Unknown sizes count as large.
    """
    depth = spec.kh * spec.kw * spec.cg
    streams = depth * nv * lanes * 4 > L1_BYTES // 2  # the weight panel comes from L2

    def cycles(pixels: int, taps: float, setup: float) -> float:
        # A multiply-add a cycle beside a load a cycle, with enough independent chains. Tiles of
        # more sums lose up to a twentieth of the rate; why is not known.
        sums = pixels * nv
        step = max(sums, pixels + nv, 6) * (1.0 + 0.005 * max(0, sums - 16)) + 0.2
        if streams:
            step = max(step, 3.5 * nv)  # cycles for a line of 64 bytes
        if guarded and tile == "flat":
            step += 6 * pixels  # every input element is checked
        return depth * taps * step + setup + 4 * pixels * nv

    n, oh, ow = (d if isinstance(d, int) else 64 for d in (spec.n, spec.oh, spec.ow))
    if tile == "flat":
        setup = 24.0 * ri + 2.0 * ri * spec.kh * spec.kw
        total = -(-n * oh * ow // ri) * cycles(ri, 1.0, setup)
    else:
        rows = tile == "rows"
        length, across = (spec.ow, oh) if rows else (spec.oh, ow)
        if not isinstance(length, int) or length < ri:
            return math.inf
        if rows:
            taps = _taps_done(spec.h, spec.oh, spec.kh, spec.sh, spec.ph, spec.dh)
        else:
            taps = _taps_done(spec.w, spec.ow, spec.kw, spec.sw, spec.pw, spec.dw)
        if length == ri:  # taps in the padding along the line are left out, but not their loads
            size, kernel, stride, pad, dilation = (
                (spec.w, spec.kw, spec.sw, spec.pw, spec.dw)
                if rows
                else (spec.h, spec.kh, spec.sh, spec.ph, spec.dh)
            )
            taps *= _taps_done(size, length, kernel, stride, pad, dilation)
        full, rest = divmod(length, ri)
        if split and (rest == 0 or spec.kh * spec.kw * spec.cg < 64):
            return math.inf
        last = 0.0 if not rest else cycles(rest if split else ri, taps, 24.0)
        total = n * across * (full * cycles(ri, taps, 24.0) + last) * (1.02 if split else 1.0)
    return total * (len(vector_starts(spec.og, lanes, nv)) // nv) * spec.groups


def _blocking(spec: ConvSpec, config: dict[str, Any]) -> dict[str, Any]:
    """Tiles per task and the order of tasks: what is read again should be what stays in cache."""
    ri, nv, lanes = config["ri"], config["nv"], config["lanes"]
    panels = len(vector_starts(spec.og, lanes, nv)) // nv * spec.groups
    depth = spec.kh * spec.kw * spec.cg
    tiles = tile_count(spec, config["tile"], ri)
    if not isinstance(tiles, int) or not isinstance(spec.h, int) or not isinstance(spec.w, int):
        return {"chunk": 8, "order": "panel"}
    wanted = TASK_FLOPS / (2 * ri * nv * lanes * depth)
    wanted = min(wanted, tiles * panels / MIN_TASKS)
    chunk = max(1, min(tiles, round(wanted)))
    chunk = _even(spec, config, tiles, chunk)
    chunks = -(-tiles // chunk)
    weights = 4 * panels * depth * nv * lanes
    read = min(spec.h, spec.oh * spec.kh) * min(spec.w, spec.ow * spec.kw)  # a stride may skip
    source = 4 * spec.n * spec.c * read  # type: ignore[operator]
    # Narrow groups use a part of every cache line, and come back for the rest.
    again = panels // spec.groups * max(1, 32 // spec.cg if spec.groups > 1 else 1)
    by_panel = weights + source * (again if source > L2_BYTES // 2 else 1)
    by_pixel = source + weights * (chunks if weights > L2_BYTES // 4 else 1)
    if by_panel <= by_pixel:
        return {"chunk": chunk, "order": "panel"}
    if source > L2_BYTES // 2:  # all panels should find a task's input in the cache
        chunk = _even(spec, config, tiles, max(1, min(chunk, tiles * (L2_BYTES // 4) // source)))
    return {"chunk": chunk, "order": "pixel"}


def _even(spec: ConvSpec, config: dict[str, Any], tiles: int, chunk: int) -> int:
    """About ``chunk`` tiles per task, so that tasks are nearly equal and end with a line."""
    if config["tile"] != "flat":
        length = spec.ow if config["tile"] == "rows" else spec.oh
        per_line = -(-length // config["ri"])  # type: ignore[operator]
        chunk = chunk if chunk < per_line else chunk // per_line * per_line
    return -(-tiles // -(-tiles // chunk)) if tiles else 1


def inner_unroll(depth: int) -> int:
    """How many steps of the innermost loop to unroll."""
    if depth <= 8:
        return depth
    return next(u for u in (2, 3, 1) if depth % u == 0)
