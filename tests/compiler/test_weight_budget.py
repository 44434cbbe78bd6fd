"""Weights under a budget: the same bits as with all of them in memory, whatever the routes."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import plait
from plait.compiler import pipeline
from plait.runtime import bank as banks
from plait.runtime import load_costs
from plait.runtime import tier as tiers
from plait.runtime.plan import FetchStep, Plan

from .budgets import EXPERTS, UNIT, Experts, Net, compiled, example, weights


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def variants(net: Net) -> dict[str, Any]:
    """Compiled with everything in memory, with room for some experts, and for hardly one."""
    with torch.no_grad():
        always = weights(net.dense) + 2 * net.one.bias.nbytes
        found = {
            "resident": compiled(copy.deepcopy(net), None),
            "some": compiled(copy.deepcopy(net), always + 7 * UNIT),
            "one": compiled(copy.deepcopy(net), always + UNIT),
            "demand": compiled(
                copy.deepcopy(net),
                "60%",
                pipeline="normalize,prefetch-weights{ahead=false,evict=lru,cached=false},"
                "fuse-vertical",
            ),
        }
    return found


ROUTES = st.one_of(
    st.integers(0, EXPERTS).map(lambda e: [[e, e]] * 7),
    st.lists(st.tuples(st.integers(0, EXPERTS), st.integers(0, EXPERTS)), min_size=2, max_size=24),
)


@settings(max_examples=40, deadline=None)
@given(ROUTES)
def test_any_routes_give_the_same_bits(variants: dict[str, Any], routes: list[Any]) -> None:
    index = torch.tensor(routes)
    x, _ = example(len(index), seed=len(index))
    wanted = variants["resident"](x, index)
    for name in ("some", "one", "demand"):
        assert torch.equal(variants[name](x, index), wanted), name
        tier = variants[name].weight_tier
        assert tier.counters.peak_bytes <= tier.capacity and tier.counters.over == 0


def test_the_small_budget_works_in_waves_and_the_larger_one_need_not(
    variants: dict[str, Any],
) -> None:
    x, _ = example(6)
    index = torch.tensor([[0, 1]] * 6)
    for name, waves in (("one", True), ("some", False)):
        counters = variants[name].weight_tier.counters
        before = counters.waves
        variants[name](x, index)
        assert (counters.waves > before) == waves


def test_steady_calls_fetch_within_one_launch(
    variants: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_costs, "WAKE", 1.0)  # all loads are cheap
    monkeypatch.setattr(tiers, "REST", 1)
    tier = variants["some"].weight_tier
    before = tier.counters.to_json()
    for k in range(200):
        inputs = example(2 + k % 3, seed=k)
        assert torch.equal(variants["some"](*inputs), variants["resident"](*inputs))
        assert 0 <= tier.resident_bytes <= tier.capacity
    spent = {key: value - before[key] for key, value in tier.counters.to_json().items()}
    assert spent["inside"] > 50 and spent["misses"] > 50
    assert spent["fetches"] == 400 and tier.counters.over == 0
    assert tier.counters.peak_bytes <= tier.capacity


def test_routes_that_drift_give_the_same_bits(variants: dict[str, Any]) -> None:
    for step in range(30):
        x, _ = example(4, seed=step)
        index = torch.tensor([[step // 10, step // 10 + 1]] * 4)
        assert torch.equal(variants["some"](x, index), variants["resident"](x, index))


def test_plans_fetch_once_for_each_route(variants: dict[str, Any]) -> None:
    plan = variants["some"].plan
    fetches = [s for s in plan.steps if isinstance(s, FetchStep)]
    assert [len(s.banks) for s in fetches] == [2, 2]
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert "fetch " in str(plan)


def test_explain_tells_of_hits_and_bytes(variants: dict[str, Any]) -> None:
    variants["some"](*example(9))
    text = variants["some"].explain()
    assert "weights of a slower tier: " in text and "MiB moved" in text
    assert "PLT-PRE-001" in text


def test_the_model_keeps_its_parameters(net: Net) -> None:
    model = copy.deepcopy(net)
    before = dict(model.named_parameters())
    wanted = model(*example(9))
    budget = compiled(model, "60%")
    assert all(before[n] is p for n, p in model.named_parameters())
    assert all(torch.equal(p, dict(net.named_parameters())[n]) for n, p in before.items())
    assert torch.equal(model(*example(9)), wanted)
    assert budget.state_dict().keys() == net.state_dict().keys()
    filed = before["one.up"].untyped_storage()
    assert filed.nbytes() == before["one.up"].nbytes
    model.load_state_dict(net.state_dict())
    assert copy.deepcopy(budget)(*example(9)).shape == wanted.shape


def test_weights_that_change_are_fetched_anew(net: Net) -> None:
    model = copy.deepcopy(net)
    budget = compiled(model, "60%")
    budget(*example(9))
    model.one.up.mul_(2.0)
    model.two.down = nn.Parameter(model.two.down + 1.0)
    resident = compiled(copy.deepcopy(model), None)
    assert torch.equal(budget(*example(9)), resident(*example(9)))
    model.one.up.data.mul_(0.5)  # not counted by torch
    resident = compiled(copy.deepcopy(model), None)
    assert torch.equal(budget(*example(9)), resident(*example(9)))


@pytest.mark.parametrize("late", [False, True])
def test_weights_that_change_while_they_are_packed_keep_their_values(
    net: Net, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    model, other = copy.deepcopy(net), copy.deepcopy(net)
    for parameter in other.parameters():
        parameter.mul_(2.0)
    real = pipeline._make

    def make(*args: Any) -> Any:
        """Loads other weights where another thread might."""
        made = real(*args) if late else None
        model.load_state_dict(other.state_dict())
        return made or real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_make", make)
        budget = compiled(model, "60%")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    resident = compiled(other, None)
    assert torch.equal(budget(*example(9)), resident(*example(9)))


def test_changes_after_a_refused_budget_are_kept(net: Net) -> None:
    model = copy.deepcopy(net)
    refused = plait.compile(model, weight_budget=100)
    with pytest.raises(plait.OptionError):
        refused(*example(9))
    model.one.up.data.mul_(2.0)
    wanted = model.one.up.clone()
    with pytest.raises(plait.OptionError):
        refused(*example(9))
    assert torch.equal(model.one.up, wanted)


def test_parameters_that_share_memory_stay_together(net: Net) -> None:
    model = copy.deepcopy(net)
    both = torch.stack([model.one.up, model.two.up])
    model.one.up, model.two.up = nn.Parameter(both[0]), nn.Parameter(both[1])
    model.two.down = model.one.down
    budget = compiled(model, "60%")
    both.mul_(2.0)
    assert torch.equal(model.one.up, both[0]) and model.two.down is model.one.down
    assert model.one.up.data_ptr() == both.data_ptr()
    budget.recompile()
    resident = compiled(copy.deepcopy(model), None)
    assert torch.equal(budget(*example(9)), resident(*example(9)))


def test_programs_of_one_model_share_the_budget(net: Net) -> None:
    model = copy.deepcopy(net)
    budget = plait.compile(model, weight_budget="60%", dynamic_shapes=None)
    resident = plait.compile(copy.deepcopy(net))
    for tokens in (1, 9, 12):
        assert torch.equal(budget(*example(tokens)), resident(*example(tokens)))
    assert len(budget.programs) > 1
    assert len(budget.weight_tier.sites) == 2
    assert budget.weight_tier.counters.peak_bytes <= budget.weight_tier.capacity


def test_models_that_share_weights_leave_them_in_one_place(net: Net) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: Net) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return 2 * self.inner(x, index)

    shared = copy.deepcopy(net)
    first, second = compiled(shared, "60%"), compiled(Doubled(shared).eval(), "70%")
    for seed in range(4):
        if seed == 2:
            shared.one.up.mul_(-2)
        wanted = shared(*example(9, seed))
        torch.testing.assert_close(first(*example(9, seed)), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second(*example(9, seed)), 2 * wanted, rtol=1e-4, atol=1e-5)
    assert first.programs[0].calls == second.programs[0].calls == 2  # since the weights changed
    assert not [r for r in first.remarks + second.remarks if r.id == "PLT-CAP-017"]


def test_calls_from_many_threads(variants: dict[str, Any]) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for k in range(15):
                inputs = example(3 + seed, seed=seed * 100 + k)
                if not torch.equal(variants["some"](*inputs), variants["resident"](*inputs)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_experts_within_branches(net: Net) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: Tensor) -> Tensor:
            index = (x[:, :2].abs() * 100).long() % EXPERTS
            return self.experts(x, index)

    torch.manual_seed(1)
    model = plait.Router([Branch(), Branch()], lambda x: (x[:, 0] > 0).long(), combine="sum")
    model.eval()
    resident = plait.compile(copy.deepcopy(model))
    budget = plait.compile(copy.deepcopy(model), weight_budget="50%")
    for tokens in (12, 1, 30):
        x, _ = example(tokens)
        assert torch.equal(budget(x), resident(x))
    tier = budget.weight_tier
    assert tier.counters.fetches and tier.counters.peak_bytes <= tier.capacity


# -- saved models ----------------------------------------------------------------------------------


def test_a_loaded_model_outlives_its_file(
    net: Net, variants: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "model.plait"
    compiled(copy.deepcopy(net), "60%").save(path)
    own = plait.load(path)
    given = plait.load(path, weight_budget="50%")
    plain = plait.load(path, weight_budget="100%")
    assert own.options.weight_budget == "60%" and given.options.weight_budget == "50%"
    path.write_bytes(b"\x00" * path.stat().st_size)  # the same file, of other contents
    for seed in range(5):
        wanted = variants["resident"](*example(9, seed))
        for model in (own, given, plain):
            assert torch.equal(model(*example(9, seed)), wanted)
    path.unlink()
    assert torch.equal(own(*example(7)), variants["resident"](*example(7)))
    state = own.state_dict()
    assert all(torch.equal(state[n], p) for n, p in net.state_dict().items())
    own.save(path)
    assert torch.equal(plait.load(path)(*example(7)), own(*example(7)))


def test_damage_is_noticed_under_a_budget_too(variants: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.plait"
    variants["resident"].save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"one_up") + 3000] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(plait.FileError, match="PLT-SAV-004"):
        plait.load(path, weight_budget="60%")


class Scaled(Net):
    """With a buffer of no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return super().forward(x * self.scale, index)


