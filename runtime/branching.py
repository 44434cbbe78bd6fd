"""Branches inside a launch: what the native step that leads the workers to them (`fork`) reads.

The branches of a `BranchStep` have tables of their own, for each number of rows one; so have the
two sides of a `torch.cond`, which is a route of one row. Tables are made when
a launch stops because one is missing, and kept for the latest `SLOTS` numbers of a branch. What
branches within a branch is part of that branch's table, in the same way.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    fork_function,
    offsets_function,
)
from .host import Host, Hosted, Recorder
from .plan import BranchStep, FetchStep, KernelStep, LibraryStep, TensorRef
from .sizes import evaluate
from .spans import ITEMSIZE, Span, span_of
from .table import Address, Table, build_table, micros, share
from .workspace import Memory, aligned_empty

NOT_YET = "a plan is not compiled yet"
FIRST = 2
"""The stop word where the first fork lacks a table; lower ones are for other reasons to stop."""


class Forks:
    """The branch steps of a launch by number, those within branches, too, and its stop word."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self._known: dict[int, Branches] = {}
        self._numbers = itertools.count(FIRST)

    def add(self, branches: Branches) -> int:
        """Its number from now on."""
        number = next(self._numbers)
        self._known[number] = branches
        return number

    def forget(self, branches: Branches) -> None:
        """Drops it, and what is within it."""
        del self._known[branches.number]
        for inner in branches.within():
            self.forget(inner)

    def __getitem__(self, number: int) -> Branches:
        return self._known[number]

    def follow(self) -> None:
        """Sends all of them where their instances say."""
        for branches in self._known.values():
            branches.follow((branches.instance.routes() or {}).get(branches.step.name))


class Layout:
    """The steps of one launch of an instance: its kernels, and what is there for its branches."""

    def __init__(self, instance: Hosted, forks: Forks) -> None:
        self.instance, self.forks = instance, forks
        self.steps: list[KernelStep] = []
        self.branches: list[Branches] = []
        self._spans: list[list[Span]] = []
        self._functions = dict(instance.executor.functions)
        self._values = dict(instance.values)
        self._jumps: dict[str, np.ndarray] = {}
        self._checked: set[str] = set()
        self._routes: dict[str, np.ndarray] = {}  # of `torch.cond`s

    def add(self, step: KernelStep, also: Sequence[TensorRef] = ()) -> None:
        """Adds a kernel; it writes what lies ``also`` behind its arguments."""
        self.steps.append(step)
        self._spans.append([self._span(a) for a in (*step.args, *also)])

    def _span(self, ref: TensorRef) -> Span:
        if ref.buffer in self._routes:
            return span_of(ref, ref.buffer, 0, {})
        return self.instance.span(ref)

    def native(
        self,
        name: str,
        function: int,
        args: Sequence[TensorRef] = (),
        reads: int = 0,
        words: Mapping[str, int] | None = None,
        also: Sequence[TensorRef] = (),
        checked: bool = False,
    ) -> None:
        """Adds a native function, given ``args`` and ``words``; ``checked`` if it may stop all."""
        kernel, words = f"native {function}", words or {}
        self._functions[kernel] = function
        self._values |= words
        if checked:
            self._checked.add(kernel)
        self.add(KernelStep(name, kernel, tuple(args), reads, tuple(words)), also)

    def route(self, step: BranchStep | FetchStep) -> TensorRef:
        """The offsets of its route. Those of a `torch.cond` are made once, of its truth value."""
        if not isinstance(step, BranchStep) or step.kind == "rows":
            return step.selector
        name = f"offsets of {step.name}"
        ref = TensorRef(name, "int64", (3,), (1,))
        if name not in self._routes:
            self._routes[name] = np.zeros(3, np.int64)
            self.native(name, offsets_function(), (step.selector, ref), 1)
        return ref

    def branch(self, step: BranchStep) -> None:
        """Adds a branch step."""
        route, branches = self.route(step), Branches(self.instance, step, self.forks)
        operands = (*step.refs, *step.results)
        self.branches.append(branches)
        self._jumps[step.name] = branches.jumps
        self.native(
            step.name,
            fork_function(len(operands)),
            (route, *operands),
            len(step.refs) + 1,
            {f"fork {branches.number}": branches.fork.ctypes.data},
            checked=True,
        )

    def copy(self, ref: TensorRef, to: str) -> None:
        """Adds a copy of ``ref``, which has no gaps, to the buffer ``to``."""
        nbytes = _nbytes(self.instance, ref)
        words = {f"bytes of {to}": nbytes}
        self._values |= words
        self._functions["copy"] = copy_function()
        target = TensorRef(to, ref.dtype, ref.shape, ref.strides)
        step = KernelStep(to, "copy", (ref, target), 1, tuple(words), bytes=2 * nbytes)
        self.steps.append(step)
        self._spans.append([self.instance.span(ref)])  # nothing else is at the other end

    def table(self, addresses: Mapping[str, Address], tail: int = driver.END) -> Table:
        """The native table of everything added."""
        routes = {name: Address(words.ctypes.data) for name, words in self._routes.items()}
        table = build_table(
            self.steps,
            self._spans,
            {**addresses, **routes},
            self._functions,
            self._values,
            self.instance.workers,
            placed=self.instance.workers == self.instance.plan.workers,
            checked=self._checked,
            stop=self.forks.stop,
            forks=self._jumps,
            tail=tail,
        )
        table.arrays += self._routes.values()
        return table

    def nanoseconds(self, table: Table) -> list[int]:
        """About how long each list of a table takes, without branches."""
        times = [0.0] * table.workers
        for part in table.parts:
            step = self.steps[part.step]
            whole = max(1, sum(p.hi - p.lo for p in table.parts if p.step == part.step))
            times[part.worker] += 1e3 * micros(step, self._values) * (part.hi - part.lo) / whole
        return [1 + int(t) for t in times]


