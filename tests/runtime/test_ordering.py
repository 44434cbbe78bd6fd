"""Waits between workers: enough of them for every conflict, none that is implied, no deadlock."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from plait.runtime import driver
from plait.runtime.plan import KernelStep, TensorRef
from plait.runtime.spans import Span, span_of
from plait.runtime.table import Address, Table, build_table

SLOTS = 6


def _ref(slot: int) -> TensorRef:
    return TensorRef("arena", "float32", (16,), (1,), 16 * slot)


@st.composite
def programs(draw: Any) -> tuple[list[KernelStep], int]:
    """Steps that read and write slots of one arena, placed on some of the workers."""
    workers = draw(st.integers(1, 8))
    steps = []
    for k in range(draw(st.integers(1, 25))):
        reads = draw(st.lists(st.integers(0, SLOTS - 1), max_size=2))
        writes = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=2))
        tasks = draw(st.integers(1, 9))
        place: tuple[tuple[int, int], ...] = ()
        if draw(st.booleans()):
            chosen = draw(st.lists(st.integers(0, workers - 1), min_size=1, unique=True))
            ends = sorted(draw(st.integers(0, tasks)) for _ in chosen[1:])
            place = tuple(zip(chosen, [*ends, tasks], strict=True))
        args = tuple(map(_ref, (*reads, *writes)))
        flops = draw(st.sampled_from([0, 10**6]))
        steps.append(
            KernelStep(f"s{k}", "nop", args, len(reads), tasks=tasks, flops=flops, place=place)
        )
    return steps, workers


def _spans(steps: list[KernelStep]) -> list[list[Span]]:
    return [[span_of(a, "arena", 0, {}) for a in s.args] for s in steps]


def _table(steps: list[KernelStep], workers: int, stamped: bool = False) -> Table:
    functions = {"nop": driver.clock_gettime()}
    addresses = {"arena": Address(0)}
    return build_table(
        steps, _spans(steps), addresses, functions, {}, workers, placed=True, stamped=stamped
    )


def _conflicts(steps: list[KernelStep]) -> set[tuple[int, int]]:
    spans = _spans(steps)

    def clash(i: int, j: int) -> bool:
        return any(
            (a >= steps[i].reads or b >= steps[j].reads) and x.overlaps(y)
            for a, x in enumerate(spans[i])
            for b, y in enumerate(spans[j])
        )

    return {(i, j) for j in range(len(steps)) for i in range(j) if clash(i, j)}


def _entries(table: Table) -> list[list[list[int]]]:
    """The rows of every worker's list."""
    lists = [a for a in table.arrays if a.ndim == 2 and a.shape[1] == driver.ENTRY_WORDS]
    assert len(lists) == table.workers
    return [rows.tolist() for rows in lists]


def _interpret(table: Table, chance: random.Random) -> list[tuple[int, str]]:
    """Runs the lists with workers in random turns: (part, "begin" or "end") in order."""
    entries = _entries(table)
    counters: dict[int, int] = {}
    at = [0] * len(entries)
    mine = [[k for k, p in enumerate(table.parts) if p.worker == w] for w in range(len(entries))]
    running: list[int | None] = [None] * len(entries)
    log: list[tuple[int, str]] = []
    while True:
        ready = []
        for w, rows in enumerate(entries):
            op, fn, lo = rows[at[w]][:3]
            if op == driver.WAIT and counters.get(fn, 0) < lo:
                continue
            if op != driver.END:
                ready.append(w)
        if not ready:
            break
        w = chance.choice(ready)
        op, fn = entries[w][at[w]][:2]
        if op == driver.CALL and running[w] is None:
            running[w] = mine[w].pop(0)
            log.append((running[w], "begin"))  # type: ignore[arg-type]
            continue
        if op == driver.CALL:
            log.append((running[w], "end"))  # type: ignore[arg-type]
            running[w] = None
        elif op == driver.SIGNAL:
            counters[fn] = counters.get(fn, 0) + 1
        at[w] += 1
    ended = all(rows[at[w]][0] == driver.END for w, rows in enumerate(entries))
    assert ended, "a worker waits for ever"
    return log


@settings(max_examples=300, deadline=None)
@given(programs(), st.randoms(use_true_random=False))
def test_whatever_the_turns_of_workers_conflicting_steps_keep_their_order(
    program: tuple[list[KernelStep], int], chance: random.Random
) -> None:
    steps, workers = program
    table = _table(steps, workers)
    covered: dict[int, list[int]] = {}
    for part in table.parts:
        covered.setdefault(part.step, []).extend(range(part.lo, part.hi))
    assert all(covered[k] == list(range(s.tasks)) for k, s in enumerate(steps))  # type: ignore[arg-type]
    before: dict[int, list[int]] = {}
    for i, j in _conflicts(steps):
        before.setdefault(j, []).append(i)
    parts_of: dict[int, set[int]] = {}
    for k, part in enumerate(table.parts):
        parts_of.setdefault(part.step, set()).add(k)
    ended: set[int] = set()
    for k, what in _interpret(table, chance):
        if what == "begin":
            step = table.parts[k].step
            assert all(parts_of[i] <= ended for i in before.get(step, ()))
        else:
            ended.add(k)
    assert len(ended) == len(table.parts)


def test_a_chain_on_one_worker_never_waits() -> None:
    place = ((1, 4),)
    steps = [KernelStep(f"s{k}", "nop", (_ref(0), _ref(0)), 1, tasks=4, place=place) for k in "abc"]
    assert _table(steps, 2).waits == 0


def test_a_wait_that_another_implies_is_left_out() -> None:
    def step(name: str, read: int, write: int, worker: int) -> KernelStep:
        return KernelStep(name, "nop", (_ref(read), _ref(write)), 1, place=((worker, 1),))

    steps = [step("a", 0, 1, 0), step("b", 1, 2, 1), step("c", 2, 3, 2)]
    joined = KernelStep("d", "nop", (_ref(1), _ref(3), _ref(4)), 2, place=((3, 1),))
    # d needs a and c, and c has waited for b, which has waited for a.
    assert _table([*steps, joined], 4).waits == 3


def test_many_workers_meet_at_one_counter() -> None:
    args = (_ref(0), _ref(0))
    steps = [KernelStep(f"s{k}", "nop", args, 1, tasks=64, flops=10**7) for k in range(3)]
    table = _table(steps, 8)
    assert table.waits == 2 * 8
    waited = {row[1] for rows in _entries(table) for row in rows if row[0] == driver.WAIT}
    assert len(waited) == 1