def test_a_budget_in_inference_mode(tmp_path: Path) -> None:
    net = Scaled().eval()
    inputs = example(9)
    wanted = net(*inputs)
    with torch.inference_mode():
        made = compiled(net, "60%")
        made.save(tmp_path / "model.plait")
        loaded = plait.load(tmp_path / "model.plait", weight_budget="70%")
    for model in (made, loaded):
        torch.testing.assert_close(model(*inputs), wanted, rtol=1e-4, atol=1e-5)
        assert model.weight_tier is not None
        assert not any(t.is_inference() for t in model.state_dict().values())
    net.one.up.mul_(-2)
    torch.testing.assert_close(made(*inputs), net(*inputs), rtol=1e-4, atol=1e-5)


def test_weights_made_in_inference_mode_are_left_where_they_are() -> None:
    with torch.inference_mode():
        net = Net().eval()
        with pytest.warns(UserWarning, match="PLT-PRE-008"):
            made = compiled(net, "60%")
        torch.testing.assert_close(made(*example(7)), net(*example(7)), rtol=1e-4, atol=1e-5)
        assert made.weight_tier is not None and repr(net.one.up)


# -- refusals --------------------------------------------------------------------------------------


MEANINGLESS = [0, -5, True, 1.5, "half", "0%", "120%", "x%", "40", "0MB", "2XB", b"4"]


