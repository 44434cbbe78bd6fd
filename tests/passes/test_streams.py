"""streams: order is kept with few events, and memory of what may run at once apart."""

from __future__ import annotations

import random

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.passes.plan_memory import plan_memory
from plait.passes.streams import Streams, StreamsPass, assign, lifetimes


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[int, ...]]:
    count = draw(st.integers(1, 14))
    return [
        tuple(draw(st.lists(st.integers(0, k - 1), max_size=3))) if k else () for k in range(count)
    ]


def _ordered(after: list[tuple[int, ...]], streams: Streams) -> nx.DiGraph:
    """What certainly comes after what: the order of each stream, and events."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(after)))
    last: dict[int, int] = {}
    for k, stream in enumerate(streams.of):
        if stream in last:
            graph.add_edge(last[stream], k)
        last[stream] = k
        graph.add_edges_from((j, k) for j in streams.waits[k])
    return graph


@settings(max_examples=300, deadline=None)
@given(graphs(), st.integers(1, 5))
def test_every_dependency_is_kept_and_no_event_is_idle(
    after: list[tuple[int, ...]], most: int
) -> None:
    streams = assign(after, [1.0] * len(after), most)
    assert max(streams.of) < most
    graph = _ordered(after, streams)
    closure = nx.transitive_closure_dag(graph)
    for k, needs in enumerate(after):
        assert all(closure.has_edge(j, k) for j in needs)
        assert {j for j in range(len(after)) if streams.before[k] >> j & 1} == set(
            closure.predecessors(k)
        )
        for j in streams.waits[k]:
            assert streams.of[j] != streams.of[k]
            without = graph.copy()
            without.remove_edge(j, k)
            assert not nx.has_path(without, j, k)


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_with_enough_streams_only_what_depends_is_ordered(after: list[tuple[int, ...]]) -> None:
    wanted = nx.DiGraph()
    wanted.add_nodes_from(range(len(after)))
    wanted.add_edges_from((j, k) for k, needs in enumerate(after) for j in needs)
    wanted = nx.transitive_closure_dag(wanted)
    streams = assign(after, [1.0] * len(after), len(after))
    have = nx.transitive_closure_dag(_ordered(after, streams))
    assert set(have.edges) == set(wanted.edges)
    # No more streams than chains of a largest matching, and no more events than other edges.
    reduced = nx.transitive_reduction(wanted)
    matching = nx.bipartite.maximum_matching(
        nx.Graph(((0, j), (1, k)) for j, k in reduced.edges), [(0, j) for j, _ in reduced.edges]
    )
    chains = len(after) - len(matching) // 2
    assert len(set(streams.of)) <= chains
    assert streams.events <= reduced.number_of_edges() - len(matching) // 2


def test_a_diamond_takes_two_streams_and_two_events() -> None:
    streams = assign([(), (0,), (0,), (1, 2)], [1.0, 5.0, 1.0, 1.0], 8)
    assert streams.of[0] == streams.of[1] == streams.of[3] != streams.of[2]
    assert streams.waits == ((), (), (0,), (2,))
    assert streams.critical[streams.of[0]] and not streams.critical[streams.of[2]]


def test_a_later_chain_takes_over_a_stream() -> None:
    fan = [(), (0,), (0,), (1, 2), (3,), (3,), (4, 5)]
    assert len(set(assign(fan, [1.0] * 7, 8).of)) == 2


def test_one_stream_needs_no_events() -> None:
    streams = assign([(), (0,), (0,), (1, 2)], [1.0] * 4, 1)
    assert set(streams.of) == {0} and streams.events == 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="task 1 comes after one that is not before it"):
        assign([(), (1,)], [1.0, 1.0], 2)
    with pytest.raises(ValueError, match="most must be at least 1"):
        StreamsPass(most=0)


@settings(max_examples=200, deadline=None)
@given(graphs(), st.integers(1, 4), st.integers(0, 2**32))
def test_buffers_of_tasks_that_may_run_at_once_never_overlap(
    after: list[tuple[int, ...]], most: int, seed: int
) -> None:
    chance = random.Random(seed)
    streams = assign(after, [chance.random() for _ in after], most)
    count = len(after)
    users = {
        f"b{k}": chance.sample(range(count), chance.randint(1, min(3, count))) for k in range(8)
    }
    sizes = {name: chance.choice((1, 64, 100, 1000)) for name in users}
    memory = plan_memory(lifetimes(sizes, users, streams))
    closure = nx.transitive_closure_dag(_ordered(after, streams))
    names = sorted(users)
    for i, a in enumerate(names):
        for b in names[:i]:
            x, y = int(memory.offsets[a]), int(memory.offsets[b])
            if x + sizes[a] <= y or y + sizes[b] <= x:
                continue
            forth = all(closure.has_edge(j, k) for j in users[a] for k in users[b])
            back = all(closure.has_edge(k, j) for j in users[a] for k in users[b])
            assert forth or back, (a, b)
    assert memory.lower_bound <= int(memory.total)


def test_a_chain_shares_memory_and_branches_do_not() -> None:
    chain = assign([(), (0,), (1,), (2,)], [1.0] * 4, 4)
    users = {"a": [0, 1], "b": [1, 2], "c": [2, 3]}
    assert plan_memory(lifetimes(dict.fromkeys(users, 64), users, chain)).total == 128
    fork = assign([(), (0,), (0,), (1, 2)], [1.0] * 4, 4)
    users = {"a": [1], "b": [2]}
    assert plan_memory(lifetimes(dict.fromkeys(users, 64), users, fork)).total == 128
    fork = assign([(), (0,), (0,), (1, 2)], [1.0] * 4, 1)
    assert plan_memory(lifetimes(dict.fromkeys(users, 64), users, fork)).total == 64
