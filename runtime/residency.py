"""Fetches of weights inside a launch: what is resident, kept where native code can change it.

A fetch that Python makes ends one launch and begins another, which costs more than the fetch. Where
loads are cheap, `fetch_function` makes them instead, as one step of a launch among the kernels: it
maps what a route wants and drops what Python ranked lowest. Whatever is not that simple stops the
launch (`driver.CHECKED`), and the call is made anew with fetches by Python.

All state is 64-bit words. `Residency.root` has those of `Root`; a unit is `UNIT` words (whether it
is resident, its bytes, the fetch that last wanted it, its pieces and their number); a piece of a
unit is `PIECE` words (address and length of what is loaded, address and length of what is dropped,
which may be nothing, for pages that units share).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from . import native
from .bank import PROCESS_MADVISE

if TYPE_CHECKING:
    from .site import Site

UNIT, PIECE = 8, 4
MOST = 256
"""Ranges that are dropped by one call to the system."""


class Root(IntEnum):
    """Words of the root, by number."""

    STOP = 0
    """Not 0: the latest fetch could not be made."""
    UNITS = 1
    """Address of all units."""
    ORDER = 2
    """Address of the numbers of units, what is to be dropped first first; their count follows."""
    N_ORDER = 3
    BYTES = 4
    """What is resident, and the most that may be."""
    CAPACITY = 5
    EPOCH = 6
    """The number of the latest fetch."""
    PIDFD = 7
    """A descriptor of this process, or -1."""
    RANGES = 8
    """Address of ranges that are to be dropped, address and length each; their count follows."""
    N_RANGES = 9
    FETCHES = 10
    """Counted since the last `Residency.counted`, as the rest; PEAK is of BYTES."""
    HITS = 11
    MISSES = 12
    DROPPED = 13
    MOVED = 14
    PEAK = 15


_IR = """
declare i32 @madvise(ptr, i64, i32)
declare i64 @syscall(i64, ...)

define internal ptr @plait_unit(ptr %root, i64 %number) {
  %units = call i64 @plait_get(ptr %root, i64 UNITS)
  %base = inttoptr i64 %units to ptr
  %k = mul i64 %number, UNIT_WORDS
  %p = getelementptr i64, ptr %base, i64 %k
  ret ptr %p
}

define internal i1 @plait_load_unit(ptr %unit) {
entry:
  %first = call i64 @plait_get(ptr %unit, i64 3)
  %n = call i64 @plait_get(ptr %unit, i64 4)
  %pieces = inttoptr i64 %first to ptr
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k1, %done ]
  %over = icmp sge i64 %k, %n
  br i1 %over, label %well, label %load
load:
  %row = mul i64 %k, PIECE_WORDS
  %row1 = add i64 %row, 1
  %at = call i64 @plait_get(ptr %pieces, i64 %row)
  %length = call i64 @plait_get(ptr %pieces, i64 %row1)
  %address = inttoptr i64 %at to ptr
  %code = call i32 @madvise(ptr %address, i64 %length, i32 22)
  %bad = icmp ne i32 %code, 0
  br i1 %bad, label %badly, label %done
done:
  %k1 = add i64 %k, 1
  br label %next
well:
  ret i1 true
badly:
  ret i1 false
}

define internal void @plait_drop_ranges(ptr %root) {
entry:
  %n = call i64 @plait_get(ptr %root, i64 N_RANGES)
  %at = call i64 @plait_get(ptr %root, i64 RANGES)
  %ranges = inttoptr i64 %at to ptr
  call void @plait_set(ptr %root, i64 N_RANGES, i64 0)
  %fd = call i64 @plait_get(ptr %root, i64 PIDFD)
  %able = icmp sge i64 %fd, 0
  %many = icmp sgt i64 %n, 1
  %together = and i1 %able, %many
  br i1 %together, label %sum, label %next
sum:
  %i = phi i64 [ 0, %entry ], [ %i1, %sum ]
  %total = phi i64 [ 0, %entry ], [ %total1, %sum ]
  %i1 = add i64 %i, 1
  %second = shl i64 %i, 1
  %word = or i64 %second, 1
  %part = call i64 @plait_get(ptr %ranges, i64 %word)
  %total1 = add i64 %total, %part
  %summed = icmp sge i64 %i1, %n
  br i1 %summed, label %all, label %sum
all:
  %done = call i64 (i64, ...) @syscall(i64 TOGETHER, i64 %fd, ptr %ranges, i64 %n, i64 4, i64 0)
  %well = icmp eq i64 %done, %total1
  br i1 %well, label %out, label %refused
refused:
  call void @plait_set(ptr %root, i64 PIDFD, i64 -1)
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ 0, %refused ], [ %k1, %one ]
  %over = icmp sge i64 %k, %n
  br i1 %over, label %out, label %one