@pytest.mark.parametrize("budget", MEANINGLESS)
def test_budgets_without_meaning(net: Net, budget: Any, tmp_path: Path) -> None:
    with pytest.raises(plait.OptionError, match="PLT-OPT-006"):
        plait.compile(net, weight_budget=budget)
    with pytest.raises(plait.OptionError, match="PLT-OPT-006"):
        plait.load(tmp_path / "none", weight_budget=budget)


def test_a_budget_below_the_largest_expert_names_the_least_there_is(net: Net) -> None:
    with pytest.raises(plait.OptionError, match=r"PLT-OPT-006.*give at least \d+ bytes") as caught:
        compiled(copy.deepcopy(net), weights(net.dense) + 100)
    least = int(caught.value.hint.split()[3])
    model = compiled(copy.deepcopy(net), least)
    resident = compiled(copy.deepcopy(net), None)
    assert torch.equal(model(*example(9)), resident(*example(9)))
    with pytest.raises(plait.OptionError):
        compiled(copy.deepcopy(net), least - 1)


def test_a_model_without_routed_weights_cannot_keep_a_budget() -> None:
    model = nn.Linear(8, 8).eval()
    with pytest.raises(plait.OptionError, match="PLT-OPT-006"):
        plait.compile(model, example_inputs=torch.randn(2, 8), weight_budget="50%")
    whole = plait.compile(model, example_inputs=torch.randn(2, 8), weight_budget="100%")
    assert "PLT-PRE-004" in {r.id for r in whole.remarks}


