"""speculate-routes: bets from the profile, the same results whether they are won or lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import plait


class Model(nn.Module):
    """Two routers, the second inside a branch of the first."""

    def __init__(self) -> None:
        super().__init__()
        inner = plait.Router(_branches(2, 3), lambda x: x[:, 1].long(), combine="sum")
        self.outer = plait.Router(
            [inner, *_branches(4, 5)], lambda x: x[:, 0].long(), combine="sum"
        )

    def forward(self, x):
        return self.outer(x).relu()


def _branches(*widths: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, w), nn.GELU(), nn.Linear(w, 4)) for w in widths]


def batch(first: int, second: int = 0, cells: int = 40) -> torch.Tensor:
    """Cells that all go to branch ``first``, and inside it to ``second``."""
    x = torch.rand(cells, 4) * 0.9
    x[:, 0] += first
    x[:, 1] += second
    return x


def ids(compiled) -> list[str]:
    return [r.id for r in compiled.remarks if r.id.startswith("PLT-SPC")]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def test_dead_branches_are_compiled_when_they_are_needed(model: Model) -> None:
    profile = plait.profile(model, [(batch(0),), (batch(1),), (batch(0),), (batch(1),)])
    with torch.no_grad():
        bets = plait.compile(model, profile=profile, tune="off")
        plain = plait.compile(model, tune="off")
        for x in (batch(0), batch(1)):
            assert torch.equal(bets(x), plain(x))
        # Branch 2 outside, branch 1 inside.
        assert ids(bets) == ["PLT-SPC-001"] * 2
        (name,) = bets.plan.deferred
        assert name.endswith("branch_2") and name not in bets.plan.parts
        assert f"{name} ran 0 times (deferred)" in bets.explain()
        mixed = torch.cat([batch(0, 1), batch(2), batch(1)])
        for x in (mixed, batch(2), batch(0, 1), mixed):
            assert torch.equal(bets(x), plain(x))
            torch.testing.assert_close(bets(x), model(x))
        assert "a bet lost" in bets.explain()
    assert ids(plain) == []


def test_held_out_batches_decide(model: Model) -> None:
    batches = [(batch(0),), (batch(1),), (batch(1),), (batch(2),)]
    profile = plait.profile(model, batches, holdout=0.25)
    with torch.no_grad():
        compiled = plait.compile(model, profile=profile, tune="off", example_inputs=(batch(0),))
    assert compiled.plan.deferred == ()
    assert "PLT-SPC-002" in ids(compiled)


def test_a_small_profile_is_no_ground_for_a_bet(model: Model) -> None:
    profile = plait.profile(model, [(batch(0, cells=3),), (batch(0, cells=3),)])
    with torch.no_grad():
        compiled = plait.compile(model, profile=profile, tune="off", example_inputs=(batch(0),))
        assert compiled.plan.deferred == () and "PLT-SPC-003" in ids(compiled)
        pipeline = "normalize,outline-branches,speculate-routes{min_cells=1},fuse-vertical"
        compiled = plait.compile(
            model, profile=profile, tune="off", pipeline=pipeline, example_inputs=(batch(0),)
        )
        assert len(compiled.plan.deferred) == 2


def test_a_profile_of_another_model_is_refused(model: Model) -> None:
    other = plait.Router(_branches(2), lambda x: x[:, 0].long(), combine="sum").eval()
    profile = plait.profile(other, [(batch(0),), (batch(0),)])
    with pytest.raises(plait.InputError, match="PLT-PRF-002"):
        plait.compile(model, profile=profile)
    with pytest.raises(plait.OptionError, match="PLT-OPT-005"):
        plait.compile(model, profile="routes.json")


def test_a_saved_program_makes_no_bets(model: Model, tmp_path) -> None:
    profile = plait.profile(model, [(batch(0),), (batch(1),), (batch(0),)])
    with torch.no_grad():
        compiled = plait.compile(model, profile=profile, tune="off", example_inputs=(batch(0),))
        assert compiled.plan.deferred
        compiled.save(tmp_path / "model.plait")
        loaded = plait.load(tmp_path / "model.plait")
        for x in (batch(0), batch(2), batch(1)):
            torch.testing.assert_close(loaded(x), model(x))
