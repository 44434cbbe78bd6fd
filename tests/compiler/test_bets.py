"""Bets on likely routes and on capacities: judged by measurement, the same results when lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.compiler.measure import bets
from plait.runtime.executor import Executor


def mlp(*widths: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(8, w), nn.GELU(), nn.Linear(w, 8)) for w in widths]


class Routed(nn.Module):
    """Three routers, the last with three branches; where to is in the first columns of a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = plait.Router(mlp(16), lambda x: x[:, 2:3], threshold=0.0)
        self.pair = plait.Router(mlp(12, 13), lambda x: x[:, 1].long(), combine="sum")
        self.last = plait.Router(mlp(16, 24, 32), lambda x: x[:, 0].long(), combine="sum")

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(x) + self.pair(x)
        return self.last(torch.cat([x[:, :1], y[:, 1:]], 1)).relu()


def cells(last: Sequence[int], pair: int = 0, closed: int = 0) -> Tensor:
    """A cell for each of ``last``; the first ``closed`` gates are closed."""
    x = torch.rand(len(last), 8) * 0.9
    x[:, 0] += torch.tensor(last)
    x[:, 1] += pair
    x[:closed, 2] -= 1
    return x


class Judge:
    """Stands in for timing: the special plan takes ``special``, everything else 1 second."""

    def __init__(self, special: float) -> None:
        self.special = special

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        for call in calls:
            call()
        return [1.0] * (len(calls) - 1) + [self.special]


