"""Complex numbers: views that only note a conjugate or a sign are computed before kernels read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import plait


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        """What the function gives."""
        return self.function(*args)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.conj().imag + 1,
        lambda x: (x.conj() * x).real.relu() + x.mT.conj().imag.sum() * x.mH.imag.mean(),
    ],
)
def test_conjugates_and_signs_are_seen_by_kernels(function: Callable[[Tensor], Tensor]) -> None:
    model = Of(function).eval()
    compiled = plait.compile(model, tune="off")
    for rows in (2, 3):
        x = torch.randn(rows, 3, dtype=torch.complex64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    assert compiled.programs


def test_expanded_arguments_with_gaps() -> None:
    compiled = plait.compile(lambda x: x.expand(4, 3, 5), tune="off")
    x = torch.randn(3, 2, dtype=torch.complex64)[:, :1]
    assert torch.equal(compiled(x), x.expand(4, 3, 5))
    assert compiled.programs


def test_a_weight_that_is_a_negated_view() -> None:
    model = Of(lambda x: x * model.part).eval()
    model.register_buffer("part", torch.randn(3, dtype=torch.complex64).conj().imag)
    compiled = plait.compile(model, tune="off")
    x = torch.randn(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert compiled.programs