one:
  %row = mul i64 %k, 2
  %row1 = add i64 %row, 1
  %start = call i64 @plait_get(ptr %ranges, i64 %row)
  %length = call i64 @plait_get(ptr %ranges, i64 %row1)
  %address = inttoptr i64 %start to ptr
  %ignored = call i32 @madvise(ptr %address, i64 %length, i32 4)
  %k1 = add i64 %k, 1
  br label %next
out:
  ret void
}

define internal void @plait_drop_unit(ptr %root, ptr %unit) {
entry:
  %first = call i64 @plait_get(ptr %unit, i64 3)
  %n = call i64 @plait_get(ptr %unit, i64 4)
  %pieces = inttoptr i64 %first to ptr
  %at = call i64 @plait_get(ptr %root, i64 RANGES)
  %ranges = inttoptr i64 %at to ptr
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k1, %done ]
  %over = icmp sge i64 %k, %n
  br i1 %over, label %out, label %look
look:
  %k1 = add i64 %k, 1
  %row = mul i64 %k, PIECE_WORDS
  %row2 = add i64 %row, 2
  %row3 = add i64 %row, 3
  %start = call i64 @plait_get(ptr %pieces, i64 %row2)
  %length = call i64 @plait_get(ptr %pieces, i64 %row3)
  %some = icmp sgt i64 %length, 0
  br i1 %some, label %note, label %done
note:
  %filled = call i64 @plait_get(ptr %root, i64 N_RANGES)
  %to = mul i64 %filled, 2
  %to1 = add i64 %to, 1
  call void @plait_set(ptr %ranges, i64 %to, i64 %start)
  call void @plait_set(ptr %ranges, i64 %to1, i64 %length)
  call void @plait_add(ptr %root, i64 N_RANGES, i64 1)
  %now = add i64 %filled, 1
  %full = icmp sge i64 %now, MOST
  br i1 %full, label %flush, label %done
flush:
  call void @plait_drop_ranges(ptr %root)
  br label %done
done:
  br label %next
out:
  %size = call i64 @plait_get(ptr %unit, i64 1)
  %less = sub i64 0, %size
  call void @plait_set(ptr %unit, i64 0, i64 0)
  call void @plait_add(ptr %root, i64 BYTES, i64 %less)
  call void @plait_add(ptr %root, i64 DROPPED, i64 1)
  ret void
}

define internal i1 @plait_make_room(ptr %root, i64 %need, i64 %epoch) {
entry:
  %n = call i64 @plait_get(ptr %root, i64 N_ORDER)
  %at = call i64 @plait_get(ptr %root, i64 ORDER)
  %order = inttoptr i64 %at to ptr
  %capacity = call i64 @plait_get(ptr %root, i64 CAPACITY)
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k1, %skip ]
  %held = call i64 @plait_get(ptr %root, i64 BYTES)
  %sum = add i64 %held, %need
  %fits = icmp sle i64 %sum, %capacity
  br i1 %fits, label %well, label %more
more:
  %over = icmp sge i64 %k, %n
  br i1 %over, label %badly, label %look
look:
  %k1 = add i64 %k, 1
  %number = call i64 @plait_get(ptr %order, i64 %k)
  %unit = call ptr @plait_unit(ptr %root, i64 %number)
  %resident = call i64 @plait_get(ptr %unit, i64 0)
  %mark = call i64 @plait_get(ptr %unit, i64 2)
  %there = icmp ne i64 %resident, 0
  %unused = icmp ne i64 %mark, %epoch
  %free = and i1 %there, %unused
  br i1 %free, label %drop, label %skip
drop:
  call void @plait_drop_unit(ptr %root, ptr %unit)
  br label %skip
skip:
  br label %next
well:
  call void @plait_drop_ranges(ptr %root)
  ret i1 true