@pytest.fixture
def wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bet that can be won pays."""
    monkeypatch.setattr(bets, "timed", Judge(0.1))


def both(model: nn.Module, batches: list[tuple[Tensor, ...]], **options):
    """Compiled with bets on ``batches``, and without."""
    profile = plait.profile(model, batches, holdout=0.25)
    with torch.no_grad():
        mine = plait.compile(
            model, profile=profile, tune="off", example_inputs=batches[0], **options
        )
        return mine, plait.compile(model, tune="off", example_inputs=batches[0])


def ids(compiled) -> list[str]:
    return [r.id for r in compiled.remarks if r.id.startswith("PLT-SPC")]


def speculation(compiled):
    return compiled.programs[-1].executable.speculation


@pytest.fixture
def model() -> Routed:
    torch.manual_seed(0)
    return Routed().eval()


LIKELY = "normalize,outline-branches,speculate-routes{sized=false},fuse-vertical"
SIZED = "normalize,outline-branches,speculate-routes{likely=2.0,dense=2.0},fuse-vertical"
N = 24
USUAL = [(cells([0] * N, k % 2, 6),) for k in range(16)]


def test_likely_routes_run_first(model: Routed, wins: None) -> None:
    compiled, plain = both(model, USUAL, pipeline=LIKELY)
    assert "PLT-SPC-005" in ids(compiled)
    assert speculation(compiled).bet.assumed == {("last", 0): (0,)}
    assert speculation(compiled).bet.dense == (("gate", 0),)
    with torch.no_grad():
        for x in (cells([0] * N), cells([0] * N, 1, N), cells([0] * N, 7, 3)):
            torch.testing.assert_close(compiled(x), plain(x))
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert (speculation(compiled).hits, speculation(compiled).misses) == (7, 0)
        misses = [[1] * N, [0] * (N - 1) + [2], [3] * N, [-2] * N, [0, 1, 2, 3] * 6]
        for last in misses:
            x = cells(last, 1, 5)
            assert torch.equal(compiled(x), plain(x))
    assert (speculation(compiled).hits, speculation(compiled).misses) == (7, 5)
    assert "7 hits (each saves" in compiled.explain() and "5 misses" in compiled.explain()


def test_cells_that_are_not_numbers(model: Routed, wins: None) -> None:
    compiled, plain = both(model, USUAL)
    x = cells([0] * N)
    x[3] = torch.nan
    x[5, 3:] = torch.inf
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), equal_nan=True)
        y = cells([0] * N)
        y[3, 2] = torch.nan  # only the gate's score
        torch.testing.assert_close(compiled(y), model(y), equal_nan=True, rtol=1e-4, atol=1e-5)


def test_what_does_not_pay_is_refused(model: Routed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bets, "timed", Judge(0.99))
    compiled, plain = both(model, USUAL)
    assert speculation(compiled) is None
    assert set(ids(compiled)) == {"PLT-SPC-001", "PLT-SPC-009"}
    assert not any("_rows" in name for name in compiled.plan.parts)
    x = cells([0, 1, 2] * 8)
    with torch.no_grad():
        assert torch.equal(compiled(x), plain(x))


def test_a_bet_that_wins_little_and_loses_often_is_refused(
    model: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = [(cells([0] * N),)] * 12
    held = [(cells([0] * N),), (cells([1] * N),)] * 2
    monkeypatch.setattr(bets, "timed", Judge(0.6))  # half the time 0.4 is won, else 0.6 lost
    assert speculation(both(model, fitted + held)[0]) is None
    monkeypatch.setattr(bets, "timed", Judge(0.2))
    compiled, _ = both(model, fitted + held)
    assert speculation(compiled).bet.held == (True, False, True, False)
    assert speculation(compiled).bet.odds == 0.5


def test_without_held_out_batches_nothing_is_bet(model: Routed, wins: None) -> None:
    profile = plait.profile(model, USUAL, holdout=0)
    with torch.no_grad():
        compiled = plait.compile(model, profile=profile, tune="off", example_inputs=USUAL[0])
    assert speculation(compiled) is None
    assert "PLT-SPC-006" in ids(compiled)


COUNTS = [10, 12, 10, 14, 10, 10, 9, 10]


def uneven(zeros: int) -> Tensor:
    return cells([0] * zeros + [1] * (N - zeros), 0, 24)


def test_capacities_spill(model: Routed, wins: None) -> None:
    compiled, plain = both(model, [(uneven(k),) for k in COUNTS * 2], pipeline=SIZED)
    assert speculation(compiled) is None and "PLT-SPC-008" in ids(compiled)
    (step,) = [s for s in compiled.plan.steps if getattr(s, "router", "") == "last#0"]
    assert step.sized[0][0] == 10 and step.sized[2] == (0, "")
    name = step.sized[0][1]
    executor: Executor = compiled.programs[-1].executable.executor
    counts = executor.counts
    before = [counts[kind, name] for kind in ("taken", "spilled", "missed")]
    with torch.no_grad():
        for zeros in (10, 13, 24, 9, 0, 1, 20):
            x, ran = uneven(zeros), sum(counts["taken", n] for _, n in step.sized if n)
            have, want = compiled(x), plain(x)
            torch.testing.assert_close(have, want)
            if ran == sum(counts["taken", n] for _, n in step.sized if n):  # the same kernels ran
                assert torch.equal(have, want)
    after = [counts[kind, name] for kind in ("taken", "spilled", "missed")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 3, 2]
    assert f"{name} ran" in compiled.explain() and "with spills" in compiled.explain()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_routes(data: st.DataObject, tailored) -> None:
    compiled, plain, model = tailored
    seed = data.draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    low, high = data.draw(st.sampled_from([(0, 1), (1, 2), (0, 3), (-2, 6), (3, 4)]))
    last = torch.randint(low, high, (N,), generator=generator).tolist()
    x = cells(last, data.draw(st.integers(-1, 2)), data.draw(st.integers(0, N)))
    with torch.no_grad():
        have, want = compiled(x), plain(x)
        torch.testing.assert_close(have, model(x), rtol=1e-4, atol=1e-5)
        if x[:, 0].long().any():  # a miss: the general plan's own answer
            assert torch.equal(have, want)
        else:
            torch.testing.assert_close(have, want)


@pytest.fixture(scope="module")
def tailored():
    patch = pytest.MonkeyPatch()
    patch.setattr(bets, "timed", Judge(0.1))
    torch.manual_seed(0)
    model = Routed().eval()
    compiled, plain = both(model, USUAL, pipeline=LIKELY)
    patch.undo()
    assert speculation(compiled) is not None
    # Random routes are drift, which would be answered by a plan for them.
    compiled.programs[-1].executable.monitor._wake = lambda: None
    return compiled, plain, model


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


def test_the_likely_side_runs_without_waiting(wins: None) -> None:
    model = Chooses().eval()
    for sign in (1.0, -1.0):
        compiled, plain = both(model, [(sign * torch.rand(5, 8),) for _ in range(16)])
        assert speculation(compiled).bet.assumed == {("", 0): (0,) if sign > 0 else (1,)}
        with torch.no_grad():
            for x in (torch.rand(5, 8), -torch.rand(5, 8)):
                torch.testing.assert_close(compiled(x), plain(x))
            x = torch.full((5, 8), torch.nan)
            torch.testing.assert_close(compiled(x), model(x), equal_nan=True)
            x = -sign * torch.rand(5, 8)
            assert torch.equal(compiled(x), plain(x))
        assert speculation(compiled).misses >= 2


def exits(first: float, second: float) -> plait.EarlyExit:
    torch.manual_seed(1)
    stages = [nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8)]
    heads = [nn.Linear(8, 4) for _ in stages]
    model = plait.EarlyExit(stages, heads, lambda logits: logits[:, 0] > 0).eval()
    with torch.no_grad():
        heads[0].bias[0], heads[1].bias[0] = first, second
    return model


def test_samples_that_usually_leave_at_one_exit(wins: None) -> None:
    model = exits(-9.0, 9.0)
    compiled, plain = both(model, [(torch.randn(1, 8),) for _ in range(16)])
    assert speculation(compiled).bet.assumed == {("", 0): (0,), ("", 1): ()}
    with torch.no_grad():
        for scale in (1.0, 100.0, -100.0, torch.nan):
            x = torch.randn(1, 8) * scale
            torch.testing.assert_close(compiled(x), plain(x), equal_nan=True)
            torch.testing.assert_close(compiled(x), model(x), equal_nan=True)
    assert speculation(compiled).misses


def test_most_samples_stay(wins: None) -> None:
    model = exits(-0.3, -9.0)
    compiled, plain = both(model, [(torch.randn(9, 8),) for _ in range(16)])
    assert speculation(compiled).bet.dense == (("", 0),)
    with torch.no_grad():
        for scale in (0.0, 1.0, 3.0, -100.0):
            x = torch.randn(9, 8) * scale
            torch.testing.assert_close(compiled(x), plain(x))


def test_only_a_choice_after_the_fact_needs_no_guard(wins: None) -> None:
    """Nothing can be lost, so nothing stands behind the likely plan."""
    model = plait.Router(mlp(16), lambda x: x[:, 2:3], threshold=0.0).eval()
    compiled, plain = both(model, [(cells([0] * N, 0, 6),) for _ in range(16)])
    assert speculation(compiled) is None and "PLT-SPC-005" in ids(compiled)
    assert compiled.plan.name == "likely" and not compiled.plan.parts
    with torch.no_grad():
        for closed in (0, 3, N):
            x = cells([0] * N, 0, closed)
            torch.testing.assert_close(compiled(x), plain(x))


class Mixes(nn.Module):
    """What comes of a cell depends on the others that take this branch, and on their number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).cumsum(0) / x.shape[0]


