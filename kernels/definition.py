"""Groups as plain loop nests for TVM's schedulers (MetaSchedule, DLight).

A template writes a finished kernel; a definition only says what is to be computed, one block per
stage, and leaves tiling, vectors and threads to a search or a rule. Buffers lie as the tensors
really do: a strided argument (channels last, with a halo, a slice of a concat) is seen through its
*physical* buffer, whose dimensions are the argument's in the order of their strides.

Sizes must be known; everything else raises `group.Unsupported`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx
import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .abi import Pack, TensorArg, contiguous_strides
from .emit import Expr, tvm_dtype
from .group import IO, Group, Unsupported
from .ops import evaluate
from .target import Target
from .templates import conv_spec, gemm_spec
from .templates.conv_common import compulsory_bytes
from .value import Context, Value, cast_expr

REMARK = "definition"


@dataclass(frozen=True)
class Physical:
    """The memory of a tensor as a dense buffer.

    ``shape`` are the buffer's extents, ``dims[k]`` the argument's dimension that runs along its
    k-th (None: a gap), ``before`` how far the argument's dimensions reach below index 0, and
    ``offset`` the elements from the buffer's start to the argument's logical element 0.
    """

    arg: TensorArg
    shape: tuple[int, ...]
    dims: tuple[int | None, ...]
    before: tuple[int, ...]
    offset: int

    @staticmethod
    def of(arg: TensorArg) -> Physical:
        """Reads the strides. Raises `Unsupported` where they do not form a dense buffer."""
        if not all(isinstance(d, int) for d in (*arg.shape, *arg.strides)):
            raise Unsupported(f"{REMARK}.symbolic", "sizes known only at run time")
        shape, strides = cast("tuple[int, ...]", arg.shape), cast("tuple[int, ...]", arg.strides)
        if 0 in shape:
            raise Unsupported(f"{REMARK}.empty", "a tensor without elements")
        wide = [d for d in range(len(shape)) if shape[d] + sum(arg.halo[d]) > 1 and strides[d] != 0]
        wide.sort(key=lambda d: -strides[d])
        dims: list[int | None] = []
        extents: list[int] = []
        room = 0  # the stride of the dimension before
        for d in wide:
            size = shape[d] + sum(arg.halo[d])
            if dims:
                if room % strides[d] or size > room // strides[d]:
                    raise Unsupported(f"{REMARK}.strides", f"overlapping strides {strides}")
                extents.append(room // strides[d])
            else:
                extents.append(size)
            dims.append(d)
            room = strides[d]
        if room > 1 or not dims:
            dims.append(None)
            extents.append(max(room, 1))
        before = tuple(arg.halo[d][0] if d in wide else 0 for d in range(len(shape)))
        offset = sum(b * s for b, s in zip(before, strides, strict=True))
        return Physical(arg, tuple(extents), tuple(dims), before, offset)

    def index(self, logical: Sequence[Expr]) -> list[Expr]:
        """The buffer's index of a logical index (which may reach into the halo)."""
        return [
            _zero()
            if d is None
            else (logical[d] + self.before[d] if self.before[d] else logical[d])
            for d in self.dims
        ]


@dataclass
class Definition:
    """A group ready for scheduling.

    ``func`` is a schedulable PrimFunc named "main" whose parameters are the physical buffers of
    ``inputs`` (packed ones in their packed shape) and then ``outputs``; ``blocks`` are the names
    of its stages in order.
    """

    func: Any
    inputs: tuple[Physical, ...]
    outputs: tuple[Physical, ...]
    packs: tuple[Pack | None, ...]
    blocks: tuple[str, ...]
    flops: int
    bytes: int
    input_args: tuple[TensorArg, ...]


class _Sizes:
    """What converters ask of an emitter, for groups whose sizes are all known."""

    @staticmethod
    def dim(value: Any) -> Expr:
        if not isinstance(value, int):
            raise Unsupported(f"{REMARK}.symbolic", "sizes known only at run time")
        return tir.IntImm("int64", value)


