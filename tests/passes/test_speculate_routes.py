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


DEAD = "normalize,outline-branches,speculate-routes{likely=2.0,sized=false},fuse-vertical"


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
        bets = plait.compile(model, profile=profile, tune="off", pipeline=DEAD)
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


def test_a_dead_branch_that_needs_the_library_is_no_part_of_a_launch() -> None:
    class Library(nn.Module):
        def forward(self, x):
            return x.logcumsumexp(1)

    torch.manual_seed(0)
    inner = plait.Router([Library(), nn.ReLU()], lambda x: x[:, 1].long(), combine="sum")
    for dead in (Library(), inner):
        branches = [*_branches(2, 3), dead]
        model = plait.Router(branches, lambda x: x[:, 0].long(), combine="sum").eval()
        profile = plait.profile(model, [(batch(k % 2),) for k in range(4)])
        with torch.no_grad():
            bets = plait.compile(model, profile=profile, tune="off", pipeline=DEAD)
            for x in (batch(0), batch(2), torch.cat([batch(1), batch(2)]), batch(2), batch(0)):
                torch.testing.assert_close(bets(x), model(x))
        assert "but has aten.logcumsumexp" in bets.explain()


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


class Folds(nn.Module):
    """Routers that a buffer decides, in several ways."""

    def __init__(self, task: int = 1) -> None:
        super().__init__()
        self.register_buffer("task", torch.tensor([task]))
        self.register_buffer("table", torch.tensor([1, 0, 4, 1, 2, 1, 0]))
        self.all = plait.Router(_branches(2, 3), lambda x: self.task.expand(len(x)), combine="sum")
        self.hash = plait.Router(_branches(2, 3, 5), "hash", combine="select")
        self.each = plait.Router(_branches(2, 3, 4), lambda x: self.table, combine="sum")

    def forward(self, x):
        keys = self.task.expand(len(x)) * 7
        return self.each(x).relu() + self.all(x) * self.hash(x, keys)


def test_constant_routers_are_folded() -> None:
    for task in (0, 1, 2, -1):
        torch.manual_seed(task)
        model = Folds(task).eval()
        x = torch.randn(7, 4)
        with torch.no_grad():
            compiled = plait.compile(model, tune="off", example_inputs=(x,))
            plain = plait.compile(model, tune="off", pipeline=NO_FOLD, example_inputs=(x,))
            assert ids(compiled) == ["PLT-SPC-004"] * 3 and not compiled.plan.parts
            assert len(plain.plan.parts) == 8
            for value in (x, x * torch.nan, x * 1e3):
                torch.testing.assert_close(compiled(value), plain(value), equal_nan=True)
                torch.testing.assert_close(compiled(value), model(value), equal_nan=True)


NO_FOLD = "normalize,outline-branches,speculate-routes{fold=false},fuse-vertical"


class OneTask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("task", torch.tensor(1))
        scorer = lambda x: self.task.expand(x.shape[0])  # noqa: E731
        self.router = plait.Router(_branches(2, 3), scorer, combine="sum")

    def forward(self, x):
        return self.router(x)


def test_a_changed_task_is_seen_and_any_batch_is_folded() -> None:
    model = OneTask().eval()
    shapes = ({0: torch.export.Dim("n", min=1, max=50)},)
    with torch.no_grad():
        compiled = plait.compile(model, tune="off", dynamic_shapes=shapes)
        for task in (1, 0, 2):
            model.task.fill_(task)
            for count in (5, 2, 9):
                x = torch.randn(count, 4)
                torch.testing.assert_close(compiled(x), model(x))
        assert "PLT-SPC-004" in ids(compiled) and not compiled.plan.parts


class Alike(nn.Module):
    """Branches that begin with the same slice and activation, and go on differently."""

    def __init__(self, last: int) -> None:
        super().__init__()

        class Branch(nn.Module):
            def __init__(self, width: int, end: int) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, 4))
                self.end = end

            def forward(self, x):
                return self.body(x[:, 1 : self.end].relu())

        branches = [Branch(2, 4), Branch(5, 4), Branch(3, last)]
        self.router = plait.Router(branches, nn.Linear(6, 3), top_k=2)

    def forward(self, x):
        return self.router(x)


def test_what_branches_begin_with_runs_before_the_scatter() -> None:
    torch.manual_seed(3)
    model = Alike(4).eval()
    x = torch.randn(9, 6)
    with torch.no_grad():
        compiled = plait.compile(model, tune="off", example_inputs=(x,))
        off = "normalize,outline-branches,speculate-routes{hoist=false},fuse-vertical"
        plain = plait.compile(model, tune="off", pipeline=off, example_inputs=(x,))
        assert ids(compiled) == ["PLT-SPC-010"] and ids(plain) == []
        part, whole = (next(iter(c.plan.parts.values())) for c in (compiled, plain))
        assert part.inputs[0].shape[1] == 3 and whole.inputs[0].shape[1] == 6
        for value in (x, x * torch.nan, -x.abs()):
            have, want = compiled(value), plain(value)
            torch.testing.assert_close(have, want, equal_nan=True, rtol=0, atol=0)
            torch.testing.assert_close(have, model(value), equal_nan=True)


def test_branches_that_begin_differently_keep_what_they_begin_with() -> None:
    class Branch(nn.Module):
        def __init__(self, begin: int) -> None:
            super().__init__()
            self.begin, self.out = begin, nn.Linear(3, 4)

        def forward(self, x):
            return self.out(x[:, self.begin : self.begin + 3])

    model = plait.Router([Branch(0), Branch(1)], nn.Linear(6, 2)).eval()
    x = torch.randn(9, 6)
    with torch.no_grad():
        compiled = plait.compile(model, tune="off", example_inputs=(x,))
        assert ids(compiled) == []
        torch.testing.assert_close(compiled(x), model(x))
