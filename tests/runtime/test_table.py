"""Launches on real threads: the order that was asked for is the order that the clock shows."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import pytest

from plait.runtime import driver
from plait.runtime.plan import KernelStep, TensorRef
from plait.runtime.spans import span_of
from plait.runtime.table import Address, Table, build_table


def _steps(seed: int, workers: int, count: int = 40) -> list[KernelStep]:
    """Random steps on ten slots; where each runs is drawn, too."""
    chance = random.Random(seed)
    steps = []
    for k in range(count):
        slots = [chance.randrange(10) for _ in range(3)]
        args = tuple(TensorRef("arena", "float32", (16,), (1,), 16 * s) for s in slots)
        chosen = chance.sample(range(workers), chance.randint(1, workers))
        place = tuple((w, 2 * (n + 1)) for n, w in enumerate(chosen))
        steps.append(KernelStep(f"s{k}", "nop", args, 2, tasks=2 * len(chosen), place=place))
    return steps


def _table(steps: list[KernelStep], workers: int) -> Table:
    spans = [[span_of(a, "arena", 0, {}) for a in s.args] for s in steps]
    functions = {"nop": ctypes.cast(ctypes.CDLL(None).labs, ctypes.c_void_p).value or 0}
    addresses = {"arena": Address(0)}
    return build_table(steps, spans, addresses, functions, {}, workers, True, True)


def _ordered(steps: list[KernelStep], table: Table) -> None:
    """Every part began after the parts ended that it conflicts with and that come before it."""
    assert table.stamps is not None
    times = table.stamps.tolist()
    begin = [s * 10**9 + ns for s, ns, _, _ in times]
    end = [s * 10**9 + ns for _, _, s, ns in times]
    assert all(begin) and all(b <= e for b, e in zip(begin, end, strict=True))
    slots = [[a.offset for a in s.args] for s in steps]
    for j, late in enumerate(table.parts):
        for i, early in enumerate(table.parts):
            if early.step >= late.step:
                continue
            a, b = slots[early.step], slots[late.step]
            if a[2] in b or b[2] in a:
                assert end[i] <= begin[j], (early, late)


@pytest.mark.parametrize(("workers", "turns"), [(1, 1000), (2, 2000), (3, 500), (8, 100)])
def test_thousands_of_launches_keep_the_order(workers: int, turns: int) -> None:
    launch = driver.launch_function()
    for seed in range(5):
        steps = _steps(seed, workers)
        table = _table(steps, workers)
        assert table.stamps is not None
        for turn in range(turns):
            if turn % 50 == 0:
                table.stamps[:] = 0
                launch(table.address, 0)
                _ordered(steps, table)
            else:
                launch(table.address, 0)


def test_without_openmp_workers_take_turns() -> None:
    steps = _steps(7, 3)
    table = _table(steps, 3)
    table.block[driver.GOMP] = 0
    driver.launch_function()(table.address, 0)
    _ordered(steps, table)


def test_a_team_that_is_too_small_runs_everything() -> None:
    """OpenMP may give fewer threads than asked for; then one of them runs all lists in turns."""
    steps = _steps(3, 2)
    table = _table(steps, 2)
    one = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
    table.block[driver.NUM_THREADS] = ctypes.cast(one, ctypes.c_void_p).value
    driver.launch_function()(table.address, 0)
    _ordered(steps, table)


@pytest.mark.parametrize("how", ["team", "no OpenMP", "short team"])
@pytest.mark.parametrize("stopping", [True, False])
def test_a_kernel_may_end_its_launch(how: str, stopping: bool) -> None:
    """What waits for it, on its worker or another, does not run then; nobody waits for ever."""
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
    word = ctypes.c_int64()
    ran: list[str] = []

    def noted(name: str) -> Any:
        return kernel(lambda lo, hi, a, b: ran.append(f"{name}{lo}"))

    def check(lo: int, hi: int, a: int, b: int) -> None:
        ran.append("check")
        word.value = int(stopping)

    kernels = {"before": noted("before"), "check": kernel(check), "after": noted("after")}
    functions = {n: ctypes.cast(k, ctypes.c_void_p).value or 0 for n, k in kernels.items()}
    x, y, z = (TensorRef("arena", "float32", (16,), (1,), 16 * n) for n in range(3))
    steps = [
        KernelStep("a", "before", (x, y), 1, tasks=2, place=((0, 1), (1, 2))),
        KernelStep("b", "check", (y, z), 1, place=((1, 1),)),
        KernelStep("c", "after", (z, x), 1, tasks=3, place=((0, 1), (1, 2), (2, 3))),
    ]
    spans = [[span_of(a, "arena", 0, {}) for a in s.args] for s in steps]
    stop = ctypes.addressof(word)
    addresses = {"arena": Address(0)}
    table = build_table(steps, spans, addresses, functions, {}, 3, True, False, ("check",), stop)
    one = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
    if how == "no OpenMP":
        table.block[driver.GOMP] = 0
    elif how == "short team":
        table.block[driver.NUM_THREADS] = ctypes.cast(one, ctypes.c_void_p).value
    for _ in range(20):
        ran.clear()
        word.value = 1  # a launch begins with none
        driver.launch_function()(table.address, 0)
        assert sorted(ran[:2]) == ["before0", "before1"] and ran[2] == "check"
        assert sorted(ran[3:]) == ([] if stopping else ["after0", "after1", "after2"])
