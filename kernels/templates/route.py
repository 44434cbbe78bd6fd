"""Sorting slots by branch: a counting sort of a few thousand numbers, in one task."""

from __future__ import annotations

import operator
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, product
from ..emit import Emitter, Expr, Ref
from ..group import IO, Group, Unsupported, symbols_of
from ..ops import argument
from ..target import Target
from .conv_common import name_index


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """The one configuration."""
    _check(group, io, target)
    return [{}]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers ``plait.route`` and the parts of its result, or ``plait.places``.

    Raises `Unsupported` for other types.
    """
    _check(group, io, target)
    head = group.nodes[0]
    if str(head.target).startswith("plait.places"):
        return _places(group, io, config, name)
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
    if any(io[n].dtype != torch.int64 for n in group.inputs):
        raise Unsupported("PLT-RTE-003", "branches are numbered in int64 only")
