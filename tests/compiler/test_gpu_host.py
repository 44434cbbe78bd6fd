"""`plait.compile(weight_budget=...)` of models on a GPU: experts in host memory, slots for some."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.compiler import build, specialise
from plait.compiler.build import store_at
from plait.compiler.capture.captured import Captured
from plait.compiler.capture.export import capture
from plait.compiler.errors import OptionError
from plait.compiler.gpu import compiled
from plait.compiler.gpu.branches import assemble
from plait.compiler.gpu.lower import GpuLowered
from plait.compiler.gpu.paged import SLOTS
from plait.compiler.gpu.pipeline import Planned, planned
from plait.compiler.gpu.select import GpuKernels
from plait.compiler.lowering.select import missed
from plait.compiler.notes import Notes
from plait.compiler.options import Options
from plait.compiler.specialise import Specialiser
from plait.compiler.weights import host
from plait.compiler.weights.budget import WeightStore
from plait.compiler.weights.host import HostStore
from plait.kernels import routing
from plait.kernels.group import Group
from plait.kernels.ops import argument
from plait.passes.prefetch_weights import TIERED
from plait.passes.verifier import verify
from plait.runtime.plan import FetchStep, KernelStep, LibraryStep, Plan, cuts

from ..runtime.ordered_gpu import OrderedGpu
from .budgets import EXPERTS, INNER, WIDTH, Experts, Net, example, weights
from .test_gpu import Emulated

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
UNIT = 2 * INNER * WIDTH * 4  # both matrices of an expert
RESIDENT = (WIDTH * WIDTH + WIDTH + 2 * EXPERTS * WIDTH) * 4  # the linear layer, and biases
CPU = torch.device("cpu")


class _Here:
    """A GPU executor whose calls have ended when they return."""

    def __init__(self, inner: Any, device: OrderedGpu) -> None:
        self.inner, self.device = inner, device

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        results = self.inner.run(tensors)
        self.device.synchronize()
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrderedGpu]:
    """Lets `plait.compile` take the CPU for a GPU, which emulates kernels."""
    device, loader = OrderedGpu(), Emulated(tmp_path_factory.mktemp("host"))

    def executor(lowered: GpuLowered, place: torch.device, store: HostStore) -> Any:
        return _Here(assemble(lowered, device, loader, store), device)

    properties = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048)
    with pytest.MonkeyPatch.context() as patch:
        for module in (build, specialise):
            patch.setattr(module, "gpu_of", lambda captured: CPU)
        patch.setattr(compiled, "executor", executor)
        patch.setattr(host, "device_of", lambda place: device)
        patch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
        patch.setattr("torch.cuda.get_device_properties", lambda device: properties)
        patch.setenv("PLAIT_DEBUG", "1")
        yield device


def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _check(model: Any, net: nn.Module, calls: int = 4, tokens: int = 3) -> None:
    for seed in range(calls):
        given = example(tokens, seed)
        with torch.no_grad():
            torch.testing.assert_close(model(*given), net(*given), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def model(gpu: OrderedGpu) -> Any:
    made = plait.compile(_net(), weight_budget=RESIDENT + 7 * UNIT, tune="off")
    _check(made, _net(), 1)
    return made


@pytest.mark.parametrize("slots", [7, 1, 3])
def test_any_budget_gives_what_the_model_does(model: Any, slots: int) -> None:
    tier = model.weight_tier
    assert tier.capacity == 7 * UNIT
    inputs = example(3, 9)
    whole = model(*inputs)
    before = tier.counters.fetches, tier.counters.waves, tier.counters.misses
    tier.limit(slots * UNIT)
    try:
        assert tier.slots.count == slots
        _check(model, _net())
        counters = tier.counters
        fetches, waves, misses = counters.fetches, counters.waves, counters.misses
        assert fetches == before[0] + 8 and misses > before[2]
        assert (waves > before[1]) == (slots < 7)
        assert tier.resident_bytes <= slots * UNIT and not counters.over
        assert torch.equal(model(*inputs), whole)  # the same bits
    finally:
        tier.limit(7 * UNIT)


def test_remarks_and_explain_tell_what_was_done(model: Any) -> None:
    told = {r.id: r.reason for r in model.remarks}
    assert "lie on a slower tier" in told["PLT-PRE-001"]
    assert not {"PLT-PRE-003", "PLT-PRE-010", "PLT-PRE-011", "PLT-CAP-015"} & set(told)
    assert f"weights of a slower tier: {model.weight_tier.counters}" in model.explain()


def test_the_plan_fetches_before_the_products_of_a_route(model: Any) -> None:
    plan = model.plan
    assert Plan.from_json(plan.to_json()) == plan
    kinds = [type(plan.steps[k]) for k in sorted(cuts(plan.steps))]
    assert kinds == [FetchStep, KernelStep, KernelStep] * 2
    fetches = [s for s in plan.steps if isinstance(s, FetchStep)]
    assert [s.router for s in fetches] == ["one#0", "two#0"]
    assert len({s.table for s in fetches}) == 2 and all(len(s.banks) == 2 for s in fetches)


def test_parameters_lie_in_host_memory_and_stay_what_they_are(model: Any, gpu: OrderedGpu) -> None:
    places = {memory.host.data_ptr() for memory in gpu._shown}
    net = model._original
    for block in (net.one, net.two):
        assert {block.up.data_ptr(), block.down.data_ptr()} <= places
        assert block.bias.data_ptr() not in places
    assert net.dense.weight.data_ptr() not in places
    _check(net, _net(), 1)
    (program,) = model.programs
    constants = program.captured.constants().values()
    assert len([t for t in constants if t.data_ptr() in places]) == 4
    assert not any(t.nbytes > UNIT for t in program.executable.executor.inner._memory.values())


def test_forecasts_start_from_a_profile(model: Any) -> None:
    batches = [example(5, seed) for seed in range(4)]
    profile = plait.profile(_net(), batches)
    (program,) = model.programs
    store, forecast = model._dispatcher.specialiser.store, model.weight_tier.forecast
    store.learn(program.executable.executor, profile)
    for router in profile.total:
        number = ("one", "two").index(router.name)
        load = torch.tensor(router.load, dtype=torch.float64)
        have = torch.from_numpy(forecast._recent[number])
        torch.testing.assert_close(have, load / load.sum())


def test_another_size_shares_the_slots(model: Any, gpu: OrderedGpu) -> None:
    tier, shown = model.weight_tier, len(gpu._shown)
    sites = len(tier.sites)
    _check(model, _net(), 2, tokens=1)
    assert len(model.programs) == 2 and model.weight_tier is tier
    assert len(tier.sites) == sites == 2 and len(gpu._shown) == shown


def test_a_budget_below_one_expert_is_an_error_and_nothing_moves(gpu: OrderedGpu) -> None:
    net, shown = Experts().eval(), len(gpu._shown)
    least = EXPERTS * WIDTH * 4 + UNIT
    model = plait.compile(net, weight_budget=least - 1, tune="off")
    with pytest.raises(OptionError, match="PLT-OPT-006") as error:
        model(*example(3))
    assert f"give at least {least} bytes" in str(error.value)
    assert len(gpu._shown) == shown
    net = plait.compile(nn.Linear(4, 4).eval(), weight_budget=40, tune="off")
    with pytest.raises(OptionError, match="could lie in host memory"):
        net(torch.rand(1, 4))


def test_changed_weights_are_copied_anew(model: Any) -> None:
    net, other = model._original, _net()
    with torch.no_grad():
        for block in (net.one, other.one):
            block.up.mul_(1.5)
        other.two.down.zero_()
        net.two.down.copy_(other.two.down)
    _check(model, other, 3)
    assert "PLT-CAP-014" in {r.id for r in model.remarks}


# -- what cannot be fetched ------------------------------------------------------------------------


class Mixed(nn.Module):
    """Two routes of float32, of which one shares a matrix with an operator; and one of bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, 64, WIDTH))
        self.shared = nn.Parameter(torch.randn(EXPERTS, WIDTH, 64))
        self.other = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.brief = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH).bfloat16())

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        first, second, third = (routing.route(index + k, EXPERTS) for k in range(3))
        y = routing.routed_linear(x, *first, self.up, None, False, 1, False)
        y = routing.routed_linear(y, *first, self.shared, None, False, 0, True)
        z = routing.routed_linear(x, *second, self.other, None, False, 1, True)
        half = x.bfloat16()
        half = routing.routed_linear(half, *third, self.brief, None, False, 1, True)
        return y + z + half.float() + (self.shared * x[0, 0]).sum()


