"""Branches inside a launch: what the native step that leads the workers to them (`fork`) reads.

The branches of a `BranchStep` have tables of their own for each number of rows. They are made when
a launch stops because one is missing, and kept for the latest `SLOTS` numbers of a branch.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import driver
from .fork import (
    SLOTS,
    UNIT,
    Fork,
    Unit,
    Variant,
    copy_function,
)
from .host import Hosted, Recorder
from .plan import BranchStep, KernelStep, TensorRef
from .spans import ITEMSIZE
from .table import BYTES_PER_US, Address, Table, build_table, micros
from .workspace import Workspace

NOT_YET = "a plan is not compiled yet"


@dataclass
class _Made:
    """A table for a number of rows, and the memory that it needs."""

    words: np.ndarray
    keep: tuple[Any, ...]


class Branches:
    """The native state of one branch step: `fork` and what it points to.

    Where a table is missing it sets the word at ``stop`` to ``number``.
    """

    def __init__(self, instance: Hosted, step: BranchStep, number: int, stop: int) -> None:
        self.instance, self.step = instance, step
        self._shapes = [instance.geometry(ref)[0] for ref in step.refs]
        self._row = [_row_bytes(self._shapes[0], step.refs[0]), *[0] * (len(step.refs) - 1)]
        self._row.append(_row_bytes(instance.geometry(step.results[0])[0], step.results[0]))
        self.names = [name for names in step.units for name in reversed(names)]
        workers, units = instance.workers, len(self.names)
        self._table = np.zeros((units, UNIT), np.int64)
        self.jumps = np.zeros((units, workers), np.int64)
        self._loads = np.zeros(workers, np.int64)
        self._operands = np.zeros(len(self._row), np.int64)
        self._idle = np.zeros(driver.LISTS, np.int64)  # a launch block without lists
        self._nothing = np.zeros(len(Variant), np.int64)
        self._nothing[Variant.LAUNCH] = self._idle.ctypes.data
        self._given = np.zeros(len(step.plans) + 1, np.int64)
        self._seen = np.zeros(len(step.plans) + 1, np.int64)
        self._made: list[list[_Made]] = [[] for _ in range(units)]
        self._next = [0] * units
        self.fork = np.zeros(len(Fork), np.int64)
        for word, value in (
            (Fork.STOP, stop),
            (Fork.NUMBER, number),
            (Fork.UNITS, units),
            (Fork.TABLE, self._table.ctypes.data),
            (Fork.WORKERS, workers),
            (Fork.JUMPS, self.jumps.ctypes.data),
            (Fork.LOADS, self._loads.ctypes.data),
            (Fork.OPERANDS, self._operands.ctypes.data),
            (Fork.NOTHING, self._nothing.ctypes.data),
            (Fork.SEEN, self._seen.ctypes.data),
            (Fork.SEEN_BYTES, self._seen.nbytes),
        ):
            self.fork[word] = value
        counts = instance.executor.counts
        u = 0
        for b, names in enumerate(step.units):
            for name in reversed(names):
                unit, own = self._table[u], name != step.plans[b]
                unit[Unit.BRANCH], unit[Unit.SIZED] = b, own
                unit[Unit.SIZE] = step.sized[b][0] if len(names) > 1 else 0
                unit[Unit.RUNS] = counts.address("taken", name)
                unit[Unit.MISSES] = counts.address("missed", name)
                unit[Unit.SPILLS] = counts.address("spilled", name)
                u += 1

    def follow(self, offsets: Sequence[int] | None) -> None:
        """Takes these offsets from now on and not the route's; None: the route's."""
        self.fork[Fork.GIVEN] = 0
        if offsets is not None:
            self._given[:] = offsets
            self.fork[Fork.GIVEN] = self._given.ctypes.data

    def report(self, recorder: Recorder) -> None:
        """Tells where the latest launch went."""
        recorder(self.step, self._seen.tolist(), self._shapes[0][0])

    def make(self) -> str:
        """Makes the variants that the latest launch lacked. Returns why one cannot be, if so."""
        loads = np.diff(self._seen)
        for u, name in enumerate(self.names):
            unit = self._table[u]
            load, size = int(loads[unit[Unit.BRANCH]]), int(unit[Unit.SIZE])
            taken = size if load >= size else 0
            rows = taken if unit[Unit.SIZED] else load - taken
            if rows <= 0 or rows in unit[Unit.VARIANTS :: 2]:
                continue
            part = self.instance.executor.parts[name].made()
            if part is None:
                return NOT_YET
            shapes = [(rows, *self._shapes[0][1:]), *self._shapes[1:]]
            inner = part.instance(shapes, self.instance.workers)
            if inner.simple and len(inner.fresh) == 1:
                made = self._variant(inner)
            elif _is_copy(inner):
                made = self._copy(inner)
            else:
                return f"{name} is not kernels alone"
            slots = self._made[u]
            slot = len(slots) if len(slots) < SLOTS else self._next[u]
            slots[slot : slot + 1] = [made]
            self._next[u] = (slot + 1) % SLOTS
            at = Unit.VARIANTS + 2 * slot
            unit[at : at + 2] = rows, made.words.ctypes.data
        return ""

    def _variant(self, inner: Hosted) -> _Made:
        executor = inner.executor
        space = Workspace(inner, executor.functions, executor.constants, tail=driver.JUMP)
        [table] = space.tables
        assert table is not None
        slots = [*(slot for slot, _ in inner.inputs), inner.fresh[0][0]]
        return self._filled(table, slots, space.ext_address, _times(inner, table), space)

    def _copy(self, inner: Hosted) -> _Made:
        """The variant of a plan that gives its rows back."""
        ref = inner.plan.outputs[0]
        step = KernelStep("copy", "copy", (ref, replace(ref, buffer="")), 1, ("bytes",))
        nbytes = math.prod(inner.geometry(ref)[0]) * ITEMSIZE[ref.dtype]
        table = build_table(
            [step],
            [[]],
            {ref.buffer: Address(0, 0), "": Address(0, 1)},
            {"copy": copy_function()},
            {**inner.values, "bytes": nbytes},
            inner.workers,
            tail=driver.JUMP,
        )
        ext = array("q", [0, 0])
        slots = [0, *[-1] * (len(self._row) - 2), 1]
        times = [1 + int(1e3 * nbytes / BYTES_PER_US)]
        return self._filled(table, slots, ext.buffer_info()[0], times, ext)

    def _filled(
        self, table: Table, slots: Sequence[int], ext: int, nanoseconds: Sequence[int], keep: Any
    ) -> _Made:
        """A variant, of whose pointers ``slots[k]`` is for operand k, -1 for none."""
        fills = np.array(
            [(slot, k, self._row[k]) for k, slot in enumerate(slots) if slot >= 0], np.int64
        )
        times, ends = np.array(nanoseconds, np.int64), np.array(table.ends, np.int64)
        words = np.zeros(len(Variant), np.int64)
        words[Variant.LAUNCH], words[Variant.EXT] = table.address, ext
        words[Variant.FILLS], words[Variant.N_FILLS] = fills.ctypes.data, len(fills)
        words[Variant.ENDS], words[Variant.TIMES] = ends.ctypes.data, times.ctypes.data
        return _Made(words, (table, keep, fills, times, ends))


def _is_copy(inner: Hosted) -> bool:
    """Whether the plan's only result is its first input, whole."""
    plan = inner.plan
    if plan.steps or len(plan.outputs) != 1 or plan.outputs[0].buffer != plan.inputs[0].buffer:
        return False
    return inner.geometry(plan.outputs[0]) == inner.geometry(plan.inputs[0])


def _row_bytes(shape: Sequence[int], ref: TensorRef) -> int:
    return math.prod(shape[1:]) * ITEMSIZE[ref.dtype]


def _times(inner: Hosted, table: Table) -> list[int]:
    """About how many nanoseconds each list of a table takes."""
    times = [0.0] * table.workers
    [steps] = inner.segments
    assert isinstance(steps, list)
    for part in table.parts:
        step = steps[part.step]
        whole = max(1, sum(p.hi - p.lo for p in table.parts if p.step == part.step))
        times[part.worker] += 1e3 * micros(step, inner.values) * (part.hi - part.lo) / whole
    return [1 + int(t) for t in times]
