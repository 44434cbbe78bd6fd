"""Makes an exact check of many objects quick: memory is compared before Python is asked.

A *full* check asks every object and is right by itself. In front of it stands a table of words
(`runtime.words`) that cannot all be as they were where the full check would find a change. A call
compares the table; only where it differs the full check runs, and if that finds nothing (something
else in the same dictionary changed) the table is taken again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ...runtime.words import Words
from ..capture.arguments import is_plain
from . import samples
from .layout import INLINE, WORD, dict_tag, tensor_layout
from .samples import word

Row = tuple[int, int]
_TRIES = 3


def quick(
    full: Callable[[], bool],
    take: Callable[[], Words | None],
    aside: Sequence[Callable[[], bool]] = (),
) -> Callable[[], bool]:
    """A function that says what ``full`` says, and mostly need not ask it. Safe under threads.

    ``take`` makes a table of what ``full`` looks at, None where that cannot be; ``aside`` tell
    whether what has no place in a table changed. None is called before the first check.
    """
    words: Words | None = None
    moved: Callable[[], Any] = _unknown
    failures = 0

    def changed() -> bool:
        nonlocal words, moved, failures
        if not moved():
            return False
        # Taken before the objects are asked, and never into a table in use: what another thread
        # changes from here on is found by the next call.
        fresh = words.again() if words is not None else None
        if (fresh is None or fresh.moved()) and failures < _TRIES:
            fresh = take()
            failures += fresh is None
        if full():
            return True
        words = fresh
        if fresh is None:
            moved = _unknown
        elif aside:
            moved = lambda: fresh.moved() or any(x() for x in aside)  # noqa: E731
        else:
            moved = fresh.moved
        return False

    return changed


def limits() -> str:
    """What guards cannot be quick about in this process, in words; empty if nothing."""
    missing = {"tensors": tensor_layout(), "dictionaries": dict_tag()}
    return " and ".join(what for what, found in missing.items() if found is None)


def _unknown() -> bool:
    return True


def tag_rows(tables: Iterable[Any]) -> list[Row] | None:
    """Rows that differ once one of some dictionaries changed; None where that cannot be told."""
    tag = dict_tag()
    unique = {id(t): t for t in tables}
    if not unique:
        return []
    if tag is None or not all(isinstance(t, dict) for t in unique.values()):
        return None
    return [(place + tag, word(place + tag)) for place in sorted(unique)]


def readable(tensor: Tensor) -> bool:
    """Whether `tensor_rows` takes ``tensor``."""
    known = type(tensor) in (Tensor, nn.Parameter) and is_plain(tensor)
    return known and tensor.ndim <= INLINE and tensor_layout() is not None


def tensor_rows(tensors: Sequence[Tensor]) -> list[Row]:
    """Rows for the memory, version, sizes and strides of `readable` tensors, and for `samples`.

    Of all tensors come first the pointers to what later rows look into, and rows of a kind in the
    order of their addresses, as memory is read best.
    """
    if not tensors:
        return []
    at = tensor_layout()
    assert at is not None
    objects, impls, ends = set[Row](), set[Row](), set[Row]()
    for tensor in tensors:
        impl, storage = tensor._cdata, tensor.untyped_storage()
        place = storage._cdata
        objects.add((id(tensor) + at.object_impl, impl))
        impls.add((impl + at.impl_storage, place))
        impls.add((impl + at.impl_offset, int(tensor.storage_offset())))
        impls.add((impl + at.impl_ndim, tensor.ndim))
        for start, values in (at.impl_sizes, tensor.shape), (at.impl_strides, tensor.stride()):
            impls.update((impl + start + WORD * k, value) for k, value in enumerate(values))
        ends.add((place + at.storage_data, storage.data_ptr()))
        if tensor.is_inference():  # such have no counter
            impls.add((impl + at.impl_counter, 0))
            continue
        counter = word(impl + at.impl_counter)
        impls.add((impl + at.impl_counter, counter))
        if counter:
            version = counter + at.counter_version
            ends.add((version, word(version) >> 32 << 32 | tensor._version))
    contents = samples.rows(tensors)
    return [*sorted(objects), *sorted(impls), *sorted(ends), *contents]


def table(tables: Iterable[Any], tensors: Sequence[Tensor]) -> Words | None:
    """Words that differ once a dictionary or a tensor, all of them `readable`, changed; None where
    there are none such, or where memory does not hold what torch says. Keeps all of them alive.
    """
    tables = list(tables)
    tags = tag_rows(tables)
    if tags is None:
        return None
    words = Words([*tags, *tensor_rows(tensors)], free=len(tags), keep=(tables, list(tensors)))
    return None if words.moved() else words