def _captured(model: nn.Module, *given: Tensor) -> Captured:
    with torch.no_grad():
        return capture(model.eval(), given, {})


@pytest.fixture(scope="module")
def mixed() -> Planned:
    index = torch.randint(0, EXPERTS, (3, 1))
    return planned(_captured(Mixed(), torch.rand(3, WIDTH), index), budget=8000)


def test_routes_are_fetched_whole_or_not_at_all(mixed: Planned) -> None:
    (route,) = mixed.graph.meta[SLOTS]
    tables = [n for n in mixed.graph.graph.nodes if argument_of(n) is not None]
    assert len(tables) == 1 and len(route.weights) == 1
    assert mixed.layout == (((WIDTH, WIDTH), torch.float32),)
    size = EXPERTS * WIDTH * WIDTH * 4
    assert mixed.graph.meta[TIERED].tiered == size
    told = [r for r in mixed.remarks if r.id == "PLT-PRE-011"]
    assert len(told) == 1 and "not in float32" in told[0].reason


def argument_of(node: Any) -> Any:
    routed = str(node.target) == "plait.routed_linear.default"
    return argument(node, "slots") if routed else None


def test_the_graph_means_what_it_did(mixed: Planned) -> None:
    verify(mixed.graph)
    given = torch.rand(3, WIDTH), torch.randint(0, EXPERTS, (3, 1))
    before: Any = mixed.captured.graph_module
    after: Any = mixed.graph
    torch.testing.assert_close(after(*given), before(*given))


