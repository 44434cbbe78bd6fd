"""What each kind of group computes, as definitions for TVM's schedulers.

One function per kind, ``(group, io, target) -> Definition``; those of products take a ``width`` to
pack a constant weight into panels, as CPUs want it. All raise `group.Unsupported` for what they do
not cover, symbolic sizes first of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.fx as fx
import tvm.tirx as tir
import tvm_ffi
from tvm.script.ir_builder import tirx as T

from .abi import Pack, TensorArg, contiguous_strides
from .definition import Definition, Writer, exprs, known, value_of, zero
from .emit import Expr, compute_dtype
from .group import HALF, IO, Group, Unsupported
from .ops import evaluate
from .ops.rows import Monoid, RowContext
from .target import Target
from .templates import conv_spec, gemm_spec
from .templates.row_space import RowSpace, row_space
from .threaded.experts import experts
from .threaded.route import route
from .threaded.topk import topk
from .value import Value, cast_expr


def _divide(w: Writer, value: Expr, by: int) -> list[Expr]:
    """Quotient and remainder, which for an index made as ``q * by + r`` are q and r again."""
    return [w.simplify(tir.floordiv(value, by)), w.simplify(tir.floormod(value, by))]


def _float(value: Expr, dtype: torch.dtype) -> Expr:
    return cast_expr(value, dtype, torch.float32)


def _has_schedules(dtype: torch.dtype, target: Target) -> None:
    if dtype in HALF and target.kind == "cuda":
        raise Unsupported("PLT-DEF-010", f"the library has tensor cores for products of {dtype}")
    if dtype == torch.bfloat16:  # TVM's lowering of such schedules ends the process
        raise Unsupported("PLT-DEF-010", "schedules of bfloat16 products cannot be lowered")


# -- matrix products --------------------------------------------------------------------------


def gemm(group: Group, io: IO, target: Target, *, width: int | None = None) -> Definition:
    """A matrix product with what follows it elementwise.

    ``width`` packs a constant right factor into panels of so many columns, which must divide n.
    Operands may not be read through views.
    """
    spec = gemm_spec.parse(group, io)
    _has_schedules(spec.dtype, target)
    lead = known((*spec.batch, *spec.rows))  # the sizes of all loops but those over n and k
    n, k = known((spec.n, spec.k))
    b_batch = known(io[spec.b].shape[:-2])
    shape = known(spec.shape)
    if tuple(io[spec.a].shape) != (*lead, k) or spec.a_strides[-1] != io[spec.a].strides[-1]:
        raise Unsupported("PLT-DEF-005", "the left factor is read through a view")
    if b_batch not in ((), spec.batch):
        raise Unsupported("PLT-DEF-006", "the right factor is broadcast")
    packed: dict[fx.Node, tuple[Pack, TensorArg]] = {}
    swapped = False
    if width is not None:
        if not spec.b_const or n % width:
            raise Unsupported("PLT-DEF-007", f"no constant of whole panels of {width} columns")
        panels = (*b_batch, n // width, k, width)
        pack = Pack("gemm_panels", (("width", width), ("transposed", spec.b_transposed)))
        packed[spec.b] = (pack, TensorArg(spec.dtype, panels, contiguous_strides(panels)))
    else:
        swapped = _is_swapped(spec, io)
    columns = (n,) if width is None else (n // width, width)

    def body(w: Writer) -> None:
        left = w.ctx.env[spec.a]
        right = value_of(w.inputs[group.inputs.index(spec.b)], w.buffers[spec.b])

        def term(s: list[Expr], r: list[Expr]) -> Expr:
            column = [r[0], s[-1]] if width is None else [s[-2], r[0], s[-1]]
            if swapped:
                column.reverse()
            x = left.load([*s[: len(lead)], r[0]])
            y = right.load([*s[: len(b_batch)], *column])
            return _float(x, spec.dtype) * _float(y, spec.dtype)

        acc = w.reduce("product", (*lead, *columns), (k,), term)

        def load(index: Sequence[Expr]) -> Expr:
            column = index[-1] if spec.has_column else zero()
            split = [column] if width is None else _divide(w, column, width)
            value = acc[(*index[: len(lead)], *split)]
            if spec.alpha != 1:
                value = value * tir.FloatImm("float32", spec.alpha)
            if spec.fused_bias is not None and spec.beta != 0:
                bias = w.ctx.env[spec.fused_bias].broadcast(exprs(shape))
                extra = _float(bias.load(index), bias.dtype)
                value = value + extra * tir.FloatImm("float32", spec.beta)
            return cast_expr(value, torch.float32, spec.dtype)

        def index(s: list[Expr]) -> list[Expr]:
            column = s[-1] if width is None else s[-2] * width + s[-1]
            return [*s[: len(lead)], *([column] if spec.has_column else [])]

        w.ctx.env[spec.anchor] = Value(exprs(shape), spec.dtype, load)
        w.store_outputs(shape, (*lead, *columns), index)

    return Writer(group, io, packed, target).write(body, cast(int, spec.flops))


def _is_swapped(spec: gemm_spec.GemmSpec, io: IO) -> bool:
    """Whether the right factor lies as ``[.., N, K]``."""
    sizes, strides = tuple(io[spec.b].shape), tuple(io[spec.b].strides)
    for swapped, own, steps in (
        (False, (spec.k, spec.n), spec.b_strides[-2:]),
        (True, (spec.n, spec.k), spec.b_strides[:-3:-1]),
    ):
        if sizes[-2:] == own and strides[-2:] == tuple(steps):
            return swapped
    raise Unsupported("PLT-DEF-005", "the right factor is read through a view")


# -- convolutions -----------------------------------------------------------------------------


def conv(group: Group, io: IO, target: Target, *, width: int | None = None) -> Definition:
    """A convolution with what follows it elementwise; the input must have the halo it reads.

    ``width`` packs the weight for so many output channels side by side, which must divide the
    channels of a group.
    """
    spec = conv_spec.parse(group, io)
    dtype = io[spec.x].dtype
    _has_schedules(dtype, target)
    n, h, w_, oh, ow = known((spec.n, spec.h, spec.w, spec.oh, spec.ow))
    del h, w_
    lanes = min(target.vector_bytes // 4, width or 1)
    packed: dict[fx.Node, tuple[Pack, TensorArg]] = {}
    blocks = spec.og
    if width is not None:
        if spec.og % width or width % lanes:
            raise Unsupported("PLT-DEF-007", f"{spec.og} channels are not blocks of {width}")
        blocks = spec.og // width
        shape = (spec.groups * blocks, spec.kh, spec.kw, spec.cg, width)
        params = (("groups", spec.groups), ("lanes", lanes), ("vectors", width // lanes))
        packed[spec.weight] = (
            Pack("conv_direct", params),
            TensorArg(dtype, shape, contiguous_strides(shape), const=True),
        )
    have, need = conv_spec.halo_of(io[spec.x], spec.rank), spec.needed()
    if any(x < y for a, b in zip(have, need, strict=True) for x, y in zip(a, b, strict=True)):
        raise Unsupported("PLT-DEF-008", "the input has no zeros around it")

    def body(w: Writer) -> None:
        x = w.ctx.env[spec.x]
        weight = w.buffers[spec.weight]
        physical = w.inputs[group.inputs.index(spec.weight)]

        def term(s: list[Expr], r: list[Expr]) -> Expr:
            image, row, col, g, block, *lane = s
            ky, kx, c = r
            channel = g * spec.cg + c if spec.groups > 1 else c
            at = spec.out_index(
                image, channel,
                row * spec.sh + (ky * spec.dh - spec.ph), col * spec.sw + (kx * spec.dw - spec.pw),
            )  # fmt: skip
            if width is not None:
                where = [g * blocks + block, ky, kx, c, lane[0]]
            else:
                where = [g * spec.og + block, c, *((ky, kx) if spec.rank == 2 else (kx,))]
            return _float(x.load(at), dtype) * _float(weight[tuple(physical.index(where))], dtype)

        spatial = (n, oh, ow, spec.groups, blocks, *((width,) if width is not None else ()))
        acc = w.reduce("conv", spatial, (spec.kh, spec.kw, spec.cg), term)

        def load(index: Sequence[Expr]) -> Expr:
            image, channel, col = index[0], index[1], index[-1]
            row = index[2] if spec.rank == 2 else zero()
            g, c = _divide(w, channel, spec.og)
            value = acc[(image, row, col, g, *([c] if width is None else _divide(w, c, width)))]
            if spec.bias is not None:
                value = value + _float(w.ctx.env[spec.bias].load([channel]), dtype)
            return cast_expr(value, torch.float32, dtype)

        def index(s: list[Expr]) -> list[Expr]:
            image, row, col, g, block, *lane = s
            channel = g * blocks + block
            if width is not None:
                channel = channel * width + lane[0]
            return spec.out_index(image, w.simplify(channel), row, col)

        shape = known(io[group.outputs[0]].shape)
        assert group.anchor is not None
        w.ctx.env[group.anchor] = Value(exprs(shape), dtype, load)
        w.store_outputs(shape, spatial, index)

    return Writer(group, io, packed, target).write(body, cast(int, spec.flops))


# -- everything elementwise -------------------------------------------------------------------


def pointwise(group: Group, io: IO, target: Target) -> Definition:
    """Elementwise nodes and views; the outputs must have one shape."""
    shape = known(io[group.outputs[0]].shape)
    return Writer(group, io, {}, target).write(lambda w: w.store_outputs(shape), 0)


# -- reductions and normalisations --------------------------------------------------------------


def _reducer(monoid: Monoid) -> Callable[[Expr, Expr], Expr]:
    """The monoid's way to combine, by TVM's own operator where that means the same.

    Threads can share only reductions that TVM knows.
    """
    a, b = (tir.Var(name, compute_dtype(monoid.dtype)) for name in "ab")
    made = monoid.combine(a, b)
    if tvm_ffi.structural_equal(made, tir.Select(a > b, a, b)):
        return tir.max
    if tvm_ffi.structural_equal(made, tir.Select(a < b, a, b)):
        return tir.min
    return monoid.combine


class _BlockRows:
    """`ops.rows.Rows` as stages: every fold and every value per row gets a buffer of its own."""

    def __init__(self, writer: Writer, space: RowSpace) -> None:
        self._writer, self._space = writer, space
        self._dims = known(space.dims)
        self.count = space.count
        self.row: list[Expr] = []  # the axes of the stage being written that are not folded

    def fold(self, monoid: Monoid, value: Value) -> Value:
        def term(s: list[Expr], r: list[Expr]) -> Expr:
            self.row = s
            return value.load(self.operand_index(s, r))

        buffer = self._writer.reduce(
            "fold",
            self.kept,
            [self._dims[a] for a in self._space.axes],
            term,
            dtype=compute_dtype(monoid.dtype),
            identity=monoid.identity,
            combine=_reducer(monoid),
        )
        return self._per_row(buffer, monoid.dtype)

    def find(self, value: Value, largest: bool) -> tuple[Value, Value]:
        del value, largest
        raise Unsupported("PLT-DEF-009", "positions of extremes are left to the library")

    def scan(self, monoid: Monoid, value: Value) -> Value:
        del monoid, value
        raise Unsupported("PLT-DEF-011", "running totals are left to the library")

    def keep(self, value: Value) -> Value:
        return value

    def define(self, dtype: torch.dtype, compute: Callable[[], Expr]) -> Value:
        buffer = T.sblock_alloc_buffer(list(exprs(self.kept or (1,))), compute_dtype(dtype))

        def body(s: list[Expr], _: list[Expr]) -> None:
            self.row = s
            self._writer.store_scalar(buffer, s or [zero()], compute)

        self._writer.block("row", self.kept, [], body)
        return self._per_row(buffer, dtype)

    def _per_row(self, buffer: Any, dtype: torch.dtype) -> Value:
        return Value((), dtype, lambda _: buffer[tuple(self.row or [zero()])])

    @property
    def kept(self) -> tuple[int, ...]:
        """The sizes that are not folded."""
        return tuple(self._dims[a] for a in self._space.kept)

    def point(self, s: Sequence[Expr], r: Sequence[Expr]) -> list[Expr]:
        """A point of the space from its row and its place in the row."""
        point: list[Expr] = [zero()] * len(self._dims)
        for axis, value in zip((*self._space.kept, *self._space.axes), (*s, *r), strict=True):
            point[axis] = value
        return point

    def operand_index(self, s: Sequence[Expr], r: Sequence[Expr]) -> list[Expr]:
        """The operand's index at a place in a row."""
        return self._space.operand_index(self.point(s, r), exprs(self._dims))


