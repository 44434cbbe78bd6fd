"""Distributions that check their parameters and samples."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, Beta, Normal, TransformedDistribution

import plait


@pytest.fixture(autouse=True)
def checking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distributions check, as they do until torch.compile is used in a process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


class Forecast(nn.Module):
    """The likelihood of a share under a distribution whose parameters are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.calls, torch.Tensor)
        self.calls += 1
        a, b = self.hidden(x).unbind(-1)
        shifted = TransformedDistribution(Normal(a, b.exp()), [AffineTransform(1.0, 2.0)])
        return -Beta(a.exp(), b.exp()).log_prob(y).mean() - shifted.log_prob(y).mean()


def test_checks_that_hold_leave_a_program_and_others_raise_as_in_eager_mode() -> None:
    torch.manual_seed(0)
    model = Forecast().eval()
    twin = copy.deepcopy(model)
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        for batch in (5, 6, 7):
            x, y = torch.randn(batch, 4), torch.rand(batch)
            torch.testing.assert_close(compiled(x, y), twin(x, y))
        assert len(compiled.programs) == 2
        runs = sum(p.calls for p in compiled.programs)
        bad_parameter, bad_sample = (x * float("nan"), y), (x, y + 2)
        for given, cause in ((bad_parameter, "parameter"), (bad_sample, "value argument")):
            with pytest.raises(ValueError, match=cause) as want:
                twin(*given)
            with pytest.raises(ValueError, match=cause) as have:
                compiled(*given)
            assert str(have.value) == str(want.value)
        torch.testing.assert_close(compiled(x, y), twin(x, y))
    assert sum(p.calls for p in compiled.programs) == runs + 3, "each was tried"
    assert torch.equal(model.calls, twin.calls)
    assert not [r for r in compiled.remarks if r.pass_name == "capture" and r.kind == "missed"]


def test_a_saved_program_says_what_was_invalid(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return Normal(x, x.exp()).log_prob(x * 2)

    compiled = plait.compile(function, tune="off")
    x = torch.randn(5)
    torch.testing.assert_close(compiled(x), function(x))
    compiled.save(tmp_path / "saved")
    loaded = plait.load(tmp_path / "saved")
    torch.testing.assert_close(loaded(x), function(x))
    with pytest.raises(RuntimeError, match="a distribution was given invalid values"):
        loaded(x * float("nan"))


def test_questions_of_others_are_not_taken_for_checks() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch._is_all_true(x > 0) else x - 1

    compiled = plait.compile(function, tune="off")
    for x in (torch.ones(3), -torch.ones(3)):
        torch.testing.assert_close(compiled(x), function(x))