def test_experts_without_a_kernel_stay(mixed: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    select = GpuKernels.select

    def declines(self: GpuKernels, group: Group, io: Any) -> Any:
        if group.kind == "experts":
            return missed("PLT-KER-003", (group.nodes[0].name,), "no kernel today")
        return select(self, group, io)

    monkeypatch.setattr(GpuKernels, "select", declines)
    lowered = mixed.lower()
    assert not lowered.banks and lowered.stayed == EXPERTS * WIDTH * WIDTH * 4
    assert not any(isinstance(s, FetchStep) for s in lowered.plan.steps)
    products = [s for s in lowered.plan.steps if isinstance(s, LibraryStep)]
    assert sum("slots" in s.kwargs for s in products) == 1
    assert "PLT-PRE-003" in {r.id for r in lowered.remarks}


class Stacked(nn.Module):
    """Experts whose weights are apart until they are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(EXPERTS))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        weight = torch.stack([one.weight for one in self.all])
        route, first = routing.route(index, EXPERTS), self.all[0]
        y = routing.routed_linear(x, *route, weight, None, False, 1, True)
        return y + x * first.weight.sum()  # type: ignore[operator]


def test_what_weights_are_made_of_moves_unless_something_else_reads_it() -> None:
    captured = _captured(Stacked(), torch.rand(3, WIDTH), torch.randint(0, EXPERTS, (3, 1)))
    found = host._sources(captured.graph_module, set())
    names = {captured.names[name] for name in found}
    assert names == {f"all.{k}.weight" for k in range(1, EXPERTS)}


# -- which store ---------------------------------------------------------------------------------


def test_a_store_is_for_one_device(gpu: OrderedGpu) -> None:
    store = WeightStore("40%")
    there = store_at(store, CPU)
    assert isinstance(there, HostStore) and there.budget == "40%"
    assert store_at(there, CPU) is there and store_at(store, None) is store
    assert type(store_at(there, None)) is WeightStore
    with pytest.raises(NotImplementedError, match="for another device"):
        captured = _captured(nn.Linear(2, 2), torch.rand(1, 2))
        build.build(captured, Options(weight_budget="40%"), store)


def test_a_loaded_program_is_refused_by_name(gpu: OrderedGpu) -> None:
    notes = Notes()
    made = Specialiser(None, Options(weight_budget="40%"), None, notes, WeightStore("40%"), [])
    with pytest.warns(UserWarning, match="PLT-PRE-010"):
        assert made.build(_captured(nn.Linear(2, 2), torch.rand(1, 2))) is None


def test_a_model_of_this_size_has_these_bytes() -> None:
    assert weights(_net()) == RESIDENT + 2 * EXPERTS * UNIT
