"""Routed regions run as plans of their own: the same results for every route."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.kernels.routing import gather, scatter
from plait.runtime.plan import BranchStep, LibraryStep, Plan


def library_steps(plan: Plan) -> list[str]:
    """Targets of the library steps of a plan and its parts."""
    return [s.target for s in plan.every_step() if isinstance(s, LibraryStep)]


def check(compiled, model, *inputs: Tensor) -> None:
    with torch.no_grad():
        have, want = compiled(*inputs), model(*inputs)
        assert torch.equal(have, compiled(*inputs))
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


class Routed(nn.Module):
    """Unlike branches; the second input says who goes where."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5))
        self.b = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5))
        self.c = nn.Linear(6, 5)

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        first, second, third = scatter(x.tanh(), index, 3)
        return gather([self.a(first), self.b(second), self.c(third)], index, weight).relu()


MODEL = Routed().eval()
COMPILED = plait.compile(MODEL, tune="off")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_routes(data: st.DataObject) -> None:
    cells, slots = data.draw(st.sampled_from([1, 2, 5, 16, 33])), data.draw(st.integers(1, 3))
    kind = data.draw(st.sampled_from(["uniform", "one", "last", "none", "strangers"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    index = {
        "uniform": lambda: torch.randint(0, 3, (cells, slots), generator=generator),
        "one": lambda: torch.zeros(cells, slots, dtype=torch.int64),
        "last": lambda: torch.full((cells, slots), 2),
        "none": lambda: torch.full((cells, slots), 3),
        "strangers": lambda: torch.randint(-2, 6, (cells, slots), generator=generator),
    }[kind]()
    x = torch.randn(cells, 6, generator=generator)
    weight = torch.rand(cells, slots, generator=generator)
    check(COMPILED, MODEL, x, index, weight)


def test_all_of_it_is_kernels() -> None:
    compiled = plait.compile(MODEL, tune="off")
    for cells in (9, 4, 21):
        index, weight = torch.randint(0, 3, (cells, 2)), torch.rand(cells, 2)
        check(compiled, MODEL, torch.randn(cells, 6), index, weight)
    assert any(isinstance(s, BranchStep) for s in compiled.plan.steps)
    assert library_steps(compiled.plan) == []
    assert Plan.from_json(compiled.plan.to_json()) == compiled.plan
    assert "rows" in str(compiled.plan)


class Normed(nn.Module):
    """What makes the cells needs whole rows; each cell has one slot."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        cells = self.norm(x)
        parts = scatter(cells, index, 3)
        out = gather([b(p) for b, p in zip(self.branches, parts, strict=True)], index, None)
        return self.norm(out + cells).softmax(-1)


@pytest.mark.parametrize("shape", [(9, 6), (9, 4, 6)])
def test_rows_are_normalised_before_they_move(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    model = Normed().eval()
    compiled = plait.compile(model, tune="off")
    for _ in range(3):
        check(compiled, model, torch.randn(shape), torch.randint(0, 4, shape[:1]))
    assert library_steps(compiled.plan) == []


class Images(nn.Module):
    """Convolutions of different widths, one branch deeper, one the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)

        def branch(*widths: int) -> nn.Module:
            layers: list[nn.Module] = []
            for a, b in zip((4, *widths), (*widths, 4), strict=True):
                layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
            return nn.Sequential(*layers)

        branches = [branch(8), branch(16, 12), nn.Identity()]
        self.router = plait.Router(branches, lambda x: x.mean((2, 3))[:, :3].softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.router(self.first(x)).mean(1)


def test_convolutions_in_branches() -> None:
    torch.manual_seed(0)
    model = Images().eval()
    compiled = plait.compile(model)
    for batch in (6, 1, 11, 6):
        check(compiled, model, torch.randn(batch, 3, 9, 9) * 3)
    assert library_steps(compiled.plan) == []


class Nested(nn.Module):
    """A router as a branch of another, per token, and one that takes all branches above a limit."""

    def __init__(self) -> None:
        super().__init__()
        branches = [nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))]
        inner = plait.Router(branches, nn.Sequential(nn.Linear(8, 2), nn.Softmax(-1)))
        scorer = nn.Sequential(nn.Linear(8, 3), nn.Softmax(-1))
        self.router = plait.Router(
            [inner, nn.Linear(8, 8), nn.Identity()], scorer, threshold=0.3, cell_dims=2
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x) + x


class Chooses(nn.Module):
    """Path-level choice with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y, z = torch.cond(
            x.sum() > 0,
            lambda x: (self.a(x).relu(), x.mean(0)),
            lambda x: (self.b(x) * 2, x.amax(0)),
            (x,),
        )
        return y + z


class Within(nn.Module):
    """Choices within a branch, one in another, on as many cells as data tells."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def choose(self, x: Tensor) -> Tensor:
        def first(x: Tensor) -> Tensor:
            return torch.cond(x[:, 1].sum() > 0, self.a, self.b, (x,)) * 2

        return torch.cond(x.sum() > 0, first, self.c, (x,)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, 0] > 0).long()
        first, second = scatter(x, index, 2)
        return gather([self.choose(first), self.b(second)], index, None)


