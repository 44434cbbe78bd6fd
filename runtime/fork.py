"""Branches inside a launch, the native half: a step that reads where the rows of a route went and
leads every worker through the tables of the branches that have any.

A branch is one unit, or two where it has a plan for a number of rows besides (`BranchStep.sized`).
For each unit with rows the step looks up a *variant*, the table for so many, moves its pointers to
the rows, and sets the jumps that every worker takes one after the other (`driver.JUMP`): to the
variant's list, whose last entry jumps back, or on to the next unit. List 0, which has the steps
that nobody shares, goes to the worker that has least to do so far (list scheduling: Graham, "Bounds
on multiprocessing timing anomalies", 1969).

All state is words of 64 bits: those of a `Fork`, of its `Unit`s, of their `Variant`s.
"""

from __future__ import annotations

import functools
import re
from enum import IntEnum

from . import driver, native

SLOTS = 16
FILL = 3
"""Words of a pointer to be set: its entry, the operand that it is of, bytes of a row (0: all)."""


class Fork(IntEnum):
    """Words of a fork, by number."""

    STOP = 0
    """Address of the launch's stop word, and what it is set to where a variant is missing."""
    NUMBER = 1
    UNITS = 2
    """How many units there are, and their address."""
    TABLE = 3
    WORKERS = 4
    JUMPS = 5
    """Address of the addresses of jumps: of each unit one for each worker."""
    LOADS = 6
    """Address of what each worker has to do."""
    OPERANDS = 7
    """Address of the operands' addresses."""
    NOTHING = 8
    """Address of the variant of a unit without rows, which has no lists."""
    GIVEN = 9
    """Address of offsets to follow instead of the route's, or 0."""
    SEEN = 10
    """Address of a copy of those that were followed, and its bytes."""
    SEEN_BYTES = 11


class Unit(IntEnum):
    """Words of a unit, by number: a plan that a branch may run."""

    BRANCH = 0
    SIZE = 1
    """A number of rows for which the branch has a plan besides, 0 for none."""
    SIZED = 2
    """1 for that plan, which takes the first so many rows, 0 for the one that takes the others."""
    ROWS = 3
    """How many rows it has this time, and the first."""
    FIRST = 4
    CHOSEN = 5
    """Address of the variant for so many."""
    SHORT = 6
    """1 if it is sized and the branch has rows, but too few, and if it has too many."""
    LONG = 7
    RUNS = 8
    """Addresses of counts: of launches in which it ran, was short, was long."""
    MISSES = 9
    SPILLS = 10
    VARIANTS = 11
    """`SLOTS` pairs of a number of rows and the address of the variant for so many."""


UNIT = Unit.VARIANTS + 2 * SLOTS


class Variant(IntEnum):
    """Words of a table for a number of rows, by number."""

    LAUNCH = 0
    """Address of the launch block."""
    EXT = 1
    """Address of the pointers that each call brings."""
    FILLS = 2
    """Address of those to be set, and their number."""
    N_FILLS = 3
    ENDS = 4
    """Address of the addresses of the last entries of the lists."""
    TIMES = 5
    """Address of how long each list takes, in nanoseconds."""
    FORKS = 6
    """Address of the addresses of its own forks, and their number."""
    N_FORKS = 7


