"""Schedules on random task graphs: valid, never below the bounds, the same as their simulation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.passes.ios import TooLarge, ios_schedule
from plait.passes.list_schedule import RULES, Rule, dealt, improved, in_order, list_schedule
from plait.passes.schedule_parts import CLOSE, schedule_by_parts
from plait.passes.tasks import (
    Bounds,
    Costs,
    Place,
    Schedule,
    Share,
    Task,
    bounds,
    check,
    even,
    pieces,
    ready,
    simulate,
)

COSTS = Costs(call=0.1e-6, notice=0.4e-6)
FREE = Costs(0.0, 0.0)


@st.composite
def graphs(draw: Any, most: int = 14) -> list[Task]:
    """Tasks of one to a hundred microseconds, each after some of the ones before it."""
    tasks = []
    for k in range(draw(st.integers(0, most))):
        after = draw(st.lists(st.integers(0, k - 1), max_size=3, unique=True)) if k else []
        seconds = draw(st.integers(1, 100)) * 1e-6
        beside = draw(st.sampled_from([1.0, 1.0, 0.8, 1.5]))
        tasks.append(Task(f"t{k}", seconds, draw(st.integers(1, 12)), tuple(sorted(after)), beside))
    return tasks


def _valid(tasks: list[Task], schedule: Schedule, costs: Costs) -> None:
    """Whole, in order, one at a time, and not below what is possible."""
    places = [schedule.place(k) for k in range(len(tasks))]
    again = simulate(tasks, schedule.order, places, schedule.workers, costs)
    assert again.shares == schedule.shares
    for number, task in enumerate(tasks):
        for k in task.after:
            assert schedule.finish(k) <= schedule.start(number)
    for worker in range(schedule.workers):
        own = sorted(
            (s.start, s.finish) for shares in schedule.shares for s in shares if s.worker == worker
        )
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(own))
    assert schedule.seconds >= bounds(tasks, schedule.workers).best * (1 - 1e-9)


@settings(max_examples=150, deadline=None)
@given(graphs(), st.integers(1, 8), st.sampled_from(RULES))
def test_list_schedules_are_valid(tasks: list[Task], workers: int, rule: Rule) -> None:
    _valid(tasks, list_schedule(tasks, workers, rule, COSTS), COSTS)
    _valid(tasks, in_order(tasks, workers, COSTS), COSTS)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 4), st.sampled_from(RULES))
def test_local_search_never_makes_a_schedule_longer(
    tasks: list[Task], workers: int, rule: Rule
) -> None:
    greedy = list_schedule(tasks, workers, rule, COSTS)
    better = improved(tasks, greedy, rule, COSTS, rounds=15)
    _valid(tasks, better, COSTS)
    assert better.seconds <= greedy.seconds
    assert improved(tasks, greedy, rule, COSTS, rounds=15) == better


def _best(tasks: list[Task], workers: int) -> float:
    """The shortest of all schedules: in every order, each task whole or dealt out to some."""

    def ends(shares: dict[int, tuple[Share, ...]], free: list[float]) -> float:
        if len(shares) == len(tasks):
            return max(free)
        found = []
        for k, task in enumerate(tasks):
            if k in shares or any(j not in shares for j in task.after):
                continue
            done = [shares.get(j, ()) for j in range(len(tasks))]
            starts = [max(free[w], ready(tasks, done, k, w, COSTS)) for w in range(workers)]
            places: list[Place] = [((w, task.pieces),) for w in range(workers)]
            places += [dealt(task, starts, count, COSTS) for count in range(2, workers + 1)]
            for place in places:
                own, low, later = [], 0, list(free)
                for w, end in place:
                    spent = task.spent(len(place), workers) * (end - low) / task.pieces
                    later[w] = starts[w] + COSTS.call + spent
                    own.append(Share(w, end, starts[w], later[w]))
                    low = end
                found.append(ends({**shares, k: tuple(own)}, later))
        return min(found)

    return ends({}, [0.0] * workers)


@settings(max_examples=40, deadline=None)
@given(graphs(most=4), st.integers(2, 3))
def test_small_parts_are_scheduled_as_well_as_can_be(tasks: list[Task], workers: int) -> None:
    found = schedule_by_parts(tasks, workers, COSTS, rounds=0)
    _valid(tasks, found, COSTS)
    if len(pieces([t.after for t in tasks])) == 1:
        limit = max(_best(tasks, workers), CLOSE * bounds(tasks, workers).best)
        assert found.seconds <= limit * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 8), st.integers(0, 400))
def test_schedules_by_parts_are_valid_however_soon_the_search_ends(
    tasks: list[Task], workers: int, states: int
) -> None:
    _valid(tasks, schedule_by_parts(tasks, workers, COSTS, states=states, rounds=3), COSTS)


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_pieces_are_cut_just_where_all_so_far_come_before_all_others(tasks: list[Task]) -> None:
    found = pieces([t.after for t in tasks])
    order = [k for piece in found for k in piece]
    assert sorted(order) == list(range(len(tasks))) and all(found)
    before: list[set[int]] = []
    for task in tasks:
        before.append(set(task.after).union(*(before[k] for k in task.after)))
    cuts = {sum(map(len, found[:k])) for k in range(len(found) + 1)}
    for position in range(len(order) + 1):
        so_far = set(order[:position])
        assert all(before[k] <= so_far for k in order[:position])
        assert (position in cuts) == all(so_far <= before[k] for k in order[position:])


@settings(max_examples=60, deadline=None)
@given(graphs(most=9), st.integers(1, 4))
def test_stages_of_ios_are_valid(tasks: list[Task], workers: int) -> None:
    _valid(tasks, ios_schedule(tasks, workers, COSTS), COSTS)


@settings(max_examples=40, deadline=None)
@given(graphs(most=6), st.integers(1, 3))
def test_bounds_are_not_above_the_best_schedule_there_is(tasks: list[Task], workers: int) -> None:
    """By brute force over all orders, each task whole on one worker or dealt out evenly."""
    best = float("inf")
    options = [
        [*((((w, t.pieces)),) for w in range(workers)), even(t.pieces, workers)] for t in tasks
    ]
    for order in itertools.permutations(range(len(tasks))):
        position = {k: p for p, k in enumerate(order)}
        if any(position[k] > position[n] for n, t in enumerate(tasks) for k in t.after):
            continue
        for places in itertools.islice(itertools.product(*options), 200):
            best = min(best, simulate(tasks, order, places, workers, FREE).seconds)
        if len(tasks) > 4:
            break
    limit = bounds(tasks, workers)
    assert limit.best <= best * (1 + 1e-9) or not tasks
    assert list_schedule(tasks, workers, RULES[0], FREE).seconds >= limit.best * (1 - 1e-9)


def test_two_independent_halves_take_half_the_time() -> None:
    tasks = [Task("a", 10e-6), Task("b", 10e-6)]
    assert list_schedule(tasks, 2, RULES[0], FREE).seconds == pytest.approx(10e-6)
    assert ios_schedule(tasks, 2, FREE).seconds == pytest.approx(10e-6)
    assert in_order(tasks, 2, FREE).seconds == pytest.approx(20e-6)


def test_a_task_that_can_be_cut_fills_the_room_beside_another() -> None:
    """6 + 10 on two workers, the second cut so that both end together: 8."""
    tasks = [Task("a", 6e-6), Task("b", 10e-6, pieces=10)]
    schedule = list_schedule(tasks, 2, Rule(1.0, "order", least=0.0), FREE)
    assert schedule.seconds == pytest.approx(8e-6)
    assert sorted(end for _, end in schedule.place(1)) == [2, 10]


def test_bounds_are_the_longest_path_and_the_work() -> None:
    tasks = [Task("a", 4e-6), Task("b", 9e-6, 3, (0,)), Task("c", 30e-6, 30)]
    limit = bounds(tasks, 2)
    assert limit.path == pytest.approx(15e-6)  # of 30 pieces 15; 4 and two thirds of 9 are less
    assert limit.work == pytest.approx(43e-6 / 2)
    assert limit.best == limit.work
    assert bounds([], 2) == Bounds(0.0, 0.0)


def test_ios_says_that_its_search_is_too_large() -> None:
    tasks = [Task(f"t{k}", 1e-6) for k in range(14)]
    with pytest.raises(TooLarge, match="more than 50 stages"):
        ios_schedule(tasks, 2, COSTS, max_stages=50)


def test_ios_searches_each_piece_between_meeting_points_on_its_own() -> None:
    """Thirty diamonds in a row would be far too many sets of tasks for one search."""
    tasks: list[Task] = [Task("start", 1e-6)]
    for k in range(30):
        top = len(tasks) - 1
        tasks.append(Task(f"l{k}", 5e-6, 1, (top,)))
        tasks.append(Task(f"r{k}", 5e-6, 1, (top,)))
        tasks.append(Task(f"j{k}", 1e-6, 1, (top + 1, top + 2)))
    schedule = ios_schedule(tasks, 2, FREE, max_stages=2000)
    assert schedule.seconds == pytest.approx(1e-6 + 30 * 6e-6)


@pytest.mark.parametrize(
    ("order", "places", "message"),
    [
        ([0], [((0, 1),), ((0, 1),)], "every task once"),
        ([1, 0], [((0, 1),), ((0, 1),)], "ordered before"),
        ([0, 1], [((0, 2),), ((0, 1),)], "do not do it once"),
        ([0, 1], [(), ((0, 1),)], "do not do it once"),
    ],
)
def test_wrong_schedules_are_refused(order: Any, places: Any, message: str) -> None:
    tasks = [Task("a", 1e-6), Task("b", 1e-6, 1, (0,))]
    with pytest.raises(ValueError, match=message):
        simulate(tasks, order, places, 2)


@pytest.mark.parametrize(
    "task", [Task("x", -1.0), Task("x", float("nan")), Task("x", 1.0, 0), Task("x", 1.0, 1, (0,))]
)
def test_tasks_that_make_no_sense_are_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="task x"):
        check([task])
