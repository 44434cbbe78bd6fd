"""GPU plans in any order that streams and events allow: right values, or a test that fails."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.passes.plan_memory import plan_memory
from plait.passes.streams import assign, lifetimes
from plait.runtime.cuda_graph import GpuExecutor, releases
from plait.runtime.plan import (
    Buffer,
    KernelStep,
    Lane,
    LibraryStep,
    Plan,
    PlanError,
    Step,
    TensorRef,
)

from .fake_gpu import FakeGpu

N = 5


def _ref(name: str) -> TensorRef:
    return TensorRef(name, "float32", (N,), (1,))


def _mix(pointers: Sequence[int], stream: int) -> None:
    """The last tensor becomes 1 + the sum of the others, each scaled by its position."""
    views = [(ctypes.c_float * N).from_address(p) for p in pointers]
    for i in range(N):
        views[-1][i] = 1 + sum((k + 1) * v[i] / 4 for k, v in enumerate(views[:-1]))


def _expected(steps: Sequence[Step], x: torch.Tensor, outputs: Sequence[str]) -> list[torch.Tensor]:
    known = {"x": x}
    for step in steps:
        if isinstance(step, KernelStep):
            reads = [known[r.buffer].double() for r in step.args[:-1]]  # as Python computes
            known[step.name] = (1 + sum((k + 1) * v / 4 for k, v in enumerate(reads))).float()
        else:
            assert isinstance(step, LibraryStep)
            known[step.name] = known[step.refs[0].buffer] + known[step.refs[1].buffer]
    return [known[name] for name in outputs]


def _plan(chance: random.Random, count: int, most: int) -> Plan:
    """Steps that read up to three earlier results, on streams, with memory shared as allowed."""
    steps: list[Step] = []
    after: list[tuple[int, ...]] = []
    buffers = {"x": Buffer("x", "input", 4 * N)}
    for k in range(count):
        name = f"v{k}"
        reads = [chance.randint(-1, k - 1) for _ in range(chance.randint(1, 3))]
        refs = [_ref("x" if j < 0 else f"v{j}") for j in reads]
        if chance.random() < 0.4:
            refs = (refs * 2)[:2]
            args = [{"ref": 0}, {"ref": 1}]
            result = (_ref(name),)
            steps.append(LibraryStep(name, "aten.add.Tensor", tuple(refs), args, {}, result))
            buffers[name] = Buffer(name, "library", 4 * N)
        else:
            steps.append(KernelStep(name, "mix", (*refs, _ref(name)), len(refs)))
            buffers[name] = Buffer(name, "arena", 4 * N)
        after.append(tuple({j for j in reads if j >= 0}))
    read = {j for needs in after for j in needs}
    outputs = [f"v{k}" for k in range(count) if k not in read]  # so that every step matters
    outputs.append(f"v{chance.randrange(count)}")
    for name in outputs:
        if buffers[name].kind == "arena":
            buffers[name] = Buffer(name, "output", 4 * N)
    streams = assign(after, [chance.random() for _ in after], most)
    users = {
        n: [k for k, s in enumerate(steps) if n in _names(s)]
        for n, b in buffers.items()
        if b.kind == "arena"
    }
    memory = plan_memory(lifetimes(dict.fromkeys(users, 4 * N), users, streams))
    for name, offset in memory.offsets.items():
        buffers[name] = replace(buffers[name], offset=offset)
    return Plan(
        "random",
        buffers,
        steps,
        [_ref("x")],
        [_ref(n) for n in outputs],
        arena_bytes=memory.total,
        lanes=[Lane(s, w) for s, w in zip(streams.of, streams.waits, strict=True)],
        urgent=tuple(s for s, urgent in enumerate(streams.critical) if urgent),
    )


def _names(step: Step) -> set[str]:
    refs = step.args if isinstance(step, KernelStep) else (*step.refs, *step.results)  # type: ignore[union-attr]
    return {r.buffer for r in refs if r is not None}


def _is_right(plan: Plan, seed: int, *, graph: bool = True, calls: int = 4) -> bool:
    device = FakeGpu(seed)
    executor = GpuExecutor(plan, {}, {"mix": _mix}, device, graph=graph)
    right = True
    for call in range(calls):
        device.caller = f"caller {call % 2}"
        x = torch.rand(N)
        results = executor.run([x])
        device.synchronize()
        wanted = _expected(plan.steps, x, [r.buffer for r in plan.outputs])
        right &= all(torch.allclose(a, b) for a, b in zip(results, wanted, strict=True))
    assert device.captures == graph and device.replays == (calls - 1 if graph else 0)
    return right


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_values_are_right_in_every_order(seed: int, count: int, most: int, graph: bool) -> None:
    assert _is_right(_plan(random.Random(seed), count, most), seed, graph=graph)


def test_each_event_is_needed() -> None:
    """Without any one of its events a plan goes wrong in some order."""
    plan = _plan(random.Random(3), 8, 4)
    dropped = 0
    for number, lane in enumerate(plan.lanes):
        for other in lane.waits:
            lanes = list(plan.lanes)
            lanes[number] = Lane(lane.stream, tuple(k for k in lane.waits if k != other))
            broken = replace(plan, lanes=lanes)
            outcomes = []
            for seed in range(40):
                try:
                    outcomes.append(_is_right(broken, seed, graph=False, calls=1))
                except KeyError:  # a library result that was given back too early
                    outcomes.append(False)
            assert not all(outcomes), (number, other)
            dropped += 1
    assert dropped >= 3


def _copy_memory(pointers: Sequence[int], stream: int) -> None:
    ctypes.memmove(pointers[1], pointers[0], 24)


def test_memory_of_results_with_other_strides_is_not_given_to_other_streams() -> None:
    """Each step has torch's row-major result laid out by columns; a kernel copies its memory."""
    x, steps, after = TensorRef("x", "float32", (2, 3), (3, 1)), [], []
    buffers = {"x": Buffer("x", "input", 24)}
    for k in range(8):
        columns = TensorRef(f"a{k}", "float32", (2, 3), (1, 2))
        flat = TensorRef(f"b{k}", "float32", (6,), (1,))
        args = [{"ref": 0}, k]
        steps.append(LibraryStep(f"a{k}", "aten.add.Scalar", (x,), args, {}, (columns,)))
        steps.append(KernelStep(f"b{k}", "copy", (columns, flat), 1))
        buffers[f"a{k}"] = Buffer(f"a{k}", "library", 24)
        buffers[f"b{k}"] = Buffer(f"b{k}", "output", 24)
        after += [(), (2 * k,)]
    lanes = [Lane(k % 3, after[k]) for k in range(len(steps))]
    outputs = [s.args[1] for s in steps if isinstance(s, KernelStep)]
    plan = Plan("columns", buffers, steps, [x], outputs, lanes=lanes)
    value = torch.rand(2, 3)
    for seed in range(20):
        device = FakeGpu(seed)
        executor = GpuExecutor(plan, {}, {"copy": _copy_memory}, device, graph=False)
        results = executor.run([value])
        device.synchronize()
        for k, found in enumerate(results):
            torch.testing.assert_close(found, (value + k).t().flatten())