class Writer:
    """Writes the blocks of a definition; ``ctx.env`` holds the values known so far."""

    def __init__(self, group: Group, io: IO, packed: dict[fx.Node, tuple[Pack, TensorArg]]) -> None:
        self.group = group
        self.packs = tuple(packed[n][0] if n in packed else None for n in group.inputs)
        self.input_args = tuple(io[n] for n in group.inputs)
        self.inputs = tuple(
            Physical.of(packed[n][1] if n in packed else io[n]) for n in group.inputs
        )
        self.outputs = tuple(Physical.of(io[n]) for n in group.outputs)
        self.buffers: dict[fx.Node, Any] = {}
        self.blocks: list[str] = []
        self.ctx = Context(cast(Any, _Sizes()), {})
        self._packed = packed
        self._bounds = tvm.sym.Analyzer()

    def write(self, body: Callable[[Writer], None], flops: int) -> Definition:
        """Runs ``body`` inside the function's frame."""
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            params = [
                (T.arg(f"{kind}{i}", T.handle()), physical)
                for kind, part in (("in", self.inputs), ("out", self.outputs))
                for i, physical in enumerate(part)
            ]
            buffers = [_match(param, physical) for param, physical in params]
            inputs, self.out_buffers = buffers[: len(self.inputs)], buffers[len(self.inputs) :]
            for node, physical, buffer in zip(self.group.inputs, self.inputs, inputs, strict=True):
                self.buffers[node] = buffer
                if node not in self._packed:
                    self.ctx.env[node] = _value(physical, buffer)
            body(self)
        return Definition(
            builder.get(), self.inputs, self.outputs, self.packs, tuple(self.blocks), flops,
            cast(int, compulsory_bytes([*self.input_args, *(p.arg for p in self.outputs)])),
            self.input_args,
        )  # fmt: skip

    def block(
        self,
        name: str,
        spatial: Sequence[int],
        reduced: Sequence[int],
        body: Callable[[list[Expr], list[Expr]], None],
    ) -> None:
        """One stage: a loop nest over ``spatial`` and ``reduced`` extents around ``body``."""
        name = f"{name}{len(self.blocks)}"
        self.blocks.append(name)
        extents = [tir.IntImm("int64", e) for e in (*spatial, *reduced)]
        with T.grid(*extents) as loops:
            loops = [loops] if isinstance(loops, tir.Var) else list(loops)
            with T.sblock(name):
                axes = [
                    (T.axis.spatial if k < len(spatial) else T.axis.reduce)(e, loop, "int64")
                    for k, (e, loop) in enumerate(zip(extents, loops, strict=True))
                ]
                for axis, extent in zip(axes, extents, strict=True):
                    self._bounds.bind(axis, tvm.ir.Range(tir.IntImm("int64", 0), extent))
                body(axes[: len(spatial)], axes[len(spatial) :])

    def reduce(
        self,
        name: str,
        spatial: Sequence[int],
        reduced: Sequence[int],
        term: Callable[[list[Expr], list[Expr]], Expr],
        *,
        dtype: str = "float32",
        identity: float | int = 0,
        combine: Callable[[Expr, Expr], Expr] = lambda a, b: a + b,
    ) -> Any:
        """A reduction into a new buffer of shape ``spatial``, which is returned."""
        result = T.sblock_alloc_buffer([tir.IntImm("int64", e) for e in spatial], dtype)

        def body(s: list[Expr], r: list[Expr]) -> None:
            with T.init():
                T.buffer_store(result, tir.const(identity, dtype), s)
            T.buffer_store(result, combine(result[tuple(s)], term(s, r)), s)

        self.block(name, spatial, reduced, body)
        return result

    def simplify(self, value: Expr) -> Expr:
        """``value`` simplified by what is known of the axes of blocks."""
        return self._bounds.simplify(value)

    def store_outputs(
        self,
        shape: Sequence[int],
        axes: Sequence[int] | None = None,
        index: Callable[[list[Expr]], list[Expr]] = list,
    ) -> None:
        """Stages that evaluate the group's remaining nodes and write each output of ``shape``.

        They run over ``axes`` (``shape`` unless given), from which ``index`` makes the logical
        index. Raises `Unsupported` for an output of another shape.
        """
        evaluate([n for n in self.group.nodes if n not in self.ctx.env], self.ctx)
        for node, physical, buffer in zip(
            self.group.outputs, self.outputs, self.out_buffers, strict=True
        ):
            if tuple(physical.arg.shape) != tuple(shape):
                raise Unsupported(f"{REMARK}.view", "an output of another shape than the product")
            value: Value = self.ctx.env[node]

            def body(
                s: list[Expr], _: list[Expr], p: Any = physical, v: Value = value, b: Any = buffer
            ) -> None:
                at = index(s)
                result = v.load(at)
                if p.arg.dtype == torch.bool:
                    result = tir.Cast("int8", result)
                T.buffer_store(b, result, p.index(at))

            self.block("out", axes if axes is not None else shape, [], body)


