"""How many blocks fit on a multiprocessor, and which variants suit one launch."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.kernels.group import Unsupported
from plait.kernels.occupancy import (
    SM90,
    Candidate,
    block_seconds,
    choose,
    fused_seconds,
    resident_blocks,
)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 32, 0, 8),  # threads
        (32, 16, 0, 32),  # blocks
        (256, 64, 0, 4),  # registers
        (256, 255, 0, 1),
        (128, 32, 48 << 10, 4),  # shared memory, of which each block takes a KiB more
        (128, 32, (227 << 10), 1),
        (1024, 65, 0, 0),  # not one
        (33, 128, 0, 8),  # a warp with one thread is a warp
    ],
)
def test_blocks_on_a_multiprocessor_of_sm_90(
    threads: int, registers: int, shared: int, blocks: int
) -> None:
    assert resident_blocks(threads, registers, shared) == blocks


def test_a_block_takes_the_launch_s_time_over_its_waves() -> None:
    full = Candidate(132 * 8, 256, 32, 0, 1e-5)
    assert block_seconds(full) == 1e-5
    assert block_seconds(Candidate(132 * 8 * 3 + 1, 256, 32, 0, 1e-5)) == 0.25e-5
    with pytest.raises(ValueError, match="no block"):
        block_seconds(Candidate(1, 1024, 255, 0, 1.0))


def test_the_fastest_alone_is_not_the_best_together() -> None:
    small = Candidate(132 * 8 * 10, 256, 32, 0, 10e-6)
    greedy = Candidate(132, 256, 255, 0, 1.0e-6)  # one block a multiprocessor
    frugal = Candidate(132, 256, 32, 0, 1.2e-6)
    assert choose([[greedy, frugal]]).picks == (0,)
    together = choose([[small], [greedy, frugal]])
    assert together.picks == (0, 1) and together.resident == 8
    # With the fastest the others' blocks would come one by one.
    assert fused_seconds([small, greedy]) > 7 * fused_seconds([small, frugal])
    assert together.seconds == pytest.approx(10e-6 + 1.2e-6 / 8)


def test_the_longest_block_bounds_a_launch() -> None:
    lone = Candidate(1, 128, 32, 0, 5e-6)
    assert fused_seconds([lone, Candidate(132, 128, 32, 0, 1e-6)]) == 5e-6


candidates = st.builds(
    Candidate,
    blocks=st.sampled_from([1, 40, 132, 1000, 5000]),
    threads=st.sampled_from([128, 256]),
    registers=st.sampled_from([16, 40, 96, 255]),
    shared_bytes=st.sampled_from([0, 3000, 20000, 48 << 10]),
    seconds=st.floats(1e-6, 1e-3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(candidates, min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_choice_is_the_best_of_all(kernels: list[list[Candidate]]) -> None:
    every = [
        fused_seconds(picked)
        for picked in itertools.product(*kernels)
        if len({c.threads for c in picked}) == 1
    ]
    if not every:
        with pytest.raises(Unsupported, match="PLT-HFU-001"):
            choose(kernels)
        return
    choice = choose(kernels)
    picked = [ks[i] for ks, i in zip(kernels, choice.picks, strict=True)]
    assert len({c.threads for c in picked}) == 1
    assert choice.seconds == fused_seconds(picked) == pytest.approx(min(every))


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one variant"):
        choose([[Candidate(1, 32, 8, 0, 1.0)], []])
    with pytest.raises(ValueError, match="no time"):
        Candidate(1, 32, 8, 0, 0.0)


def test_the_roofline() -> None:
    assert SM90.seconds(67e12, 1) == 1.0 and SM90.seconds(1, 4.8e12) == 1.0
