"""Sizes that are computed by torch's functions, and so are tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import plait


def floor(length: int) -> Any:
    return torch.div(length - 1, 3, rounding_mode="floor") + 1


def trunc(length: int) -> Any:
    return 2 * torch.div(length, 2, rounding_mode="trunc") - 1


def right(length: int) -> Any:
    return (9 - torch.div(length, 4, rounding_mode="floor")) // 2


def written(length: int) -> Any:
    number = torch.div(length, 2, rounding_mode="floor")
    number += 1
    return number


@pytest.mark.parametrize("number", [floor, trunc, right])
def test_one_program_takes_every_size(number: Callable[[int], Any]) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = number(x.shape[0])
        made = x.new_zeros((count + 1, 2)) + torch.ones(count.item() + 1, 1)
        made = made.expand(count, count + 1, 2)
        return made if made.shape[0] > 1 else made + 1, x[:count] + x[-count:], count

    compiled = plait.compile(function, tune="off")
    for length in (9, 10, 14, 23):
        x = torch.randn(length, 3, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(compiled(x), function(x))
    assert [len(p.captured.symbols) for p in compiled.programs] == [0, 1]
    assert [r.id for r in compiled.remarks if r.pass_name == "capture"] == ["PLT-CAP-002"]


def test_what_was_written_since_is_no_size() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.new_ones(written(x.shape[0])) + 1

    compiled = plait.compile(function, tune="off")
    for length in (9, 10, 14):
        x = torch.randn(length, 3)
        torch.testing.assert_close(compiled(x), function(x))


def test_in_inference_mode_torch_finds_the_sizes() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(floor(x.shape[0]), 3) + self.weight

    with torch.inference_mode():
        model = Model().eval()
        compiled = plait.compile(model, tune="off")
        for length in (9, 10, 14):
            x = torch.randn(length, 3)
            torch.testing.assert_close(compiled(x), model(x))
    assert len(compiled.programs) == 2, compiled.explain()


def test_other_roundings_are_left_to_torch() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        length = x.shape[0]
        below = torch.div(4 - length, 3, rounding_mode="trunc")
        return (
            x + below,
            x + torch.div(length, 2),
            x[torch.div(length, -3, rounding_mode="floor") :],
        )

    compiled = plait.compile(function, tune="off")
    for length in (9, 10, 14):
        x = torch.randn(length, 3)
        torch.testing.assert_close(compiled(x), function(x))
