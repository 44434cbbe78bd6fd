"""What a divided model is predicted to take: what ranks share, and what waits for what."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.compiler.placed import local, options, predict
from plait.compiler.placed.measure import Costs
from plait.compiler.placed.options import PlacementOptions
from plait.compiler.placed.predict import Cost, Host, System, predicted
from plait.passes.placement.problem import Link
from plait.runtime.pipeline import RankProgram, SegmentStep, Wire

FREE = Link(0.0, math.inf)
PLENTY = Host(64.0)


def made(edges: Sequence[tuple[int, int]], where: Sequence[int], ranks: int) -> list[RankProgram]:
    """Programs of segments "0", "1", ...: ``where`` is each one's rank, an edge (a, b) says that b
    reads what a makes. The last one's is the result.
    """
    stage = [0] * len(where)
    for a, b in sorted(edges, key=lambda e: e[1]):
        stage[b] = max(stage[b], stage[a] + (where[a] != where[b]))
    far = dict.fromkeys((a, where[b]) for a, b in edges if where[a] != where[b])
    wires = {
        key: Wire(str(key[0]), where[key[0]], key[1], stage[key[0]], number, "float32", (1,))
        for number, key in enumerate(far)
    }
    found = []
    for rank in range(ranks):
        mine = sorted((k for k in range(len(where)) if where[k] == rank), key=lambda k: stage[k])
        steps = []
        for k in mine:
            read = [wires[a, rank] for a, b in edges if b == k and where[a] != rank]
            sends = [w for (a, _), w in wires.items() if a == k]
            steps.append(SegmentStep(str(k), stage[k], (), (str(k),), tuple(read), tuple(sends)))
        results = (str(len(where) - 1),) if where[-1] == rank else ()
        found.append(
            RankProgram(rank, ranks, 1 + max(stage), len(wires), tuple(steps), (), results)
        )
    return found


def ranks(
    programs: Sequence[RankProgram], host: Host, costs: Sequence[float | Cost], link: Link = FREE,
    nbytes: float = 0.0, read: float = 0.0, turns: float = math.inf,
) -> System:  # fmt: skip
    each = {str(k): x if isinstance(x, Cost) else Cost(x, 1.0, read) for k, x in enumerate(costs)}
    sizes = dict.fromkeys(each, nbytes)
    return System(programs, [host] * (len(programs) + 1), each, sizes, link, turns)


def test_a_chain_takes_its_segments_and_messages() -> None:
    # The caller feeds two ranks, one sends to the other, which sends the result: each is two halves
    # of a message but the feeding, whose second half nobody waits for.
    found = ranks(made([(0, 1)], [0, 1], 2), PLENTY, [1.0, 2.0], Link(0.1, 100.0), nbytes=10.0)
    assert found.step() == pytest.approx(0.05 + 1 + 0.2 + 2 + 0.2)
    # What is fed behind the last batch is no input, only the word to go on.
    programs = [replace(p, inputs=("x",) * (p.rank == 0)) for p in found.programs]
    fed = replace(found, programs=programs, nbytes={**found.nbytes, "x": 1000.0})
    assert fed.step() == pytest.approx(5 + found.step())


@pytest.mark.parametrize(("cores", "seconds"), [(4, 1.0), (2, 1.0), (1, 2.0)])
def test_ranks_share_cores(cores: int, seconds: float) -> None:
    assert ranks(made([], [0, 1], 2), Host(cores), [1.0, 1.0]).step() == pytest.approx(seconds)


def test_ranks_share_the_rate_of_memory() -> None:
    # Either reads 10 bytes/s, as fast as it can alone; together there are 12.
    host = Host(2, alone=10.0, together=12.0)
    both = ranks(made([], [0, 1], 2), host, [1.0, 1.0], read=10.0)
    assert both.step() == pytest.approx(20 / 12)
    half = ranks(made([], [0, 1], 2), host, [1.0, 1.0], read=7.0)  # 30 % waits for nothing else
    assert half.step() == pytest.approx(0.3 + 0.7 * 14 / 12)
    cached = ranks(made([], [0, 1], 2), host, [1.0, 1.0], read=20.0)  # memory is no faster
    assert cached.step() == pytest.approx(20 / 12)
    # Who runs half of the time reads half as much in it.
    one = Host(1, alone=10.0, together=12.0)
    assert ranks(made([], [0, 1], 2), one, [1.0, 1.0], read=10.0).step() == pytest.approx(2.0)


def test_gpus_share_neither_cores_nor_memory_of_their_host() -> None:
    programs, gpu = made([(0, 2), (1, 2)], [0, 1, 2], 3), Cost(1.0, 0.0, 10.0)
    host = Host(2, alone=10.0, together=10.0)
    assert ranks(programs, host, [1.0, gpu, 0.0], read=10.0).step() == pytest.approx(1.0)
    busy = Cost(1.0, 4.0)
    assert ranks(programs, host, [busy, Cost(1.5), 0.0]).step() == pytest.approx(2.0)
    assert ranks(programs, host, [busy, Cost(3.0), 0.0]).step() == pytest.approx(3.0)


def test_a_step_ends_with_the_last_result() -> None:
    programs = made([], [0, 1], 2)
    programs[0] = replace(programs[0], results=("0",))
    assert ranks(programs, PLENTY, [3.0, 1.0]).step() == pytest.approx(3.0)
    assert ranks(programs, PLENTY, [1.0, 3.0]).step() == pytest.approx(3.0)


def test_messages_keep_the_cores_of_both_ends_busy() -> None:
    programs = made([(0, 2)], [0, 1, 1], 2)
    each = {str(k): Cost(seconds, 1.0) for k, seconds in enumerate((1.0, 4.0, 0.0))}
    link, sizes = Link(1.0, math.inf), dict.fromkeys(each, 1.0)
    hosts = [Host(1), Host(1), Host(1)]
    assert System(programs, hosts, each, sizes, link, called=False).step() == pytest.approx(4.5)


def test_who_has_no_turn_waits() -> None:
    programs = made([(0, 1), (0, 2), (0, 3), (0, 4), *((k, 5) for k in range(1, 5))],
                    [0, 0, 1, 2, 3, 0], 4)  # fmt: skip
    costs = [1.0, 4.0, 4.0, 4.0, 4.0, 1.0]
    assert ranks(programs, PLENTY, costs).step() == pytest.approx(6.0)
    assert ranks(programs, PLENTY, costs, turns=3).step() == pytest.approx(10.0)
    assert ranks(programs, Host(3), costs).step() == pytest.approx(1 + 16 / 3 + 1)


def test_who_waited_longest_has_the_next_turn() -> None:
    found = ranks(made([], [0, 1, 2, 3], 4), PLENTY, [2.0, 1.0, 1.0, 3.0], turns=2)
    assert found.step() == pytest.approx(2 + 3)


def test_a_full_pipeline_is_as_fast_as_its_slowest_rank() -> None:
    programs = made([(0, 1), (1, 2)], [0, 1, 2], 3)
    assert ranks(programs, PLENTY, [1.0, 3.0, 2.0]).step() == pytest.approx(6.0)
    assert ranks(programs, PLENTY, [1.0, 3.0, 2.0]).period() == pytest.approx(3.0)
    assert ranks(programs, Host(1), [1.0, 3.0, 2.0]).period() == pytest.approx(6.0)


def test_one_more_batch_than_stages_is_in_flight() -> None:
    # While the caller is sent a result and sends an input, there is one to compute on.
    found = ranks(made([(0, 1)], [0, 1], 2), PLENTY, [1.0, 1.0], Link(0.2, math.inf))
    assert found.period() == pytest.approx(1 + 0.1)


def seconds_of(
    edges: Sequence[tuple[int, int]], seconds: Sequence[float], how: dict[str, Any],
    devices: Sequence[str] = ("cpu", "cpu", "cpu"), report: dict[str, float] | None = None,
) -> float:  # fmt: skip
    """What is predicted of segments with a unit each, one on each device; a call takes 0.5 s."""
    count = len(seconds)
    nodes = [SimpleNamespace() for _ in seconds]
    units: Any = SimpleNamespace(of={})
    units.of = {str(k): SimpleNamespace(name=str(k), nodes=nodes) for k in range(count)}
    ops = [SimpleNamespace(name=str(k), time_s=(x,) * count) for k, x in enumerate(seconds)]
    segments: Any = [
        SimpleNamespace(name=str(k), nodes=[str(k)], rank=k, inputs=(), outputs=())
        for k in range(count)
    ]
    here: Any = [SimpleNamespace(torch=torch.device(x)) for x in devices[:count]]
    return predicted(
        SimpleNamespace(ops=ops), SimpleNamespace(report=report or {}),
        made(edges, range(count), count), segments, units, Costs(call=0.5), FREE, here,
        PlacementOptions(**how),
    )  # fmt: skip


def test_what_a_plan_takes_is_told_by_how_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "work", lambda unit: (0.0, 0.0))
    monkeypatch.setattr(predict, "cores", lambda: 2)
    monkeypatch.setattr(options, "cores", lambda: 2)
    alone = {"launch": "processes", "threads": 1}
    assert seconds_of([(0, 1)], [1.0, 2.0], alone) == pytest.approx(1.5 + 2.5)
    assert seconds_of([], [1.0, 2.0], alone) == pytest.approx(2.5)
    # With all cores they take turns: the second does not share those of the first.
    assert seconds_of([], [2.0, 1.0], {**alone, "threads": 2}) == pytest.approx(2.5 + 1.5)
    full = {**alone, "objective": "throughput"}
    assert seconds_of([(0, 1)], [1.0, 2.0], full) == pytest.approx(2.5)
    # One thread drives all devices, but GPUs compute by themselves.
    report = {"makespan_s": 3.5, "load_s": 2.75}
    inline = {"launch": "inline"}
    for devices, objective, want in (
        (("cpu", "cpu"), "latency", 4.0), (("cuda:0", "cpu"), "latency", 3.5),
        (("cuda:0", "cpu"), "throughput", 2.75), (("cuda:0", "cuda:1"), "latency", 3.5),
    ):  # fmt: skip
        how = {**inline, "objective": objective}
        assert seconds_of([(0, 1)], [1.0, 2.0], how, devices, report) == pytest.approx(want)
    # Two ranks share a machine of two cores, the third has one to itself.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    spread = {"launch": "torchrun", "threads": 2}
    assert seconds_of([], [1.0, 1.0, 2.0], spread) == pytest.approx(3.0)
    assert seconds_of([], [1.0, 1.0, 3.0], spread) == pytest.approx(3.5)


@st.composite
def divided(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int], list[float]]:
    count = draw(st.integers(1, 8))
    pairs = [(a, b) for b in range(count) for a in range(b)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    where = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    costs = draw(st.lists(st.integers(0, 5).map(float), min_size=count, max_size=count))
    return edges, where, costs


@given(divided(), st.integers(1, 3), st.sampled_from([1, 2, math.inf]))
def test_no_prediction_is_below_what_there_is_to_do(
    model: tuple[list[tuple[int, int]], list[int], list[float]], cores: int, turns: float
) -> None:
    edges, where, costs = model
    # Results are those of the last segment: nobody waits for others, so let it read all.
    edges = list(dict.fromkeys([*edges, *((k, len(where) - 1) for k in range(len(where) - 1))]))
    path = list(costs)
    for a, b in sorted(edges, key=lambda e: e[1]):
        path[b] = max(path[b], path[a] + costs[b])
    found = ranks(made(edges, where, 3), Host(cores), costs, turns=turns)
    step, period = found.step(), found.period()
    assert max(path[-1], sum(costs) / min(cores, turns)) <= step + 1e-9
    assert step <= sum(costs) + 1e-9
    busiest = max(sum(c for c, r in zip(costs, where, strict=True) if r == k) for k in range(3))
    # Some pipelines repeat after several batches only, and twelve are timed.
    least = max(busiest, sum(costs) / min(cores, turns))
    assert 0.9 * least - 1e-9 <= period <= 1.1 * sum(costs) + 1e-9


@pytest.mark.parametrize(("threads", "turns"), [(1, 2), (2, 1), (3, 1)])
def test_local_ranks_share_the_turns_that_are_predicted(
    threads: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[tuple[int, ...]] = []
    offers: list[int] = []

    def offered(count: int) -> tuple[int, int]:
        offers.append(count)
        return os.pipe()

    monkeypatch.setattr(local, "cores", lambda: 2)
    monkeypatch.setattr(local, "offered", offered)
    monkeypatch.setattr(local.Ranks, "_start", lambda _, ends: shared.append(ends))
    local.Ranks(2, 1.0, threads).close()
    assert offers == ([turns] if turns < 2 else [])
    assert [len(ends) for ends in shared] == ([2, 2] if turns < 2 else [0, 0])
