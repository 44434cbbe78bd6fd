"""The executor runs plans right: order, overlap, sharing between workers, threads, leaks."""

import ctypes
import random
import threading

import psutil
import pytest
import torch
import tvm
from tvm.script.ir_builder import tirx as T

from plait.kernels import target
from plait.kernels.abi import TensorArg
from plait.kernels.emit import Emitter
from plait.runtime.executor import Executor
from plait.runtime.plan import Buffer, Guard, KernelStep, LibraryStep, Plan, PlanError, TensorRef
from plait.runtime.spans import Span

COLUMNS = 64


@pytest.fixture(scope="module")
def add(tmp_path_factory):
    """Address of ``out[r, :] = a[r, :] + b[r, :]``, one task a row; out has row stride 64."""
    arg = TensorArg(torch.float32, (1, COLUMNS), (COLUMNS, 1))
    em = Emitter("add", [arg, arg], [arg])
    with em.function() as row, T.serial(0, COLUMNS // 16) as i, T.vectorized(16) as j:
        at = [row, i * 16 + j]
        em.outputs[0].store(em.inputs[0].load(at) + em.inputs[1].load(at), at)
    module = tvm.compile(tvm.IRModule({"add": em.finish()}), target=target.host().tvm())
    path = tmp_path_factory.mktemp("kernel") / "add.so"
    module.export_library(str(path))
    library = ctypes.CDLL(str(path))
    yield ctypes.cast(library.add, ctypes.c_void_p).value


def ref(name, rows, offset=0):
    return TensorRef(name, "float32", (rows, COLUMNS), (COLUMNS, 1), offset)


def random_plan(rng, rows, work):
    """A random DAG of additions over a small arena whose slots are reused; and its meaning."""
    slots = {f"t{k}": Buffer(f"t{k}", "arena", rows * 256, offset=k * rows * 256) for k in range(4)}
    slots["x"] = Buffer("x", "input", rows * 256)
    slots["y"] = Buffer("y", "output", rows * 256)
    defined = ["x"]
    program = []
    for _ in range(rng.randint(1, 30)):
        a, b = rng.choice(defined), rng.choice(defined)
        out = rng.choice([f"t{k}" for k in range(4)])
        if out in (a, b):
            continue
        program.append((a, b, out))
        if out not in defined:
            defined.append(out)
    program.append((rng.choice(defined), rng.choice(defined), "y"))
    steps = [
        KernelStep(
            f"s{k}", "add", (ref(a, rows), ref(b, rows), ref(o, rows)), 2,
            tasks=rows, flops=rng.choice(work),
        )
        for k, (a, b, o) in enumerate(program)
    ]  # fmt: skip
    plan = Plan("p", slots, steps, [ref("x", rows)], [ref("y", rows)], arena_bytes=4 * rows * 256)

    def meaning(x):
        env = {"x": x}
        for a, b, o in program:
            env[o] = env[a] + env[b]
        return env["y"]

    return plan, meaning


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_random_graphs_match_their_meaning(add, workers):
    rng = random.Random(workers)
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        for _ in range(60):
            rows = rng.choice([1, 2, 7, 33])
            plan, meaning = random_plan(rng, rows, [0, 10**7])
            executor = Executor(Plan.from_json(plan.to_json()), {}, {"add": add})
            x = torch.randint(-3, 4, (rows, COLUMNS)).float()
            for _ in range(3):
                assert torch.equal(executor.run([x])[0], meaning(x))
    finally:
        torch.set_num_threads(before)


def test_many_python_threads_share_one_executor(add):
    plan, meaning = random_plan(random.Random(5), 16, [10**7])
    executor = Executor(plan, {}, {"add": add})
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randint(-3, 4, (16, COLUMNS), generator=generator).float()
            if not torch.equal(executor.run([x])[0], meaning(x)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_ten_thousand_calls_leak_nothing(add):
    plan, _ = random_plan(random.Random(7), 64, [0])
    executor = Executor(plan, {}, {"add": add})
    x = torch.randn(64, COLUMNS)
    grown = []
    for _ in range(5):
        before = psutil.Process().memory_info().rss
        for _ in range(2000):
            executor.run([x])
        grown.append(psutil.Process().memory_info().rss - before)
    assert min(grown) < 800 << 10  # what leaks does so each time; the process may grow otherwise


def test_library_steps_mix_with_kernels(add):
    rows = 4
    buffers = {
        "x": Buffer("x", "input", rows * 256),
        "t": Buffer("t", "arena", rows * 256),
        "l": Buffer("l", "library", rows * 256),
        "y": Buffer("y", "output", rows * 256),
    }
    steps = [
        KernelStep("a", "add", (ref("x", rows), ref("x", rows), ref("t", rows)), 2, tasks=rows),
        LibraryStep(
            "b", "aten.relu.default", (ref("t", rows),), [{"ref": 0}], {}, (ref("l", rows),)
        ),
        KernelStep("c", "add", (ref("l", rows), ref("x", rows), ref("y", rows)), 2, tasks=rows),
    ]
    plan = Plan("p", buffers, steps, [ref("x", rows)], [ref("y", rows)], arena_bytes=rows * 256)
    x = torch.randn(rows, COLUMNS)
    out = Executor(Plan.from_json(plan.to_json()), {}, {"add": add}).run([x])[0]
    assert torch.equal(out, torch.relu(x + x) + x)


def test_symbols_bind_and_guards_speak(add):
    size = "s0"
    shape = TensorRef("x", "float32", (size, COLUMNS), (COLUMNS, 1))
    buffers = {
        "x": Buffer("x", "input", "s0*256"),
        "y": Buffer("y", "output", "s0*256"),
    }
    out = TensorRef("y", "float32", (size, COLUMNS), (COLUMNS, 1))
    plan = Plan(
        "p", buffers, [KernelStep("a", "add", (shape, shape, out), 2, tasks="s0")], [shape], [out],
        symbols={"s0": (0, 0)}, guards=[Guard("s0 <= 9", "at most 9 rows")],
    )  # fmt: skip
    executor = Executor(plan, {}, {"add": add})
    for rows in (0, 1, 5, 9):
        x = torch.randn(rows, COLUMNS)
        assert torch.equal(executor.run([x])[0], x + x)
    with pytest.raises(ValueError, match="at most 9 rows"):
        executor.run([torch.randn(10, COLUMNS)])


def test_a_missing_kernel_is_one_clear_error():
    plan, _ = random_plan(random.Random(1), 2, [0])
    with pytest.raises(PlanError, match="compile again"):
        Executor(plan, {}, {})


@pytest.mark.parametrize("text", ["", "{", '{"version": 1}', '{"version": 99}'])
def test_a_broken_plan_is_one_clear_error(text):
    with pytest.raises(PlanError, match="compile again"):
        Plan.from_json(text)


def test_channel_slices_of_one_buffer_do_not_overlap():
    def slice_of(offset, channels):
        return Span("b", offset * 4, (7 * 256 + channels) * 4, 4, (8, channels), (256, 1))

    assert not slice_of(0, 64).overlaps(slice_of(64, 192))
    assert not slice_of(64, 192).overlaps(slice_of(0, 64))
    assert slice_of(0, 65).overlaps(slice_of(64, 192))
    assert slice_of(0, 256).overlaps(slice_of(100, 8))


def test_overlap_agrees_with_counting_elements():
    rng = random.Random(3)
    for _ in range(3000):
        strides = rng.choice([(40, 8, 1), (30, 5, 1), (1,), (16, 1), (64, 8, 2)])
        boxes = []
        for _ in range(2):
            shape = tuple(rng.randint(1, 6) for _ in strides)
            start = rng.randint(0, 60)
            elements = {start}
            for d, s in zip(shape, strides, strict=True):
                elements = {e + k * s for e in elements for k in range(d)}
            extent = max(elements) - start + 1
            boxes.append((Span("b", start * 4, extent * 4, 4, shape, strides), elements))
        (a, x), (b, y) = boxes
        if x & y:
            assert a.overlaps(b)
