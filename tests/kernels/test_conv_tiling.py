"""Which tiles are thought to suit a convolution."""

from __future__ import annotations

from typing import Any

import pytest

from plait.kernels.target import Target
from plait.kernels.templates import conv_spec, conv_tiling

from .spatial import case

WIDE = Target("cpu", "skylake-avx512", 64, 32)


def configs(c: int, oc: int, kernel: int, size: int, **options: int) -> list[dict[str, Any]]:
    made = case(1, c, oc, (kernel, kernel), (size, size), padding=kernel // 2, **options)
    group, io = made.trace()[1:]
    return conv_tiling.configs(conv_spec.parse(group, io), io, WIDE)


def tiles(c: int, oc: int, kernel: int, size: int) -> list[tuple[str, int, int]]:
    """(kind, pixels, vectors) of each configuration."""
    return [(f["tile"], f["ri"], f["nv"]) for f in configs(c, oc, kernel, size)]


@pytest.mark.parametrize("shape", [(1024, 416, 1, 14), (64, 64, 1, 56), (256, 256, 3, 14)])
def test_the_first_two_are_tiles_of_different_sizes(shape: tuple[int, ...]) -> None:
    first, second, *_ = tiles(*shape)
    assert first[1:] != second[1:]


def test_pixels_whose_lines_share_a_set_of_the_cache_are_few() -> None:
    assert all(ri <= 10 for _, ri, _ in tiles(1024, 416, 1, 14))  # 4096 bytes apart
    assert any(ri > 10 for _, ri, _ in tiles(256, 64, 3, 14))


def test_tiles_that_need_every_register_are_not_for_single_taps() -> None:
    assert (14, 2) not in {tile[1:] for c in (480, 512, 728) for tile in tiles(c, 416, 1, 14)}


def test_wide_tiles_are_not_for_weights_beyond_the_first_cache() -> None:
    """49 vectors of channels are seven panels of seven, but each step would wait for its panel."""
    assert all(nv <= 5 for _, _, nv in tiles(384, 771, 1, 14))
    assert any(nv == 7 for _, _, nv in tiles(16, 112, 1, 14))


@pytest.mark.parametrize("shape", [(512, 256, 1, 28), (256, 512, 1, 28), (128, 256, 1, 56)])
def test_tiles_that_fit_the_lines_beat_larger_ones(shape: tuple[int, ...]) -> None:
    for kind, pixels, vectors in tiles(*shape)[:2]:
        assert kind == "rows"
        assert shape[-1] % pixels == 0
        assert pixels * vectors <= 16


def test_large_weights_are_read_once_where_a_stride_leaves_little_input() -> None:
    assert configs(1024, 2048, 1, 14, stride=2)[0]["order"] == "panel"


def test_narrow_groups_share_the_lines_of_their_input_while_these_are_cached() -> None:
    """A task of 4 rows, all groups of which follow it, reads 9 rows of 56 KiB."""
    first = configs(256, 256, 3, 56, stride=2, groups=32)[0]
    assert first["order"] == "pixel"
    assert first["ri"] * first["chunk"] <= 4 * 28
