"""The loops of groups with reductions: what all have in common, and lanes along the row.

`AlongRow` puts the lanes of a vector on neighbouring elements of one row: several vectors of
partial results hide the latency of additions and are combined at the row's end. `row_across` has
loops with lanes on neighbouring rows. All implement `ops.rows.Rows`.

What is left of a row after the last whole vector is covered by one more vector that ends at the
row's end; lanes it has in common with its neighbour count once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Dim, product
from ..emit import Emitter, Expr, expr_dtype, tvm_dtype
from ..ops.common import cast, convert_expr, i64, linear, unravel, widened
from ..ops.rows import Monoid, better, constant, extreme
from ..ops.scope import bind, sharing
from ..value import Value
from .row_space import RowSpace

KEEP_ELEMENTS = 16384  # the most elements of a value that are kept on the stack
STRETCH = 128  # additions in a row to one float before it is added to another
Body = Callable[[], None]


def held_dtype(dtype: torch.dtype) -> str:
    """TVM's type of a temporary for elements of ``dtype``: bfloat16 is held as float32."""
    return "float32" if dtype == torch.bfloat16 else tvm_dtype(dtype)


def to_held(value: Expr, dtype: torch.dtype) -> Expr:
    """An element as a temporary holds it."""
    if dtype == torch.bfloat16:
        return widened(value)
    return tir.Cast("int8", value) if dtype == torch.bool else value


def from_held(value: Expr, dtype: torch.dtype) -> Expr:
    """The element that a temporary holds; no bit is lost."""
    if dtype == torch.bfloat16:
        top = tir.reinterpret("uint32", value) >> tir.IntImm("uint32", 16)
        return tir.reinterpret("bfloat16", tir.Cast("uint16", top))
    return value != tir.IntImm("int8", 0) if dtype == torch.bool else value


@dataclass
class Site:
    """Where the loops stand: an index into the space, the position in the row, the lane.

    ``slot`` numbers the partial results; ``valid``, if given, tells which lanes see an element for
    the first time.
    """

    index: list[Expr]
    position: Expr
    slot: Expr
    valid: Expr | None = None