badly:
  call void @plait_drop_ranges(ptr %root)
  ret i1 false
}

define void @plait_fetch_body(ptr %lo, ptr %hi, ptr %offsets, ptr %root, ptr %firsta, ptr %counta) {
entry:
  %first = ptrtoint ptr %firsta to i64
  %count = ptrtoint ptr %counta to i64
  %before = call i64 @plait_get(ptr %root, i64 EPOCH)
  %epoch = add i64 %before, 1
  call void @plait_set(ptr %root, i64 EPOCH, i64 %epoch)
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k1, %counted ]
  %wanted = phi i64 [ 0, %entry ], [ %wanted1, %counted ]
  %lacking = phi i64 [ 0, %entry ], [ %lacking1, %counted ]
  %need = phi i64 [ 0, %entry ], [ %need1, %counted ]
  %use = phi i64 [ 0, %entry ], [ %use1, %counted ]
  %over = icmp sge i64 %k, %count
  br i1 %over, label %known, label %look
look:
  %k1 = add i64 %k, 1
  %begin = call i64 @plait_get(ptr %offsets, i64 %k)
  %end = call i64 @plait_get(ptr %offsets, i64 %k1)
  %rows = icmp sgt i64 %end, %begin
  %number = add i64 %first, %k
  %unit = call ptr @plait_unit(ptr %root, i64 %number)
  br i1 %rows, label %want, label %counted
want:
  call void @plait_set(ptr %unit, i64 2, i64 %epoch)
  %there = call i64 @plait_get(ptr %unit, i64 0)
  %size = call i64 @plait_get(ptr %unit, i64 1)
  %absent = icmp eq i64 %there, 0
  %one = zext i1 %absent to i64
  %part = select i1 %absent, i64 %size, i64 0
  br label %counted
counted:
  %w = phi i64 [ 0, %look ], [ 1, %want ]
  %l = phi i64 [ 0, %look ], [ %one, %want ]
  %s = phi i64 [ 0, %look ], [ %part, %want ]
  %u = phi i64 [ 0, %look ], [ %size, %want ]
  %wanted1 = add i64 %wanted, %w
  %lacking1 = add i64 %lacking, %l
  %need1 = add i64 %need, %s
  %use1 = add i64 %use, %u
  br label %next
known:
  %hits = sub i64 %wanted, %lacking
  call void @plait_add(ptr %root, i64 FETCHES, i64 1)
  call void @plait_add(ptr %root, i64 HITS, i64 %hits)
  call void @plait_add(ptr %root, i64 MISSES, i64 %lacking)
  %some = icmp sgt i64 %lacking, 0
  br i1 %some, label %check, label %out
check:
  %capacity = call i64 @plait_get(ptr %root, i64 CAPACITY)
  %fit = icmp sle i64 %use, %capacity
  br i1 %fit, label %room, label %stop
room:
  %made = call i1 @plait_make_room(ptr %root, i64 %need, i64 %epoch)
  br i1 %made, label %bring, label %stop
bring:
  %j = phi i64 [ 0, %room ], [ %j1, %brought ]
  %ready = icmp sge i64 %j, %count
  br i1 %ready, label %sum, label %see
see:
  %j1 = add i64 %j, 1
  %wantedn = add i64 %first, %j
  %wantedu = call ptr @plait_unit(ptr %root, i64 %wantedn)
  %mark = call i64 @plait_get(ptr %wantedu, i64 2)
  %is = call i64 @plait_get(ptr %wantedu, i64 0)
  %ours = icmp eq i64 %mark, %epoch
  %gone = icmp eq i64 %is, 0
  %todo = and i1 %ours, %gone
  br i1 %todo, label %load, label %brought
load:
  %loaded = call i1 @plait_load_unit(ptr %wantedu)
  br i1 %loaded, label %note, label %stop
note:
  %bytes = call i64 @plait_get(ptr %wantedu, i64 1)
  call void @plait_set(ptr %wantedu, i64 0, i64 1)
  call void @plait_add(ptr %root, i64 BYTES, i64 %bytes)
  call void @plait_add(ptr %root, i64 MOVED, i64 %bytes)
  br label %brought
brought:
  br label %bring
