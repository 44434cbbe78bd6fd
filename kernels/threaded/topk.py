"""The first elements of short rows in order: every element counts those before it.

An element's place in the order is the number of elements that come before it, so all elements find
their places at once, without an exchange. Of equal elements the first comes first, and NaN is
larger than every number, as in the CPU's kernel.
"""

from __future__ import annotations

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import product
from ..definition import THREADS, Definition, Writer, known
from ..emit import Expr
from ..group import IO, Group, Unsupported
from ..math import i32
from ..ops.common import convert_expr, i64, unravel
from ..target import Target
from ..templates.topk import Order
from .common import (
    barrier,
    div,
    launch,
    local,
    mod,
    shared,
    shared_out,
    when,
    wide,
    write,
)

MOST = 1024
"""Elements of a row: each is compared with all of them."""


def topk(group: Group, io: IO, target: Target) -> Definition:
    """``topk``, ``sort`` or ``argsort``. Raises `Unsupported` for long rows and other types."""
    order = Order(group, io)
    source = io[group.inputs[0]]
    shape = known(source.shape)
    size = shape[order.dim] if shape else 1
    outer = [d for k, d in enumerate(shape) if k != order.dim]
    rows = product(outer)
    assert isinstance(rows, int)
    if size > MOST:
        raise Unsupported("PLT-TOP-004", f"more than {MOST} elements of a row are put in order")
    together = max(1, THREADS // size)
    held = "int32" if order.held == torch.float32 else "int64"

    def body(w: Writer, _: bool) -> None:
        value = w.ctx.env[group.inputs[0]]

        def at(row: Expr, position: Expr) -> list[Expr]:
            if not shape:
                return []
            index = unravel(wide(row), [i64(d) for d in outer])
            return [*index[: order.dim], wide(position), *index[order.dim :]]

        with launch(-(-rows // together)) as (block, thread):
            keys = shared(together * size, held)
            first = block * together
            with shared_out(together * size, thread) as number:
                row = first + div(number, size)
                with when(row < rows):
                    element = convert_expr(
                        value.load(at(row, mod(number, size))), order.dtype, order.held
                    )
                    T.buffer_store(keys, _key(T.bind(element), order.held), [number])
            barrier()
            place = local(1, "int32")
            with shared_out(together * size, thread) as number:
                row, own = first + div(number, size), T.bind(mod(number, size))
                with when(row < rows):
                    mine, begin = T.bind(keys[number]), T.bind(number - own)
                    T.buffer_store(place, i32(0), [0])
                    with T.serial(i32(0), i32(size)) as k:
                        other = T.bind(keys[begin + k])
                        beyond = other > mine if order.largest else other < mine
                        before = tir.Or(beyond, tir.And(tir.EQ(other, mine), k < own))
                        T.buffer_store(place, place[0] + tir.Select(before, i32(1), i32(0)), [0])
                    with when(place[0] < order.count):
                        index = at(row, place[0])
                        if order.values is not None:
                            physical, buffer = w.outputs[order.values], w.out_buffers[order.values]
                            found = value.load(at(row, own))
                            T.buffer_store(buffer, found, physical.index(index))
                        if order.indices is not None:
                            physical = w.outputs[order.indices]
                            buffer = w.out_buffers[order.indices]
                            T.buffer_store(buffer, wide(own), physical.index(index))

    return write(group, io, target, body, rows * size * size)


def _key(value: Expr, held: torch.dtype) -> Expr:
    """An integer that is larger where ``value`` is: equal for both zeros, largest for NaN."""
    if not held.is_floating_point:
        return wide(value)
    kind, bits = ("int32", 32) if held == torch.float32 else ("int64", 64)
    mantissa = {32: 23, 64: 52}[bits]
    most = (1 << bits - 1) - 1
    infinity = most - ((1 << mantissa) - 1)
    raw = T.bind(tir.reinterpret(kind, value))
    magnitude = T.bind(raw & tir.IntImm(kind, most))
    signed = tir.Select(raw < tir.IntImm(kind, 0), tir.IntImm(kind, 0) - magnitude, magnitude)
    return tir.Select(magnitude > tir.IntImm(kind, infinity), tir.IntImm(kind, most), signed)