class Engine:
    """What both kinds of loops share. ``width * unroll`` elements are in flight at a time."""

    def __init__(self, em: Emitter, space: RowSpace, width: int, unroll: int) -> None:
        self.em, self.space, self.width, self.unroll = em, space, width, unroll
        self.count: Dim = space.count
        self.dims = [em.dim(d) for d in space.dims]
        self.site: Site | None = None
        self.number = 0  # of the sweep under way, or last done
        self._scans: list[Callable[[bool], None]] = []
        self._long = not isinstance(self.count, int) or self.count > 4 * STRETCH * self.slots

    # -- to be provided -----------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Partial results in flight."""
        return self.width * self.unroll

    def walk(self, body: Body, flush: Body | None) -> None:
        """Runs ``body`` once for each point of the row, in vectors, with ``site`` set.

        ``flush`` runs now and then, outside vectors.
        """
        raise NotImplementedError

    def finish_fold(self, parts: list[Any], combine: Callable[..., list[Expr]]) -> list[Value]:
        """Values of the folded partial results."""
        raise NotImplementedError

    def define(self, dtype: torch.dtype, compute: Callable[[], Expr]) -> Value:
        """See `Rows.define`."""
        raise NotImplementedError

    def each_row(self, body: Callable[[], None]) -> None:
        """Runs ``body()`` once for each row, outside of sweeps."""
        raise NotImplementedError

    def row_here(self) -> list[Expr]:
        """The index of the row that the loops stand at, folded axes being 0."""
        raise NotImplementedError

    def room(self) -> int | None:
        """Elements of a kept value, None if there is no room for them."""
        raise NotImplementedError

    # -- common -------------------------------------------------------------------------------

    def sweep(self, body: Body, flush: Body | None = None) -> None:
        """Runs ``body`` for the whole row with shared values evaluated once per element."""
        self.number += 1
        for step in self._scans:
            step(False)

        def shared() -> None:
            with sharing():
                for step in self._scans:  # here, for what reads them may be guarded
                    step(True)
                body()

        self.walk(shared, flush)
        self.site = None

    def here(self) -> list[Expr]:
        """The index into the operand's shape of the point the loops stand at."""
        assert self.site is not None
        return self.space.operand_index(self.site.index, self.dims)

    @contextlib.contextmanager
    def vector(self, width: int) -> Iterator[Expr]:
        """A vectorised loop, or none for a single element; yields the lane."""
        if width == 1:
            with T.serial(i64(0), i64(1)) as j:  # bound values need a scope of their own
                yield j
        else:
            with T.vectorized(i64(0), i64(width)) as j:
                yield j

    def partial(self, dtype: torch.dtype, value: Expr) -> Expr:
        """A buffer of partial results, filled with ``value``."""
        buffer = self.em.local(self.slots, tvm_dtype(dtype))
        self.fill(buffer, value)
        return buffer

    def fill(self, buffer: Any, value: Expr) -> None:
        """Sets all of a buffer of partial results."""
        for u in range(self.unroll):
            with self.vector(self.width) as j:
                T.buffer_store(buffer, value, [u * self.width + j])

    def fold(self, monoid: Monoid, value: Value) -> Value:
        """See `Rows.fold`."""
        dtype = monoid.dtype
        acc = self.partial(dtype, monoid.neutral())
        long = monoid.long and self._long
        wide = torch.float64 if long else dtype  # additions of whole stretches must not round
        total = self.partial(wide, constant(monoid.identity, wide)) if long else acc

        def body() -> None:
            assert self.site is not None
            x, slot = value.load(self.here()), self.site.slot
            if self.site.valid is not None and not monoid.idempotent:
                x = tir.Select(self.site.valid, x, monoid.neutral())
            elif dtype.is_floating_point:
                x = bind(x)
            T.buffer_store(acc, monoid.combine(acc[slot], x), [slot])

        def flush() -> None:
            for u in range(self.unroll):
                with self.vector(self.width) as j:
                    slot = u * self.width + j
                    x = convert_expr(acc[slot], dtype, wide)
                    T.buffer_store(total, monoid.combine(total[slot], x), [slot])
                    T.buffer_store(acc, monoid.neutral(), [slot])

        self.sweep(body, flush if long else None)
        if long:
            flush()
        (folded,) = self.finish_fold([total], lambda a, b: [monoid.combine(a[0], b[0])])
        return cast(folded, dtype)

    def find(self, value: Value, largest: bool) -> tuple[Value, Value]:
        """See `Rows.find`."""
        dtype = value.dtype
        best = self.partial(dtype, extreme(dtype, largest).neutral())
        where = self.partial(torch.int64, tir.IntImm("int64", torch.iinfo(torch.int64).max))

        def combine(a: list[Expr], b: list[Expr]) -> list[Expr]:
            first, second = bind(a[0]), bind(b[0])
            i, j = bind(a[1]), bind(b[1])
            wins = bind(better(second, j, first, i, largest))
            return [tir.Select(wins, second, first), tir.Select(wins, j, i)]

        def body() -> None:
            assert self.site is not None
            slot = self.site.slot
            new = [value.load(self.here()), self.site.position]
            merged = [bind(x) for x in combine([best[slot], where[slot]], new)]
            T.buffer_store(best, merged[0], [slot])
            T.buffer_store(where, merged[1], [slot])

        self.sweep(body)
        found, position = self.finish_fold([best, where], combine)
        return found, position

    def scan(self, monoid: Monoid, value: Value) -> Value:
        """See `Rows.scan`: every sweep from here on starts anew. For one axis, walked in order."""
        total = self.em.local(self.slots, tvm_dtype(monoid.dtype))

        def step(within: bool) -> None:
            if not within:
                self.fill(total, monoid.neutral())
                return
            assert self.site is not None
            slot = self.site.slot
            x = monoid.combine(total[slot], value.load(self.here()))
            T.buffer_store(total, x, [slot])

        def load(_: Any) -> Expr:
            assert self.site is not None
            return total[self.site.slot]

        self._scans.append(step)
        return Value(value.shape, monoid.dtype, load)

    def keep(self, value: Value) -> Value:
        """See `Rows.keep`: the first sweep that reads the value fills a buffer on the stack."""
        room = self.room()
        if room is None:
            return value
        buffer = self.em.local(room, held_dtype(value.dtype))
        state: dict[str, Any] = {"sweep": None, "site": None, "value": None}

        def load(_: Any) -> Expr:
            site = self.site
            assert site is not None
            at = self.buffer_index(site)
            if state["sweep"] not in (None, self.number):
                return from_held(buffer[at], value.dtype)
            if state["site"] is not site:
                x = bind(to_held(value.load(self.here()), value.dtype))
                T.buffer_store(buffer, x, [at])
                state.update(sweep=self.number, site=site, value=from_held(x, value.dtype))
            return state["value"]

        return Value(value.shape, value.dtype, load)

    def buffer_index(self, site: Site) -> Expr:
        """The element of a kept value's buffer for a site."""
        return site.position

    def stretches(
        self, count: Expr, body: Callable[[Expr], None], flush: Body | None, most: int = STRETCH
    ) -> None:
        """``body(i)`` for i below ``count``, with ``flush`` after every ``most`` of them."""
        if flush is None:
            with T.serial(i64(0), count) as i:
                body(i)
            return
        with T.serial(i64(0), tir.floordiv(count + (most - 1), i64(most))) as c:
            first = T.bind(c * most)
            with T.serial(i64(0), tir.min(i64(most), count - first)) as i:
                body(first + i)
            flush()


