"""GPU plans that choose among plans: right values for every choice, in every order."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.compiler.gpu.order import dependencies
from plait.passes.plan_memory import plan_memory
from plait.passes.streams import assign, lifetimes
from plait.runtime.cuda_graph import GpuExecutor, releases
from plait.runtime.plan import (
    BranchStep,
    Buffer,
    KernelStep,
    Lane,
    LibraryStep,
    Plan,
    PlanError,
    Step,
    TensorRef,
    touched,
)

from .fake_gpu import FakeGpu
from .test_cuda_graph import N, _expected, _mix, _plan, _ref

ROWS = 6
CELLS = TensorRef("cells", "float32", (ROWS, N), (N, 1))
OFFSETS = TensorRef("offsets", "int64", (3,), (1,))


def _library(name: str, target: str, ref: TensorRef, args: list[Any], dtype: str) -> LibraryStep:
    return LibraryStep(
        name, target, (ref,), [{"ref": 0}, *args], {}, (TensorRef(name, dtype, (), ()),)
    )


def _chooses(chance: random.Random, count: int, most: int) -> Plan:
    """A plan of kernels, library operators, `torch.cond`s and routers, on streams."""
    steps: list[Step] = []
    buffers = {"x": Buffer("x", "input", 4 * N), "cells": Buffer("cells", "input", 4 * ROWS * N, 1)}
    buffers["offsets"] = Buffer("offsets", "input", 24, 2)
    parts: dict[str, Plan] = {}
    values = ["x"]

    def add(name: str, step: Step, kind: str, nbytes: int = 4 * N) -> None:
        steps.append(step)
        buffers[name] = Buffer(name, kind, nbytes)

    for k in range(count):
        name, ref = f"v{k}", _ref(chance.choice(values))
        kind = chance.choice(("kernel", "library", "cond", "rows"))
        if kind == "kernel":
            other = _ref(chance.choice(values))
            add(name, KernelStep(name, "mix", (ref, other, _ref(name)), 2), "arena")
        elif kind == "library":
            other, args = _ref(chance.choice(values)), [{"ref": 0}, {"ref": 1}]
            step = LibraryStep(name, "aten.add.Tensor", (ref, other), args, {}, (_ref(name),))
            add(name, step, "library")
        elif kind == "cond":
            add(f"s{k}", _library(f"s{k}", "aten.sum.default", ref, [], "float32"), "library")
            total = TensorRef(f"s{k}", "float32", (), ())
            add(f"p{k}", _library(f"p{k}", "aten.gt.Scalar", total, [8.0], "bool"), "library")
            sides = (f"{name} yes", f"{name} no")
            for side in sides:
                inner = _plan(chance, chance.randint(1, 4), 2)
                parts[side] = replace(inner, outputs=inner.outputs[:1])
            chosen = TensorRef(f"p{k}", "bool", (), ())
            add(name, BranchStep(name, "cond", sides, chosen, (ref,), (_ref(name),)), "arena")
        else:
            names = (f"{name} 0", f"{name} 1")
            for number, part in enumerate(names):
                parts[part] = _scaled(2.0 + number)
            routed = TensorRef(f"r{k}", "float32", (ROWS, N), (N, 1))
            router = BranchStep(f"r{k}", "rows", names, OFFSETS, (CELLS,), (routed,))
            add(f"r{k}", router, "arena", 4 * ROWS * N)
            row = replace(routed, shape=(N,), strides=(1,), offset=N * chance.randrange(ROWS))
            add(name, KernelStep(name, "mix", (row, ref, _ref(name)), 2), "arena")
        values.append(name)
    read = {r.buffer for s in steps for r in (s.args[:-1] if isinstance(s, KernelStep) else s.refs)}  # type: ignore[union-attr]
    outputs = [name for name in values[1:] if name not in read]
    for name in outputs:
        if buffers[name].kind == "arena":
            buffers[name] = replace(buffers[name], kind="output")
    streams = assign(dependencies(steps, set()), [chance.random() for _ in steps], most)
    users: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        for ref in touched(step):
            if ref is not None and buffers[ref.buffer].kind == "arena":
                users.setdefault(ref.buffer, []).append(number)
    sizes = {name: int(buffers[name].nbytes) for name in users}
    memory = plan_memory(lifetimes(sizes, users, streams))
    for name, offset in memory.offsets.items():
        buffers[name] = replace(buffers[name], offset=offset)
    return Plan(
        "chooses",
        buffers,
        steps,
        [_ref("x"), CELLS, OFFSETS],
        [_ref(name) for name in outputs],
        arena_bytes=memory.total,
        lanes=[Lane(s, w) for s, w in zip(streams.of, streams.waits, strict=True)],
        parts=parts,
    )


def _scaled(factor: float) -> Plan:
    """Multiplies up to `ROWS` rows."""
    rows, result = replace(CELLS, buffer="x"), replace(CELLS, buffer="y")
    step = LibraryStep("y", "aten.mul.Scalar", (rows,), [{"ref": 0}, factor], {}, (result,))
    nbytes = 4 * ROWS * N
    buffers = {"x": Buffer("x", "input", nbytes), "y": Buffer("y", "library", nbytes)}
    return Plan("scaled", buffers, [step], [rows], [result], lanes=[Lane(0)])


def _wanted(
    plan: Plan, x: torch.Tensor, cells: torch.Tensor, offsets: torch.Tensor
) -> list[torch.Tensor]:
    known = {"x": x, "cells": cells, "offsets": offsets}
    begin, middle, end = offsets.tolist()
    for step in plan.steps:
        if isinstance(step, BranchStep) and step.kind == "cond":
            part = plan.parts[step.plans[0 if bool(known[step.selector.buffer]) else 1]]
            outputs = [r.buffer for r in part.outputs]
            (known[step.name],) = _expected(part.steps, known[step.refs[0].buffer], outputs)
        elif isinstance(step, BranchStep):
            known[step.name] = torch.full_like(cells, float("nan"))
            known[step.name][begin:middle] = cells[begin:middle] * 2
            known[step.name][middle:end] = cells[middle:end] * 3
        elif isinstance(step, KernelStep):
            # To the bit, for a `torch.cond` asks whether a sum is above 8.
            reads = [
                known[r.buffer].flatten()[int(r.offset) :][:N].double() for r in step.args[:-1]
            ]
            known[step.name] = (1 + sum((k + 1) * v / 4 for k, v in enumerate(reads))).float()
        elif isinstance(step, LibraryStep):
            first = known[step.refs[0].buffer]
            if step.target == "aten.add.Tensor":
                known[step.name] = first + known[step.refs[1].buffer]
            else:
                known[step.name] = first.sum() if "sum" in step.target else first > 8.0
    return [known[r.buffer] for r in plan.outputs]


def _executor(plan: Plan, device: FakeGpu, graph: bool) -> GpuExecutor:
    parts = {n: GpuExecutor(p, {}, {"mix": _mix}, device) for n, p in plan.parts.items()}
    return GpuExecutor(plan, {}, {"mix": _mix}, device, graph=graph, parts=parts)


def _is_right(plan: Plan, seed: int, graph: bool, refuses: str = "", calls: int = 5) -> bool:
    device, chance = FakeGpu(seed, refuses), random.Random(seed)
    executor = _executor(plan, device, graph)
    right, found = True, []
    for call in range(calls):
        device.caller = f"caller {call % 2}"
        middle, scale = chance.randint(0, ROWS), chance.choice((0.1, 2.0, 5.0))
        offsets = torch.tensor([0, middle, ROWS])
        given = torch.rand(N) * scale, torch.rand(ROWS, N), offsets
        found.append((executor.run(given), _wanted(plan, *given)))
        if chance.random() < 0.5:
            device.synchronize()
    device.synchronize()
    for results, wanted in found:
        right &= all(torch.allclose(a, b) for a, b in zip(results, wanted, strict=True))
    return right


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 4), st.booleans())
def test_values_are_right_for_every_choice(seed: int, count: int, most: int, graph: bool) -> None:
    assert _is_right(_chooses(random.Random(seed), count, most), seed, graph)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_pieces_that_cannot_be_captured_are_launched(seed: int) -> None:
    plan = _chooses(random.Random(seed), 6, 3)
    assert _is_right(plan, seed, graph=True, refuses="not while capturing")


class _Late(FakeGpu):
    """Lets only so many captures succeed."""

    left = 2

    def capture(self, stream: Any, body: Any) -> Any:
        self.left -= 1
        self.refuses = "" if self.left >= 0 else "no more"
        return super().capture(stream, body)


def test_all_pieces_are_graphs_or_none_is() -> None:
    """A graph reads what an earlier one made where it was when it was captured."""
    plan = next(p for p in _plans() if sum(isinstance(s, BranchStep) for s in p.steps) >= 3)
    device = _Late(1)
    parts = {name: _Direct(part, device) for name, part in plan.parts.items()}
    executor = GpuExecutor(plan, {}, {"mix": _mix}, device, parts=parts)
    for _ in range(4):
        given = torch.rand(N), torch.rand(ROWS, N), torch.tensor([0, 2, ROWS])
        results = executor.run(given)
        device.synchronize()
        for have, want in zip(results, _wanted(plan, *given), strict=True):
            torch.testing.assert_close(have, want)
    assert device.captures == 3 and device.replays == 2
    assert executor.refusals() == [("", "no more")]


class _Direct:
    """Computes a part without graphs of its own."""

    def __init__(self, part: Plan, device: FakeGpu) -> None:
        self.part, self.device = part, device

    def run_into(self, tensors: Any, into: Any) -> None:
        part = self.part

        def compute(x: torch.Tensor) -> torch.Tensor:
            if part.name == "scaled":
                return x * part.steps[0].args[1]  # type: ignore[union-attr]
            return _expected(part.steps, x, [r.buffer for r in part.outputs])[0]

        self.device.call(torch.Tensor.copy_, into[0], self.device.call(compute, tensors[0]))

    def refusals(self, name: str) -> list[tuple[str, str]]:
        return []

    def visits(self) -> list[str]:
        return []


def _plans() -> Any:
    return (_chooses(random.Random(seed), 8, 3) for seed in range(100))


def test_the_host_has_to_wait_for_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGpu, "attend", lambda self, event: None)
    outcomes = []
    for seed, plan in enumerate(_plans()):
        if plan.parts:
            try:
                outcomes.append(_is_right(plan, seed, graph=False, calls=2))
            except Exception:  # numbers that are none
                outcomes.append(False)
        if len(outcomes) == 10:
            break
    assert not all(outcomes)


def test_branches_are_counted() -> None:
    plan = next(p for p in _plans() if any(s.name == "r0" for s in p.steps))
    device = FakeGpu()
    executor = _executor(plan, device, graph=True)
    for middle in (0, 3, ROWS):
        executor.run([torch.rand(N), torch.rand(ROWS, N), torch.tensor([0, middle, ROWS])])
    device.synchronize()
    assert {"v0 0 ran 2 times", "v0 1 ran 2 times"} <= set(executor.visits())


def test_what_branches_read_is_given_back_behind_them() -> None:
    plan = next(p for p in _plans() if any(s.name == "p0" for s in p.steps))
    found = releases(plan)
    choice = next(k for k, s in enumerate(plan.steps) if s.name == "v0")
    assert not any("p0" in names for names in found[: choice + 1])


def test_plans_of_branches_must_be_there() -> None:
    plan = next(p for p in _plans() if p.parts)
    with pytest.raises(PlanError, match="plans of branches are missing"):
        GpuExecutor(plan, {}, {"mix": _mix}, FakeGpu())


def test_nothing_passes_a_step_that_chooses() -> None:
    """What kernels share a launch or memory follows from this."""
    for plan in _plans():
        needs = dependencies(plan.steps, set())
        for number, step in enumerate(plan.steps):
            if isinstance(step, BranchStep):
                assert needs[number] == tuple(range(number))
                assert all(number in later or max(later) > number for later in needs[number + 1 :])
