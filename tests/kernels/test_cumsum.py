"""Running totals of whole numbers, against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import plait
from plait.runtime.plan import KernelStep, LibraryStep

KINDS = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def steps(function, x: Tensor) -> set[type]:
    """The kinds of steps of a compiled function, once it has given what torch gives."""
    compiled = plait.compile(function, tune="off")
    have, want = compiled(x), function(x)
    assert have.dtype == want.dtype and torch.equal(have, want)
    return {type(s) for s in compiled.plan.steps}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_type_and_dimension(dtype: torch.dtype, dim: int) -> None:
    x = torch.randint(-9, 9, (3, 5, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert steps(lambda x: torch.cumsum(x, dim), x) == {KernelStep}
    assert steps(lambda x: torch.cumsum(x, dim), x.permute(2, 0, 1)) == {KernelStep}


@pytest.mark.parametrize("shape", [(7,), (1, 1), (0, 4), (4, 0), (2, 6000), (300, 2)])
def test_long_short_and_empty(shape: tuple[int, ...]) -> None:
    x = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(1))
    steps(lambda x: torch.cumsum(x, -1) * 2, x)
    steps(lambda x: torch.cumsum(x, 0), x)


def test_totals_wrap_around_as_torchs_do() -> None:
    x = torch.tensor([2**62, 2**62, 2**62, -5])
    assert steps(lambda x: torch.cumsum(x, 0), x) == {KernelStep}


def test_sizes_may_be_open() -> None:
    compiled = plait.compile(lambda x: torch.cumsum(x, 1), tune="off")
    for shape in ((3, 5), (4, 7), (9, 130), (2, 2)):
        x = torch.randint(-9, 9, shape)
        assert torch.equal(compiled(x), torch.cumsum(x, 1))
    assert len(compiled.programs) == 2


def test_fractions_and_other_results_are_the_librarys() -> None:
    assert LibraryStep in steps(lambda x: torch.cumsum(x, 0), torch.randn(9))
    narrow = torch.tensor([100, 100])
    assert LibraryStep in steps(lambda x: torch.cumsum(x, 0, dtype=torch.int8), narrow)
    assert LibraryStep in steps(lambda x: torch.cumsum(x, 0) + 1, torch.tensor(3))