_IR = """
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define internal ptr @plait_unit(ptr %fork, i64 %k) {
  %table = call ptr @plait_pointer(ptr %fork, i64 TABLE)
  %at = mul i64 %k, UNIT_WORDS
  %p = getelementptr i64, ptr %table, i64 %at
  ret ptr %p
}

define internal void @plait_divide(ptr %offsets, ptr %unit) {
  %branch = call i64 @plait_get(ptr %unit, i64 BRANCH)
  %next = add i64 %branch, 1
  %begin = call i64 @plait_get(ptr %offsets, i64 %branch)
  %end = call i64 @plait_get(ptr %offsets, i64 %next)
  %all = sub i64 %end, %begin
  %size = call i64 @plait_get(ptr %unit, i64 SIZE)
  %sized = call i64 @plait_get(ptr %unit, i64 SIZED)
  %special = icmp ne i64 %sized, 0
  %fits = icmp sge i64 %all, %size
  %taken = select i1 %fits, i64 %size, i64 0
  %left = sub i64 %all, %taken
  %rows = select i1 %special, i64 %taken, i64 %left
  %past = add i64 %begin, %taken
  %first = select i1 %special, i64 %begin, i64 %past
  call void @plait_set(ptr %unit, i64 ROWS, i64 %rows)
  call void @plait_set(ptr %unit, i64 FIRST, i64 %first)
  %some = icmp sgt i64 %all, 0
  %few = icmp slt i64 %all, %size
  %lacks = and i1 %some, %few
  %short = select i1 %lacks, i64 %sized, i64 0
  call void @plait_set(ptr %unit, i64 SHORT, i64 %short)
  %many = icmp sgt i64 %all, %size
  %long = select i1 %many, i64 %sized, i64 0
  call void @plait_set(ptr %unit, i64 LONG, i64 %long)
  ret void
}

define internal i64 @plait_search(ptr %unit, i64 %rows) {
entry:
  br label %next
next:
  %k = phi i64 [ VARIANTS, %entry ], [ %k2, %look ]
  %over = icmp uge i64 %k, UNIT_WORDS
  br i1 %over, label %none, label %look
look:
  %k1 = add i64 %k, 1
  %k2 = add i64 %k, 2
  %held = call i64 @plait_get(ptr %unit, i64 %k)
  %same = icmp eq i64 %held, %rows
  br i1 %same, label %found, label %next
found:
  %at = call i64 @plait_get(ptr %unit, i64 %k1)
  ret i64 %at
none:
  ret i64 0
}

define internal void @plait_point(ptr %fork, ptr %variant, i64 %begin) {
entry:
  %operands = call ptr @plait_pointer(ptr %fork, i64 OPERANDS)
  %ext = call ptr @plait_pointer(ptr %variant, i64 EXT)
  %fills = call ptr @plait_pointer(ptr %variant, i64 FILLS)
  %n = call i64 @plait_get(ptr %variant, i64 N_FILLS)
  %launch = call ptr @plait_pointer(ptr %variant, i64 LAUNCH)
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k1, %fill ]
  %over = icmp uge i64 %k, %n
  br i1 %over, label %out, label %fill
fill:
  %k1 = add i64 %k, 1
  %row = mul i64 %k, FILL_WORDS
  %row1 = add i64 %row, 1
  %row2 = add i64 %row, 2
  %entry_ = call i64 @plait_get(ptr %fills, i64 %row)
  %operand = call i64 @plait_get(ptr %fills, i64 %row1)
  %bytes = call i64 @plait_get(ptr %fills, i64 %row2)
  %base = call i64 @plait_get(ptr %operands, i64 %operand)
  %shift = mul i64 %begin, %bytes
  %address = add i64 %base, %shift
  call void @plait_set(ptr %ext, i64 %entry_, i64 %address)
  br label %next
out:
  call void @plait_prepare(ptr %launch, ptr %ext)
  ret void
}

define internal i64 @plait_idlest(ptr %loads, i64 %workers) {
entry:
  %first = call i64 @plait_get(ptr %loads, i64 0)
  br label %next
next:
  %k = phi i64 [ 1, %entry ], [ %k1, %look ]
  %best = phi i64 [ 0, %entry ], [ %best1, %look ]
  %least = phi i64 [ %first, %entry ], [ %least1, %look ]
  %over = icmp uge i64 %k, %workers
  br i1 %over, label %out, label %look
look:
  %k1 = add i64 %k, 1
  %load = call i64 @plait_get(ptr %loads, i64 %k)
  %less = icmp slt i64 %load, %least
  %best1 = select i1 %less, i64 %k, i64 %best
  %least1 = select i1 %less, i64 %load, i64 %least
  br label %next
out:
  ret i64 %best
}

define internal void @plait_lead(ptr %fork, ptr %jumps, ptr %variant) {
entry:
  %workers = call i64 @plait_get(ptr %fork, i64 WORKERS)
  %loads = call ptr @plait_pointer(ptr %fork, i64 LOADS)
  %launch = call ptr @plait_pointer(ptr %variant, i64 LAUNCH)
  %lists = call i64 @plait_get(ptr %launch, i64 LAUNCH_WORKERS)
  %ends = call ptr @plait_pointer(ptr %variant, i64 ENDS)
  %times = call ptr @plait_pointer(ptr %variant, i64 TIMES)
  %home = call i64 @plait_idlest(ptr %loads, i64 %workers)
  br label %next
next:
  %w = phi i64 [ 0, %entry ], [ %w1, %set ]
  %over = icmp uge i64 %w, %workers
  br i1 %over, label %out, label %look
look:
  %w1 = add i64 %w, 1
  %jump = call ptr @plait_pointer(ptr %jumps, i64 %w)
  %behind = getelementptr i64, ptr %jump, i64 ENTRY_WORDS
  %on = ptrtoint ptr %behind to i64
  %turned = sub i64 %w, %home
  %low = icmp slt i64 %turned, 0
  %wrapped = add i64 %turned, %workers
  %list = select i1 %low, i64 %wrapped, i64 %turned
  %has = icmp slt i64 %list, %lists
  br i1 %has, label %go, label %set
go:
  %slot = add i64 %list, LAUNCH_LISTS
  %to = call i64 @plait_get(ptr %launch, i64 %slot)
  %end = call ptr @plait_pointer(ptr %ends, i64 %list)
  call void @plait_set(ptr %end, i64 1, i64 %on)
  %time = call i64 @plait_get(ptr %times, i64 %list)
  call void @plait_add(ptr %loads, i64 %w, i64 %time)
  br label %set
set:
  %target = phi i64 [ %on, %look ], [ %to, %go ]
  call void @plait_set(ptr %jump, i64 1, i64 %target)
  br label %next
out:
  ret void
}

define void @plait_fork_N_body(ptr %lo, ptr %hi, ptr %route, OPERANDS_GIVEN, ptr %fork) {
entry:
  %operands = call ptr @plait_pointer(ptr %fork, i64 OPERANDS)
  OPERANDS_STORED
  %own = ptrtoint ptr %route to i64
  %given = call i64 @plait_get(ptr %fork, i64 GIVEN)
  %follow = icmp ne i64 %given, 0
  %at = select i1 %follow, i64 %given, i64 %own
  %offsets = inttoptr i64 %at to ptr
  %seen = call ptr @plait_pointer(ptr %fork, i64 SEEN)
  %length = call i64 @plait_get(ptr %fork, i64 SEEN_BYTES)
  call void @llvm.memcpy.p0.p0.i64(ptr %seen, ptr %offsets, i64 %length, i1 false)
  %units = call i64 @plait_get(ptr %fork, i64 UNITS)
  %workers = call i64 @plait_get(ptr %fork, i64 WORKERS)
  %loads = call ptr @plait_pointer(ptr %fork, i64 LOADS)
  %jumps = call ptr @plait_pointer(ptr %fork, i64 JUMPS)
  %nothing = call i64 @plait_get(ptr %fork, i64 NOTHING)
  br label %clear
clear:
  %c = phi i64 [ 0, %entry ], [ %c1, %clear ]
  %c1 = add i64 %c, 1
  call void @plait_set(ptr %loads, i64 %c, i64 0)
  %cleared = icmp uge i64 %c1, %workers
  br i1 %cleared, label %choose, label %clear
choose:
  %i = phi i64 [ 0, %clear ], [ %i1, %keep ]
  %chosen = icmp uge i64 %i, %units
  br i1 %chosen, label %lead, label %look
look:
  %i1 = add i64 %i, 1
  %unit = call ptr @plait_unit(ptr %fork, i64 %i)
  call void @plait_divide(ptr %offsets, ptr %unit)
  %rows = call i64 @plait_get(ptr %unit, i64 ROWS)
  %empty = icmp sle i64 %rows, 0
  br i1 %empty, label %keep, label %search
search:
  %held = call i64 @plait_search(ptr %unit, i64 %rows)
  %known = icmp ne i64 %held, 0
  br i1 %known, label %keep, label %missing
missing:
  %number = call i64 @plait_get(ptr %fork, i64 NUMBER)
  %stop = call ptr @plait_pointer(ptr %fork, i64 STOP)
  store atomic i64 %number, ptr %stop release, align 8
  ret void
keep:
  %found = phi i64 [ %nothing, %look ], [ %held, %search ]
  call void @plait_set(ptr %unit, i64 CHOSEN, i64 %found)
  br label %choose
lead:
  %j = phi i64 [ 0, %choose ], [ %j1, %led ]
  %over = icmp uge i64 %j, %units
  br i1 %over, label %out, label %next
next:
  %j1 = add i64 %j, 1
  %this = call ptr @plait_unit(ptr %fork, i64 %j)
  %variant = call ptr @plait_pointer(ptr %this, i64 CHOSEN)
  %skip = mul i64 %j, %workers
  %mine = getelementptr i64, ptr %jumps, i64 %skip
  %count = call i64 @plait_get(ptr %this, i64 ROWS)
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %point, label %led
point:
  %first = call i64 @plait_get(ptr %this, i64 FIRST)
  call void @plait_point(ptr %fork, ptr %variant, i64 %first)
  br label %led
led:
  call void @plait_lead(ptr %fork, ptr %mine, ptr %variant)
  br label %lead
out:
  ret void
}
"""