sum:
  %held = call i64 @plait_get(ptr %root, i64 BYTES)
  %peak = call i64 @plait_get(ptr %root, i64 PEAK)
  %higher = icmp sgt i64 %held, %peak
  %most = select i1 %higher, i64 %held, i64 %peak
  call void @plait_set(ptr %root, i64 PEAK, i64 %most)
  br label %out
stop:
  call void @plait_set(ptr %root, i64 STOP, i64 1)
  br label %out
out:
  ret void
}
"""


@functools.cache
def fetch_function() -> int:
    """Address of the native ``fetch(lo, hi, offsets, root, first, count)``, to be called like a
    kernel: makes those of ``count`` units from number ``first`` on resident that have rows.

    Where it cannot, it sets `Root.STOP` and leaves all in a state that `Residency.pull` reads.
    """
    words = {word.name: word.value for word in Root}
    words |= {"UNIT_WORDS": UNIT, "PIECE_WORDS": PIECE, "MOST": MOST, "TOGETHER": PROCESS_MADVISE}
    text = re.sub(r"\b[A-Z][A-Z_]+\b", lambda found: str(words[found[0]]), native.WORDS + _IR)
    params = ("lo", "hi", "offsets", "root", "first", "count")
    return native.load("fetch", [native.Function("plait_fetch", params, text)])["plait_fetch"]


class Residency:
    """The native state of a tier. Units are numbered over all sites, in the order of these."""

    def __init__(self) -> None:
        self.root = np.zeros(len(Root), np.int64)
        self._ranges = np.zeros(2 * MOST, np.int64)
        self.root[Root.RANGES] = self._ranges.ctypes.data
        self._units = np.zeros((0, UNIT), np.int64)
        self._pieces: list[np.ndarray] = []
        self._order = np.zeros(0, np.int64)
        self.first: list[int] = []
        """Of each site the number of its first unit."""

    @property
    def address(self) -> int:
        """Of the root."""
        return self.root.ctypes.data

    def add(self, site: Site) -> None:
        """Takes in the next site; no launch that fetches may be under way."""
        rows = np.zeros((len(site.bytes), UNIT), np.int64)
        units = site.units or [()] * len(rows)  # what nobody fetches any more has no banks
        for row, unit, size in zip(rows, units, site.bytes, strict=True):
            pieces = np.array([(*b.span(n), *b.pages(n)) for b, n in unit], np.int64)
            self._pieces.append(pieces)
            row[1], row[3], row[4] = size, pieces.ctypes.data, len(pieces)
        self.first.append(len(self._units))
        self._units = np.concatenate([self._units, rows])
        self.root[Root.UNITS] = self._units.ctypes.data

    def rank(self, order: Iterable[tuple[int, int]]) -> None:
        """Takes the (site, unit) to be dropped, in this order."""
        self._order = np.array([self.first[site] + unit for site, unit in order], np.int64)
        self.root[Root.ORDER], self.root[Root.N_ORDER] = self._order.ctypes.data, len(self._order)

    def push(self, resident: Sequence[int], size: int) -> None:
        """Takes over what is resident: units of each site as bits, and all of it in bytes."""
        for first, last, mask in zip(self.first, self._ends(), resident, strict=True):
            bits = np.array([*mask.to_bytes((last - first + 7) // 8, "little")], np.uint8)
            self._units[first:last, 0] = np.unpackbits(bits, count=last - first, bitorder="little")
        self.root[Root.BYTES] = size

    def pull(self) -> tuple[list[int], int]:
        """What `push` takes, as it is now."""
        there = self._units[:, 0].astype(np.uint8)
        resident = [
            int.from_bytes(np.packbits(there[a:b], bitorder="little").tobytes(), "little")
            for a, b in zip(self.first, self._ends(), strict=True)
        ]
        return resident, int(self.root[Root.BYTES])

    def begin_anew(self) -> None:
        """The latest launch stopped, and will be made again: what it asked for counts once."""
        self.root[Root.FETCHES : Root.DROPPED] = 0

    def counted(self) -> tuple[int, ...]:
        """Fetches, hits, misses, units dropped, bytes moved since the last call; peak bytes."""
        found = tuple(self.root[Root.FETCHES : Root.PEAK + 1].tolist())
        self.root[Root.FETCHES : Root.PEAK + 1] = 0
        return found

    def _ends(self) -> list[int]:
        return [*self.first[1:], len(self._units)]