class AlongRow(Engine):
    """Lanes along axis ``lane`` of one row, given by its index in the kept axes.

    ``merged`` folded axes before the lane's are walked together with it as one run.
    """

    def __init__(
        self, em: Emitter, space: RowSpace, row: list[Expr], lane: int, merged: int,
        width: int, unroll: int,
    ) -> None:  # fmt: skip
        super().__init__(em, space, width, unroll)
        self.row = dict(zip(space.kept, row, strict=True))
        self.run_axes = list(range(lane - merged, lane + 1))
        self.outer = [a for a in space.order if a in space.axes and a not in self.run_axes]
        self.run = product([space.dims[a] for a in self.run_axes])
        self.ordered = lane == max(space.axes)

    def room(self) -> int | None:
        if not isinstance(self.count, int) or self.count > KEEP_ELEMENTS or not self.ordered:
            return None
        return max(1, self.count)

    def walk(self, body: Body, flush: Body | None) -> None:
        with contextlib.ExitStack() as loops:
            outer = {a: loops.enter_context(T.serial(i64(0), self.dims[a])) for a in self.outer}

            def at(start: Expr, slot: Expr, valid: Expr | None = None, shift: int = 0) -> None:
                position = start + shift
                inner = unravel(start, [self.dims[a] for a in self.run_axes], shift)
                where = {**self.row, **outer, **dict(zip(self.run_axes, inner, strict=True))}
                index = [where[a] for a in range(len(self.dims))]
                axes = self.space.axes
                if len(self.run_axes) == len(axes):
                    row_position = position
                else:
                    row_position = linear([where[a] for a in axes], [self.dims[a] for a in axes])
                self.site = Site(index, row_position, slot, valid)
                body()

            if isinstance(self.run, int):
                self._static(self.run, at, flush)
            else:
                self._symbolic(self.em.dim(self.run), at, flush)

    def _static(self, run: int, at: Callable[..., None], flush: Body | None) -> None:
        width, step = self.width, self.slots
        main = run // step
        if main:
            self.stretches(i64(main), lambda i: self._group(i * step, at), flush)
        for u in range(run % step // width):
            with self.vector(width) as j:
                at(j, u * width + j, shift=main * step + u * width)
        rest = run % width
        if rest:
            with self.vector(width) as j:
                at(j, j + i64(0), j >= i64(width - rest), run - width)

    def _group(self, first: Expr, at: Callable[..., None]) -> None:
        for u in range(self.unroll):
            with self.vector(self.width) as j:
                at(first + j, u * self.width + j, shift=u * self.width)

    def _symbolic(self, run: Expr, at: Callable[..., None], flush: Body | None) -> None:
        width, step = self.width, self.slots
        if width == 1:
            self.stretches(run, lambda i: at(i, i64(0)), flush)
            return
        with T.If(run >= i64(width)):
            with T.Then():
                main = T.bind(tir.floordiv(run, i64(step)))
                self.stretches(main, lambda i: self._group(i * step, at), flush)
                done = T.bind(main * step)
                with T.serial(i64(0), tir.floordiv(run - done, i64(width))) as v:
                    with self.vector(width) as j:
                        at(done + v * width + j, j + i64(0))
                rest = T.bind(tir.floormod(run, i64(width)))
                with T.If(rest > i64(0)), T.Then(), self.vector(width) as j:
                    at(run - width + j, j + i64(0), j >= i64(width) - rest)
            with T.Else(), T.serial(i64(0), run) as i:
                at(i, i64(0))

    def finish_fold(self, parts: list[Any], combine: Callable[..., list[Expr]]) -> list[Value]:
        half = self.slots
        while half > 1:
            half //= 2
            with self.vector(half) as j:
                merged = combine([p[j + i64(0)] for p in parts], [p[j + half] for p in parts])
                for part, x in zip(parts, [bind(x) for x in merged], strict=True):
                    T.buffer_store(part, x, [j + i64(0)])
        return [
            Value((), getattr(torch, expr_dtype(p[i64(0)])), lambda _, p=p: p[i64(0)])
            for p in parts
        ]

    def define(self, dtype: torch.dtype, compute: Callable[[], Expr]) -> Value:
        buffer = self.em.local(1, held_dtype(dtype))
        with self.vector(1):
            T.buffer_store(buffer, to_held(compute(), dtype), [i64(0)])
        return Value((), dtype, lambda _: from_held(buffer[i64(0)], dtype))

    def row_here(self) -> list[Expr]:
        return [self.row.get(a, i64(0)) for a in range(len(self.dims))]

    def each_row(self, body: Callable[[], None]) -> None:
        with self.vector(1), sharing():
            body()
