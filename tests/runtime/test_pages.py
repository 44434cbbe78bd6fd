"""Tensors in huge pages: what they hold, where they lie, and how much memory they take."""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.runtime import pages
from plait.runtime.pages import CHUNK, HUGE, Pool, settle


def in_huge_pages(address: int) -> int:
    """Bytes in huge pages of the mapping around an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(x, 16) for x in span.groups())
            inside = begin <= address < end
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("nothing is mapped there")


def in_memory(address: int, nbytes: int) -> int | None:
    """Bytes of the pages there that are in memory; None where some are not mapped."""
    found = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
    mincore = ctypes.CDLL(None).mincore
    if mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), found):
        return None
    return sum(x & 1 for x in found) * mmap.PAGESIZE


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Bytes that were to come into huge pages at once, and whether they did: a system may decline
    at any time.
    """
    found: list[tuple[int, bool]] = []
    libc = pages._libc()

    class Libc:
        def madvise(self, address: int, length: int, advice: int) -> None:
            status = libc.madvise(address, length, advice)
            if advice == pages._COLLAPSE:
                found.append((length, status == 0))

    monkeypatch.setattr(pages, "_libc", Libc)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_copies_hold_the_same_and_begin_at_cache_lines(dtype: torch.dtype) -> None:
    pool = Pool()
    for shape in [(4097,), (3, 5, 700), (64, 1, 1, 1024)]:
        tensor = (torch.randn(shape) * 9).to(dtype)
        placed = pool.place(tensor)
        assert placed.data_ptr() != tensor.data_ptr() and placed.data_ptr() % 64 == 0
        assert placed.is_contiguous() and torch.equal(placed, tensor)


def test_neighbours_do_not_overlap_and_chunks_follow_each_other() -> None:
    pool = Pool()
    given = [torch.full((HUGE // 4 * 3 + k,), float(k)) for k in range(12)]  # 6 MiB each
    placed = [pool.place(t) for t in given]
    assert all(torch.equal(a, b) for a, b in zip(placed, given, strict=True))
    places = sorted((t.data_ptr(), t.nbytes) for t in placed)
    assert all(a + n <= b for (a, n), (b, _) in zip(places, places[1:], strict=False))
    assert placed[4].data_ptr() - placed[0].data_ptr() == sum(
        -(-t.nbytes // 64) * 64 for t in given[:4]
    )


def test_what_is_large_or_tiny_stays_where_it_is() -> None:
    pool = Pool()
    for count in (0, 1, 1023, CHUNK // 8):
        tensor = torch.ones(count)
        assert pool.place(tensor) is tensor
    assert pool.place(torch.ones(1024)) is not None


def test_small_tensors_get_huge_pages_together(asked: list[tuple[int, bool]]) -> None:
    pool = Pool()
    placed = [pool.place(torch.full((100_000,), float(k))) for k in range(40)]  # 16 MB
    assert sum(n for n, _ in asked) >= 12 << 20
    assert in_huge_pages(placed[20].data_ptr()) >= sum(n for n, given in asked if given)
    assert all(bool((t == k).all()) for k, t in enumerate(placed))


@pytest.mark.parametrize("do", [settle, Pool().place])
def test_large_tensors_keep_address_and_contents(do: Any, asked: list[tuple[int, bool]]) -> None:
    tensor = torch.arange(4 * HUGE, dtype=torch.int32)
    address = tensor.data_ptr()
    assert do(tensor) is tensor and tensor.data_ptr() == address
    [(nbytes, given)] = asked
    assert nbytes >= 15 * HUGE and (in_huge_pages(address + HUGE) >= nbytes or not given)
    assert torch.equal(tensor, torch.arange(4 * HUGE, dtype=torch.int32))


def test_each_page_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Libc:
        def madvise(self, address: int, length: int, advice: int) -> None:
            asked.append((address, length))

    monkeypatch.setattr(pages, "_libc", Libc)
    pool = Pool()
    held = [pool.place(torch.ones(100_000)) for _ in range(40)]
    assert len(held) * 400_000 // HUGE - 1 <= sum(n for _, n in set(asked)) // HUGE <= 8
    assert len(set(asked)) == len({a for a, _ in asked}) == len(asked) // 2


def test_a_little_takes_a_little_memory_and_goes_with_the_last_tensor() -> None:
    pool = Pool()
    placed = [pool.place(torch.ones(2048)) for _ in range(4)]
    address = placed[0].data_ptr()
    found = in_memory(address, CHUNK)
    assert found is not None and 4 * 8192 <= found <= HUGE
    one = pool.place(torch.ones(2048))
    del pool, placed
    gc.collect()
    assert in_memory(address, CHUNK) and torch.equal(one, torch.ones(2048))
    del one
    gc.collect()
    assert in_memory(address, CHUNK) is None


def test_without_huge_pages_or_memory_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(HUGE)
    monkeypatch.setattr(pages, "_COLLAPSE", 9999)  # a system that does not know it
    assert torch.equal(Pool().place(tensor), tensor)

    def none(*_: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(pages.mmap, "mmap", none)
    assert Pool().place(tensor) is tensor
