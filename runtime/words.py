"""Words of memory: a native check that many of them still hold what they held.

A *table* is a word for the verdict, the number n of rows, n rows of two words (an address, and what
the 64-bit word there must hold), and `AHEAD` empty rows. Rows are compared in order up to the first
that differs, so a row may rely on those before it: a word that is reached through a pointer comes
after the pointer. Words are fetched some rows before they are compared: what counts is how many
reads are under way at a time when they miss every cache.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Iterable
from typing import Any

from . import native

AHEAD = 24
"""Rows from one that is compared to one whose word is fetched: as many misses as can be waited for
at a time."""

_LOOP = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define void @NAME_body(ptr %table) {
entry:
  %np = getelementptr i64, ptr %table, i64 1
  %n = load i64, ptr %np
  %first = getelementptr i64, ptr %table, i64 2
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k1, %look ]
  %row = phi ptr [ %first, %entry ], [ %row1, %look ]
  %over = icmp uge i64 %k, %n
  br i1 %over, label %all, label %look
look:
  %k1 = add i64 %k, 1
  %row1 = getelementptr i64, ptr %row, i64 2
  %heldp = getelementptr i64, ptr %row, i64 1
  %soonp = getelementptr i64, ptr %row, i64 SOON
  %soon = load ptr, ptr %soonp
  call void @llvm.prefetch.p0(ptr %soon, i32 0, i32 3, i32 1)
  %word = load ptr, ptr %row
  %now = load volatile i64, ptr %word
"""
_MOVED = """
  %held = load i64, ptr %heldp
  %equal = icmp eq i64 %now, %held
  br i1 %equal, label %next, label %differs
all:
  store i64 0, ptr %table
  ret void
differs:
  store i64 %k1, ptr %table
  ret void
}
"""
_READ = """
  store i64 %now, ptr %heldp
  br label %next
all:
  ret void
}
"""


@functools.cache
def _functions() -> tuple[Any, Any]:
    """Native ``moved(table)``, which leaves a verdict (0, or the number of the first row that
    differs, from 1), and ``read(table)``, which fills in what is held. Both keep the GIL: they are
    done sooner than it could be handed over.
    """
    loops = {"plait_words_moved": _MOVED, "plait_words_read": _READ}
    loop = _LOOP.replace("SOON", str(2 * AHEAD))
    found = native.load(
        "words",
        [
            native.Function(name, ("table",), loop.replace("NAME", name) + rest)
            for name, rest in loops.items()
        ],
    )
    moved, read = (ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(found[name]) for name in loops)
    return moved, read


class Words:
    """A table of ``rows`` (address, 64-bit content), compared in this order.

    Every address must be one of an aligned word that may be read as long as the rows before it hold
    what they should; the first ``free`` may be read at all times. ``keep`` is whatever must stay
    alive for that.
    """

    def __init__(self, rows: Iterable[tuple[int, int]], free: int = 0, keep: Any = None) -> None:
        table = array("Q", [0, 0])
        for row in rows:
            table.extend(row)
        table[1] = len(table) // 2 - 1
        table.extend([0] * (2 * AHEAD))  # fetching from nowhere does nothing
        self._set(table, free, keep)

    def _set(self, table: array[int], free: int, keep: Any) -> None:
        check = functools.partial(_functions()[0], table.buffer_info()[0])

        def moved() -> int:
            """0 while every word holds what it did, else the number of the first that does not."""
            check()
            return table[0]

        self.moved, self._table, self._free, self._keep = moved, table, free, keep

    def __len__(self) -> int:
        return self._table[1]

    def again(self) -> Words:
        """The same table, but the first ``free`` words are to be what they are now."""
        table = self._table[:]
        table[1] = self._free
        _functions()[1](table.buffer_info()[0])
        table[1] = len(self)
        other = object.__new__(Words)
        other._set(table, self._free, self._keep)
        return other