def rows(group: Group, io: IO, target: Target) -> Definition:
    """Reductions and normalisations with what is elementwise before and after them."""
    space = row_space(group, io)
    dims = known(space.dims)

    def body(w: Writer) -> None:
        engine = _BlockRows(w, space)
        w.ctx = RowContext(w.ctx.emitter, w.ctx.env, engine)
        evaluate(list(group.nodes), w.ctx)
        for node, physical, buffer in zip(group.outputs, w.outputs, w.out_buffers, strict=True):
            value: Value = w.ctx.env[node]
            whole = tuple(physical.arg.shape) == tuple(space.shape)

            def stage(
                s: list[Expr], _: list[Expr], v: Value = value, p: Any = physical, b: Any = buffer,
                whole: bool = whole,
            ) -> None:  # fmt: skip
                if whole:
                    engine.row = [s[a] for a in space.kept]
                    at = space.operand_index(s, exprs(dims))
                else:
                    engine.row = s
                    at = space.row_index(engine.point(s, [zero()] * len(space.axes)), len(v.shape))
                w.store(b, p, at, v)

            w.block("out", dims if whole else engine.kept, [], stage)

    return Writer(group, io, {}, target).write(body, 2 * math.prod(dims))


DEFINITIONS: dict[str, Callable[..., Definition]] = {
    "pointwise": pointwise,
    "reduce": rows,
    "rows": rows,
    "gemm": gemm,
    "conv": conv,
    "topk": topk,
    "route": route,
    "experts": experts,
}
"""How a group of each kind is defined."""
