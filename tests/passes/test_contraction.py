"""Contraction: groups of a DAG merge exactly when that makes no cycle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.passes.contraction import Contraction


@st.composite
def dags(draw):
    n = draw(st.integers(1, 12))
    return [sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else [] for i in range(n)]


def makes_cycle(predecessors, group_of):
    """Whether the quotient graph has a cycle, by repeatedly removing groups that need nothing."""
    needs = {g: set() for g in group_of}
    for i, before in enumerate(predecessors):
        needs[group_of[i]] |= {group_of[p] for p in before if group_of[p] != group_of[i]}
    while free := [g for g, need in needs.items() if not need]:
        for g in free:
            del needs[g]
        for need in needs.values():
            need -= set(free)
    return bool(needs)


@given(dags(), st.lists(st.lists(st.integers(0, 11), min_size=2, max_size=3), max_size=12))
def test_can_merge_agrees_with_a_search_for_cycles(predecessors, merges):
    contraction = Contraction(predecessors)
    group_of = list(range(len(predecessors)))
    for wanted in merges:
        wanted = [i % len(predecessors) for i in wanted]
        old = {group_of[i] for i in wanted}
        trial = [group_of[wanted[0]] if g in old else g for g in group_of]
        possible = not makes_cycle(predecessors, trial)
        assert contraction.can_merge(*wanted) == possible
        if possible:
            contraction.merge(*wanted)
            group_of = trial
        else:
            with pytest.raises(ValueError, match="cycle"):
                contraction.merge(*wanted)
        same = [contraction.find(i) == contraction.find(0) for i in range(len(group_of))]
        assert same == [g == group_of[0] for g in group_of]


def test_two_ends_of_a_diamond_merge_only_with_a_side():
    contraction = Contraction([[], [0], [0], [1, 2]])
    assert not contraction.can_merge(0, 3)
    assert not contraction.can_merge(0, 1, 3)
    assert contraction.can_merge(0, 1, 2, 3)
    assert contraction.can_merge(1, 2)


def test_merging_two_siblings_makes_their_readers_depend_on_both():
    contraction = Contraction([[], [], [0], [1]])
    assert not contraction.depends(2, 1)
    contraction.merge(0, 1)
    assert contraction.depends(2, 1) and contraction.depends(3, 0)


def test_nodes_must_come_in_topological_order():
    with pytest.raises(ValueError, match="not a topological order"):
        Contraction([[1], []])
