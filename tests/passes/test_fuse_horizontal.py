"""fuse-horizontal: which kernels share a launch, and why others do not."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.kernels.occupancy import SM90, Candidate
from plait.passes.fuse_horizontal import FuseHorizontal, Node, merged
from plait.passes.gpu_tasks import GpuTask, check, seconds

US = 1e-6


def _node(
    name: str, *after: int, blocks: int = 20, threads: tuple[int, ...] = (256,), us: float = 2.0
) -> Node:
    variants = tuple(Candidate(blocks, t, 32, 0, us * US) for t in threads)
    return Node(GpuTask(name, us * US, SM90.share(blocks), 0.0, after), variants)


def _library(name: str, *after: int, us: float = 2.0) -> Node:
    return Node(GpuTask(name, us * US, 1.0, 0.0, after))


def _fused(nodes: list[Node], **options: float) -> list[tuple[int, ...]]:
    found, _ = FuseHorizontal(**options).fusions(nodes, SM90)  # type: ignore[arg-type]
    return [f.tasks for f in found]


def test_small_independent_kernels_share_a_launch() -> None:
    nodes = [_node("in"), *(_node(f"b{k}", 0) for k in range(4)), _node("out", 1, 2, 3, 4)]
    found, remarks = FuseHorizontal().fusions(nodes, SM90)
    assert [f.tasks for f in found] == [(1, 2, 3, 4)] and not remarks
    assert found[0].gain == pytest.approx(
        seconds([n.task for n in nodes], SM90)
        - seconds([n.task for n in merged(nodes, found)[0]], SM90)
    )
    shares = [n.task.share for n in merged(nodes, found)[0]]
    assert shares == [pytest.approx(x * nodes[0].task.share) for x in (1, 4, 1)]


def test_kernels_that_no_multiprocessor_has_room_for_stay_alone() -> None:
    wide = Node(_node("wide").task, (Candidate(20, 256, 255, 10**9, 9 * US),))
    assert _fused([wide, wide]) == [] and _fused([wide, _node("a"), _node("b")]) == [(1, 2)]


def test_the_librarys_calls_stay_alone() -> None:
    assert _fused([_library("a"), _library("b"), _node("c")]) == []


def test_kernels_that_depend_on_each_other_stay_apart() -> None:
    assert _fused([_node("a"), _node("b", 0), _node("c", 1)]) == []


def test_a_kernel_that_would_make_a_long_chain_wait_stays_alone() -> None:
    # b starts a long chain at once; with a it would wait for the slow library call before a.
    nodes = [
        _library("slow", us=100.0),
        _node("early"),
        _node("a", 0),
        _node("b", 1),
        _library("long", 3, us=100.0),
    ]
    _, remarks = FuseHorizontal().fusions(nodes, SM90)
    assert _fused(nodes) == []
    assert [r.id for r in remarks] == ["PLT-HFU-008"] and "would not end sooner" in remarks[
        0
    ].reason


def test_a_common_number_of_threads_is_looked_for_among_variants() -> None:
    nodes = [_node("a", threads=(128, 256)), _node("b", threads=(256,)), _node("c", threads=(64,))]
    (fusion,) = FuseHorizontal().fusions(nodes, SM90)[0]
    assert fusion.tasks == (0, 1) and fusion.picks == (1, 0)
    assert _fused([_node("a", threads=(128,)), _node("b", threads=(256,))]) == []


def test_options_bound_what_is_fused() -> None:
    nodes = [_node(f"b{k}") for k in range(5)]
    assert _fused(nodes) == [(0, 1, 2, 3, 4)]
    assert _fused(nodes, most=2) == [(0, 1), (2, 3)]
    assert _fused(nodes, most=1) == [] == _fused(nodes, least_gain=1e6)
    with pytest.raises(ValueError, match="own_flops -1"):
        FuseHorizontal(own_flops=-1)


@st.composite
def plans(draw: st.DrawFn) -> list[Node]:
    nodes = []
    for k in range(draw(st.integers(1, 12))):
        after = tuple(sorted(set(draw(st.lists(st.integers(0, k - 1), max_size=2))))) if k else ()
        us = draw(st.floats(1.0, 20.0))
        if draw(st.booleans()):
            threads = tuple(draw(st.sets(st.sampled_from((64, 128, 256)), min_size=1)))
            nodes.append(
                _node(f"n{k}", *after, blocks=draw(st.integers(1, 500)), threads=threads, us=us)
            )
        else:
            nodes.append(_library(f"n{k}", *after, us=us))
    return nodes


@settings(max_examples=150, deadline=None)
@given(plans())
def test_fusions_never_close_a_cycle_or_lose_a_dependency(nodes: list[Node]) -> None:
    found, _ = FuseHorizontal(least_gain=-100.0).fusions(nodes, SM90)
    tasks, members = merged(nodes, found)
    check([n.task for n in tasks])
    assert sorted(k for group in members for k in group) == list(range(len(nodes)))
    place = {k: m for m, group in enumerate(members) for k in group}
    graph = nx.DiGraph((j, m) for m, node in enumerate(tasks) for j in node.task.after)
    for k, node in enumerate(nodes):
        for j in node.task.after:
            assert graph.has_edge(place[j], place[k])


@settings(max_examples=100, deadline=None)
@given(plans())
def test_the_plan_is_never_predicted_slower(nodes: list[Node]) -> None:
    found, _ = FuseHorizontal().fusions(nodes, SM90)
    before = seconds([n.task for n in nodes], SM90)
    after = seconds([n.task for n in merged(nodes, found)[0]], SM90)
    assert after <= before - sum(f.gain for f in found) + 1e-12
