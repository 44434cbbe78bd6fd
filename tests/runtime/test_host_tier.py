"""Experts in host memory: for any routes, budgets and speeds what all-resident experts give."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.compiler.gpu.order import dependencies
from plait.passes.plan_memory import plan_memory
from plait.passes.streams import assign, lifetimes
from plait.runtime.cuda_graph import GpuExecutor
from plait.runtime.host_tier import HostTier
from plait.runtime.paging import Paging
from plait.runtime.plan import (
    Buffer,
    FetchStep,
    KernelStep,
    Lane,
    LibraryStep,
    Plan,
    PlanError,
    Step,
    TensorRef,
    cuts,
    touched,
)
from plait.runtime.slots import HostBank, Slots

from .ordered_gpu import OrderedGpu

N, ROWS, EXPERTS = 3, 7, 4
UNIT = 2 * 4 * N  # bytes of both matrices of an expert
LAYOUT = [((N,), torch.float32)] * 2
OFFSETS = TensorRef("offsets", "int64", (EXPERTS + 1,), (1,))


def _rows(name: str) -> TensorRef:
    return TensorRef(name, "float32", (ROWS, N), (N, 1))


def _plan(layers: int, streams: int, apart: bool = False) -> Plan:
    """Layers of two products each, with operators of the library before and behind them; ``apart``
    has all but the last product of a layer wait until the next layer has fetched.
    """
    steps: list[Step] = []
    buffers = {"x": Buffer("x", "input", 4 * ROWS * N)}
    inputs = [_rows("x")]
    value = "x"
    for k in range(layers):
        offsets = replace(OFFSETS, buffer=f"offsets{k}")
        inputs.append(offsets)
        buffers[offsets.buffer] = Buffer(offsets.buffer, "input", 8 * (EXPERTS + 1), k + 1)
        banks, table = (f"up{k}", f"down{k}"), f"table{k}"
        for name in (*banks, table):
            buffers[name] = Buffer(name, "const", 4 * N * EXPERTS)

        def add(name: str, kind: str, step: Step) -> None:
            buffers[name] = Buffer(name, kind, 4 * ROWS * N)
            steps.append(step)

        def product(name: str, read: str, bank: str) -> None:
            weights = TensorRef(bank, "float32", (EXPERTS, N), (N, 1))
            own = TensorRef(table, "int32", (EXPERTS,), (1,))  # noqa: B023
            args = (_rows(read), offsets, weights, own, _rows(name))  # noqa: B023
            add(name, "arena", KernelStep(name, "product", args, 4))

        twice = LibraryStep(
            f"a{k}", "aten.add.Tensor", (_rows(value),) * 2, [{"ref": 0}, {"ref": 1}], {},
            (_rows(f"a{k}"),),
        )  # fmt: skip
        add(f"a{k}", "library", twice)
        steps.append(FetchStep(f"fetch{k}", banks, offsets, f"router#{k}", table=table))
        product(f"h{k}", f"a{k}", banks[0])
        if apart:
            steps.append(FetchStep(f"again{k}", banks, offsets, f"router#{k}", table=table))
        product(f"y{k}", f"h{k}", banks[1])
        refs, args = (_rows(f"y{k}"), _rows(value)), [{"ref": 0}, {"ref": 1}]
        step = LibraryStep(f"v{k}", "aten.add.Tensor", refs, args, {}, (_rows(f"v{k}"),))
        add(f"v{k}", "library", step)
        value = f"v{k}"
    found = assign(dependencies(steps, set()), [1.0] * len(steps), streams)
    users: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        for ref in touched(step):
            if ref is not None and buffers[ref.buffer].kind == "arena":
                users.setdefault(ref.buffer, []).append(number)
    memory = plan_memory(lifetimes(dict.fromkeys(users, 4 * ROWS * N), users, found))
    for name, offset in memory.offsets.items():
        buffers[name] = replace(buffers[name], offset=offset)
    lanes = [Lane(s, w) for s, w in zip(found.of, found.waits, strict=True)]
    outputs = [_rows(value)]
    return Plan("layers", buffers, steps, inputs, outputs, arena_bytes=memory.total, lanes=lanes)


def _product(device: OrderedGpu) -> Callable[[Sequence[int], int], None]:
    """The kernel: a row times the factors of its expert, plus one."""

    def run(pointers: Sequence[int], stream: int) -> None:
        x, offsets, bank, table, out = pointers
        begins = (ctypes.c_int64 * (EXPERTS + 1)).from_address(offsets)
        device.touch(table, False)
        slots = (ctypes.c_int32 * EXPERTS).from_address(table)
        read, written = ((ctypes.c_float * (ROWS * N)).from_address(p) for p in (x, out))
        for expert in range(EXPERTS):
            rows = range(begins[expert], begins[expert + 1])
            if not rows or slots[expert] < 0:
                continue
            place = bank + 4 * N * slots[expert]
            device.touch(place, False)
            factors = (ctypes.c_float * N).from_address(place)
            for row in rows:
                for i in range(N):
                    written[row * N + i] = read[row * N + i] * factors[i] + 1
        for i in range(begins[EXPERTS] * N, ROWS * N):
            written[i] = 0.0

    return run


def _banks(layers: int) -> dict[str, HostBank]:
    names = [f"{kind}{k}" for k in range(layers) for kind in ("up", "down")]
    return {name: HostBank(torch.rand(EXPERTS, N)) for name in names}


def _wanted(banks: dict[str, HostBank], x: torch.Tensor, *routes: torch.Tensor) -> torch.Tensor:
    for k, offsets in enumerate(routes):
        y = x + x
        for kind in ("up", "down"):
            result = torch.zeros_like(y)
            for expert in range(EXPERTS):
                rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
                result[rows] = y[rows] * banks[f"{kind}{k}"].tensor[expert] + 1
            y = result
        x = y + x
    return x


def _route(chance: random.Random) -> torch.Tensor:
    """Offsets of a route, which leaves some experts, and perhaps some rows, out."""
    some = chance.sample(range(EXPERTS + 1), chance.randint(1, EXPERTS + 1))
    chosen = sorted(chance.choice(some) for _ in range(ROWS))
    return torch.tensor([sum(c < e for c in chosen) for e in range(EXPERTS + 1)])


class _Setup:
    """Executors of plans with as many layers, over one tier."""

    def __init__(self, seed: int, layers: int, slots: int, graph: bool, **options: Any) -> None:
        self.device = OrderedGpu(seed)
        self.chance = random.Random(seed)
        self.layers = layers
        torch.manual_seed(seed)
        self.banks = _banks(layers)
        self.tier = HostTier(slots * UNIT + 5, self.device, LAYOUT, **options)
        functions = {"product": _product(self.device)}
        self.executors = []
        for number in range(2):
            plan = _plan(layers, 1 + number, apart=number == 1)
            paging = Paging(plan, self.device, self.tier, self.banks)
            made = GpuExecutor(plan, {}, functions, self.device, graph=graph, fetching=paging)
            self.executors.append(made)

    def call(self, number: int) -> Callable[[], None]:
        """Issues a call; what is returned checks its result, once all is done."""
        self.device.caller = f"caller {self.chance.randrange(2)}"
        given = [torch.rand(ROWS, N), *(_route(self.chance) for _ in range(self.layers))]
        (have,) = self.executors[number].run(given)
        want = _wanted(self.banks, *given)
        return lambda: self._check(have, want)

    def _check(self, have: torch.Tensor, want: torch.Tensor) -> None:
        torch.testing.assert_close(have, want, rtol=1e-6, atol=0)

    def run(self, calls: int) -> None:
        checks = []
        for _ in range(calls):
            checks.append(self.call(self.chance.randrange(2)))
            assert self.tier.resident_bytes <= self.tier.capacity
            assert len(self.tier.slots.of) * UNIT == self.tier.resident_bytes
            if self.chance.random() < 0.3:
                self.device.synchronize()
        self.device.synchronize()
        for check in checks:
            check()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["value", "lru"]),
)
def test_any_routes_and_budgets_give_what_resident_experts_do(
    seed: int, layers: int, slots: int, graph: bool, ahead: bool, evict: Any
) -> None:
    made = _Setup(seed, layers, slots, graph, ahead=ahead, evict=evict)
    made.run(6)
    counters = made.tier.counters
    assert counters.peak_bytes <= made.tier.capacity and not counters.over
    assert made.device.captures == 0 or graph


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_budget_may_change_between_calls(seed: int, sizes: list[int]) -> None:
    made = _Setup(seed, 2, 3, True)
    for slots in sizes:
        made.tier.limit(slots * UNIT)
        assert made.tier.slots.count == slots
        made.run(2)


def _fails(slots: int = 3) -> bool:
    """Whether something goes wrong with some order of things."""
    for seed in range(10):
        try:
            _Setup(seed, 2, slots, False).run(6)
        except AssertionError:
            return True
    return False


def test_a_slot_is_overwritten_behind_its_last_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _fails()
    monkeypatch.setattr(Slots, "were_read", lambda self, keys, event: None)
    assert _fails()


def test_a_slot_is_read_behind_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "await_copies", lambda self, keys, stream: None)
    assert _fails()


def test_calls_come_one_after_the_other_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "turn", lambda self, stream: contextlib.nullcontext())
    assert _fails(slots=2 * EXPERTS)


def test_calls_come_one_after_the_other_where_one_failed() -> None:
    device = OrderedGpu()
    slots = Slots(device, LAYOUT)
    with pytest.raises(KeyError), slots.turn("failing"):
        raise KeyError
    with slots.turn("next"):
        assert device.log[-2:] == [("failing", "record"), ("next", "wait")]


class _Filling(OrderedGpu):
    """New memory is filled by the stream that asks for it."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        raw = super().allocate(nbytes)
        nothing = torch.zeros(nbytes, dtype=torch.uint8)
        return self.call(torch.Tensor.copy_, raw, nothing, non_blocking=True)


