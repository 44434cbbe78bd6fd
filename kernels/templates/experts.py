"""Products of rows with the weights of their branch, where only the run knows who gets how many.

A task is one panel of output columns of one branch; tasks of one panel follow one another, so that
any even split of the tasks gives every worker an equal part of every branch, however uneven the
routes. A branch's rows are shared out evenly among as few tiles of at most ``ri`` rows as there
must be. A branch without rows costs a comparison: its weights are not touched.

Pointwise operators that follow run on the accumulators. A gate's two operands, which are columns of
one product, are computed in one panel that holds some columns of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, Pack, product
from ..emit import Emitter, Expr
from ..gates import gate_of
from ..group import HALF, IO, Group, Unsupported, symbols_of
from ..ops import argument, category, evaluate
from ..ops.common import convert_expr, convert_products
from ..ops.scope import sharing
from ..target import Target
from ..value import Context, Value
from .conv_common import loop, name_index, vector
from .conv_tiling import inner_unroll
from .half_factors import LANES, Left, words, words_at_even
from .sums import Sums
from .vectors import ramp

BLOCK = 256  # steps that are summed, and of rows that are copied, at a time
STRANDS = 4
"""Partial sums of a single row: each addition waits for the one before it, and loses digits. Wider
tiles have enough sums in flight without.
"""


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """Tile sizes, the best guess first."""
    spec = _Spec(group, io, target)
    wide = -(-spec.columns // spec.lanes)
    found = [{"ri": 6, "nv": 4}, {"ri": 12, "nv": 2}]
    if not spec.halves:
        found.insert(1, {"ri": 9, "nv": 3})
    return [c for c in found if c["nv"] <= max(2, wide)]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers a ``plait.routed_linear`` and the pointwise operators after it.

    Raises `Unsupported` for what `candidates` declines.
    """
    spec = _Spec(group, io, target)
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    em = Emitter(name, inputs, outputs, symbols_of(group, (*inputs, *outputs)))
    width = config["nv"] * spec.lanes
    panels = -(-spec.columns // width)
    with em.function() as task:
        body = _Body(em, group, spec, config)
        body.task(
            name_index(tir.truncdiv(task, spec.branches)),
            name_index(tir.truncmod(task, spec.branches)),
        )
    # As torch.nn.Linear keeps its weight, [N, K], is "transposed" to a matrix product.
    layout: list[tuple[str, int | bool]] = [("width", width), ("transposed", not spec.transposed)]
    if spec.halves:
        layout.append(("alternate", spec.alternate))
    if spec.pairs:
        layout.append(("pairs", True))
    pack = Pack("paired_panels" if spec.halves else "gemm_panels", tuple(layout))
    return em.kernel(
        panels * spec.branches,
        config,
        flops=product([2, outputs[0].shape[0], spec.columns, spec.depth]),
        packs=tuple(pack if n is spec.weight else None for n in group.inputs),
    )


class _Spec:
    """What a group computes. ``columns`` are the product's; ``halves`` a gate's operands in it."""

    def __init__(self, group: Group, io: IO, target: Target) -> None:
        if target.kind != "cpu":
            reason = f"this template does not generate code for {target.kind}"
            raise Unsupported("PLT-EXP-001", reason)
        self.node = node = next(n for n in group.nodes if category(n) == "experts")
        if argument(node, "slots") is not None:
            raise Unsupported("PLT-EXP-007", "matrices in slots have kernels on GPUs only")
        self.weight, self.bias = argument(node, "weight"), argument(node, "bias")
        operands = [argument(node, "x"), self.weight, *([] if self.bias is None else [self.bias])]
        self.dtype = io[self.weight].dtype
        if self.dtype not in (torch.float32, *HALF) or any(
            io[n].dtype != self.dtype for n in operands
        ):
            reason = "routed products have kernels in float32, bfloat16 and float16 only"
            raise Unsupported("PLT-EXP-002", reason)
        weight = io[self.weight]
        if not weight.const or not all(isinstance(d, int) for d in weight.shape):
            raise Unsupported("PLT-EXP-003", "weights computed at run time are not packed")
        if 0 in weight.shape:
            raise Unsupported("PLT-EXP-004", "weights without elements")
        self.transposed = bool(argument(node, "transposed"))
        self.branches = int(weight.shape[0])  # type: ignore[arg-type]
        self.depth, self.columns = (
            int(weight.shape[k])  # type: ignore[arg-type]
            for k in ((1, 2) if self.transposed else (2, 1))
        )
        self.lanes = max(1, target.vector_bytes // 4)
        self.pairs = target.pairs(self.dtype)
        self.steps = -(-self.depth // 2) if self.pairs else self.depth
        self.copied = self.dtype in HALF and not (
            self.pairs and words_at_even(io[operands[0]].strides, self.depth)
        )
        self.halves, self.alternate = gate_of(group, node)


class _Body:
    """Emits the work of one task."""

    def __init__(self, em: Emitter, group: Group, spec: _Spec, config: dict[str, Any]) -> None:
        self.em, self.spec, self.lanes = em, spec, spec.lanes
        self.ri, self.nv = config["ri"], config["nv"]
        self.width = self.nv * self.lanes
        # Vectors of one operand of a gate, and columns that are stored.
        self.parts = 2 if spec.halves else 1
        self.stored = spec.columns // self.parts
        refs = dict(zip(group.inputs, em.inputs, strict=True))
        node = spec.node
        self.x, self.weight = refs[argument(node, "x")], refs[spec.weight]
        self.x_words, self.weight_words = (
            (words(self.x), words(self.weight)) if spec.pairs else (None, None)
        )
        self.left = None
        if spec.copied:
            self.left = Left(em, self.x, self.ri, min(spec.steps, BLOCK), spec.pairs)
        self.offsets, self.order = refs[argument(node, "offsets")], refs[argument(node, "order")]
        self.bias = None if spec.bias is None else refs[spec.bias]
        self.share, self.scatter = int(argument(node, "share")), bool(argument(node, "scatter"))
        self.out = em.outputs[0]
        self.panels = -(-spec.columns // self.width)
        self._sums: list[Expr] = [em.f32(0.0)] * self.parts
        env: dict[fx.Node, Any] = {n: Value.of(ref) for n, ref in refs.items()}
        for k, part in enumerate(spec.halves or (node,)):
            env[part] = Value(tuple(self.out.shape), spec.dtype, lambda _, k=k: self._sums[k])
        env.setdefault(node, None)
        evaluate(group.nodes, Context(em, env))
        self._result: Value = env[group.outputs[0]]

    def task(self, panel: Expr, branch: Expr) -> None:
        """All rows of one branch, in one panel of columns."""
        em, ri = self.em, self.ri
        begin = name_index(self.offsets.load([branch]))
        end = name_index(self.offsets.load([branch + 1]))
        count = name_index(end - begin)
        weights = name_index((branch * self.panels + panel) * (self.spec.steps * self.width))
        tiles = name_index(tir.truncdiv(count + (ri - 1), em.i64(ri)))
        with T.serial(em.i64(0), tiles) as t:
            first = name_index(tir.truncdiv(count * t, tiles))
            size = name_index(tir.truncdiv(count * (t + 1), tiles) - first)

            def choose(sizes: list[int]) -> None:
                if len(sizes) == 1:
                    self._tile(name_index(begin + first), end - 1, sizes[0], panel, branch, weights)
                    return
                half = len(sizes) // 2
                with T.If(size <= sizes[half - 1]):
                    with T.Then():
                        choose(sizes[:half])
                    with T.Else():
                        choose(sizes[half:])

            choose(_sizes(ri))
        with T.If(branch == self.spec.branches - 1), T.Then():
            self._zeros(end, panel)

    def _tile(
        self, first: Expr, last: Expr, size: int, panel: Expr, branch: Expr, weights: Expr
    ) -> None:
        """``size`` rows; where a branch has fewer, its last one again."""
        em, lanes, width = self.em, self.lanes, self.width
        place = [name_index(tir.min(first + i, last)) for i in range(size)]
        slots = [name_index(self.order.load([p])) for p in place]
        if self.share:
            rows = [tir.truncdiv(s, em.i64(self.share)) for s in slots]
        else:
            rows = place
        bases = [name_index(self.x.offset([r, em.i64(0)])) for r in rows]
        strands = math.gcd(self.spec.steps, max(1, STRANDS // size))
        sums = Sums(em, size, self.nv * strands, lanes, self.spec.steps // strands)
        self._product(bases, weights, sums, strands)
        for total in sums.totals:
            half = strands
            while half > 1:
                half //= 2
                with T.unroll(em.i64(self.nv * half)) as v, vector(em, lanes) as j:
                    lane = v * lanes + j
                    T.buffer_store(total, total[lane] + total[lane + half * width], [lane])
        for i, total in enumerate(sums.totals):
            row = slots[i] if self.scatter else place[i]
            self._store(row, panel, branch, total)

    def _product(self, bases: list[Expr], weights: Expr, sums: Sums, strands: int) -> None:
        """Adds the product of some rows with the panel's weights to ``sums``, in blocks."""
        em, spec = self.em, self.spec
        stride = self.x.strides[1]
        together = 2 if spec.pairs else 1
        source = self.x_words
        starts = bases if source is None else [name_index(tir.truncdiv(b, 2)) for b in bases]

        def direct(row: int, k: Expr) -> Expr:
            if source is None:
                return self.x.load_flat(starts[row] + k * stride)
            return source[starts[row] + k]

        def block(first: Expr, steps: int, elements: int) -> None:
            panel = weights + first * self.width
            if self.left is None:
                self._steps(lambda row, k: direct(row, first + k), panel, steps, sums, strands)
            else:
                begin = [name_index(b + first * together * stride) for b in bases]
                self.left.fill(begin, stride, em.i64(elements))
                self._steps(self.left.load, panel, steps, sums, strands)
            sums.flush(0)

        size = spec.steps
        if self.left is not None:
            size = BLOCK
        elif sums.cut:
            size = BLOCK * strands
        whole = spec.depth // (size * together)
        if whole:
            with loop(em, whole) as number:
                block(name_index(number * size), size, size * together)
        rest = spec.steps - whole * size
        if rest:
            block(em.i64(whole * size), rest, spec.depth - whole * size * together)

    def _steps(
        self, left: Callable[[int, Expr], Expr], weights: Expr, steps: int, sums: Sums,
        strands: int,
    ) -> None:  # fmt: skip
        em, lanes, width = self.em, self.lanes, self.width
        strands = math.gcd(steps, strands)
        unroll = max(strands, inner_unroll(steps))
        with loop(em, steps // unroll) as k0, T.unroll(em.i64(unroll)) as k1:
            k = k0 * unroll + k1
            strand = tir.truncmod(k1, em.i64(strands)) * width
            for i in range(len(sums.totals)):
                value = left(i, k)
                with T.unroll(em.i64(self.nv)) as v:
                    column = weights + k * width + v * lanes
                    if self.weight_words is not None:
                        pairs = self.weight_words[ramp(column, LANES)]
                        sums.add_pairs(i, strand + v * lanes, value, pairs)
                    else:
                        with vector(em, lanes) as j:
                            weight = self.weight.load_flat(column + j)
                            term = value * convert_expr(weight, self.spec.dtype, torch.float32)
                            sums.add(i, strand + v * lanes + j, term)

    def _zeros(self, end: Expr, panel: Expr) -> None:
        """Rows of no branch."""
        with T.serial(end, self.order.shape[0]) as p:
            row = name_index(self.order.load([p])) if self.scatter else p
            self._store(row, panel, None, None)

    def _store(self, row: Expr, panel: Expr, branch: Expr | None, sums: Expr | None) -> None:
        """Stores a row's part of the panel; columns past the last are left out."""
        em, lanes = self.em, self.lanes
        kept = self.nv // self.parts  # vectors that are stored
        base = panel * (kept * lanes)

        def put(column: Expr, lane: Expr) -> None:
            with sharing():
                self._sums[:] = [
                    self._total(column, lane, k, branch, sums) for k in range(self.parts)
                ]
                self.out.store(self._result.load([row, column]), [row, column])

        for v in range(kept):
            first = name_index(base + v * lanes)
            if self.stored % (kept * lanes) == 0:
                with vector(em, lanes) as j:
                    put(first + j, v * lanes + j)
                continue
            with T.If(first + lanes <= self.stored):
                with T.Then(), vector(em, lanes) as j:
                    put(first + j, v * lanes + j)
                with T.Else(), T.serial(em.i64(0), em.i64(lanes)) as j:
                    with T.If(first + j < self.stored), T.Then():
                        put(first + j, v * lanes + j)

    def _total(
        self, column: Expr, lane: Expr, part: int, branch: Expr | None, sums: Expr | None
    ) -> Expr:
        """The product at a column of one operand, with its bias."""
        dtype = self.spec.dtype
        if sums is None or branch is None:
            return convert_expr(self.em.f32(0.0), torch.float32, dtype)
        total = sums[lane + part * (self.width // 2)]
        if self.bias is not None:
            if self.parts == 2:
                alternate = self.spec.alternate
                column = column * 2 + part if alternate else column + part * self.stored
            total = total + convert_expr(self.bias.load([branch, column]), dtype, torch.float32)
        return convert_products(total, dtype)


def _sizes(most: int) -> list[int]:
    """Rows for which there is code of their own: each count, above six every other."""
    return [n for n in range(1, most + 1) if n <= 6 or (most - n) % 2 == 0]
