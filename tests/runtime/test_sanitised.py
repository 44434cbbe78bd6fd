"""Launches under ThreadSanitizer, at any number of workers: no two touch the same memory unordered.

The native code that runs launch tables is instrumented and linked to a program that gives every
launch threads of its own (`sanitised.c`). Needs LLVM's ``opt`` and ``llc`` and a C compiler that
knows ``-fsanitize=thread``.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from plait.kernels.c_compiler import c_compiler
from plait.runtime import driver
from plait.runtime.plan import KernelStep, TensorRef
from plait.runtime.spans import span_of
from plait.runtime.table import Address, build_table

ROWS = 8
SLOTS = 5
FUNCTIONS = range(0x7ACE_0000, 0x7ACE_0005)
"""Stand for the addresses of the program's functions."""
LAUNCHES, RUNS = 12, 40
"""Launches for each number of workers, and how many workers run each of them in all."""
PROGRAM = Path(__file__).with_name("sanitised.c")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, or a skipped test where a tool is missing."""
    compiler = c_compiler()
    if compiler is None or not all(map(shutil.which, ("opt", "llc"))):
        pytest.skip("needs opt, llc and a C compiler")
    folder = tmp_path_factory.mktemp("sanitised")
    text = re.sub(r"^(define .*) \{$", r"\1 sanitize_thread {", driver.llvm_ir(), flags=re.M)
    text = text.replace("define internal", "define")
    (folder / "driver.ll").write_text(text)
    opaque = ["--opaque-pointers"]  # what LLVM 14 has to be told, and 17 no longer knows
    if "--opaque-pointers" not in _out(["opt", "--help-hidden"]):
        opaque = []
    built = folder / "sanitised"
    for command in (
        ["opt", *opaque, "-passes=tsan-module,function(tsan)", "driver.ll", "-o", "driver.bc"],
        ["llc", *opaque, "-relocation-model=pic", "-filetype=obj", "driver.bc", "-o", "driver.o"],
        [*compiler, "-O1", "-g", "-fsanitize=thread", PROGRAM, "driver.o", "-o", built],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{command[0]} cannot sanitise threads: {done.stderr[-300:]}")
    return built


def _out(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def _ref(buffer: str, slot: int = 0) -> TensorRef:
    return TensorRef(buffer, "int64", (ROWS,), (1,), ROWS * slot)


def _steps(chance: random.Random, workers: int) -> tuple[list[KernelStep], list[int]]:
    """Steps that read "x" or slots of "arena" and write other slots, the last one "y"; and what
    "y" is where "x" is 0, 1, 2, ...
    """
    values = {"x": list(range(ROWS))}
    refs = {"x": _ref("x")}
    steps: list[KernelStep] = []
    last = chance.randint(1, 25)
    for k in range(last + 1):
        a, b = chance.choice(list(values)), chance.choice(list(values))
        free = [s for s in range(SLOTS) if str(s) not in (a, b)]
        out = "y" if k == last else str(chance.choice(free))
        refs[out] = _ref("y") if k == last else _ref("arena", int(out))
        values[out] = [
            3 * values[a][(r + 1) % ROWS] + values[b][5 * r % ROWS] + r for r in range(ROWS)
        ]
        place: tuple[tuple[int, int], ...] = ()
        if chance.random() < 0.7:
            chosen = chance.sample(range(workers), chance.randint(1, workers))
            ends = sorted(chance.randint(0, ROWS) for _ in chosen[1:])
            place = tuple(zip(chosen, [*ends, ROWS], strict=True))
        args = (refs[a], refs[b], refs[out])
        flops = chance.choice([0, 10**7])
        steps.append(KernelStep(f"s{k}", "mix", args, 2, tasks=ROWS, flops=flops, place=place))
    return steps, values["y"]


def _launch(seed: int, workers: int, waits: bool = True) -> list[int]:
    """The words of a launch of random steps, as `sanitised.c` reads them; without ``waits`` workers
    do not wait for each other.
    """
    steps, wanted = _steps(random.Random(seed), workers)
    x, y = np.arange(ROWS), np.zeros(ROWS, np.int64)
    arena = np.zeros(ROWS * SLOTS, np.int64)
    addresses = {"x": Address(0, 0), "y": Address(0, 1), "arena": Address(arena.ctypes.data)}
    spans = [[span_of(a, a.buffer, 0, {}) for a in s.args] for s in steps]
    functions = {"mix": FUNCTIONS.start}
    table = build_table(steps, spans, addresses, functions, {}, workers, placed=True)
    words = (driver.GOMP, driver.THREAD_NUM, driver.NUM_THREADS, driver.YIELD)
    table.block[list(words)] = FUNCTIONS[1:]
    pointers = np.array([x.ctypes.data, y.ctypes.data])
    arrays = [table.block, pointers, np.array(wanted), y, x, arena, *table.arrays]
    found = [len(arrays)]
    for array in arrays:
        flat = array.reshape(-1).tolist()
        if not waits and array.ndim == 2 and array.shape[1] == driver.ENTRY_WORDS:
            rows = array.copy()
            rows[rows[:, 0] == driver.WAIT, 2] = 0
            flat = rows.reshape(-1).tolist()
        moves = [(k, *_target(value, arrays)) for k, value in enumerate(flat)]
        moves = [m for m in moves if len(m) == 3]
        found += [len(flat), *flat, len(moves), *(word for m in moves for word in m)]
    return found


def _target(value: int, arrays: Sequence[np.ndarray]) -> tuple[int, ...]:
    """The array that an address lies in and the offset there, or -1 and the function's number."""
    if value in FUNCTIONS:
        return -1, value - FUNCTIONS.start
    for k, array in enumerate(arrays):
        if 0 <= value - array.ctypes.data < array.nbytes:
            return k, value - array.ctypes.data
    return ()


def _run(program: Path, launches: Sequence[list[int]], runs: int) -> subprocess.CompletedProcess:
    path = program.with_name("launches")
    path.write_bytes(b"".join(np.array(words, np.int64).tobytes() for words in launches))
    command = [str(program), str(path), str(runs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_no_two_workers_touch_the_same_memory_unordered(program: Path, workers: int) -> None:
    launches = [_launch(seed, workers) for seed in range(LAUNCHES)]
    done = _run(program, launches, RUNS // workers)
    assert done.returncode == 0, done.stdout + done.stderr[:3000]


def test_without_waits_the_sanitiser_finds_a_race(program: Path) -> None:
    done = _run(program, [_launch(seed, 3, waits=False) for seed in range(8)], 20)
    assert done.returncode == 66 and "data race" in done.stderr or done.returncode == 1
