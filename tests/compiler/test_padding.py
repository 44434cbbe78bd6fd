"""Lengths that are padded to whole chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import plait
from plait.compiler.capture.padding import padded_sizes

CHUNK = 4


def twice(length: int) -> int:
    return (CHUNK - length % CHUNK) % CHUNK


def negated(length: int) -> int:
    return -length % CHUNK


def if_needed(length: int) -> int:
    return CHUNK - length % CHUNK if length % CHUNK != 0 else 0


@pytest.mark.parametrize("pad", [twice, negated, if_needed])
def test_one_program_takes_every_number_of_chunks(pad: Callable[[int], int]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        batch, length = x.shape[:2]
        padded = F.pad(x, (0, 0, 0, pad(length)))
        chunks = padded.reshape(batch, padded.shape[1] // CHUNK, -1, x.shape[2])
        running = chunks.cumsum(2) + chunks.sum(2, keepdim=True).cumsum(1)
        return running.reshape(batch, -1, x.shape[2])[:, :length]

    compiled = plait.compile(function, tune="off")
    for length in (9, 10, 5, 23, 6):
        x = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(compiled(x), function(x))
    assert [len(p.captured.symbols) for p in compiled.programs] == [0, 1]
    x = torch.randn(2, 3, 3)
    torch.testing.assert_close(compiled(x), function(x))
    assert [r.id for r in compiled.remarks if r.pass_name == "capture"] == ["PLT-CAP-002"]


def test_remainders_are_those_of_python() -> None:
    numbers: list[Callable[[int], int]] = [
        lambda n: (4 - n % 4) % 4,
        lambda n: (8 - n % 4) % 8,
        lambda n: (4 - n % 6) % 4,
        lambda n: (4 - (n - 9) % 4) % 4,
        lambda n: -n % 4 + -3 * n % 7,
        lambda n: 4 - n % 4,
        lambda n: n % -3 + (3 - n) % 5,
    ]

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sum() + torch.tensor([number(x.shape[0]) for number in numbers])

    compiled = plait.compile(function, tune="off")
    for length in (5, 7, 10, 11, 17):
        x = torch.zeros(length)
        assert torch.equal(compiled(x), function(x)), length
    kept = torch.SymInt.__mod__, torch.SymInt.__rsub__
    with padded_sizes():
        pass
    assert (torch.SymInt.__mod__, torch.SymInt.__rsub__) == kept
