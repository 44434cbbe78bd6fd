"""Groups as plain loop nests for TVM's schedulers (MetaSchedule, DLight).

A template writes a finished kernel; a definition only says what is to be computed, one block per
stage, and leaves tiling, vectors and threads to a search or a rule. Buffers lie as the tensors
really do: a strided argument (channels last, with a halo, a slice of a concat) is seen through its
*physical* buffer, whose dimensions are the argument's in the order of their strides.

Sizes must be known; everything else raises `group.Unsupported`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx
import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .abi import Pack, TensorArg, compulsory_bytes
from .emit import Expr, tvm_dtype
from .group import IO, Group, Unsupported
from .ops import evaluate
from .ops.scope import _nested as nested
from .target import Target
from .value import Context, Value

THREADS = 256
"""Of a block of a GPU, where the kernel does not need another number."""


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
        shape, strides = known(arg.shape), cast("tuple[int, ...]", arg.strides)
        if not all(isinstance(d, int) for d in strides):
            raise Unsupported("PLT-DEF-001", "sizes known only at run time")
        wide = [d for d in range(len(shape)) if shape[d] + sum(arg.halo[d]) > 1 and strides[d] != 0]
        wide.sort(key=lambda d: -strides[d])
        dims: list[int | None] = []
        extents: list[int] = []
        room = 0  # the stride of the dimension before
        for d in wide:
            size = shape[d] + sum(arg.halo[d])
            if dims:
                if room % strides[d] or size > room // strides[d]:
                    raise Unsupported("PLT-DEF-003", f"overlapping strides {strides}")
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
            zero() if d is None else (logical[d] + self.before[d] if self.before[d] else logical[d])
            for d in self.dims
        ]


@dataclass
class Definition:
    """A group ready for scheduling.

    ``func`` is a schedulable PrimFunc named "main" whose parameters are the physical buffers of
    ``inputs`` (packed ones in their packed shape) and then ``outputs``; ``blocks`` are the names
    of its stages in order. Kernels for GPUs that are written thread by thread are ``bound``, and
    have no stages: one function that reads aligned vectors, and one that reads single elements.
    """

    func: Any
    inputs: tuple[Physical, ...]
    outputs: tuple[Physical, ...]
    packs: tuple[Pack | None, ...]
    blocks: tuple[str, ...]
    flops: int
    bytes: int
    input_args: tuple[TensorArg, ...]
    bound: tuple[Any, ...] = ()


class _Sizes:
    """What converters ask of an emitter, for groups whose sizes are all known."""

    @staticmethod
    def dim(value: Any) -> Expr:
        if not isinstance(value, int):
            raise Unsupported("PLT-DEF-001", "sizes known only at run time")
        return tir.IntImm("int64", value)


class Writer:
    """Writes the blocks of a definition; ``ctx.env`` holds the values known so far.

    For GPUs every block is a single store: DLight inlines stages and reduces across threads only
    where no statement names intermediate values, so expressions name them. MetaSchedule's estimates
    know statements only.
    """

    def __init__(
        self,
        group: Group,
        io: IO,
        packed: dict[fx.Node, tuple[Pack, TensorArg]],
        target: Target,
    ) -> None:
        self._single = target.kind == "cuda"
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
                    self.ctx.env[node] = value_of(physical, buffer)
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
        with contextlib.ExitStack() as stack:
            loops = stack.enter_context(T.grid(*extents)) if extents else []
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
        """A reduction into a new buffer of shape ``spatial``, which is returned.

        One of a single term is no reduction to TVM: its rules would inline it, and end the process.
        """
        result = T.sblock_alloc_buffer(list(exprs(spatial or (1,))), dtype)
        if math.prod(reduced) == 1:

            def single(s: list[Expr], _: list[Expr]) -> None:
                value = self._expr(lambda: term(s, [zero() for _ in reduced]))
                T.buffer_store(result, combine(tir.const(identity, dtype), value), s or [zero()])

            self.block(name, spatial, [], single)
            return result

        def body(s: list[Expr], r: list[Expr]) -> None:
            at = s or [zero()]
            with T.init():
                T.buffer_store(result, tir.const(identity, dtype), at)
            T.buffer_store(result, combine(result[tuple(at)], self._expr(lambda: term(s, r))), at)

        self.block(name, spatial, reduced, body)
        return result

    def _expr(self, make: Callable[[], Expr]) -> Expr:
        return nested(make) if self._single else make()

    def simplify(self, value: Expr) -> Expr:
        """``value`` simplified by what is known of the axes of blocks."""
        return self._bounds.simplify(value)

    def store(self, buffer: Any, physical: Physical, index: list[Expr], value: Value) -> None:
        """Stores the element of ``value`` at a logical index, as memory holds it."""
        result = self._expr(lambda: value.load(index))
        if physical.arg.dtype == torch.bool:
            result = tir.Cast("int8", result)
        T.buffer_store(buffer, result, physical.index(index))

    def store_scalar(self, buffer: Any, index: Sequence[Expr], make: Callable[[], Expr]) -> None:
        """Stores ``make()`` in a temporary buffer."""
        T.buffer_store(buffer, self._expr(make), list(index))

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
                raise Unsupported("PLT-DEF-004", "an output of another shape than the product")
            value: Value = self.ctx.env[node]

            def body(
                s: list[Expr], _: list[Expr], p: Any = physical, v: Value = value, b: Any = buffer
            ) -> None:
                self.store(b, p, index(s), v)

            self.block("out", axes if axes is not None else shape, [], body)


def _match(param: Expr, physical: Physical) -> Any:
    shape = [tir.IntImm("int64", e) for e in physical.shape]
    return T.match_buffer(param, shape, tvm_dtype(physical.arg.dtype))


def value_of(physical: Physical, buffer: Any) -> Value:
    """The value that reads a tensor through its physical buffer."""

    def load(index: Sequence[Expr]) -> Expr:
        element = buffer[tuple(physical.index(index))]
        return element != tir.IntImm("int8", 0) if physical.arg.dtype == torch.bool else element

    return Value(exprs(known(physical.arg.shape)), physical.arg.dtype, load)


def known(sizes: Sequence[Any]) -> tuple[int, ...]:
    """Sizes as ints. Raises `Unsupported` for symbolic ones, and where there are no elements."""
    if not all(isinstance(s, int) for s in sizes):
        raise Unsupported("PLT-DEF-001", "sizes known only at run time")
    if 0 in sizes:
        raise Unsupported("PLT-DEF-002", "a tensor without elements")
    return tuple(sizes)


def zero() -> Expr:
    """The index 0."""
    return tir.IntImm("int64", 0)


def exprs(sizes: Sequence[int]) -> tuple[Expr, ...]:
    """Sizes as int64 constants."""
    return tuple(tir.IntImm("int64", s) for s in sizes)