def _match(param: Expr, physical: Physical) -> Any:
    shape = [tir.IntImm("int64", e) for e in physical.shape]
    return T.match_buffer(param, shape, tvm_dtype(physical.arg.dtype))


def _value(physical: Physical, buffer: Any) -> Value:
    def load(index: Sequence[Expr]) -> Expr:
        element = buffer[tuple(physical.index(index))]
        return element != tir.IntImm("int8", 0) if physical.arg.dtype == torch.bool else element

    return Value(_exprs(_static(physical.arg.shape)), physical.arg.dtype, load)


def _static(sizes: Sequence[Any]) -> tuple[int, ...]:
    if not all(isinstance(s, int) for s in sizes):
        raise Unsupported(f"{REMARK}.symbolic", "sizes known only at run time")
    return tuple(sizes)


def _zero() -> Expr:
    return tir.IntImm("int64", 0)


def _exprs(sizes: Sequence[int]) -> tuple[Expr, ...]:
    return tuple(tir.IntImm("int64", s) for s in sizes)


def _divide(w: Writer, value: Expr, by: int) -> list[Expr]:
    """Quotient and remainder, which for an index made as ``q * by + r`` are q and r again."""
    return [w.simplify(tir.floordiv(value, by)), w.simplify(tir.floormod(value, by))]


def _float(value: Expr, dtype: torch.dtype) -> Expr:
    return cast_expr(value, dtype, torch.float32)


# -- matrix products --------------------------------------------------------------------------


