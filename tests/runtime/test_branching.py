"""Branches inside a launch give what branches as launches of their own give, bit for bit."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.runtime import driver, whole
from plait.runtime.executor import Executor
from plait.runtime.fork import SLOTS
from plait.runtime.plan import BranchStep

WIDTH = 8
SIZES = {"x": {0: torch.export.Dim("n")}}


def branch(kind: int) -> nn.Module:
    if kind == 0:
        return nn.Identity()
    if kind == 1:
        return nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(nn.Linear(WIDTH, 64 * kind), nn.GELU(), nn.Linear(64 * kind, WIDTH))


class Net(nn.Module):
    """Three routers one behind the other; the first element of a row says where it goes."""

    def __init__(self, branches: int = 4) -> None:
        super().__init__()
        self.routers = nn.ModuleList(
            plait.Router(
                [branch((k + shift) % 5) for k in range(branches)],
                lambda x, s=shift: (x[:, 0].abs() * 10).long().add(s) % branches,
                combine="sum",
            )
            for shift in range(3)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1]
        for router in self.routers:
            x = torch.cat([first, self.norm(x + router(x))[:, 1:]], 1)
        return x


def either(truth: Tensor, first: Any, second: Any, x: Tensor) -> Any:
    """`torch.cond`, without its own compilation in eager mode."""
    if torch.compiler.is_exporting():
        return torch.cond(truth, first, second, (x,))
    return (first if truth else second)(x)


class Sides(nn.Module):
    """A `torch.cond` with two results, one of them twice and views; and one within a side."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = branch(3)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> tuple[Tensor, Tensor]:
            y = either(x[:, 2].sum() > 0, self.dense, lambda x: x - 1, x)
            return y.tanh(), y[:, :1] + x[:, :1]

        def plain(x: Tensor) -> tuple[Tensor, Tensor]:
            return x.clone(), x[:, :1].clone()

        wide, narrow = either(x[:, 1].sum() > 0, inner, plain, x)
        return wide * narrow


class Deep(nn.Module):
    """Routers and conds within branches, three deep; the first three elements say where it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = self.within(0, self.within(1, self.within(2, Sides())))
        self.exits = plait.EarlyExit(
            [branch(2) for _ in range(3)],
            [nn.Linear(WIDTH, 4) for _ in range(3)],
            lambda logits: logits[:, 0] > 0.1,
        )

    @staticmethod
    def within(place: int, inner: nn.Module) -> nn.Module:
        return plait.Router(
            [inner, branch(place + 1), nn.Identity()],
            lambda x: (x[:, place] * 10).long().abs() % 3,
            combine="sum",
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.router(x)
        return y, self.exits(y)


def rows(routes: list[int]) -> Tensor:
    x = torch.randn(len(routes), WIDTH)
    x[:, 0] = (torch.tensor(routes) + 0.5) / 10
    return x


def compiled_and(model: nn.Module) -> tuple[plait.Compiled, Executor]:
    with torch.no_grad():
        compiled = plait.compile(model, tune="off", dynamic_shapes=SIZES)
        compiled(rows([0, 1, 2, 3, 0]))
    return compiled, compiled.programs[0].executable.executor


def step_by_step(executor: Executor, compiled: plait.Compiled, x: Tensor) -> Tensor:
    """The answer with a launch for each branch."""
    instance = executor.instance([x.shape], torch.get_num_threads())
    instance.on_step = lambda: None
    try:
        return compiled(x)
    finally:
        instance.on_step = None


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of rows may change with every call."""
    monkeypatch.setattr(whole, "PATIENCE", 1 << 30)


@pytest.fixture(scope="module")
def net() -> tuple[plait.Compiled, Executor, nn.Module]:
    torch.manual_seed(0)
    model = Net().eval()
    return *compiled_and(model), model


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(routes=st.lists(st.integers(0, 3), min_size=2, max_size=9))
def test_any_route(net, routes: list[int]) -> None:
    compiled, executor, model = net
    x, inside = rows(routes), executor.inside
    with torch.no_grad():
        first, again = compiled(x), compiled(x)
        assert executor.inside == inside + 2
        assert torch.equal(first, again)
        assert torch.equal(first, step_by_step(executor, compiled, x))
        torch.testing.assert_close(first, model(x))


@pytest.fixture(scope="module")
def deep() -> tuple[plait.Compiled, Executor, nn.Module]:
    torch.manual_seed(1)
    model = Deep().eval()
    return *compiled_and(model), model


