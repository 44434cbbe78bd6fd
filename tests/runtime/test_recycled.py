"""Tensors where others were freed: never where one lives."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.runtime.recycled import _LEAST, Recycled

SIZES = [1, _LEAST // 4 - 1, _LEAST // 4, _LEAST // 2, _LEAST]


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 9), st.booleans()), max_size=40))
def test_no_two_share_memory(steps: list[tuple[int, int, bool]]) -> None:
    spare = 3 * _LEAST
    empty = Recycled(spare)
    live: list[tuple[torch.Tensor, int]] = []
    for number, (size, freed, view) in enumerate(steps):
        new = empty((size,), None, torch.float32).fill_(number)
        live.append((new[size // 2 :] if view else new, number))
        del new
        if freed < len(live):
            del live[freed]
        assert all((tensor == value).all() for tensor, value in live)
        used = sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t, _ in live}.values()
        )
        kept = sum(s.nbytes() for s in empty._kept)
        assert kept <= used + spare + 2 * 4 * max(SIZES)  # what was freed since it was made


def test_the_freed_is_used_again() -> None:
    empty = Recycled(0)
    first = empty((64, 512), (1, 64), torch.float32)
    assert first.stride() == (1, 64)
    where = first.data_ptr()
    view = first[3:]
    del first
    second = empty((512, 64), None, torch.float32)
    assert second.is_contiguous() and second.data_ptr() != where
    del view
    assert empty((64, 256), None, torch.float64).data_ptr() == where


def test_no_more_is_kept_than_is_spare() -> None:
    empty = Recycled(5 * _LEAST)
    for size in range(1, 9):
        empty((size * _LEAST,), None, torch.uint8)
    assert sum(s.nbytes() for s in empty._kept) <= 5 * _LEAST + 8 * _LEAST
    empty((9 * _LEAST,), None, torch.uint8)
    assert [s.nbytes() // _LEAST for s in empty._kept] == [9]  # 8 is more than is spare