@dataclass
class _Made:
    """A table for a number of rows, the branches in it and the memory that it needs."""

    words: np.ndarray
    branches: list[Branches]
    keep: tuple[Any, ...]


class Branches:
    """The native state of one branch step: `fork` and what it points to.

    Where a table is missing it sets the stop word of ``forks`` to its `number`.
    """

    def __init__(self, instance: Hosted, step: BranchStep, forks: Forks) -> None:
        self.instance, self.step, self._forks = instance, step, forks
        self.number = forks.add(self)
        self._rows = step.kind == "rows"
        self._shapes = [instance.geometry(ref)[0] for ref in step.refs]
        self._row = [0] * (len(step.refs) + len(step.results))
        if self._rows:
            self._row[0] = _row_bytes(self._shapes[0], step.refs[0])
            self._row[-1] = _row_bytes(instance.geometry(step.results[0])[0], step.results[0])
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
            (Fork.STOP, forks.stop),
            (Fork.NUMBER, self.number),
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

    def follow(self, choice: Sequence[int] | bool | None) -> None:
        """Goes there from now on and not where the route tells; None: where that does."""
        self.fork[Fork.GIVEN] = 0
        if choice is not None:
            sides = (0, int(choice), 1) if isinstance(choice, bool) else choice
            self._given[:] = sides
            self.fork[Fork.GIVEN] = self._given.ctypes.data

    def report(self, recorder: Recorder) -> None:
        """Tells where the latest launch went, here and within the branches that it went to."""
        seen = self._seen.tolist()
        recorder(self.step, seen if self._rows else seen[1] == 1, self._total())
        for u, made in enumerate(self._made):
            unit = self._table[u]
            if unit[Unit.ROWS] > 0:
                [chosen] = [m for m in made if m.words.ctypes.data == unit[Unit.CHOSEN]]
                for inner in chosen.branches:
                    inner.report(recorder)

    def within(self) -> list[Branches]:
        """The branch steps within its branches."""
        return [inner for made in self._made for m in made for inner in m.branches]

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
            reason = _unfit(name, part)  # of what was compiled meanwhile nobody has asked
            if reason:
                return reason
            shapes = self._shapes
            if self._rows:
                shapes = [(rows, *shapes[0][1:]), *shapes[1:]]
            workers = self.instance.workers if _wide(part, shapes, self.instance.workers) else 1
            made = self._variant(part.instance(shapes, workers))
            if isinstance(made, str):
                return f"{name} {made}"
            slots = self._made[u]
            slot = len(slots) if len(slots) < SLOTS else self._next[u]
            for old in slots[slot : slot + 1]:
                for inner in old.branches:
                    self._forks.forget(inner)
            slots[slot : slot + 1] = [made]
            self._next[u] = (slot + 1) % SLOTS
            at = Unit.VARIANTS + 2 * slot
            unit[at : at + 2] = rows, made.words.ctypes.data
        return ""

    def _total(self) -> int:
        return self._shapes[0][0] if self._rows else 1

    def _variant(self, inner: Hosted) -> _Made | str:
        """The table of an instance, or why there cannot be one."""
        if not all(_is_dense(*inner.geometry(ref)) for ref in inner.plan.outputs):
            return "has a result with gaps"
        layout = Layout(inner, self._forks)
        for segment in inner.segments:
            if isinstance(segment, list):
                for step in segment:
                    layout.add(step)
            else:
                assert isinstance(segment, BranchStep)
                if has_gaps(inner, segment):
                    return f"has {segment.name}, whose operands have gaps"
                layout.branch(segment)
        memory = Memory(inner, inner.executor.constants)
        addresses, pointers, keep = memory.addresses, len(inner.ext), []
        slots = [slot for slot, _ in inner.inputs]
        fresh = {name: (slot, shape, strides) for slot, name, shape, strides, _ in inner.fresh}
        for k, ref in enumerate(inner.plan.outputs):
            slot, *geometry = fresh.get(ref.buffer, (-1,))
            if tuple(geometry) == inner.geometry(ref) and not evaluate(ref.offset, inner.values):
                del fresh[ref.buffer]  # it is written where it is wanted
                slots.append(slot)
                continue
            addresses[f"result {k}"] = Address(0, pointers)
            slots.append(pointers)
            pointers += 1
            layout.copy(ref, f"result {k}")
        ext = array("q", [0] * max(1, pointers))
        for name, (slot, *_) in fresh.items():  # parts of it are results
            nbytes = evaluate(inner.plan.buffers[name].nbytes, inner.values)
            keep.append(aligned_empty(nbytes))
            ext[slot] = keep[-1].data_ptr()
        table = layout.table(addresses, driver.JUMP)
        fills = np.array(
            [(slot, k, self._row[k]) for k, slot in enumerate(slots) if slot >= 0], np.int64
        )
        times = np.array(layout.nanoseconds(table), np.int64)
        ends = np.array(table.ends, np.int64)
        forks = np.array([b.fork.ctypes.data for b in layout.branches], np.int64)
        words = np.zeros(len(Variant), np.int64)
        words[Variant.LAUNCH], words[Variant.EXT] = table.address, ext.buffer_info()[0]
        words[Variant.FILLS], words[Variant.N_FILLS] = fills.ctypes.data, len(fills)
        words[Variant.ENDS], words[Variant.TIMES] = ends.ctypes.data, times.ctypes.data
        words[Variant.FORKS], words[Variant.N_FORKS] = forks.ctypes.data, len(forks)
        keep += [table, memory, ext, fills, times, ends, forks]
        return _Made(words, layout.branches, tuple(keep))


