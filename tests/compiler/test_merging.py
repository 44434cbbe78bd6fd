"""Mergers in whole models: right when forced, measured once, kept for the next compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
from plait.compiler.measure import merging

FORCED = "normalize,merge-parallel-ops{least_gain=-1e9},fuse-vertical"


class Attention(nn.Module):
    """Self-attention whose projections read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Branches of convolutions over one tensor, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 4, 1)
        self.c, self.pool = nn.Conv2d(4, 8, 3, padding=1), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
        return torch.cat([a, self.c(b), self.pool(x)], 1)


CASES = [(Attention, (2, 5, 32)), (Block, (1, 8, 9, 9))]


def _ids(compiled: Any) -> list[str]:
    return [r.id for r in compiled.remarks if r.id.startswith("PLT-MRG")]


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_merged_models_compute_what_eager_does(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,), pipeline=FORCED)
        assert _ids(compiled) == ["PLT-MRG-001"]
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_merger_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(3, 7, 32)
    with torch.no_grad():
        first = plait.compile(model, example_inputs=(x,), pipeline=FORCED)
        monkeypatch.setattr(merging, "timed", None)  # calling it would fail
        other = Attention().eval()
        second = plait.compile(other, example_inputs=(x,), pipeline=FORCED)
        torch.testing.assert_close(second(x), other(x), rtol=1e-4, atol=1e-5)
    reasons = [[r.reason for r in c.remarks if r.id == "PLT-MRG-001"] for c in (first, second)]
    assert len(reasons[0]) == 1 and reasons[0] == reasons[1]


def test_sizes_that_calls_choose_are_not_measured() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 32)
    shapes = {"x": {1: torch.export.Dim("tokens", min=2, max=64)}}
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,), pipeline=FORCED, dynamic_shapes=shapes)
        assert _ids(compiled) == ["PLT-MRG-004"]
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_measured_where_nothing_is_tuned() -> None:
    model, x = Attention().eval(), torch.randn(4, 3, 32)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x,), pipeline=FORCED, tune="off")
    assert _ids(compiled) == ["PLT-MRG-004"]
