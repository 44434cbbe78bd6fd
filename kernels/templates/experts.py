"""Products of rows with the weights of their branch, where only the run knows who gets how many.

A task is one panel of output columns of one branch; tasks of one panel follow one another, so that
any even split of the tasks gives every worker an equal part of every branch, however uneven the
routes. Rows of a branch are taken ``ri`` at a time, the last ones again where they do not fill a
tile; few rows get narrower tiles, which read the weights as fast and waste less. A branch without
rows costs a comparison: its weights are not touched.
"""

from __future__ import annotations

from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, Pack, product
from ..emit import Emitter, Expr
from ..group import IO, Group, Unsupported, symbols_of
from ..ops import argument
from ..target import Target
from .conv_common import loop, name_index, vector
from .conv_tiling import inner_unroll

FEW = (1, 2, 4)  # narrower tiles, for branches with that many rows or fewer


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """Tile sizes, the best guess first."""
    _check(group, io, target)
    columns = int(io[group.outputs[0]].shape[1])  # type: ignore[arg-type]
    lanes = max(1, target.vector_bytes // 4)
    wide = -(-columns // lanes)
    found = [{"ri": 6, "nv": 4}, {"ri": 9, "nv": 3}, {"ri": 12, "nv": 2}]
    return [c for c in found if c["nv"] <= max(2, wide)]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers one ``plait.routed_linear``. Raises `Unsupported` for what `candidates` declines."""
    _check(group, io, target)
    (node,) = group.nodes
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    symbols = symbols_of(group, (*inputs, *outputs))
    em = Emitter(name, inputs, outputs, symbols)
    weight = io[argument(node, "weight")]
    lanes = max(1, target.vector_bytes // 4)
    transposed = bool(argument(node, "transposed"))
    branches = int(weight.shape[0])  # type: ignore[arg-type]
    depth, columns = (int(weight.shape[k]) for k in ((1, 2) if transposed else (2, 1)))  # type: ignore[arg-type]
    panels = -(-columns // (config["nv"] * lanes))
    with em.function() as task:
        body = _Body(em, group, config, lanes, branches, depth, columns)
        body.task(
            name_index(tir.truncdiv(task, branches)), name_index(tir.truncmod(task, branches))
        )
    width = config["nv"] * lanes
    # As torch.nn.Linear keeps its weight, [N, K], is "transposed" to a matrix product.
    pack = Pack("gemm_panels", (("width", width), ("transposed", not transposed)))
    return em.kernel(
        panels * branches,
        config,
        flops=product([2, outputs[0].shape[0], columns, depth]),
        packs=tuple(pack if n is argument(node, "weight") else None for n in group.inputs),
    )


class _Body:
    """Emits the work of one task."""

    def __init__(
        self, em: Emitter, group: Group, config: dict[str, Any], lanes: int,
        branches: int, depth: int, columns: int,
    ) -> None:  # fmt: skip
        self.em, self.lanes, self.ri, self.nv = em, lanes, config["ri"], config["nv"]
        self.branches, self.depth, self.columns = branches, depth, columns
        (node,) = group.nodes
        refs = dict(zip(group.inputs, em.inputs, strict=True))
        self.x, self.weight = refs[argument(node, "x")], refs[argument(node, "weight")]
        self.offsets, self.order = refs[argument(node, "offsets")], refs[argument(node, "order")]
        bias = argument(node, "bias")
        self.bias = None if bias is None else refs[bias]
        self.share, self.scatter = int(argument(node, "share")), bool(argument(node, "scatter"))
        self.out = em.outputs[0]

    def task(self, panel: Expr, branch: Expr) -> None:
        """All rows of one branch, in one panel of columns."""
        em, ri = self.em, self.ri
        begin = name_index(self.offsets.load([branch]))
        end = name_index(self.offsets.load([branch + 1]))
        count = name_index(end - begin)
        panels = -(-self.columns // (self.nv * self.lanes))
        weights = name_index((branch * panels + panel) * (self.depth * self.nv * self.lanes))

        def tiles(size: int) -> None:
            with T.serial(em.i64(0), tir.truncdiv(count + (size - 1), em.i64(size))) as t:
                first = tir.max(tir.min(t * size, count - size), em.i64(0))
                self._tile(name_index(begin + first), end - 1, size, panel, branch, weights)

        def choose(sizes: list[int]) -> None:
            if len(sizes) == 1:
                tiles(sizes[0])
                return
            with T.If(count <= sizes[0]):
                with T.Then():
                    tiles(sizes[0])
                with T.Else():
                    choose(sizes[1:])

        choose([n for n in FEW if n < ri] + [ri])
        with T.If(branch == self.branches - 1), T.Then():
            self._zeros(end, panel)

    def _tile(
        self, first: Expr, last: Expr, size: int, panel: Expr, branch: Expr, weights: Expr
    ) -> None:
        em, lanes, width = self.em, self.lanes, self.nv * self.lanes
        place = [name_index(tir.min(first + i, last)) for i in range(size)]
        slots = [name_index(self.order.load([p])) for p in place]
        if self.share:
            rows = [tir.truncdiv(s, em.i64(self.share)) for s in slots]
        else:
            rows = place
        bases = [name_index(self.x.offset([r, em.i64(0)])) for r in rows]
        step = self.x.strides[1]
        sums = [em.local(width) for _ in range(size)]
        for buffer in sums:
            with T.unroll(em.i64(self.nv)) as v, vector(em, lanes) as j:
                T.buffer_store(buffer, em.f32(0.0), [v * lanes + j])
        unroll = inner_unroll(self.depth)
        with loop(em, self.depth // unroll) as k0, T.unroll(em.i64(unroll)) as k1:
            k = k0 * unroll + k1
            for i in range(size):
                value = self.x.load_flat(bases[i] + k * step)
                with T.unroll(em.i64(self.nv)) as v, vector(em, lanes) as j:
                    lane = v * lanes + j
                    term = value * self.weight.load_flat(weights + k * width + lane)
                    T.buffer_store(sums[i], sums[i][lane] + term, [lane])
        for i in range(size):
            row = slots[i] if self.scatter else place[i]
            self._store(row, panel, branch, lambda lane, i=i: sums[i][lane])

    def _zeros(self, end: Expr, panel: Expr) -> None:
        """Rows of no branch."""
        em = self.em
        with T.serial(end, self.order.shape[0]) as p:
            row = name_index(self.order.load([p])) if self.scatter else p
            self._store(row, panel, None, lambda lane: em.f32(0.0))

    def _store(self, row: Expr, panel: Expr, branch: Expr | None, value: Any) -> None:
        """Stores a row's part of the panel; columns past the last are left out."""
        em, lanes = self.em, self.lanes
        base = panel * (self.nv * lanes)

        def put(column: Expr, lane: Expr) -> None:
            total = value(lane)
            if self.bias is not None and branch is not None:
                total = total + self.bias.load([branch, column])
            self.out.store(total, [row, column])

        for v in range(self.nv):
            first = name_index(base + v * lanes)
            if self.columns % (self.nv * lanes) == 0:
                with vector(em, lanes) as j:
                    put(first + j, v * lanes + j)
                continue
            with T.If(first + lanes <= self.columns):
                with T.Then(), vector(em, lanes) as j:
                    put(first + j, v * lanes + j)
                with T.Else(), T.serial(em.i64(0), em.i64(lanes)) as j:
                    with T.If(first + j < self.columns), T.Then():
                        put(first + j, v * lanes + j)


def _check(group: Group, io: IO, target: Target) -> None:
    (node,) = group.nodes
    if target.kind != "cpu":
        raise Unsupported("PLT-EXP-001", f"this template does not generate code for {target.kind}")
    weight, bias = argument(node, "weight"), argument(node, "bias")
    operands = [argument(node, "x"), weight, *([] if bias is None else [bias])]
    if any(io[n].dtype != torch.float32 for n in operands):
        raise Unsupported("PLT-EXP-002", "only float32 has a kernel for routed products")
    if not io[weight].const or not all(isinstance(d, int) for d in io[weight].shape):
        raise Unsupported("PLT-EXP-003", "weights computed at run time are not packed")
    if 0 in io[weight].shape:
        raise Unsupported("PLT-EXP-004", "weights without elements")
