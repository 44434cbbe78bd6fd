"""Operators in branches that ask how many cells there are: the model is compiled all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait
from plait.compiler.measure import bets

BRANCHES: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    lambda x: x.roll(1, 1) + x.roll(1, 0),
    F.instance_norm,
    lambda x: F.local_response_norm(x, 3),
    lambda x: x + torch.cdist(x.flatten(1), x.flatten(1)).sum(1).view(-1, 1, 1, 1),
    lambda x: F.bilinear(x, x, torch.ones(3, 3, 3)),
    lambda x: x - x.sum(0) if x.numel() else x,
]
SIZES = ({0: torch.export.Dim("n", min=0)},)


class Does(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def routed(branches: Sequence[Callable[[Tensor], Tensor]]) -> nn.Module:
    """Cells go where their first number says."""
    scorer = Does(lambda x: x[:, 0, 0, 0].long())
    return plait.Router(map(Does, branches), scorer, combine="select").eval()


def cells(*labels: int) -> Tensor:
    x = torch.randn(len(labels), 4, 3, 3)
    x[:, 0, 0, 0] = torch.tensor(labels)
    return x


def test_they_are_compiled() -> None:
    """Whatever the number of their cells: none, one, or so many that distances become products."""
    model = routed(BRANCHES)
    compiled = plait.compile(model, dynamic_shapes=SIZES, tune="off")
    for labels in ((0, 1, 2, 3, 4, 4, 5, 6, 6), (4,), (0, 4) * 30):
        x = cells(*labels)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert not [r for r in compiled.remarks if r.id.startswith("PLT-CAP") and r.kind == "missed"]


def test_branches_that_ask_have_to_be_outlined() -> None:
    """Otherwise they would run without cells."""
    model, x = routed([BRANCHES[3], F.relu]), cells(1, 1)
    compiled = plait.compile(model, pipeline="fuse-vertical", tune="off")
    with pytest.warns(UserWarning, match=r"PLT-CAP-015.*whether they have cells.*outlined"):
        torch.testing.assert_close(compiled(x), model(x))
    compiled = plait.compile(model, pipeline="outline-branches", tune="off")
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled.programs


def test_no_bet_on_the_route_of_no_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches are traced for at least one cell."""
    monkeypatch.setattr(bets, "timed", lambda calls: [1.0] * (len(calls) - 1) + [0.1])
    scorer = Does(lambda x: x[:, 0].long())
    inner = plait.Router(
        [Does(lambda x: torch.cat([x[1:], x[:1]])), nn.ReLU()], scorer, combine="sum"
    )
    outer = Does(lambda x: torch.cat([x[:1], inner(x[1:])]))
    outer.inner = inner
    model = plait.Router([outer, nn.ReLU()], Does(lambda x: x[:, 1].long()), combine="sum").eval()
    usual = torch.cat([torch.zeros(6, 2), torch.randn(6, 2)], 1)
    compiled = plait.compile(model, profile=plait.profile(model, [(usual,)] * 8), tune="off")
    for n in (6, 1):
        torch.testing.assert_close(compiled(usual[:n]), model(usual[:n]))
    assert len(compiled.programs) == 2


def test_cells_of_which_only_data_tell_how_many() -> None:
    router = plait.Router(
        [nn.Linear(4, 4), nn.ReLU()], Does(lambda x: (x[:, 0] > 0.5).long()), combine="sum"
    )
    model = Does(lambda x: router(x[x[:, 1] > 0]) * 2)
    model.router = router
    compiled = plait.compile(model.eval(), tune="off")
    for n in (7, 4, 1):
        for sign in (1, -1):  # then, there are none
            x = torch.randn(n, 4)
            x[:, 1] = sign * x[:, 1].abs()
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), model(x))
    assert any(r.id == "PLT-BRN-007" for r in compiled.remarks)
