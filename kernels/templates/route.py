"""Sorting slots by branch: a counting sort of a few thousand numbers, in one task.

Running totals of counts, which tell a slot's place within its branch, are here too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, ceil_div, product
from ..emit import Emitter, Expr, Ref
from ..group import IO, Group, Unsupported, symbols_of
from ..ops import argument
from ..ops.common import convert_expr, unravel
from ..target import Target
from .conv_common import name_index

ROWS_WORK = 1 << 12  # elements that one task adds up


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """The one configuration."""
    _check(group, io, target)
    return [{}]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers ``plait.route`` and the parts of its result, ``plait.places``, or ``cumsum``.

    Raises `Unsupported` for other types.
    """
    _check(group, io, target)
    head = group.nodes[0]
    if str(head.target).startswith("plait.places"):
        return _places(group, io, config, name)
    if str(head.target).startswith("aten.cumsum"):
        return _totals(group, io, config, name)
    branches = int(argument(head, "branches"))
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    symbols = symbols_of(group, (*inputs, *outputs))
    em = Emitter(name, inputs, outputs, symbols)
    parts = [n.args[1] for n in group.outputs]
    slots = product(inputs[0].shape)
    with em.function():
        (index,) = em.inputs
        shape = list(index.shape)
        offsets, order = (em.outputs[parts.index(k)] if k in parts else None for k in (0, 1))
        # next[b] counts the slots of branch b, then tells where the next of them goes.
        following = em.local(branches + 1, "int64")
        with T.serial(em.i64(0), em.i64(branches + 1)) as b:
            T.buffer_store(following, em.i64(0), [b])
        with T.serial(em.i64(0), em.dim(slots)) as s:
            b = _branch(index, shape, s, branches)
            T.buffer_store(following, following[b] + em.i64(1), [b])
        total = em.local(1, "int64")
        T.buffer_store(total, em.i64(0), [em.i64(0)])
        with T.serial(em.i64(0), em.i64(branches + 1)) as b:
            count = name_index(following[b])
            T.buffer_store(following, total[em.i64(0)], [b])
            if offsets is not None:
                offsets.store(total[em.i64(0)], [b])
            T.buffer_store(total, total[em.i64(0)] + count, [em.i64(0)])
        if order is not None:
            with T.serial(em.i64(0), em.dim(slots)) as s:
                b = _branch(index, shape, s, branches)
                place = name_index(following[b])
                order.store(s, [place])
                T.buffer_store(following, place + em.i64(1), [b])
    return em.kernel(1, config)


def _places(group: Group, io: IO, config: dict[str, Any], name: str) -> Kernel:
    inputs, outputs = (io[group.inputs[0]],), (io[group.outputs[0]],)
    em = Emitter(name, inputs, outputs, symbols_of(group, (*inputs, *outputs)))
    with em.function():
        (order,), (result,) = em.inputs, em.outputs
        with T.serial(em.i64(0), order.shape[0]) as r:
            result.store(r, [name_index(order.load([r]))])
    return em.kernel(1, config)


def _totals(group: Group, io: IO, config: dict[str, Any], name: str) -> Kernel:
    source, result = io[group.inputs[0]], io[group.outputs[0]]
    em = Emitter(name, (source,), (result,), symbols_of(group, (source, result)))
    dim = int(argument(group.nodes[0], "dim")) % len(source.shape)
    rows = product(d for k, d in enumerate(source.shape) if k != dim)
    size = source.shape[dim]
    chunk = max(1, ROWS_WORK // size) if isinstance(size, int) and size else 16
    with em.function() as task:
        (x,), (y,) = em.inputs, em.outputs
        outer = [d for k, d in enumerate(x.shape) if k != dim]
        total = em.local(1, "int64")
        first = name_index(task * chunk)
        last = tir.min(em.i64(chunk), em.dim(rows) - first)
        with T.serial(em.i64(0), last) as r:
            at = [name_index(i) for i in unravel(name_index(first + r), outer)]
            T.buffer_store(total, em.i64(0), [em.i64(0)])
            with T.serial(em.i64(0), x.shape[dim]) as k:
                index = [*at[:dim], k, *at[dim:]]
                value = convert_expr(x.load(index), source.dtype, torch.int64)
                T.buffer_store(total, total[em.i64(0)] + value, [em.i64(0)])
                y.store(total[em.i64(0)], index)
    return em.kernel(ceil_div(rows, chunk), config, flops=product([rows, size]))


def _branch(index: Ref, shape: list[Expr], slot: Expr, branches: int) -> Expr:
    place: list[Expr] = []
    for extent in reversed(shape[1:]):
        place.append(tir.truncmod(slot, extent))
        slot = tir.truncdiv(slot, extent)
    value = name_index(index.load([slot, *reversed(place)] if shape else []))
    last = tir.IntImm("int64", branches)
    inside = tir.And(value >= tir.IntImm("int64", 0), value < last)
    return name_index(tir.Select(inside, value, last))


def _check(group: Group, io: IO, target: Target) -> None:
    head, *rest = group.nodes
    if target.kind != "cpu":
        raise Unsupported("PLT-RTE-001", f"this template does not generate code for {target.kind}")
    parts = str(head.target).startswith("plait.route")
    if any(n.target is not operator.getitem for n in rest) or (parts and head in group.outputs):
        raise Unsupported("PLT-RTE-002", "the routes are read as a whole")
    counts = str(head.target).startswith("aten.cumsum")
    if not counts and any(io[n].dtype != torch.int64 for n in group.inputs):
        raise Unsupported("PLT-RTE-003", "branches are numbered in int64 only")
