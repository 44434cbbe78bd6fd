"""What is seen of results beside their values: whose memory they are, and how they lie in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import plait

LAST = torch.channels_last


def _bumped(x: Tensor) -> Any:
    return F.relu(x.add_(1), inplace=True), {"twice": x * 2, "same": x}


def test_a_written_argument_that_is_returned_is_that_argument(tmp_path: Path) -> None:
    compiled = plait.compile(_bumped, tune="off")
    for rows in (2, 3, 4):
        x, own = torch.arange(rows * 2.0) - 2, torch.arange(rows * 2.0) - 2
        first, others = compiled(x)
        assert first is x and others["same"] is x
        _, want = _bumped(own)
        assert torch.equal(x, own) and torch.equal(others["twice"], want["twice"])
    compiled.save(tmp_path / "m.plait")
    x = torch.ones(6)
    assert plait.load(tmp_path / "m.plait")(x)[0] is x


def test_what_only_has_the_values_of_a_written_argument_is_not_it() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        made = y * 2
        x.copy_(made)
        return made

    x = torch.zeros(3)
    made = plait.compile(function, tune="off")(x, torch.ones(3))
    assert made is not x and torch.equal(made, x)
    made += 1
    assert torch.equal(x, torch.full((3,), 2.0))


def test_arguments_and_views_of_results_are_returned_as_in_eager_mode() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = F.max_pool2d(x, 2)
        return x, pooled[1:], pooled[1:].abs()

    x = torch.randn(3, 4, 6, 12)[..., ::2]
    have, want = plait.compile(function, tune="off")(x), function(x)
    assert have[0] is x
    assert [t.stride() for t in have] == [t.stride() for t in want]
    torch.testing.assert_close(have, want)


def _scaled(x: Tensor) -> Tensor:
    made = F.pad(x, (1, 2)).clone()
    made.mT.mul_(2)
    return made


@pytest.mark.parametrize(
    ("function", "make"),
    [
        (_scaled, lambda n: torch.randn(4, n, n + 1)),
        (lambda x: x * 2, lambda n: torch.randn(4, n).T),
        (lambda x: x.sum(2) + 1, lambda n: torch.randn(5, 3, n, 2).permute(3, 2, 1, 0)),
        (lambda x: x.softmax(-1).mT.sigmoid(), lambda n: torch.randn(2, n, n + 1)),
        (lambda x: (x * 2)[..., 0].contiguous(), lambda n: torch.randn(n, n + 1, 2)),
        (lambda x: x.softmax(-1).mT.contiguous().view(-1), lambda n: torch.randn(2, n, n + 1)),
        (
            lambda x: F.max_pool2d(x, 2) + 1,
            lambda n: torch.randn(n, 3, 6, n + 4).contiguous(memory_format=LAST),
        ),
        (lambda x: F.adaptive_avg_pool1d(x, 7), lambda n: torch.randn(n, 3, 4)),
    ],
)
def test_results_of_open_sizes_lie_as_in_eager_mode(
    function: Callable[[Tensor], Tensor], make: Callable[[int], Tensor]
) -> None:
    compiled = plait.compile(function, tune="off")
    for n in (2, 5, 3):
        x = make(n)
        want, have = function(x), compiled(x)
        torch.testing.assert_close(have, want)
        assert have.stride() == want.stride()
    assert len(compiled.programs) == 2