def gemm(group: Group, io: IO, target: Target, *, width: int | None = None) -> Definition:
    """A matrix product with what follows it elementwise.

    ``width`` packs a constant right factor into panels of so many columns, which must divide n.
    Operands may not be read through views.
    """
    del target
    spec = gemm_spec.parse(group, io)
    lead = _static((*spec.batch, *spec.rows))  # the sizes of all loops but those over n and k
    n, k = _static((spec.n, spec.k))
    b_batch = _static(io[spec.b].shape[:-2])
    shape = _static(spec.shape)
    if tuple(io[spec.a].shape) != (*lead, k) or spec.a_strides[-1] != io[spec.a].strides[-1]:
        raise Unsupported(f"{REMARK}.operand", "the left factor is read through a view")
    if b_batch not in ((), spec.batch):
        raise Unsupported(f"{REMARK}.broadcast", "the right factor is broadcast")
    packed: dict[fx.Node, tuple[Pack, TensorArg]] = {}
    swapped = False
    if width is not None:
        if not spec.b_const or n % width:
            raise Unsupported(f"{REMARK}.panels", f"no constant of whole panels of {width} columns")
        panels = (*b_batch, n // width, k, width)
        pack = Pack("gemm_panels", (("width", width), ("transposed", spec.b_transposed)))
        packed[spec.b] = (pack, TensorArg(spec.dtype, panels, contiguous_strides(panels)))
    else:
        swapped = _is_swapped(spec, io)
    columns = (n,) if width is None else (n // width, width)

    def body(w: Writer) -> None:
        left = w.ctx.env[spec.a]
        right = _value(w.inputs[group.inputs.index(spec.b)], w.buffers[spec.b])

        def term(s: list[Expr], r: list[Expr]) -> Expr:
            column = [r[0], s[-1]] if width is None else [s[-2], r[0], s[-1]]
            if swapped:
                column.reverse()
            x = left.load([*s[: len(lead)], r[0]])
            y = right.load([*s[: len(b_batch)], *column])
            return _float(x, spec.dtype) * _float(y, spec.dtype)

        acc = w.reduce("product", (*lead, *columns), (k,), term)

        def load(index: Sequence[Expr]) -> Expr:
            column = index[-1] if spec.has_column else _zero()
            split = [column] if width is None else _divide(w, column, width)
            value = acc[(*index[: len(lead)], *split)]
            if spec.alpha != 1:
                value = value * tir.FloatImm("float32", spec.alpha)
            if spec.fused_bias is not None and spec.beta != 0:
                bias = w.ctx.env[spec.fused_bias].broadcast(_exprs(shape))
                extra = _float(bias.load(index), bias.dtype)
                value = value + extra * tir.FloatImm("float32", spec.beta)
            return cast_expr(value, torch.float32, spec.dtype)

        def index(s: list[Expr]) -> list[Expr]:
            column = s[-1] if width is None else s[-2] * width + s[-1]
            return [*s[: len(lead)], *([column] if spec.has_column else [])]

        w.ctx.env[spec.anchor] = Value(_exprs(shape), spec.dtype, load)
        w.store_outputs(shape, (*lead, *columns), index)

    return Writer(group, io, packed).write(body, cast(int, spec.flops))


def _is_swapped(spec: gemm_spec.GemmSpec, io: IO) -> bool:
    """Whether the right factor lies as ``[.., N, K]``."""
    sizes, strides = tuple(io[spec.b].shape), tuple(io[spec.b].strides)
    for swapped, own, steps in (
        (False, (spec.k, spec.n), spec.b_strides[-2:]),
        (True, (spec.n, spec.k), spec.b_strides[:-3:-1]),
    ):
        if sizes[-2:] == own and strides[-2:] == tuple(steps):
            return swapped
    raise Unsupported(f"{REMARK}.operand", "the right factor is read through a view")


# -- convolutions -----------------------------------------------------------------------------


def conv(group: Group, io: IO, target: Target, *, width: int | None = None) -> Definition:
    """A convolution with what follows it elementwise; the input must have the halo it reads.

    ``width`` packs the weight for so many output channels side by side, which must divide the
    channels of a group.
    """
    spec = conv_spec.parse(group, io)
    n, h, w_, oh, ow = _static((spec.n, spec.h, spec.w, spec.oh, spec.ow))
    del h, w_
    lanes = min(target.vector_bytes // 4, width or 1)
    packed: dict[fx.Node, tuple[Pack, TensorArg]] = {}
    blocks = spec.og
    if width is not None:
        if spec.og % width or width % lanes:
            raise Unsupported(f"{REMARK}.panels", f"{spec.og} channels are not blocks of {width}")
        blocks = spec.og // width
        shape = (spec.groups * blocks, spec.kh, spec.kw, spec.cg, width)
        params = (("groups", spec.groups), ("lanes", lanes), ("vectors", width // lanes))
        packed[spec.weight] = (
            Pack("conv_direct", params),
            TensorArg(torch.float32, shape, contiguous_strides(shape), const=True),
        )
    have, need = conv_spec.halo_of(io[spec.x], spec.rank), spec.needed()
    if any(x < y for a, b in zip(have, need, strict=True) for x, y in zip(a, b, strict=True)):
        raise Unsupported(f"{REMARK}.halo", "the input has no zeros around it")

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
            return x.load(at) * weight[tuple(physical.index(where))]

        spatial = (n, oh, ow, spec.groups, blocks, *((width,) if width is not None else ()))
        acc = w.reduce("conv", spatial, (spec.kh, spec.kw, spec.cg), term)

        def load(index: Sequence[Expr]) -> Expr:
            image, channel, col = index[0], index[1], index[-1]
            row = index[2] if spec.rank == 2 else _zero()
            g, c = _divide(w, channel, spec.og)
            value = acc[(image, row, col, g, *([c] if width is None else _divide(w, c, width)))]
            if spec.bias is not None:
                value = value + w.ctx.env[spec.bias].load([channel])
            return value

        def index(s: list[Expr]) -> list[Expr]:
            image, row, col, g, block, *lane = s
            channel = g * blocks + block
            if width is not None:
                channel = channel * width + lane[0]
            return spec.out_index(image, w.simplify(channel), row, col)

        shape = _static(io[group.outputs[0]].shape)
        assert group.anchor is not None
        w.ctx.env[group.anchor] = Value(_exprs(shape), torch.float32, load)
        w.store_outputs(shape, spatial, index)

    return Writer(group, io, packed).write(body, cast(int, spec.flops))


# -- everything elementwise -------------------------------------------------------------------


def pointwise(group: Group, io: IO, target: Target) -> Definition:
    """Elementwise nodes and views; the outputs must have one shape."""
    del target
    shape = _static(io[group.outputs[0]].shape)
    return Writer(group, io, {}).write(lambda w: w.store_outputs(shape), 0)