def test_weights_whose_product_has_no_kernel_stay(net: Net) -> None:
    wide = copy.deepcopy(net).double()
    x, index = example(9)
    with pytest.raises(plait.OptionError, match="no routed products with kernels"):
        plait.compile(wide, example_inputs=(x.double(), index), weight_budget="60%")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits(net: Net, dtype: torch.dtype) -> None:
    half = copy.deepcopy(net).to(dtype)
    x, index = example(9)
    with torch.no_grad():
        whole = plait.compile(half, example_inputs=(x.to(dtype), index), tune="off")
        some = plait.compile(
            half, example_inputs=(x.to(dtype), index), weight_budget="60%", tune="off"
        )
        for seed in range(4):
            x, index = example(9, seed)
            assert torch.equal(whole(x.to(dtype), index), some(x.to(dtype), index))


def test_a_full_disk_is_one_error(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(banks.os, "write", full)
    with pytest.raises(plait.FileError, match=r"PLT-PRE-005.*No space left.*PLAIT_CACHE_DIR"):
        compiled(copy.deepcopy(net), "60%")


def test_weights_that_cannot_be_read_back_are_one_error_and_read_again_later(
    variants: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise banks.BankError("weights cannot be read back: Input/output error")

    inputs = example(9, seed=1)
    for name in ("some", "one"):  # where all that is wanted fits together, and in waves
        with monkeypatch.context() as patched:
            patched.setattr(banks.Bank, "load", broken)
            patched.setattr(tiers.Tier, "within", lambda _: None)  # native code would load
            with pytest.raises(plait.FileError, match=r"PLT-PRE-005.*Input/output error"):
                for expert in range(EXPERTS):  # some of them are still in memory
                    variants[name](inputs[0], torch.full((9, 2), expert))
        assert torch.equal(variants[name](*inputs), variants["resident"](*inputs))


def test_a_profile_seeds_the_forecast(net: Net) -> None:
    model = copy.deepcopy(net)
    batches = [(example(8)[0], torch.full((8, 2), 3))] * 4
    profile = plait.profile(model, batches)
    budget = compiled(model, "60%", profile=profile)
    forecast = budget.weight_tier.forecast
    assert forecast._total[0].argmax() == 3
    resident = compiled(copy.deepcopy(net), None)
    assert torch.equal(budget(*example(9)), resident(*example(9)))
