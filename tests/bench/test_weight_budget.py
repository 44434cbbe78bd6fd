"""The bench of the weight budget: its oracle is Belady's, its widened model computes the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.bench import weight_budget
from plait.bench.weight_budget import oracle, widened


def best(fetches: list[Any], capacity: int) -> int:
    """Fewest misses of any sequence of choices, by trying all of them."""
    states = {frozenset(): 0}
    for site, units in fetches:
        wanted = {(site, u) for u in units}
        following: dict[frozenset[Any], int] = {}
        for state, misses in states.items():
            count = misses + len(wanted - state)
            rest = state - wanted
            room = max(0, capacity - len(wanted))
            for kept in itertools.combinations(rest, min(room, len(rest))):
                key = frozenset({*wanted, *kept})
                following[key] = min(count, following.get(key, count))
        states = following
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sets(st.integers(0, 2), min_size=1, max_size=2)),
        max_size=9,
    ),
    st.integers(2, 4),
)
def test_the_oracle_misses_as_seldom_as_can_be(
    drawn: list[tuple[int, set[int]]], capacity: int
) -> None:
    fetches = [(site, tuple(sorted(units))) for site, units in drawn]
    hits, misses = oracle(fetches, capacity)
    assert misses == best(fetches, capacity)
    assert hits + misses == sum(len(units) for _, units in fetches)


def test_wider_experts_compute_the_same_and_route_alike() -> None:
    transformers = pytest.importorskip("transformers")
    settings = dict(weight_budget.trained.__globals__["SETTINGS"], num_hidden_layers=2)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**settings, use_cache=False)
    ).eval()
    wide = widened(model, 640)
    x = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        mine, theirs = (m(x, output_router_logits=True) for m in (wide, model))
    assert wide.model.layers[0].mlp.experts.down_proj.shape[-1] == 640
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    for a, b in zip(mine.router_logits, theirs.router_logits, strict=True):
        assert torch.equal(a.topk(2).indices, b.topk(2).indices)


def test_a_text_is_cut_into_windows() -> None:
    text = [torch.arange(8).view(2, 4), torch.arange(8, 16).view(2, 4)]
    cut = weight_budget.windows(text, 3, 5)  # type: ignore[arg-type]
    assert [w.tolist() for w in cut] == [[[3 * k, 3 * k + 1, 3 * k + 2]] for k in range(5)]