def test_branches_that_mix_cells_get_exactly_their_own(wins: None) -> None:
    gate = plait.Router([Mixes()], lambda x: x[:, 2:3], threshold=0.0)
    pair = plait.Router([*mlp(8), Mixes()], lambda x: x[:, 0].long(), combine="sum")
    batches = [(cells([0] * k + [1] * (N - k), 0, 6),) for k in COUNTS * 2]
    for model, bets_on_others in ((gate.eval(), 0), (pair.eval(), 1)):
        compiled, _ = both(model, batches)
        assert ids(compiled).count("PLT-SPC-008") == bets_on_others
        assert "PLT-SPC-015" in ids(compiled) and "PLT-SPC-005" not in ids(compiled)
        with torch.no_grad():
            for x in (cells([0] * 4 + [1] * 20), cells([1] * N, 0, 9), cells([0] * N), *batches[0]):
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


class Factors(nn.Module):
    """Made-up inputs have no Cholesky decomposition."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cholesky(x.unsqueeze(2) * torch.eye(8)).sum(1)


def test_a_bet_that_cannot_be_timed_is_refused() -> None:
    branches = [Factors(), *mlp(8)]
    model = plait.Router(branches, lambda x: x[:, 0].long() % 2, combine="sum").eval()
    batches = [(cells([2] * N) + 0.1,) for _ in range(16)]
    compiled, _ = both(model, batches)
    (remark,) = [r for r in compiled.remarks if r.id == "PLT-SPC-009" and "made-up" in r.reason]
    assert "cholesky" in remark.reason and speculation(compiled) is None
    for (x,) in batches[:2]:
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_any_batch_size(model: Routed, wins: None) -> None:
    profile = plait.profile(model, USUAL)
    shapes = ({0: torch.export.Dim("n", min=1, max=99)},)
    with torch.no_grad():
        compiled = plait.compile(model, profile=profile, tune="off", dynamic_shapes=shapes)
        for count in (24, 1, 5, 40):
            for last in (0, 1):
                x = cells([last] * count)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


class Looks(nn.Module):
    """Branches with tables of different lengths: a stranger's cell would read out of range."""

    def __init__(self) -> None:
        super().__init__()
        self.router = plait.Router(
            [nn.Embedding(4, 3), nn.Embedding(9, 3)], lambda n: (n >= 4).long(), combine="sum"
        )

    def forward(self, numbers: Tensor) -> Tensor:
        return self.router(numbers) * 2


