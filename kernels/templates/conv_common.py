"""What the convolution and pooling templates share: epilogues, small loops, sizes."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Dim
from ..emit import Emitter, Expr, Ref, expr_dtype
from ..group import Group, Unsupported
from ..ops import category, evaluate
from ..ops.common import convert_expr, convert_products
from ..ops.scope import define_operator, sharing
from ..target import Target
from ..value import Context, Value

_index = define_operator("plait.index", lambda call: call.args[0], pure=False)


def name_index(value: Expr) -> Expr:
    """A variable for an integer scalar that TVM does not replace by its value again.

    Positions are computed from one another; copied into every use they become exponentially long,
    and TVM's simplifier spends minutes on them. LLVM sees through this.
    """
    return T.bind(tir.call_intrin(str(value.ty.dtype), _index, value))


@dataclass
class Epilogue:
    """The nodes after the anchor, evaluated elementwise at the anchor's own index.

    ``store(index, value)`` writes every output of the group at a logical ``index`` for which the
    anchor's result is the scalar expression ``value``, of its ``dtype`` or float32; whether that is
    a sum of ``products`` tells how it is rounded.
    """

    emitter: Emitter
    outputs: list[Value]
    dtype: torch.dtype
    products: bool
    _current: list[Expr]
    _late: list[Ref]

    @staticmethod
    def of(emitter: Emitter, group: Group) -> Epilogue:
        """Evaluates the group once; the emitted expressions are made anew at every store."""
        anchor = group.anchor
        assert anchor is not None
        current: list[Expr] = []
        env: dict[fx.Node, Any] = {
            node: Value.of(ref) for node, ref in zip(group.inputs, emitter.inputs, strict=True)
        }
        meta = anchor.meta["val"]
        first = meta[0] if isinstance(meta, (tuple, list)) else meta
        result = Value(tuple(emitter.outputs[0].shape), first.dtype, lambda _: current[0])
        env[anchor] = result if first is meta else (result,)
        evaluate([n for n in group.nodes if n is not anchor], Context(emitter, env))
        products = group.kind == "conv"
        late = [
            ref
            for node, ref in zip(group.inputs, emitter.inputs, strict=True)
            if node not in anchor.all_input_nodes and ref.arg.shape == emitter.outputs[0].arg.shape
        ]
        outputs = [env[n] for n in group.outputs]
        return Epilogue(emitter, outputs, first.dtype, products, current, late)

    def prefetch(self, index: Sequence[Expr]) -> None:
        """Asks for the cache lines that ``store`` will need at ``index`` beside the anchor's."""
        for ref in self._late:
            ref.prefetch(index)
        for ref in self.emitter.outputs:
            ref.prefetch(index, write=True)

    def store(self, index: Sequence[Expr], value: Expr) -> None:
        with sharing():
            if expr_dtype(value) == "float32":
                if self.products:
                    value = convert_products(value, self.dtype)
                else:
                    value = convert_expr(value, torch.float32, self.dtype)
            self._current[:] = [value]
            results = [out.load(index) for out in self.outputs]
            for ref, result in zip(self.emitter.outputs, results, strict=True):
                ref.store(result, index)


def check_epilogue(group: Group) -> None:
    """Raises `Unsupported` unless what follows the anchor is pointwise and of its shape."""
    anchor = group.anchor
    assert anchor is not None
    meta = anchor.meta["val"]
    shape = tuple((meta[0] if isinstance(meta, (tuple, list)) else meta).shape)
    after = {anchor}
    for node in group.nodes:
        if node is anchor or after.isdisjoint(node.all_input_nodes):
            continue
        after.add(node)
        if node.target is operator.getitem and node.args[0] is anchor:
            if node.args[1] != 0:
                raise Unsupported("PLT-POL-003", "positions of maxima are left to the library")
        elif category(node) != "pointwise" or tuple(node.meta["val"].shape) != shape:
            raise Unsupported("PLT-CNV-002", f"{node} is not elementwise over {anchor}")
    for node in group.outputs:
        if node not in after or isinstance(node.meta["val"], (tuple, list)):
            raise Unsupported("PLT-CNV-002", f"{node} is not elementwise over {anchor}")


def lane_count(channels: int, target: Target) -> int:
    """Lanes of one fp32 vector of channels: a power of two, at most a register."""
    lanes = target.vector_bytes // 4
    while lanes > channels:
        lanes //= 2
    return lanes


def loop(em: Emitter, extent: int) -> contextlib.AbstractContextManager[Expr]:
    """A serial loop, or just the index 0 if it has one step."""
    if extent == 1:
        return contextlib.nullcontext(em.i64(0))
    return T.serial(em.i64(0), em.i64(extent))


def vector(em: Emitter, lanes: int) -> contextlib.AbstractContextManager[Expr]:
    """A vectorised loop, or just the index 0 where a vector has one lane."""
    return T.vectorized(em.i64(lanes)) if lanes > 1 else contextlib.nullcontext(em.i64(0))


def clip(first: Expr, taps: int, dilation: int, size: Expr) -> tuple[Expr, Expr]:
    """The range of taps that lie inside ``[0, size)`` when tap 0 lies at ``first``."""
    zero, step = tir.IntImm("int64", 0), dilation
    begin = tir.max(zero, tir.truncdiv(-first + (step - 1), step))
    end = tir.min(tir.IntImm("int64", taps), tir.truncdiv(size - first + (step - 1), step))
    return name_index(begin), name_index(tir.max(begin, end))


def inside(pixels: int, tap: int, stride: int, pad: int, dilation: int, size: Dim) -> list[int]:
    """The first ``pixels`` outputs of a line for which ``tap`` does not fall into padding."""
    assert isinstance(size, int)
    return [i for i in range(pixels) if 0 <= i * stride - pad + tap * dilation < size]


def within(index: Expr, size: Expr) -> Expr:
    """1 (int32) if ``0 <= index < size``, else 0."""
    return tir.Cast("int32", tir.And(index >= 0, index < size))
