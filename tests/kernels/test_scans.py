"""Running totals and products, against torch: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import plait
from plait.kernels.templates import rows
from plait.runtime.plan import KernelStep, LibraryStep

from .row_check import case, check

WHOLE = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
FRACTIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def steps(function, x: Tensor) -> set[type]:
    """The kinds of steps of a compiled function, once it has given what torch gives."""
    compiled = plait.compile(function, tune="off")
    have, want = compiled(x), function(x)
    assert have.dtype == want.dtype and torch.equal(have, want)
    return {type(s) for s in compiled.plan.steps}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers from -9 to 9."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 18 - 9
    return x.to(dtype)


@pytest.mark.parametrize("dtype", WHOLE + FRACTIONS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_type_and_dimension(dtype: torch.dtype, dim: int) -> None:
    x = drawn(3, 5, 11, dtype=dtype)
    for given in (x, x.permute(2, 0, 1)):
        assert steps(lambda x: torch.cumsum(x, dim), given) == {KernelStep}
        assert steps(lambda x: torch.cumprod(x, dim), given) == {KernelStep}


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


def test_totals_in_another_type() -> None:
    narrow = torch.tensor([100, 100, 27])
    assert steps(lambda x: torch.cumsum(x, 0, dtype=torch.int8), narrow) == {KernelStep}
    large = torch.tensor([2.0**127, 2.0**127, -(2.0**127)])
    assert steps(lambda x: torch.cumsum(x, 0), large) == {KernelStep}  # infinity comes and goes
    assert steps(lambda x: torch.cumsum(x, 0, dtype=torch.float64), large) == {KernelStep}


def test_elements_are_rounded_to_the_type_before_they_are_added() -> None:
    x = drawn(64, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert steps(lambda x: torch.cumsum(x, 0, dtype=dtype), x) == {KernelStep}  # noqa: B023
        assert steps(lambda x: torch.cumprod(x / 9, 0, dtype=dtype), x) == {KernelStep}  # noqa: B023


def test_totals_that_torch_refuses_are_refused() -> None:
    compiled = plait.compile(lambda x: torch.cumsum(x, 0, dtype=torch.bool), tune="off")
    with pytest.raises(NotImplementedError, match="Bool"):
        compiled(torch.tensor([True, False]))


def test_what_is_elementwise_around_a_scan_is_part_of_its_kernel() -> None:
    """As sums of segments in state-space models: masked before and after."""
    seen = torch.ones(24, 24).tril(-1).bool()

    def segments(x: Tensor) -> Tensor:
        spread = x[..., None].expand(2, 3, 24, 24).masked_fill(~seen, 0)
        totals = torch.cumsum(spread, dim=-2)
        return torch.tril(totals * 2).masked_fill(seen.T, -torch.inf)

    compiled = plait.compile(segments, tune="off")
    assert torch.equal(compiled(drawn(2, 3, 24)), segments(drawn(2, 3, 24)))
    assert len(compiled.plan.steps) == 1


def test_a_scan_is_read_by_folds() -> None:
    x = drawn(4, 40)

    def weights(x: Tensor) -> Tensor:
        return torch.softmax(torch.cumsum(x, 1) / 9, 1)

    compiled = plait.compile(weights, tune="off")
    torch.testing.assert_close(compiled(x), weights(x))
    assert {type(s) for s in compiled.plan.steps} == {KernelStep}


def test_every_sweep_of_a_kernel_starts_anew() -> None:
    def centred(x: Tensor) -> Tensor:
        totals = torch.cumsum(x, 1)
        return totals - totals.mean(1, keepdim=True)

    across = drawn(9, 40).T.contiguous().T
    found = [case(rows, name, centred, x) for name, x in (("own", drawn(4, 9)), ("side", across))]
    check(found, atol=1e-5, rtol=1e-5)


def test_a_single_element_is_the_librarys() -> None:
    assert LibraryStep in steps(lambda x: torch.cumsum(x, 0) + 1, torch.tensor(3))