EXIT = plait.EarlyExit(
    [nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8)],
    [nn.Linear(8, 4) for _ in range(3)],
    0.35,
)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Nested(), (4, 6, 8)), (Chooses(), (5, 8)), (Within(), (9, 8)), (EXIT, (9, 8))],
    ids=["nested", "cond", "cond within", "early-exit"],
)
def test_other_choices(model: nn.Module, shape: tuple[int, ...]) -> None:
    model.eval()
    compiled = plait.compile(model, tune="off")
    torch.manual_seed(1)
    for scale in (1.0, -3.0, 0.0, 5.0):
        check(compiled, model, torch.randn(shape) * scale)
    check(compiled, model, torch.randn(shape[0] + 3, *shape[1:]))
    assert any(isinstance(s, BranchStep) for s in compiled.plan.steps)
    assert library_steps(compiled.plan) == []


def test_a_saved_program_routes(tmp_path) -> None:
    x, index, weight = torch.randn(9, 6), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    check(COMPILED, MODEL, x, index, weight)
    COMPILED.save(tmp_path / "routed.plait")
    loaded = plait.load(tmp_path / "routed.plait")
    assert torch.equal(loaded(x, index, weight), COMPILED(x, index, weight))


def test_weights_changed_in_a_branch_are_seen() -> None:
    model = Routed().eval()
    compiled = plait.compile(model, tune="off")
    x, index, weight = torch.randn(9, 6), torch.randint(0, 3, (9, 1)), torch.rand(9, 1)
    check(compiled, model, x, index, weight)
    with torch.no_grad():
        model.c.weight.mul_(2)
    check(compiled, model, x, index, weight)


def test_threads_do_not_share_a_branchs_memory() -> None:
    inputs = [
        (torch.randn(17, 6), torch.randint(0, 3, (17, 2)), torch.rand(17, 2)) for _ in range(4)
    ]
    with torch.no_grad():
        want = [COMPILED(*i) for i in inputs]
        wrong: list[int] = []

        def work(k: int) -> None:
            with torch.no_grad():
                wrong.extend(
                    k for _ in range(100) if not torch.equal(COMPILED(*inputs[k]), want[k])
                )

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_an_index_out_of_range_inside_a_branch_is_an_error() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(4, 3), nn.Embedding(9, 3)

        def forward(self, numbers: Tensor, index: Tensor) -> Tensor:
            first, second = scatter(numbers, index, 2)
            return gather([self.a(first), self.b(second)], index, None)

    model = Looks().eval()
    compiled = plait.compile(model, tune="off")
    numbers, index = torch.tensor([1, 8, 3, 0]), torch.tensor([0, 1, 0, 1])
    check(compiled, model, numbers, index)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        compiled(numbers, torch.tensor([0, 0, 0, 1]))


class Choice(nn.Module):
    """One side of a condition routes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = plait.Router([nn.Linear(4, 4), nn.Tanh()], nn.Linear(4, 2))
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: self.router(v), lambda v: self.other(v), (x,))


def test_routers_on_a_side_of_a_condition() -> None:
    torch.manual_seed(0)
    model = Choice().eval()
    compiled = plait.compile(model, tune="off")
    for shift in (-1, 1):
        check(compiled, model, torch.randn(5, 4) + shift)
    assert len(compiled.programs) == 1


def test_cells_without_slots() -> None:
    model = plait.Router(
        [nn.Linear(4, 3), nn.Linear(4, 3)], lambda x: x[:, :0].long(), combine="sum"
    )
    compiled = plait.compile(model.eval(), tune="off")
    check(compiled, model, torch.randn(5, 4))
    assert len(compiled.programs) == 1 and "PLT-BRN-009" in [r.id for r in compiled.remarks]