_TALLY_IR = """
define internal void @plait_count(ptr %unit, i64 %where, i64 %by) {
  %count = call ptr @plait_pointer(ptr %unit, i64 %where)
  %old = atomicrmw add ptr %count, i64 %by monotonic
  ret void
}

declare void @plait_tally(ptr, ptr, ptr)

define void @plait_tally_body(ptr %lo, ptr %hi, ptr %fork) {
entry:
  %units = call i64 @plait_get(ptr %fork, i64 UNITS)
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k1, %count ], [ %k1, %within ]
  %over = icmp uge i64 %k, %units
  br i1 %over, label %out, label %count
count:
  %k1 = add i64 %k, 1
  %unit = call ptr @plait_unit(ptr %fork, i64 %k)
  %rows = call i64 @plait_get(ptr %unit, i64 ROWS)
  %some = icmp sgt i64 %rows, 0
  %ran = zext i1 %some to i64
  %short = call i64 @plait_get(ptr %unit, i64 SHORT)
  %long = call i64 @plait_get(ptr %unit, i64 LONG)
  call void @plait_count(ptr %unit, i64 RUNS, i64 %ran)
  call void @plait_count(ptr %unit, i64 MISSES, i64 %short)
  call void @plait_count(ptr %unit, i64 SPILLS, i64 %long)
  br i1 %some, label %look, label %next
look:
  %variant = call ptr @plait_pointer(ptr %unit, i64 CHOSEN)
  %forks = call ptr @plait_pointer(ptr %variant, i64 FORKS)
  %n = call i64 @plait_get(ptr %variant, i64 N_FORKS)
  br label %within
within:
  %i = phi i64 [ 0, %look ], [ %i1, %inner ]
  %done = icmp uge i64 %i, %n
  br i1 %done, label %next, label %inner
inner:
  %i1 = add i64 %i, 1
  %own = call ptr @plait_pointer(ptr %forks, i64 %i)
  call void @plait_tally(ptr %lo, ptr %hi, ptr %own)
  br label %within
out:
  ret void
}
"""