def test_calls_in_flight_do_not_disturb_each_other() -> None:
    plan = _plan(random.Random(1), 8, 3)
    for graph in (True, False):
        device = FakeGpu(5)
        executor = GpuExecutor(plan, {}, {"mix": _mix}, device, graph=graph)
        inputs = [torch.rand(N) for _ in range(6)]
        found = []
        for number, x in enumerate(inputs):
            device.caller = f"caller {number % 3}"
            found.append(executor.run([x]))
        device.synchronize()
        for x, results in zip(inputs, found, strict=True):
            wanted = _expected(plan.steps, x, [r.buffer for r in plan.outputs])
            assert all(torch.allclose(a, b) for a, b in zip(results, wanted, strict=True))


def test_what_cannot_be_captured_is_launched_step_by_step_and_said() -> None:
    plan = _plan(random.Random(1), 5, 2)
    device = FakeGpu(refuses="operation not permitted when stream is capturing\nmore")
    executor = GpuExecutor(plan, {}, {"mix": _mix}, device)
    for _ in range(3):
        x = torch.rand(N)
        results = executor.run([x])
        device.synchronize()
        wanted = _expected(plan.steps, x, [r.buffer for r in plan.outputs])
        assert all(torch.allclose(a, b) for a, b in zip(results, wanted, strict=True))
    assert device.captures == 1 and device.replays == 0
    assert executor.refusal == "operation not permitted when stream is capturing"


def test_streams_of_the_critical_path_are_urgent() -> None:
    device = FakeGpu()
    plan = replace(_plan(random.Random(3), 8, 4), urgent=(1,))
    executor = GpuExecutor(plan, {}, {"mix": _mix}, device)
    assert [s.endswith("urgent") for s in executor._streams] == [False, True, *[False] * 2][
        : len(executor._streams)
    ]


def test_results_are_given_back_once_all_readers_have_ended() -> None:
    library = lambda name, *reads: LibraryStep(  # noqa: E731
        name,
        "aten.add.Tensor",
        tuple(map(_ref, reads)),
        [{"ref": 0}, {"ref": 1}],
        {},
        (_ref(name),),
    )
    steps: list[Step] = [library("a", "x", "x"), library("b", "a", "a"), library("c", "b", "a")]
    steps += [library("d", "c", "c"), library("e", "d", "d")]
    buffers = {n: Buffer(n, "input" if n == "x" else "library", 4 * N) for n in "xabcde"}
    plan = Plan("p", buffers, steps, [_ref("x")], [_ref("e")], lanes=[Lane(0)] * 5)
    assert releases(plan) == [[], [], [], ["a", "b"], ["c"]]
    # On other streams nobody knows yet that the readers have ended.
    lanes = [Lane(0), Lane(1, (0,)), Lane(0, (1,)), Lane(1, (2,)), Lane(0, (3,))]
    assert releases(replace(plan, lanes=lanes)) == [[], [], [], ["b"], ["a", "c"]]


def test_a_plan_that_is_none_for_a_gpu_is_refused() -> None:
    plan = _plan(random.Random(0), 4, 2)
    with pytest.raises(PlanError, match="not one for a GPU"):
        GpuExecutor(replace(plan, lanes=[]), {}, {"mix": _mix}, FakeGpu())
    with pytest.raises(PlanError, match="kernels of the plan are not loaded"):
        GpuExecutor(plan, {}, {}, FakeGpu())
    plan.buffers["weight"] = Buffer("weight", "const", 4)
    with pytest.raises(PlanError, match="'weight' of the plan is missing"):
        GpuExecutor(plan, {}, {"mix": _mix}, FakeGpu())
