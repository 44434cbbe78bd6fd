"""The k first elements of short rows in order: top-k, sorting, their indices.

Each row is one insertion into a sorted list on the stack. Of equal elements the first comes first
there, as torch promises for stable sorts. Where torch leaves open which comes first and somebody
reads it, ``topk`` takes the steps of PyTorch's operator (`selection`), and other sorts are the
library's. So are long lists.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Kernel, ceil_div, product
from ..emit import Emitter, Expr, Ref, compute_dtype
from ..group import HALF, IO, Group, Unsupported, symbols_of
from ..math import is_nan
from ..ops import argument
from ..ops.common import convert_expr, unravel
from ..target import Target
from .conv_common import name_index
from .selection import Selection, reproducible

MOST = 64  # elements in a sorted list: inserting moves half of them
ROWS_WORK = 1 << 12  # element visits of one task


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """The one configuration."""
    _order(group, io, target)
    return [{}]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers ``topk``, ``sort`` or ``argsort``. Raises `Unsupported` as `candidates` does."""
    spec = _order(group, io, target)
    inputs = tuple(io[n] for n in group.inputs)
    outputs = tuple(io[n] for n in group.outputs)
    em = Emitter(name, inputs, outputs, symbols_of(group, (*inputs, *outputs)))
    size = inputs[0].shape[spec.dim] if inputs[0].shape else 1
    rows = product(d for k, d in enumerate(inputs[0].shape) if k != spec.dim)
    chunk = max(1, ROWS_WORK // size) if isinstance(size, int) and size else 16
    with em.function() as task:
        body = _Body(em, spec)
        first = name_index(task * chunk)
        last = tir.min(em.i64(chunk), em.dim(rows) - first)
        with T.serial(em.i64(0), last) as row:
            body.row(name_index(first + row))
    return em.kernel(ceil_div(rows, chunk), config, flops=product([rows, size]))


class Order:
    """What a group asks for. ``values`` and ``indices`` are positions among its outputs."""

    def __init__(self, group: Group, io: IO) -> None:
        head, *rest = group.nodes
        if any(n.target is not operator.getitem for n in rest) or (rest and head in group.outputs):
            raise Unsupported("PLT-TOP-002", "the results are read as a whole")
        source = io[group.inputs[0]]
        if source.dtype == torch.bool:
            raise Unsupported("PLT-TOP-003", "truth values are not sorted")
        name = str(head.target)
        self.dtype = source.dtype
        self.held = torch.float32 if source.dtype in HALF else source.dtype
        rank = len(source.shape)
        self.dim = int(argument(head, "dim")) % rank if rank else 0
        size = source.shape[self.dim] if rank else 1
        if name.startswith("aten.topk"):
            self.count: Any = argument(head, "k")
            self.largest = bool(argument(head, "largest"))
            self.partial = True
        else:
            self.partial = False
            self.count, self.largest = size, bool(argument(head, "descending"))
        if name.startswith("aten.argsort"):
            self.values, self.indices = None, 0
        else:
            parts = {n.args[1]: k for k, n in enumerate(group.outputs)}
            self.values, self.indices = parts.get(0), parts.get(1)
        self.size: Any = size
        # Whether equal elements may change places, or everything, and it would be seen.
        ordered = bool(argument(head, "sorted", True))
        self.stable = name.endswith(".stable") and bool(argument(head, "stable"))
        self.open = not self.stable and (self.indices is not None or not ordered)
        self.ordered = ordered


def _order(group: Group, io: IO, target: Target) -> Order:
    if target.kind != "cpu":
        raise Unsupported("PLT-TOP-001", f"this template does not generate code for {target.kind}")
    order = Order(group, io)
    if not isinstance(order.count, int) or order.count > MOST:
        raise Unsupported("PLT-TOP-004", f"more than {MOST} elements of a row are put in order")
    if order.open and not (order.partial and reproducible(order.size, order.count, order.ordered)):
        raise Unsupported("PLT-TOP-005", "which of equal elements comes first is the library's")
    return order


class _Body:
    """Emits the work on one row."""

    def __init__(self, em: Emitter, spec: Order) -> None:
        self.em, self.spec = em, spec
        self.source = em.inputs[0]
        held = compute_dtype(spec.held)
        self.best = em.local(max(1, spec.count), held)
        self.place = em.local(max(1, spec.count), "int64")
        if spec.open:
            self.found = em.local(1, "int64")
            self.all, self.places = em.local(spec.size, held), em.local(spec.size, "int64")
            self.selection = Selection(em, self.all, self.places, self._before, held)

    def row(self, number: Expr) -> None:
        """Puts the first elements of row ``number`` in order and stores them."""
        em, spec = self.em, self.spec
        if not spec.count:
            return
        shape = self.source.shape
        outer = [d for k, d in enumerate(shape) if k != spec.dim]
        at = [name_index(i) for i in unravel(number, outer)]
        base = name_index(self.source.offset(self._index(at, em.i64(0))) if shape else em.i64(0))
        step = self.source.strides[spec.dim] if shape else em.i64(0)
        size = shape[spec.dim] if shape else em.i64(1)

        def element(k: Expr) -> Expr:
            value = self.source.load_flat(base + k * step)
            return T.bind(convert_expr(value, spec.dtype, spec.held))

        if not spec.open:
            self._in_order(element, spec.count, size)
        elif not spec.ordered:
            self._as_library(element)
        else:
            self._in_order(element, spec.count, size)
            with T.If(self._equals(element)), T.Then():
                self._as_library(element)
        with T.serial(em.i64(0), em.i64(spec.count)) as k:
            index = self._index(at, k) if shape else []
            if spec.values is not None:
                value = convert_expr(self.best[k], spec.held, spec.dtype)
                self._output(spec.values).store(value, index)
            if spec.indices is not None:
                self._output(spec.indices).store(self.place[k], index)

    def _equals(self, element: Callable[[Expr], Expr]) -> Expr:
        """Whether elements of the list equal others, there or left out, as in few rows."""
        em, spec = self.em, self.spec
        last = T.bind(self.best[em.i64(spec.count - 1)])
        T.buffer_store(self.found, em.i64(-spec.count), [0])
        for size, later in (
            (spec.size, lambda k: self._before(last, element(k))),
            (spec.count - 1, lambda k: self._before(self.best[k], self.best[k + 1])),
        ):
            with T.serial(em.i64(0), em.i64(size)) as k:
                more = tir.Select(later(k), em.i64(0), em.i64(1))
                T.buffer_store(self.found, self.found[0] + more, [0])
        return self.found[0] > 0

    def _as_library(self, element: Callable[[Expr], Expr]) -> None:
        """Selects the first elements as PyTorch does, of equal ones too."""
        em, spec = self.em, self.spec
        with T.serial(em.i64(0), em.i64(spec.size)) as k:
            T.buffer_store(self.all, element(k), [k])
            T.buffer_store(self.places, k, [k])
        self.selection.select(spec.size, spec.count, spec.ordered)
        with T.serial(em.i64(0), em.i64(spec.count)) as k:
            T.buffer_store(self.best, self.all[k], [k])
            T.buffer_store(self.place, self.places[k], [k])

    def _in_order(self, element: Callable[[Expr], Expr], count: int, size: Expr) -> None:
        """Keeps the first ``count`` elements in order, of equal ones the first."""
        em = self.em
        with T.serial(em.i64(0), em.i64(count)) as k:
            self._insert(element(k), k, k)
        last = em.i64(count - 1)
        with T.serial(em.i64(count), size) as k:
            value = element(k)
            with T.If(self._before(value, self.best[last])), T.Then():
                self._insert(value, k, last)

    def _output(self, k: int) -> Ref:
        return self.em.outputs[k]

    def _index(self, outer: list[Expr], position: Expr) -> list[Expr]:
        return [*outer[: self.spec.dim], position, *outer[self.spec.dim :]]

    def _insert(self, value: Expr, index: Expr, last: Expr) -> None:
        """Puts an element behind those that are not after it; what was at ``last`` is gone."""
        em = self.em
        T.buffer_store(self.best, value, [last])
        T.buffer_store(self.place, index, [last])
        with T.serial(em.i64(0), last) as i:
            here = last - i
            behind, before = T.bind(self.best[here]), T.bind(self.best[here - 1])
            with T.If(self._before(behind, before)), T.Then():
                place = T.bind(self.place[here])
                T.buffer_store(self.best, before, [here])
                T.buffer_store(self.place, self.place[here - 1], [here])
                T.buffer_store(self.best, behind, [here - 1])
                T.buffer_store(self.place, place, [here - 1])

    def _before(self, a: Expr, b: Expr) -> Expr:
        """Whether ``a`` comes strictly before ``b``. NaN is larger than every number."""
        beyond = a > b if self.spec.largest else a < b
        if not self.spec.held.is_floating_point:
            return beyond
        more, less = (a, b) if self.spec.largest else (b, a)
        return tir.Or(beyond, tir.And(is_nan(more), tir.Not(is_nan(less))))