@functools.cache
def fork_function(operands: int) -> int:
    """Address of the native ``fork(lo, hi, offsets, operands..., fork)``, to be called like a
    kernel by one worker: leads all workers to the units that have rows.

    Where it lacks a variant it sets the launch's stop word.
    """
    names = [f"a{k}" for k in range(operands)]
    stores = (
        f"  %w{k} = ptrtoint ptr %{name} to i64\n"
        f"  call void @plait_set(ptr %operands, i64 {k}, i64 %w{k})\n"
        for k, name in enumerate(names)
    )
    name = f"plait_fork_{operands}"
    text = _numbered(native.WORDS + driver.prepare_ir() + _IR).replace("plait_fork_N", name)
    text = text.replace(", OPERANDS_GIVEN", "".join(f", ptr %{name}" for name in names))
    text = text.replace("  OPERANDS_STORED\n", "".join(stores))
    params = ("lo", "hi", "offsets", *names, "fork")
    return native.load(f"fork{operands}", [native.Function(name, params, text)])[name]


@functools.cache
def tally_function() -> int:
    """Address of the native ``tally(lo, hi, fork)``, to be called at a launch's end: counts what
    ran, within branches as well. A launch that stops has not run, for the call begins anew.
    """
    text = _numbered(native.WORDS + _IR[: _IR.index("define internal void @plait_divide")])
    function = native.Function("plait_tally", ("lo", "hi", "fork"), text + _numbered(_TALLY_IR))
    return native.load("tally", [function])["plait_tally"]


@functools.cache
def offsets_function() -> int:
    """Address of the native ``offsets(lo, hi, truth, offsets)``, called like a kernel: writes a
    truth value as the offsets of a route of one row, to the first of two branches or the second.
    """
    text = """
define void @plait_offsets_body(ptr %lo, ptr %hi, ptr %truth, ptr %offsets) {
  %byte = load i8, ptr %truth
  %true = icmp ne i8 %byte, 0
  %first = zext i1 %true to i64
  call void @plait_set(ptr %offsets, i64 0, i64 0)
  call void @plait_set(ptr %offsets, i64 1, i64 %first)
  call void @plait_set(ptr %offsets, i64 2, i64 1)
  ret void
}
"""
    function = native.Function(
        "plait_offsets", ("lo", "hi", "truth", "offsets"), native.WORDS + text
    )
    return native.load("offsets", [function])["plait_offsets"]


@functools.cache
def copy_function() -> int:
    """Address of the native ``copy(lo, hi, source, target, nbytes)``, called like a kernel."""
    text = """
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define void @plait_copy_body(ptr %lo, ptr %hi, ptr %source, ptr %target, ptr %nbytes) {
  %n = ptrtoint ptr %nbytes to i64
  call void @llvm.memcpy.p0.p0.i64(ptr %target, ptr %source, i64 %n, i1 false)
  ret void
}
"""
    params = ("lo", "hi", "source", "target", "nbytes")
    return native.load("copy", [native.Function("plait_copy", params, text)])["plait_copy"]


def _numbered(text: str) -> str:
    """The text with numbers of words for their names."""
    words = {word.name: word.value for kind in (Fork, Unit, Variant) for word in kind}
    words |= {"UNIT_WORDS": UNIT, "FILL_WORDS": FILL, "ENTRY_WORDS": driver.ENTRY_WORDS}
    words |= {"LAUNCH_WORKERS": driver.WORKERS, "LAUNCH_LISTS": driver.LISTS}
    names = "|".join(sorted(words, key=len, reverse=True))
    return re.sub(rf"\b({names})\b", lambda found: str(words[found[0]]), text)
