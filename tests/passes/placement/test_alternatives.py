"""Rewritten problems compute the same, never have a cycle, and are played as the rules say."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.passes.placement.alternatives import (
    Alternative,
    Rewritten,
    alternative_from_dict,
    rewrite,
)
from plait.passes.placement.bounds import lower_bounds
from plait.passes.placement.errors import PlacementError
from plait.passes.placement.placement import Placement
from plait.passes.placement.played import Choice, Copies, play, with_copies
from plait.passes.placement.problem import Problem
from plait.passes.placement.problem_file import problem_from_dict, problem_to_dict
from plait.passes.placement.simulator import simulate

from . import rules
from .test_simulator import random_placement


def drawn(seed: int, ops: int, devices: int) -> tuple[Problem, Copies]:
    """A random problem and random copies; late readers need not even be the last ones."""
    rng = random.Random(seed)
    raw = {**rules.random_problem(rng, ops, devices), "memory_model": "dynamic"}
    problem = problem_from_dict(raw)
    p = problem.arrays
    place = {int(u): k for k, u in enumerate(p.topo)}
    readers: list[set[int]] = [set() for _ in range(ops)]
    for t, v in zip(p.pair_tensor, p.pair_dst, strict=True):
        readers[p.tensor_src[t]].add(int(v))
    choices: dict[int, Choice] = {}
    for u in range(ops):
        if not problem.ops[u].keep and rng.random() < 0.5:
            late = frozenset(v for v in readers[u] if rng.random() < 0.6)
            choices[u] = Choice(rng.choice(["recompute", "offload"]), late)
    first: dict[int, int] = {}  # the place of the first reader, directly or through copies
    for u in sorted(choices, key=lambda u: -place[u]):
        ends = [place[v] for v in choices[u].late]
        ends += [first[v] for v in readers[u] if v in first and choices[v].kind == "recompute"]
        first[u] = min(ends, default=ops)
    choices = {u: choice for u, choice in choices.items() if first[u] < ops}  # that are read
    after = [int(p.topo[rng.randrange(first[u])]) if rng.random() < 0.7 else -1 for u in choices]
    return problem, Copies(choices, after, "d0")


def values(problem: Problem, copy_of: dict[str, str]) -> dict[str, Any]:
    """What each op computes, as a term: its own name and what it reads; hosts hand values on."""
    p = problem.arrays
    terms: dict[str, Any] = {}
    for i in p.topo.tolist():
        op = problem.ops[i]
        read = {}
        for q in p.in_pair[p.in_ptr[i] : p.in_ptr[i + 1]]:
            t = int(p.pair_tensor[q])
            if not problem.tensor_names[t].startswith("@after"):
                source = problem.ops[p.tensor_src[t]].name
                read[copy_of.get(source, source), problem.tensor_names[t]] = terms[source]
        origin = copy_of.get(op.name)
        if origin is not None and op.name.endswith("@offload"):
            terms[op.name] = terms[origin]
        else:
            terms[op.name] = hash((origin or op.name, tuple(sorted(read.items()))))
    return terms


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 100_000), st.integers(1, 14), st.integers(1, 3))
def test_the_rewritten_problem_computes_the_same(seed: int, ops: int, devices: int) -> None:
    problem, copies = drawn(seed, ops, devices)
    made = rewrite(problem, copies.alternatives(problem))  # a cycle would raise
    before, after = values(problem, {}), values(made.problem, dict(made.copy_of))
    assert {name: after[name] for name in before} == before
    for copy, name in made.copy_of.items():
        late = copies.choices[problem.op_index[name]].late
        assert after[copy] == before[name]
        read = {e.dst for e in made.problem.edges if e.src == copy}
        assert {problem.ops[v].name for v in late} <= read
    assert sum(op.param_bytes for op in made.problem.ops) == pytest.approx(
        sum(op.param_bytes for op in problem.ops)
    )
    # What stayed together stays so, and parameters are where both who share them are.
    for op, new in zip(problem.ops, made.problem.ops, strict=False):
        assert op.name == new.name and op.group in (None, new.group)
    for copy, name in made.copy_of.items():
        op, twin = (made.problem.ops[made.problem.op_index[x]] for x in (name, copy))
        if copy.endswith("@recompute") and op.param_bytes:
            assert op.group is not None and op.group == twin.group


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 100_000), st.integers(1, 10), st.integers(1, 3))
def test_rewritten_problems_are_played_as_the_rules_say(seed: int, ops: int, devices: int) -> None:
    problem, copies = drawn(seed, ops, devices)
    whole = rewrite(problem, copies.alternatives(problem)).problem
    raw = problem_to_dict(whole)
    assert problem_to_dict(problem_from_dict(raw)) == raw
    groups: dict[str, set[str]] = {}
    for op in raw["ops"]:  # ops of one group with their own times: a device that all may use
        if "group" in op:
            able = {d.name for d in whole.devices if rules.seconds(raw, op, d.name) is not None}
            groups[op["group"]] = groups.get(op["group"], able) & able
    placement = random_placement(random.Random(seed), raw)
    if placement.mode == "strict":
        placement = type(placement)(placement.assign, placement.order)
    order = {k: list(v) for k, v in (placement.order or {}).items()} or None
    try:
        schedule = simulate(whole, placement)
    except PlacementError as error:  # the drawn devices do not suit a group
        assert "is not allowed on" in str(error)
        return
    expected = rules.play(raw, dict(placement.assign), order, placement.mode)
    assert expected is not None
    assert schedule.makespan == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
    assert schedule.peak.tolist() == pytest.approx([expected[1][d.name] for d in whole.devices])


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 100_000), st.integers(1, 14), st.integers(1, 3))
def test_arrays_made_directly_are_those_of_the_rewritten_problem(
    seed: int, ops: int, devices: int
) -> None:
    problem, copies = drawn(seed, ops, devices)
    direct = with_copies(problem.arrays, copies, 0)
    rewritten = rewrite(problem, copies.alternatives(problem)).problem.arrays
    for field in set(direct._fields) - {"topo", "unit", "unit_ptr", "unit_op", "allowed"}:
        assert np.array_equal(getattr(direct, field), getattr(rewritten, field)), field


def test_a_played_choice_is_simulated_like_its_rewritten_problem() -> None:
    problem, copies = drawn(5, 12, 2)
    made = rewrite(problem, copies.alternatives(problem))
    p = made.problem.arrays
    assign = np.argmax(p.allowed, axis=1)[p.unit]
    played = play(problem.arrays, copies, assign, p.topo, 0, False)
    names = [op.name for op in made.problem.ops]
    placed = {n: made.problem.devices[d].name for n, d in zip(names, assign, strict=True)}
    order: dict[str, list[str]] = {}
    for i in p.topo.tolist():
        order.setdefault(placed[names[i]], []).append(names[i])
    schedule = simulate(made.problem, Placement(placed, order))
    assert (played.cost, played.peak.tolist()) == (schedule.makespan, schedule.peak.tolist())


@pytest.mark.parametrize("seed", range(40))
def test_the_bound_for_copies_holds_for_any_of_them(seed: int) -> None:
    problem, copies = drawn(seed, 3, 2)
    made = rewrite(problem, copies.alternatives(problem)[:1])
    bound = lower_bounds(problem.arrays, copies=True)["best"]
    assert bound <= rules.optimum(problem_to_dict(made.problem)) * (1 + 1e-9)


CHAIN: dict[str, Any] = {
    "format": "placement-problem v1",
    "devices": [{"name": "a", "memory_bytes": 99}, {"name": "b", "memory_bytes": 99}],
    "default_link": {"latency_s": 0, "bandwidth_Bps": 1},
    "ops": [
        {"name": "p", "time_s": 1, "output_bytes": 1},
        {"name": "q", "time_s": 1, "output_bytes": 1, "recompute": False},
        {"name": "r", "time_s": 1, "output_bytes": 1, "keep": True},
    ],
    "edges": [{"src": a, "dst": b, "bytes": 1} for a, b in ("pq", "qr", "pr")],
}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Alternative("z", "recompute"), "op 'z' is not in the problem"),
        (Alternative("p", "forget"), "kind must be recompute or offload, is 'forget'"),
        (Alternative("q", "recompute", ("r",)), "op 'q' may not run twice"),
        (Alternative("r", "offload", (), None, "b"), "its output is kept to the end"),
        (Alternative("p", "offload", ("r",)), "a host belongs to offload"),
        (Alternative("p", "recompute", ("r",), None, "b"), "a host belongs to offload"),
        (Alternative("p", "offload", ("r",), None, "c"), "there is no device 'c' to offload to"),
        (Alternative("p", "recompute", ("p",)), "'p' does not read it"),
        (Alternative("p", "recompute", ("x",)), "'x' does not read it"),
        (Alternative("p", "recompute", ("r",), "x"), "there is no op 'x' to run after"),
        (Alternative("p", "recompute", ("r",), "r"), "cycle p@recompute -> r -> p@recompute"),
    ],
)
def test_alternatives_that_are_none_of_the_problem_are_refused(
    item: Alternative, message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        rewrite(problem_from_dict(CHAIN), [item])


def test_an_op_has_one_alternative() -> None:
    item = Alternative("p", "recompute", ("r",))
    with pytest.raises(PlacementError, match="op 'p' is there twice"):
        rewrite(problem_from_dict(CHAIN), [item, item])


def test_names_that_are_taken_are_not_taken_again() -> None:
    raw = {**CHAIN, "ops": [*CHAIN["ops"], {"name": "p@recompute", "time_s": 1}]}
    raw["edges"] = [*CHAIN["edges"], {"src": "q", "dst": "p@recompute", "bytes": 1,
                                     "tensor": "@after"}]  # fmt: skip
    made: Rewritten = rewrite(problem_from_dict(raw), [Alternative("p", "recompute", ("r",), "q")])
    assert made.copy_of == {"p@recompute@": "p"}
    assert ("q", "p@recompute@", 0, "@after@") in {
        (e.src, e.dst, e.bytes, e.tensor) for e in made.problem.edges
    }


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (1, "an item must name an 'op'"),
        ({"op": 3, "kind": "recompute"}, "an item must name an 'op'"),
        ({"op": "p"}, "op 'p': kind must be recompute or offload, is None"),
        ({"op": "p", "kind": "offload", "late": "r"}, "late must be a list of ops"),
        ({"op": "p", "kind": "offload", "after": 1}, "after must be a name, is 1"),
        ({"op": "p", "kind": "offload", "host": []}, "host must be a name"),
    ],
)
def test_files_of_alternatives_are_checked(item: Any, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        alternative_from_dict(item)


def test_alternatives_come_back_from_files() -> None:
    for item in (Alternative("p", "offload", ("q", "r"), None, "b"),
                 Alternative("p", "recompute", (), "q")):  # fmt: skip
        assert alternative_from_dict(item.to_dict()) == item
