"""The loops of groups with reductions, with lanes across rows.

`AcrossRows` puts the lanes of a vector on neighbouring rows, for tensors whose folded axes are not
the contiguous one: each lane folds a row of its own. `AcrossGroups` puts them on the channels of
several groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import product
from ..emit import Emitter, Expr, expr_dtype
from ..ops.common import i64, linear
from ..ops.scope import bind, sharing
from ..value import Value
from .row_engine import KEEP_ELEMENTS, Body, Engine, Site, from_held, held_dtype, to_held
from .row_space import RowSpace

SHORT = 32  # additions in a row to one float: a lane here adds up a whole row


class AcrossRows(Engine):
    """Lanes across ``width * unroll`` neighbouring rows along axis ``lane``, from ``start`` on.

    ``outer`` gives the index in the other kept axes.
    """

    def __init__(
        self, em: Emitter, space: RowSpace, outer: dict[int, Expr], lane: int, start: Expr,
        width: int, unroll: int,
    ) -> None:  # fmt: skip
        super().__init__(em, space, width, unroll)
        self.walked = tuple(a for a in space.axes if a != lane)
        self.steps = product([space.dims[a] for a in self.walked])
        self._long = not isinstance(self.steps, int) or self.steps > SHORT
        self.outer, self.lane, self.start = outer, lane, start
        self.slot: Expr = i64(0)

    def at_lane(self, place: Expr) -> dict[int, Expr]:
        """The indices that a place along the lane's axis gives."""
        return {self.lane: place}

    def room(self) -> int | None:
        if not isinstance(self.steps, int) or self.steps * self.slots > KEEP_ELEMENTS:
            return None
        return max(1, self.steps * self.slots)

    def buffer_index(self, site: Site) -> Expr:
        return site.position * self.slots + site.slot

    def _lanes(self, body: Callable[[Expr, Expr], None]) -> None:
        """Runs ``body(slot, index along the lane's axis)`` for all rows in flight."""
        for u in range(self.unroll):
            with self.vector(self.width) as j:
                self.slot = u * self.width + j
                body(self.slot, self.start + u * self.width + j)

    def walk(self, body: Body, flush: Body | None) -> None:
        axes = [a for a in self.space.order if a in self.walked]
        folded: dict[int, Expr] = {}

        def point(slot: Expr, place: Expr) -> None:
            where = {**self.outer, **folded, **self.at_lane(place)}
            own = self.walked
            position = linear([where[a] for a in own], [self.dims[a] for a in own])
            self.site = Site([where[a] for a in range(len(self.dims))], position, slot)
            body()

        with contextlib.ExitStack() as loops:
            for a in axes[:-1]:
                folded[a] = loops.enter_context(T.serial(i64(0), self.dims[a]))

            def innermost(i: Expr) -> None:
                folded[axes[-1]] = i
                self._lanes(point)

            if axes:
                self.stretches(self.dims[axes[-1]], innermost, flush, SHORT)
            else:
                self._lanes(point)

    def finish_fold(self, parts: list[Any], combine: Callable[..., list[Expr]]) -> list[Value]:
        return [
            Value((), getattr(torch, expr_dtype(p[i64(0)])), lambda _, p=p: p[self.slot])
            for p in parts
        ]

    def define(self, dtype: torch.dtype, compute: Callable[[], Expr]) -> Value:
        buffer = self.em.local(self.slots, held_dtype(dtype))
        self._lanes(lambda slot, _: T.buffer_store(buffer, to_held(compute(), dtype), [slot]))
        return Value((), dtype, lambda _: from_held(buffer[self.slot], dtype))

    def row_here(self) -> list[Expr]:
        where = {**self.outer, **self.at_lane(self.start + self.slot)}
        return [where.get(a, i64(0)) for a in range(len(self.dims))]

    def each_row(self, body: Callable[[], None]) -> None:
        def one(_slot: Expr, _lane: Expr) -> None:
            with sharing():
                body()

        self._lanes(one)


class AcrossGroups(AcrossRows):
    """Lanes across the channels of whole groups, where channels are neighbours: each lane folds a
    channel, and then those of a group are combined.

    ``width * unroll`` is a multiple of the channels of a group, and ``start`` is too.
    """

    def __init__(
        self, em: Emitter, space: RowSpace, outer: dict[int, Expr], start: Expr,
        width: int, unroll: int,
    ) -> None:  # fmt: skip
        super().__init__(em, space, outer, 2, start, width, unroll)
        assert space.grouped and isinstance(space.dims[2], int)
        self.each = space.dims[2]

    def at_lane(self, place: Expr) -> dict[int, Expr]:
        group = tir.floordiv(place, i64(self.each))
        return {1: group, 2: place - group * self.each}  # their sum is simplified to the place

    def finish_fold(self, parts: list[Any], combine: Callable[..., list[Expr]]) -> list[Value]:
        if self.each > 1:
            with T.serial(i64(0), i64(self.slots // self.each)) as group:
                first = group * self.each
                with T.serial(i64(1), i64(self.each)) as k:
                    merged = combine([p[first] for p in parts], [p[first + k] for p in parts])
                    for part, x in zip(parts, [bind(x) for x in merged], strict=True):
                        T.buffer_store(part, x, [first])
                with T.serial(i64(1), i64(self.each)) as k:
                    for part in parts:
                        T.buffer_store(part, part[first], [first + k])
        return super().finish_fold(parts, combine)