@pytest.mark.parametrize("ahead", [True, False])
def test_slots_are_written_when_their_memory_is_there(ahead: bool) -> None:
    device = _Filling()
    slots = Slots(device, LAYOUT)
    slots.resize(1)
    slots.load((0, 0), [torch.ones(N)] * 2, ahead)
    device.synchronize()


@pytest.mark.parametrize("use", ["read", "copied ahead"])
def test_slots_go_when_nothing_uses_them_any_more(use: str) -> None:
    device = OrderedGpu()
    slots = Slots(device, LAYOUT)
    slots.resize(3)
    slots.load((0, 0), [torch.ones(N)] * 2, ahead=True)
    if use == "read":
        device.synchronize()
        with slots.turn("reader"), device.on("reader"):
            device.call(torch.Tensor.copy_, torch.empty(N), slots.array(0)[0])
    slots.give((0, 0))
    slots.resize(2)
    assert not [kind for queue in device.queues.values() for kind, _ in queue if kind == "run"]


def test_what_stays_wanted_is_not_copied_again() -> None:
    made = _Setup(0, 1, EXPERTS, True, ahead=False)
    x, offsets = torch.rand(ROWS, N), torch.tensor([0, 2, 2, 5, 7])
    copied = []
    for _ in range(4):
        made.executors[0].run([x, offsets])
        made.device.synchronize()
        copied.append(made.device.copies)
    told = [b - a for a, b in zip(copied, copied[1:], strict=False)]
    assert copied[0] == 3 * 2 + 1 + 1 and told == [1, 1, 1]  # matrices, the table; the offsets
    counters = made.tier.counters
    assert (counters.misses, counters.hits, counters.bytes_moved) == (3, 9, 3 * UNIT)


