"""The first k of a row as PyTorch's CPU operator finds them, equal elements included.

Which of equal elements are among the first is left open by ``torch.topk``, and so is the order
without ``sorted``, but a model shows both: sparse attention reads keys whose scores a ReLU made
equal, a router returns its choice. PyTorch calls ``std::partial_sort`` where k is at most a 64th of
the row, else ``std::nth_element`` and, if asked, ``std::sort``. These are libstdc++'s steps, in the
same order: partitions around a median of three, heaps where too many of them were lopsided, and
insertion sort for what is short.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..emit import Emitter, Expr

MOST = 1024
"""Elements of a row: all of them are copied to the stack."""

SORTED = 17
"""Elements in order: up to here ``std::sort``, which leaves the last alone, inserts."""

HEAPED = 64
"""``std::partial_sort`` is used where k is at most the row's length divided by this."""


def reproducible(size: Any, count: int, ordered: bool) -> bool:
    """Whether `Selection` finds what PyTorch does, of ``count`` among ``size`` elements."""
    if sys.platform != "linux":  # another standard library
        return False
    return isinstance(size, int) and size <= MOST and (not ordered or count <= SORTED)


class Selection:
    """Emits the selection of ``count`` of ``size`` elements on the stack.

    ``values`` and ``places`` are buffers of at least ``size`` elements, of which the first
    ``count`` are what was asked for in the end; ``before(a, b)`` says whether a value comes
    strictly before another one.
    """

    def __init__(
        self,
        em: Emitter,
        values: Expr,
        places: Expr,
        before: Callable[[Expr, Expr], Expr],
        dtype: str,
    ) -> None:
        self.em, self.values, self.places, self.before = em, values, places, before
        self.value, self.place = em.local(1, dtype), em.local(1, "int64")
        self._numbers = [em.local(1, "int64") for _ in range(9)]

    def select(self, size: int, count: int, ordered: bool) -> None:
        """Moves the ``count`` first of ``size`` elements to the front."""
        em = self.em
        if count * HEAPED <= size:
            with self._number(em.i64(count)) as last:
                self._heap_select(em.i64(0), last[0], em.i64(size))
                with T.While(last[0] > 1):
                    T.buffer_store(last, last[0] - 1, [0])
                    self._hold(last[0])
                    self._move(em.i64(0), last[0])
                    self._sift(em.i64(0), em.i64(0), last[0])
            return
        self._nth_element(size, count - 1)
        if ordered:
            self._insert(em.i64(0), em.i64(count - 1))

    def _nth_element(self, size: int, nth: int) -> None:
        """Puts the element at ``nth`` in its place, and those before it in front."""
        em = self.em
        deepest = em.i64(2 * (size.bit_length() - 1))
        with (
            self._number(em.i64(0)) as first,
            self._number(em.i64(size)) as last,
            self._number(deepest) as depth,
            self._number(em.i64(0)) as cut,
        ):
            with T.While(tir.And(last[0] - first[0] > 3, depth[0] > 0)):
                T.buffer_store(depth, depth[0] - 1, [0])
                self._partition(first[0], last[0], cut)
                with T.If(cut[0] <= nth):
                    with T.Then():
                        T.buffer_store(first, cut[0], [0])
                    with T.Else():
                        T.buffer_store(last, cut[0], [0])
            with T.If(last[0] - first[0] > 3):
                with T.Then():
                    self._heap_select(first[0], em.i64(nth + 1), last[0])
                    self._swap(first[0], em.i64(nth))
                with T.Else():
                    self._insert(first[0], last[0])

    def _partition(self, first: Expr, last: Expr, cut: Expr) -> None:
        """``__unguarded_partition_pivot``: where the second part begins is stored to ``cut``."""
        values, before = self.values, self.before
        begin, middle, end = first + 1, first + tir.truncdiv(last - first, 2), last - 1
        a, b, c = (T.bind(values[i]) for i in (begin, middle, end))
        ab, bc, ac = (T.bind(before(x, y)) for x, y in ((a, b), (b, c), (a, c)))
        least = tir.Select(bc, middle, tir.Select(ac, end, begin))
        most = tir.Select(ac, begin, tir.Select(bc, end, middle))
        self._swap(first, T.bind(tir.Select(ab, least, most)))
        pivot = T.bind(values[first])
        with self._number(last) as right, self._number(self.em.i64(1)) as going:
            T.buffer_store(cut, begin, [0])
            with T.While(going[0] > 0):
                with T.While(before(values[cut[0]], pivot)):
                    T.buffer_store(cut, cut[0] + 1, [0])
                T.buffer_store(right, right[0] - 1, [0])
                with T.While(before(pivot, values[right[0]])):
                    T.buffer_store(right, right[0] - 1, [0])
                with T.If(cut[0] < right[0]):
                    with T.Then():
                        self._swap(cut[0], right[0])
                        T.buffer_store(cut, cut[0] + 1, [0])
                    with T.Else():
                        T.buffer_store(going, self.em.i64(0), [0])

    def _insert(self, first: Expr, last: Expr) -> None:
        """Insertion sort: of equal elements the one in front stays there."""
        with T.serial(first + 1, tir.max(last, first + 1)) as i:
            with T.serial(self.em.i64(0), i - first) as k:
                here = i - k
                with T.If(self.before(self.values[here], self.values[here - 1])), T.Then():
                    self._swap(here, here - 1)

    def _heap_select(self, first: Expr, middle: Expr, last: Expr) -> None:
        """Makes ``[first, middle)`` a heap of the first elements, the last of them on top."""
        length = middle - first
        with self._number(tir.truncdiv(length, 2)) as parent:
            with T.While(parent[0] > 0):
                T.buffer_store(parent, parent[0] - 1, [0])
                self._hold(first + parent[0])
                self._sift(first, parent[0], length)
        with T.serial(self.em.i64(0), last - middle) as k:
            here = middle + k
            with T.If(self.before(self.values[here], self.values[first])), T.Then():
                self._hold(here)
                self._move(first, here)
                self._sift(first, self.em.i64(0), length)

    def _sift(self, first: Expr, hole: Expr, length: Expr) -> None:
        """``__adjust_heap`` and ``__push_heap`` with what is held."""
        em, values, before = self.em, self.values, self.before
        with self._number(hole) as here, self._number(hole) as top, self._number(hole) as child:
            with T.While(child[0] < tir.truncdiv(length - 1, 2)):
                right = T.bind(2 * (child[0] + 1))
                fewer = before(values[first + right], values[first + right - 1])
                T.buffer_store(child, tir.Select(fewer, right - 1, right), [0])
                self._move(first + child[0], first + here[0])
                T.buffer_store(here, child[0], [0])
            even = tir.truncmod(length, 2).equal(em.i64(0))
            alone = child[0].equal(tir.truncdiv(length - 2, 2))
            with T.If(tir.all(even, alone, length > 1)), T.Then():
                only = T.bind(2 * child[0] + 1)
                self._move(first + only, first + here[0])
                T.buffer_store(here, only, [0])
            with self._number(em.i64(1)) as going, T.While(going[0] > 0):
                T.buffer_store(going, em.i64(0), [0])
                with T.If(here[0] > top[0]), T.Then():
                    parent = T.bind(tir.truncdiv(here[0] - 1, 2))
                    with T.If(before(values[first + parent], self.value[0])), T.Then():
                        self._move(first + parent, first + here[0])
                        T.buffer_store(here, parent, [0])
                        T.buffer_store(going, em.i64(1), [0])
            T.buffer_store(values, self.value[0], [first + here[0]])
            T.buffer_store(self.places, self.place[0], [first + here[0]])

    def _hold(self, at: Expr) -> None:
        T.buffer_store(self.value, self.values[at], [0])
        T.buffer_store(self.place, self.places[at], [0])

    def _move(self, source: Expr, target: Expr) -> None:
        T.buffer_store(self.values, self.values[source], [target])
        T.buffer_store(self.places, self.places[source], [target])

    def _swap(self, a: Expr, b: Expr) -> None:
        value, place = T.bind(self.values[a]), T.bind(self.places[a])
        self._move(b, a)
        T.buffer_store(self.values, value, [b])
        T.buffer_store(self.places, place, [b])

    @contextmanager
    def _number(self, value: Expr) -> Iterator[Expr]:
        """A variable on the stack, of which there are few: they are used again."""
        number = self._numbers.pop()
        T.buffer_store(number, value, [0])
        yield number
        self._numbers.append(number)