def test_branches_that_may_fail_do_not_run_for_strangers(wins: None) -> None:
    model = Looks().eval()
    compiled, _ = both(model, [(torch.tensor([1, 3, 2]),) for _ in range(16)])
    assert speculation(compiled) is None and "PLT-SPC-007" in ids(compiled)
    with torch.no_grad():
        x = torch.tensor([8, 1, 7])
        assert torch.equal(compiled(x), model(x))


def test_a_profile_of_another_version_is_refused(model: Routed, tmp_path) -> None:
    path = tmp_path / "routes.json"
    plait.profile(model, USUAL).save(path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(plait.PlaitError, match="PLT-PRF-005"):
        plait.compile(model, profile=plait.Profile.load(path))


class PassesOn(nn.Module):
    """A side and a branch that return what they are given."""

    def __init__(self) -> None:
        super().__init__()
        branches = [nn.Identity(), *mlp(4)]
        self.router = plait.Router(branches, lambda x: (x[:, 0] < 0).long(), combine="select")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        (y,) = torch.cond(x.sum() > 0, lambda x: (x.clone(),), lambda x: (x * 2,), (x,))
        return self.router(x), y, self.router(y)


def test_results_share_no_memory(wins: None) -> None:
    model = PassesOn().eval()
    compiled, _ = both(model, [(torch.rand(5, 8),) for _ in range(16)])
    assert len(speculation(compiled).bet.assumed) == 3
    x = torch.rand(5, 8)
    with torch.no_grad():
        results = compiled(x)
        for have, want in zip(results, model(x), strict=True):
            assert torch.equal(have, want)
    memory = [t.untyped_storage().data_ptr() for t in (x, *results)]
    assert len(set(memory)) == 4 and speculation(compiled).hits == 2


class LooksAfter(nn.Module):
    """What a router passes on is a position in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.router = plait.Router(
            [nn.Identity(), nn.ReLU()], lambda n: (n < 0).long(), combine="select"
        )

    def forward(self, numbers: Tensor) -> Tensor:
        return self.table(self.router(numbers))


def test_positions_that_a_router_passes_on_are_checked(wins: None) -> None:
    model = LooksAfter().eval()
    compiled, _ = both(model, [(torch.tensor([1, 3, 2]),) for _ in range(16)])
    with torch.no_grad():
        x = torch.tensor([4, -3, 0])
        assert torch.equal(compiled(x), model(x))
        for bad in (7, 1 << 40):
            with pytest.raises((IndexError, RuntimeError)):
                compiled(torch.tensor([4, bad, 0]))


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = plait.Router(
            [nn.Dropout(0.0), *mlp(4)], lambda x: (x[:, 0] < 0).long(), combine="select"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x) + torch.rand_like(x)


def test_random_numbers_are_drawn_once(wins: None) -> None:
    compiled, _ = both(Draws().eval(), [(torch.rand(5, 8),) for _ in range(16)])
    assert speculation(compiled) is None and "PLT-SPC-007" in ids(compiled)