def test_more_experts_than_slots_come_in_waves() -> None:
    made = _Setup(0, 1, 2, True)
    x, offsets = torch.rand(ROWS, N), torch.tensor([0, 2, 3, 5, 6])
    for _ in range(3):
        (have,) = made.executors[0].run([x, offsets])
        made.device.synchronize()
        torch.testing.assert_close(have, _wanted(made.banks, x, offsets))
    counters = made.tier.counters
    assert counters.waves == 3 * 2 * EXPERTS
    # What the last waves brought is there for the next kernel, and is used first.
    assert counters.hits == (3 * 2 - 1) * 2 and counters.peak_bytes == 2 * UNIT


@pytest.mark.parametrize("slots", [4, 5])
def test_the_wave_before_stays_while_the_next_is_copied(slots: int) -> None:
    device, chance = OrderedGpu(), random.Random(0)
    tier = HostTier(slots * UNIT, device, LAYOUT, ahead=False)
    site = tier.site_of([HostBank(torch.rand(9, N)) for _ in LAYOUT])
    for _ in range(20):
        counts = [chance.randint(0, 1) for _ in range(9)]
        with tier.using(), tier.slots.turn("caller"):
            if tier.fetch(site, counts):
                continue
            seen: list[int] = []
            before: list[int] = []
            for group in tier.waves(site, counts):
                assert set(tier.keys(site, [*before, *group])) <= tier.slots.of.keys()
                seen += group
                before = list(group)
            assert sorted(seen) == [u for u, count in enumerate(counts) if count]
    assert tier.counters.waves > 10 and not tier.counters.over


def test_memory_for_tables_is_used_again() -> None:
    made = _Setup(0, 1, 2, False)
    x, offsets, used = torch.rand(ROWS, N), torch.tensor([0, 2, 3, 5, 6]), []
    for _ in range(4):
        made.executors[0].run([x, offsets])
        paging: Any = made.executors[0].fetching
        used.append(len(paging._tables["table0"]._staged))
    assert used[1:] == used[1:2] * 3


def test_what_the_next_router_wants_is_copied_ahead() -> None:
    made = _Setup(0, 2, 6, True)
    x, offsets = torch.rand(ROWS, N), [torch.tensor(r) for r in ([0, 7, 7, 7, 7], [0, 0, 0, 7, 7])]
    others = [torch.tensor(r) for r in ([0, 0, 7, 7, 7], [0, 0, 0, 0, 7])]
    for turn in range(40):  # two kinds of calls, whose first route tells the second
        given = offsets if turn % 3 else others
        made.executors[0].run([x, *given])
    made.device.synchronize()
    assert made.tier.counters.hits + made.tier.counters.misses == 80
    made = _Setup(0, 2, 2, True)
    for turn in range(60):
        made.executors[0].run([x, *(offsets if turn % 3 else others)])
    made.device.synchronize()
    assert made.tier.counters.ahead > 0 and made.tier.counters.useful > 0


def test_no_plan_runs_without_its_weights() -> None:
    made = _Setup(0, 1, 2, True)
    plan = made.executors[0].plan
    assert len(cuts(plan.steps)) == 3
    with pytest.raises(PlanError, match="nothing fetches them"):
        GpuExecutor(plan, {}, {"product": lambda *a: None}, made.device)
    with pytest.raises(PlanError, match="are missing"):
        Paging(plan, made.device, made.tier, {})
    half = {n: HostBank(b.tensor.half()) for n, b in made.banks.items()}
    with pytest.raises(PlanError, match="are others"):
        Paging(plan, made.device, made.tier, half)
