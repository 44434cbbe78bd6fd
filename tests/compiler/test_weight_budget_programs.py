"""Budgets for weights of models with several programs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import plait

from .budgets import Net, compiled, example

NEAR = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


class Tables(Net):
    """A net that makes a table of its own where it is asked to, and may read all of its weights."""

    def forward(self, x: Tensor, index: Tensor, table: int = 0, whole: bool = False) -> Tensor:
        y = super().forward(x, index)
        if whole:
            y = y + (self.one.up * x[0, 0]).sum() + (self.two.up * x[0, 1]).sum()
        return y + (torch.arange(table).cos() * x.sum()).sum() if table else y


def test_a_later_program_that_needs_more_than_the_budget_has_it_and_says_so() -> None:
    torch.manual_seed(0)
    net = Tables().eval()
    with pytest.raises(plait.OptionError, match="PLT-OPT-006") as caught:
        plait.compile(copy.deepcopy(net), example_inputs=example(9), weight_budget=64)
    least = int(caught.value.hint.split()[3])
    model = plait.compile(copy.deepcopy(net), weight_budget=least, tune="off")
    call = example(9)
    assert torch.equal(model(*call), compiled(copy.deepcopy(net), None)(*call))
    tier = model.weight_tier
    unit = tier.capacity
    torch.testing.assert_close(model(*call, table=1000), net(*call, table=1000), **NEAR)
    assert tier.capacity == unit and len(model.programs) == 2 and not tier.counters.over
    (found,) = [r for r in model.remarks if r.id == "PLT-PRE-009"]
    more = int(found.hint.split()[3]) - least
    assert more >= 4000 and found.reason.startswith(f"{more} bytes more than the budget")
    with pytest.warns(UserWarning, match="PLT-PRE-009.*the original runs"):
        assert torch.equal(model(*call, whole=True), net(*call, whole=True))
    assert len(model.programs) == 2


def test_loading_names_the_least_for_all_programs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = plait.compile(Tables().eval(), tune="off")
    for table in (0, 1000, 10):
        model(*example(9), table=table)
    model.save(tmp_path / "model.plait")
    with pytest.raises(plait.OptionError, match=r"PLT-OPT-006.*give at least \d+ bytes") as caught:
        plait.load(tmp_path / "model.plait", weight_budget=64)
    least = int(caught.value.hint.split()[3])
    loaded = plait.load(tmp_path / "model.plait", weight_budget=least)
    torch.testing.assert_close(
        loaded(*example(9), table=1000), model(*example(9), table=1000), **NEAR
    )
    with pytest.raises(plait.OptionError):
        plait.load(tmp_path / "model.plait", weight_budget=least - 1)
