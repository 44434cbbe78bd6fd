"""Elementary functions of every magnitude, against the same in float64."""

from __future__ import annotations

import functools

import pytest
import torch

from .harness import run_kernel
from .test_pointwise import lower


def floats() -> torch.Tensor:
    """Of all exponents, whatever their bits; those next to infinity; and what is no number."""
    torch.manual_seed(0)
    below = 0x7F800000
    drawn = torch.randint(0, below, (100_000,))
    ends = torch.cat([torch.arange(512), torch.arange(below - 512, below + 2)])
    steps = (torch.arange(256)[:, None] * (1 << 23) + torch.arange(-8, 8)).flatten()
    sizes = torch.cat([drawn, ends, steps.clamp(0, below)])
    x = sizes.to(torch.int32).view(torch.float32)
    return torch.cat([x, -x])


def test_angles_of_any_size() -> None:
    """float32 is spaced wider than a turn from 2^26 on, yet each number has its sine."""
    x = floats()
    sine, cosine, tangent = run_kernel(lower(lambda x: (x.sin(), x.cos(), x.tan()), [x]), [x])
    wide = x.double()
    for have, want in ((sine, wide.sin()), (cosine, wide.cos())):
        torch.testing.assert_close(have.double(), want, rtol=0, atol=1e-7, equal_nan=True)
        torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(tangent.double(), wide.tan(), rtol=1e-5, atol=1e-10, equal_nan=True)
    bits = x.half()
    (have,) = run_kernel(lower(lambda x: x.cos(), [bits]), [bits])
    torch.testing.assert_close(have, bits.cos(), equal_nan=True)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_as_near_as_torchs(approximate: str) -> None:
    x = torch.cat([floats(), torch.linspace(-9, 9, 100_001)])
    gelu = functools.partial(torch.nn.functional.gelu, approximate=approximate)
    (have,) = run_kernel(lower(gelu, [x]), [x])
    eager, wide = gelu(x), gelu(x.double())
    numbers = x.isfinite()
    torch.testing.assert_close(have[~numbers], wide[~numbers].float(), equal_nan=True)
    have, eager, wide = have[numbers].double(), eager[numbers].double(), wide[numbers]
    near = wide.abs() < 100
    error, eagers = (have - wide)[near].abs(), (eager - wide)[near].abs()
    assert error.max() < 6e-7 and error.mean() < eagers.mean()
    torch.testing.assert_close(have[~near], wide[~near], rtol=3e-7, atol=0)
    above = (x[numbers] > -1) & (wide.abs() > 1e-37)
    torch.testing.assert_close(have[above], wide[above], rtol=1e-6, atol=0)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_doubles_keeps_their_digits(approximate: str) -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    gelu = functools.partial(torch.nn.functional.gelu, approximate=approximate)
    (have,) = run_kernel(lower(gelu, [x]), [x])
    torch.testing.assert_close(have, gelu(x), rtol=1e-12, atol=1e-14)