def test_results_that_are_parts_of_others() -> None:
    class Parts(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y[:, 1:3], x, y, self.norm.weight, y.t()

    model = Parts().eval()
    compiled, executor = compiled_and(model)
    x, inside = rows([3, 1, 0, 3, 2]), executor.inside
    with torch.no_grad():
        have, slow = compiled(x), step_by_step(executor, compiled, x)
        again = compiled(rows([0] * 5))
        assert executor.inside == inside + 2
        for a, b, want in zip(have, slow, model(x), strict=True):
            torch.testing.assert_close(a, want)
            assert torch.equal(a, b) and a.stride() == want.stride()
    assert have[1].data_ptr() == x.data_ptr() != again[1].data_ptr()
    assert have[0].untyped_storage().data_ptr() == have[2].untyped_storage().data_ptr()


CHOICE = st.tuples(*[st.integers(-2, 2)] * 3)


def chosen(choices: list[tuple[int, ...]]) -> Tensor:
    x = torch.randn(len(choices), WIDTH, generator=torch.Generator().manual_seed(len(choices)))
    x[:, :3] = (torch.tensor(choices) + 0.5) / 10
    return x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(choices=st.lists(CHOICE, min_size=2, max_size=9))
def test_branches_and_sides_within_branches(deep, choices: list[tuple[int, ...]]) -> None:
    compiled, executor, model = deep
    x, inside = chosen(choices), executor.inside
    with torch.no_grad():
        first, again = compiled(x), compiled(x)
        assert executor.inside == inside + 2
        slow = step_by_step(executor, compiled, x)
        for have, same, apart, want in zip(first, again, slow, model(x), strict=True):
            assert torch.equal(have, same) and torch.equal(have, apart)
            torch.testing.assert_close(have, want)


def test_every_number_of_workers_within_branches(deep, threads: int) -> None:
    compiled, executor, model = deep
    with torch.no_grad():
        several = [(0, 0, k - 2) for k in range(5)]
        for choices in ([(0, 0, 0)] * 4, [(0, 1, 2), (0, 0, 1)] * 3, several):
            x, inside = chosen(choices), executor.inside
            have = compiled(x)
            assert executor.inside == inside + 1
            slow = step_by_step(executor, compiled, x)
            assert all(map(torch.equal, have, slow))
            torch.testing.assert_close(have, model(x))


def test_every_number_of_workers(net, threads: int) -> None:
    compiled, executor, model = net
    with torch.no_grad():
        for routes in ([0, 0, 1, 3], [2] * 7, [3, 1], [0, 1, 2, 3] * 5):
            x, inside = rows(routes), executor.inside
            have = compiled(x)
            assert executor.inside == inside + 1
            assert torch.equal(have, step_by_step(executor, compiled, x))
            torch.testing.assert_close(have, model(x))


@pytest.mark.parametrize("how", ["no OpenMP", "short team"])
def test_workers_that_take_turns(net, how: str) -> None:
    compiled, executor, _ = net
    x = rows([0, 1, 1, 2, 3, 3])
    one = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
    with torch.no_grad():
        want = compiled(x)
        [space] = executor.instance([x.shape], torch.get_num_threads())._free
        assert space.whole is not None
        block = space.whole.table.block
        kept = block.copy()
        if how == "no OpenMP":
            block[driver.GOMP] = 0
        else:
            block[driver.NUM_THREADS] = ctypes.cast(one, ctypes.c_void_p).value
        assert torch.equal(compiled(x), want)
        block[:] = kept


def test_thousands_of_calls_on_more_workers_than_cores(net) -> None:
    compiled, _, _ = net
    chance, before = random.Random(0), torch.get_num_threads()
    with torch.no_grad():
        xs = [rows([chance.randrange(4) for _ in range(4)]) for _ in range(12)]
        wants = [compiled(x) for x in xs]
        torch.set_num_threads(3)
        try:
            for k in range(2000):
                assert torch.equal(compiled(xs[k % 12]), wants[k % 12])
        finally:
            torch.set_num_threads(before)


def test_calls_of_several_threads(net) -> None:
    compiled, _, _ = net
    xs = [rows([k, (k + 1) % 4, 2]) for k in range(4)]
    with torch.no_grad():
        wants = [compiled(x) for x in xs]
    wrong: list[int] = []

    def call(k: int) -> None:
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(compiled(xs[k]), wants[k]):
                    wrong.append(k)

    callers = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_counts_are_of_calls(net) -> None:
    _, _, model = net
    compiled, executor = compiled_and(model)
    names = next(s for s in executor.plan.steps if hasattr(s, "plans")).plans
    before = [executor.counts["taken", n] for n in names]
    with torch.no_grad():
        for _ in range(3):
            compiled(rows([0, 0, 2]))  # the first stops for what it lacks, and begins anew
    after = [executor.counts["taken", n] for n in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 0, 3, 0]
    assert f"{executor.inside} calls ran all within one launch" in compiled.explain()


def watched(executor: Executor, compiled: plait.Compiled, x: Tensor) -> list[tuple[Any, ...]]:
    """What a recorder is told of a call, which is what it is told of one step by step."""
    told: list[tuple[Any, ...]] = []
    inside = executor.inside
    executor.observe(lambda step, choice, slots: told.append((step.name, choice, slots)))
    try:
        with torch.no_grad():
            compiled(x)
            assert executor.inside == inside + 1
            fast = told[:]
            told.clear()
            step_by_step(executor, compiled, x)
    finally:
        executor.observe(lambda *_: None)
    assert fast == told
    return fast


def test_who_watches_is_told_where_calls_went(net) -> None:
    compiled, executor, _ = net
    told = watched(executor, compiled, rows([0, 2, 2, 3]))
    assert told[0][1:] == ([0, 1, 1, 3, 4], 4)


def test_who_watches_is_told_of_branches_within_branches(deep) -> None:
    compiled, executor, _ = deep
    for choices, conds in (
        ([(0, 0, 0)] * 3, [True, True]),
        ([(0, 1, 0), (1, 0, 0)], []),
        ([(0, -1, 0)] * 2, [False]),
    ):
        told = watched(executor, compiled, chosen(choices))
        assert [choice for _, choice, _ in told if isinstance(choice, bool)] == conds


def test_what_runs_within_branches_is_counted_once(deep) -> None:
    _, _, model = deep
    compiled, executor = compiled_and(model)
    outer = next(s for s in executor.plan.steps if isinstance(s, BranchStep))
    inner = executor.parts[outer.plans[0]]
    names = next(s for s in inner.plan.steps if isinstance(s, BranchStep)).plans
    x, before = chosen([(0, 1, 0), (1, 0, 0), (0, 1, 0)]), [inner.counts["taken", n] for n in names]
    with torch.no_grad():
        for _ in range(3):
            compiled(x)  # the first stops for what it lacks, several times
        compiled(chosen([(1, 0, 0)] * 3))
    after = [inner.counts["taken", n] for n in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 3, 0]


def test_variants_of_other_numbers_of_rows_are_replaced() -> None:
    model = Net(2).eval()
    with torch.no_grad():
        compiled = plait.compile(model, tune="off", example_inputs=(rows([0] * 24),))
        executor = compiled.programs[0].executable.executor
        for zeros in [*range(25), *range(24, 0, -1), 3, 3]:
            x = rows([0] * zeros + [1] * (24 - zeros))
            assert torch.equal(compiled(x), step_by_step(executor, compiled, x))
    [space] = executor.instance([(24, WIDTH)], torch.get_num_threads())._free
    assert [len(made) for b in space.whole.branches for made in b._made] == [SLOTS] * 6


def test_what_is_within_replaced_variants_goes_with_them() -> None:
    model = Deep().eval()
    with torch.no_grad():
        compiled = plait.compile(model, tune="off", example_inputs=(chosen([(0, 0, 0)] * 24),))
        executor = compiled.programs[0].executable.executor
        for zeros in [*range(25), 3]:
            x = chosen([(0, 0, zeros % 3)] * zeros + [(1, 0, 0)] * (24 - zeros))
            slow = step_by_step(executor, compiled, x)
            assert all(map(torch.equal, compiled(x), slow))
    [space] = executor.instance([(24, WIDTH)], torch.get_num_threads())._free
    alive = list(space.whole.branches)
    for branches in alive:
        alive += branches.within()
    assert set(space.whole._forks._known.values()) == set(alive)


def test_it_gives_up_where_every_call_has_new_numbers(monkeypatch) -> None:
    monkeypatch.setattr(whole, "PATIENCE", 16)
    with torch.no_grad():
        compiled = plait.compile(Net(2).eval(), tune="off", example_inputs=(rows([0] * 64),))
        for zeros in range(1, 64):
            compiled(rows([0] * zeros + [1] * (64 - zeros)))
    assert "the numbers of their rows keep changing" in compiled.explain()
