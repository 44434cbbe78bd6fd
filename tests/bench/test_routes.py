"""Index tensors have the shares that their distributions promise."""

from __future__ import annotations

import pytest
import torch

from plait.bench import routes


@pytest.mark.parametrize(
    "index",
    [
        routes.uniform(300, 8, 2),
        routes.zipf(300, 8, 4),
        routes.drift(301, 8, 2),
        routes.uniform(5, 4, 4),
        routes.uniform(0, 4, 2),
    ],
)
def test_each_token_has_k_different_experts(index: torch.Tensor) -> None:
    assert index.dtype == torch.int64
    ordered = index.sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert index.numel() == 0 or (index.min() >= 0 and index.max() < 8)


def test_uniform_gives_every_expert_the_same_share() -> None:
    share = routes.shares(routes.uniform(8000, 8, 2), 8)
    assert share.sum() == pytest.approx(1)
    assert torch.allclose(share, torch.full_like(share, 1 / 8), atol=0.01)


@pytest.mark.parametrize(
    ("experts", "s", "first"), [(8, 1.0, 0.368), (64, 1.0, 0.211), (8, 0, 0.125)]
)
def test_zipf_follows_its_law(experts: int, s: float, first: float) -> None:
    law = routes.zipf_shares(experts, s)
    assert float(law[0]) == pytest.approx(first, abs=1e-3)
    index = routes.zipf(20000, experts, 2, s)
    assert torch.allclose(routes.shares(index[:, 0], experts), law, atol=0.01)
    if s:  # the second expert is another one: the crowd spreads a little
        assert routes.shares(index, experts)[0] < law[0]


def test_drift_wakes_the_dead_experts_half_way() -> None:
    index = routes.drift(1000, 16, 2, live=0.25)
    assert set(index[:500].unique().tolist()) == set(range(4))
    assert set(index[500:].unique().tolist()) == set(range(4, 16))
    with pytest.raises(ValueError, match="3 experts are too few for 2 on each side"):
        routes.drift(10, 3, 2)


def test_seeds_make_draws() -> None:
    assert torch.equal(routes.zipf(64, 8), routes.zipf(64, 8))
    assert not torch.equal(routes.zipf(64, 8), routes.zipf(64, 8, seed=1))


def test_a_trained_router_chooses_for_held_out_text() -> None:
    pytest.importorskip("transformers")
    index = routes.trained(3000, layer=2)
    assert index.shape == (3000, 2)
    assert (index[:, 0] != index[:, 1]).all()
    assert torch.equal(index, routes.trained(3000, layer=2))
    with pytest.raises(ValueError, match="are more than the 32768 held out"):
        routes.trained(40000)
