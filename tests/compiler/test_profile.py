"""Profiles: what is counted and under which name, held-out batches, sums and identity."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import plait
from plait.compiler.routing.stats import Route, Statistics, Tally

sys.path.insert(0, str(Path(__file__).parent))
import hf_models  # a plain module beside this file


class Labels(nn.Module):
    """Labels are what stands in the first column."""

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return cells[:, 0].long()


class Two(nn.Module):
    """Two routers in a row: by label, then by score; the first a second time with ``again``."""

    def __init__(self, again: bool = False, width: int = 4) -> None:
        super().__init__()
        self.again = again
        same = [nn.Identity() for _ in range(3)]
        self.first = plait.Router(same, Labels(), combine="select")
        self.scorer = nn.Linear(width, 2)
        self.second = plait.Router(
            [nn.Linear(width, width) for _ in range(2)], self.scorer, top_k=2
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.first(x) if self.again else self.second(x)


def labelled(*labels: int) -> torch.Tensor:
    x = torch.randn(len(labels), 4)
    x[:, 0] = torch.tensor(labels)
    return x


def some(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        labelled(*torch.randint(0, 4, (int(n),), generator=generator).tolist())
        for n in torch.randint(0, 7, (count,), generator=generator)
    ]


MODEL = Two().eval()


# -- counting --------------------------------------------------------------------------------------


def test_loads_are_counted_by_hand() -> None:
    batches = [labelled(0, 0, 1), labelled(1, 1, 1, 3), torch.zeros(0, 4)]
    stats = plait.profile(MODEL, batches, holdout=0).fitted
    assert [r.key for r in stats] == [("first", 0), ("second", 0)]
    first = stats["first"]
    assert (first.branches, first.cells, first.slots) == (3, (3, 4, 0), (3, 4, 0))
    assert first.loads == ((2, 1, 0), (0, 3, 0), (0, 0, 0))
    assert first.load == (2, 4, 0) and first.dead == (2,) and first.unrouted == 1
    assert first.exit_rate == 1 / 7
    assert first.together == ((2, 0, 0), (0, 4, 0), (0, 0, 0))
    assert first.shares == ((2 / 3, 1 / 3, 0.0), (0.0, 0.75, 0.0))
    assert first.peak == (2 / 3, 0.75, 0.0)
    assert first.quantile(0.0) == (0.0, 1 / 3, 0.0)
    assert first.quantile(0.5) == pytest.approx((1 / 3, 13 / 24, 0.0))
    assert list(first.quantiles) == [0.0, 0.5, 0.9, 0.99, 1.0]
    second = stats["second"]
    assert second.load == (7, 7) and second.together == ((7, 7), (7, 7))
    assert stats.pairs == {(("first", 0), ("second", 0)): ((2, 2), (4, 4), (0, 0))}


def test_a_module_that_routes_twice_is_two_routers() -> None:
    profile = plait.profile(Two(again=True).eval(), [labelled(0, 1)], holdout=0)
    assert [r.key for r in profile.fitted] == [("first", 0), ("first", 1)]
    assert "first #2" in str(profile)
    with pytest.raises(KeyError, match="no router .*second"):
        profile.fitted["second"]


def test_pairs_are_neighbours() -> None:
    tally = Tally()
    index = torch.tensor([[0], [1]])
    tally.add([Route((name, 0), index, 2) for name in "abc"])
    names = [(a[0], b[0]) for a, b in tally.result().pairs]
    assert names == [("a", "b"), ("b", "c")]


def test_a_router_keeps_its_number_of_branches() -> None:
    tally = Tally()
    tally.add([Route(("a", 0), torch.tensor([[0]]), 2)])
    with pytest.raises(ValueError, match="had 2 branches before and has 3 now"):
        tally.add([Route(("a", 0), torch.tensor([[0]]), 3)])


def test_a_router_without_branches_or_cells_has_no_shares() -> None:
    tally = Tally()
    tally.add(
        [Route(("a", 0), torch.tensor([[0]]), 0), Route(("b", 0), torch.zeros(0, 1).long(), 2)]
    )
    stats = tally.result()
    assert stats["a"].peak == () and stats["a"].unrouted == 1
    assert stats["b"].peak == (0.0, 0.0) and stats["b"].exit_rate == 0.0
    assert str(plait.Profile("M", "f", stats, Statistics()))


def test_a_cell_that_takes_a_branch_twice_counts_once_together() -> None:
    tally = Tally()
    index = torch.tensor([[0, 0, 1], [1, 2, -1], [3, 3, 3]])
    tally.add([Route(("r", 0), index, 3)])
    (router,) = tally.result()
    assert router.loads == ((2, 2, 1),)
    assert router.together == ((1, 1, 0), (1, 2, 1), (0, 1, 1))
    assert router.unrouted == 4


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(
        st.lists(st.lists(st.integers(-1, 5), min_size=2, max_size=2), max_size=5), max_size=4
    ),
)
def test_counts_are_those_of_a_loop(n: int, batches: list[list[list[int]]]) -> None:
    tally = Tally()
    load, together = [0] * n, [[0] * n for _ in range(n)]
    pairs = [[0] * n for _ in range(n)]
    for rows in batches:
        index = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
        tally.add([Route(("a", 0), index, n), Route(("b", 0), index.flip(0), n)])
        cells = [{b for b in row if 0 <= b < n} for row in rows]
        for row in rows:
            for b in row:
                if 0 <= b < n:
                    load[b] += 1
        for cell, other in zip(cells, reversed(cells), strict=True):
            for i in cell:
                for j in cell:
                    together[i][j] += 1
                for j in other:
                    pairs[i][j] += 1
    stats = tally.result()
    assert stats.batches == len(batches)
    if batches:
        assert list(stats["a"].load) == load
        assert [list(r) for r in stats["a"].together] == together
        assert [list(r) for r in stats.pairs[("a", 0), ("b", 0)]] == pairs


def test_routers_on_other_numbers_of_cells_are_no_pair() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x):
            return self.two.second(self.two.first(x)[::2])

    profile = plait.profile(Halved().eval(), [labelled(0, 1, 2)])
    assert [r.name for r in profile.fitted] == ["two.first", "two.second"]
    assert not profile.fitted.pairs


def test_exits_show_how_many_left() -> None:
    heads = [nn.Identity() for _ in range(3)]
    exits = plait.EarlyExit([nn.Identity() for _ in range(3)], heads, lambda z: z[:, 0] < 2)
    stats = plait.profile(exits, [labelled(0, 1, 2, 3)], holdout=0).fitted
    assert [r.exit_rate for r in stats] == [0.5, 0.0]
    assert [r.label for r in stats] == ["(model)", "(model) #2"]


def test_experts_of_transformers_are_routers_of_their_own_name() -> None:
    pytest.importorskip("transformers")
    model, inputs = hf_models.MODELS["mixtral"]()
    before = model.config._experts_implementation
    seen: list[torch.Tensor] = []
    gates = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    handle = gates[0].register_forward_hook(lambda m, a, out: seen.append(out[-1]))
    profile = plait.profile(model, [dict(inputs)] * 2, holdout=0)
    handle.remove()
    names = [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert [r.name for r in profile.fitted] == names
    router = profile.fitted[names[0]]
    assert router.cells == (22, 22) and router.slots == (44, 44)
    loads = torch.bincount(seen[0].flatten(), minlength=4).tolist()
    assert router.loads == (tuple(loads),) * 2
    assert profile.fitted.pairs.keys() == {((names[0], 0), (names[1], 0))}
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("name", ["jetmoe", "switch"])
def test_experts_with_adapters_are_routers_too(name: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = hf_models.MODELS[name]()
    profile = plait.profile(model, [dict(inputs)] * 2, holdout=0)
    ends = ("mlp.router", "self_attention.experts.router") if name == "jetmoe" else ("mlp.experts",)
    assert len(profile.fitted.routers) == 2 * len(ends)
    assert all(r.name.endswith(ends) for r in profile.fitted)
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_a_model_is_left_as_it_was() -> None:
    model = Two()
    plait.profile(model, [labelled(0)])
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(plait.InputError):
        plait.profile(model, [torch.zeros(2, 9)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_compiled_model_or_a_function_is_profiled_as_the_original() -> None:
    batches = some(4)
    want = plait.profile(MODEL, batches)
    assert plait.profile(plait.compile(MODEL, tune="off"), batches) == want

    def function(x):
        return MODEL(x) * 2

    profile = plait.profile(function, batches)
    assert [r.name for r in profile.fitted] == ["0:first", "0:second"]
    assert [r.loads for r in profile.fitted] == [r.loads for r in want.fitted]


def test_compile_profiles_batches_itself() -> None:
    batches = some(4)
    compiled = plait.compile(MODEL, profile=iter(batches), tune="off")
    assert compiled.profile == plait.profile(MODEL, batches)
    assert plait.compile(profile=batches, tune="off")(MODEL).profile == compiled.profile
    with torch.no_grad():
        torch.testing.assert_close(compiled(batches[0]), MODEL(batches[0]))
    assert plait.compile(MODEL, tune="off").profile is None
    with pytest.raises(plait.InputError, match="PLT-PRF-001"):
        plait.compile(MODEL, profile=[])
    with pytest.raises(plait.OptionError, match="PLT-OPT-005"):
        plait.compile(type(MODEL), profile=batches)


# -- batches ---------------------------------------------------------------------------------------


def test_batches_are_tensors_tuples_or_dicts() -> None:
    x = labelled(0, 1)
    profile = plait.profile(MODEL, [x, (x,), [x], {"x": x}], holdout=0)
    assert len(set(profile.fitted["first"].loads)) == 1 and profile.fitted.batches == 4


@pytest.mark.parametrize(
    ("count", "share", "held"), [(1, 0.5, 0), (2, 0.1, 1), (8, 0.25, 2), (9, 0.25, 2), (9, 0.0, 0),
                                 (100, 0.29, 29), (3, 0.99, 2)],
)  # fmt: skip
def test_the_last_batches_are_held_out(count: int, share: float, held: int) -> None:
    batches = [labelled(*[0] * (i % 5)) for i in range(count)]
    profile = plait.profile(MODEL, iter(batches), holdout=share)
    assert (profile.fitted.batches, profile.heldout.batches) == (count - held, held)
    cells = [len(b) for b in batches]
    assert list(profile.fitted["first"].cells) == cells[: count - held]
    if held:
        assert list(profile.heldout["first"].cells) == cells[count - held :]
    assert profile.total == plait.profile(MODEL, batches, holdout=0).fitted


MISUSES: dict[str, Callable[[], Any]] = {
    "PLT-PRF-001: there are no batches": lambda: plait.profile(MODEL, []),
    "PLT-PRF-001: batches is a Tensor": lambda: plait.profile(MODEL, torch.zeros(2, 4)),
    "PLT-PRF-001: batches is a dict": lambda: plait.profile(MODEL, {"x": torch.zeros(2, 4)}),
    "PLT-PRF-001: batches is a int": lambda: plait.profile(MODEL, 3),
    "PLT-PRF-001: the model fails on batch 1: RuntimeError": (
        lambda: plait.profile(MODEL, [labelled(0), torch.zeros(2, 9)])
    ),
    "PLT-PRF-007: holdout=1.0 is not a share": lambda: plait.profile(MODEL, some(2), holdout=1.0),
    "PLT-PRF-007: holdout='half'": lambda: plait.profile(MODEL, some(2), holdout="half"),
    "PLT-PRF-007: a list cannot be profiled": lambda: plait.profile([], some(2)),
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse_is_one_clear_error(message: str) -> None:
    with pytest.raises(plait.PlaitError, match=message):
        MISUSES[message]()


# -- sums and identity -----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_merging_gives_the_profile_of_all_batches(a: int, b: int, seed: int) -> None:
    batches = some(a + b, seed)
    parts = [plait.profile(MODEL, p, holdout=0) for p in (batches[:a], batches[a:])]
    assert parts[0].merge(parts[1]) == plait.profile(MODEL, batches, holdout=0)


def test_held_out_batches_stay_held_out_when_merged() -> None:
    merged = plait.profile(MODEL, some(4)).merge(plait.profile(MODEL, some(8, 1)))
    assert (merged.fitted.batches, merged.heldout.batches) == (9, 3)
    assert merged.merge(merged).total.batches == 24


def test_profiles_of_other_models_do_not_mix() -> None:
    profile = plait.profile(MODEL, some(2))
    profile.check(Two().double())  # other weights, another dtype, the same structure
    profile.check(plait.compile(MODEL, tune="off"))
    for other in (Two(width=5), nn.Sequential(Two()), plait.Router([nn.Identity()], Labels())):
        with pytest.raises(plait.InputError, match="PLT-PRF-002: the profile is of a Two"):
            profile.check(other)
    wider = plait.profile(nn.Sequential(Two()).eval(), some(2))
    with pytest.raises(plait.InputError, match="PLT-PRF-002.*of a Two.*of a Sequential"):
        profile.merge(wider)
    with pytest.raises(plait.InputError, match="a dict is no profile"):
        profile.merge({})  # type: ignore[arg-type]
    deeper = Two().eval()
    deeper.first.branches = nn.ModuleList([*deeper.first.branches, nn.Identity()])
    with pytest.raises(plait.InputError, match="PLT-PRF-002"):
        profile.check(deeper)


def test_names_and_fingerprint_are_the_same_in_another_process(tmp_path: Path) -> None:
    here = plait.profile(MODEL, [labelled(0, 1)])
    code = (
        "import sys, torch, plait\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "import test_profile as t\n"
        f"plait.profile(t.MODEL, [t.labelled(0, 1)]).save({str(tmp_path / 'p.json')!r})\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-1500:]
    there = plait.Profile.load(tmp_path / "p.json")
    assert there.fingerprint == here.fingerprint
    assert [r.key for r in there.fitted] == [r.key for r in here.fitted]


# -- text ------------------------------------------------------------------------------------------


def test_it_prints_as_a_table() -> None:
    batches = [labelled(0, 0, 1), labelled(1, 1, 1, 3)]
    assert str(plait.profile(MODEL, batches, holdout=0)) == (
        "routes of Two: 2 batches fitted, 0 held out\n"
        "router  branches  cells  most load  least load  dead  unrouted\n"
        "first          3      7   1: 57.1%     2: 0.0%     1     14.3%\n"
        "second         2      7  0: 100.0%   1: 100.0%     0      0.0%"
    )
    assert str(plait.profile(nn.Identity(), [torch.zeros(1)])) == (
        "routes of Identity: 1 batches fitted, 0 held out; it has no routers"
    )