def refusal_of(host: Host, step: BranchStep) -> str:
    """Why the branches of a step cannot be part of a launch, as far as plans tell; "" if they can.

    Those that are compiled later are asked then.
    """
    operands = len(step.refs) + len(step.results)
    if operands + 2 > driver.ARG_CLASSES[-1]:
        return f"{step.name} has {operands} operands"
    for name in step.every_plan:
        part = host.parts[name].made()
        reason = "" if part is None else _unfit(name, part)
        if reason:
            return reason
    return ""


def _unfit(name: str, part: Host) -> str:
    """Why the plan of a branch cannot be part of a launch; "" if it can."""
    if part.fetching is not None:
        return f"{name} fetches weights of its own"
    for inner in part.plan.steps:
        if isinstance(inner, LibraryStep | FetchStep):
            what = inner.target if isinstance(inner, LibraryStep) else inner.name
            return f"{name} is not kernels alone, but has {what}"
        if isinstance(inner, BranchStep) and (reason := refusal_of(part, inner)):
            return reason
    return ""


def has_gaps(instance: Hosted, step: BranchStep) -> bool:
    """Whether what a branch step reads or writes is not contiguous."""
    refs = (step.selector, *step.refs, *step.results)
    return not all(_is_dense(*instance.geometry(ref)) for ref in refs)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _wide(host: Host, shapes: Sequence[Sequence[int]], workers: int) -> bool:
    """Whether any step of a plan, or of the branches in it, is worth more than one worker."""
    values = {name: shapes[i][d] for name, (i, d) in host.plan.symbols.items()}
    for step in host.plan.steps:
        if isinstance(step, KernelStep):
            if share(step, evaluate(step.tasks, values), values, workers) > 1:
                return True
        elif isinstance(step, BranchStep):
            inner = [tuple(evaluate(d, values) for d in ref.shape) for ref in step.refs]
            parts = filter(None, (host.parts[name].made() for name in step.every_plan))
            if any(_wide(part, inner, workers) for part in parts):
                return True
    return False


def _nbytes(instance: Hosted, ref: TensorRef) -> int:
    return math.prod(instance.geometry(ref)[0]) * ITEMSIZE[ref.dtype]


def _row_bytes(shape: Sequence[int], ref: TensorRef) -> int:
    return math.prod(shape[1:]) * ITEMSIZE[ref.dtype]
