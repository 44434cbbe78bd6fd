"""What the convolution and pooling templates share: epilogues, small loops, sizes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch.fx as fx
from torch.utils._sympy.functions import FloorDiv
from tvm.script.ir_builder import tirx as T

from ..abi import Dim, TensorArg
from ..emit import Emitter, Expr
from ..group import Group
from ..target import Target
from ..value import Context, Value


@dataclass
class Epilogue:
    """The nodes after the anchor, evaluated elementwise at the anchor's own index.

    ``store(index, value)`` writes every output of the group at a logical ``index`` for which the
    anchor's result is the scalar expression ``value``.
    """

    emitter: Emitter
    outputs: list[Value]
    _current: list[Expr]

    @staticmethod
    def of(emitter: Emitter, group: Group) -> Epilogue:
        """Evaluates the group once; the emitted expressions are made anew at every store."""
        anchor = group.anchor
        assert anchor is not None
        current: list[Expr] = []
        env: dict[fx.Node, Value] = {
            node: Value.of(ref) for node, ref in zip(group.inputs, emitter.inputs, strict=True)
        }
        shape, dtype = tuple(emitter.outputs[0].shape), anchor.meta["val"].dtype
        env[anchor] = Value(shape, dtype, lambda _: current[0])
        rest = [n for n in group.nodes if n is not anchor]
        if rest:
            from ..ops import evaluate

            evaluate(rest, Context(emitter, env))
        return Epilogue(emitter, [env[n] for n in group.outputs], current)

    def store(self, index: Sequence[Expr], value: Expr) -> None:
        self._current[:] = [value]
        for ref, out in zip(self.emitter.outputs, self.outputs, strict=True):
            ref.store(out.load(index), index)


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


def ceil_div(value: Dim, by: int) -> Dim:
    """``value / by`` rounded up."""
    if isinstance(value, int):
        return -(-value // by)
    return FloorDiv(value + (by - 1), by)


def symbol_names(args: Iterable[TensorArg]) -> tuple[str, ...]:
    """Names of the shape symbols that the arguments depend on, sorted."""
    names: set[str] = set()
    for arg in args:
        for dim in (*arg.shape, *arg.strides):
            if isinstance(dim, sympy.Expr):
                names |= {s.name for s in dim.free_symbols}  # type: ignore[attr-defined]
    return tuple(sorted(names))


def compulsory_bytes(args: Iterable[TensorArg]) -> Dim:
    """Bytes of all arguments, each touched once."""
    total: Dim = 0
    for arg in args:
        total = total + math.prod(arg.shape) * arg.dtype.itemsize  # type: ignore[arg-type]
    return total
