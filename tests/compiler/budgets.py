"""Models under several budgets for weights, and what holds of each after a call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from plait.runtime.tier import Tier

DEMAND = (
    "normalize,outline-branches,prefetch-weights{ahead=false,evict=lru,cached=false},fuse-vertical"
)
"""A pipeline that fetches what is wanted when it is wanted, and drops the least recently used."""


def under_budgets(compiled: Callable[..., Any], net: nn.Module, least: int) -> dict[str, Any]:
    """``net`` with all weights in memory, with room for some parts, and for ``least`` bytes."""
    return {
        "resident": compiled(copy.deepcopy(net), None),
        "some": compiled(copy.deepcopy(net), "60%"),
        "one": compiled(copy.deepcopy(net), least),
        "demand": compiled(copy.deepcopy(net), "60%", pipeline=DEMAND),
    }


def within_budget(model: Any) -> Tier:
    """The tier of a compiled model, which never held more than it may and waits for nothing."""
    tier = model.weight_tier
    assert tier.counters.peak_bytes <= tier.capacity and not tier.counters.over
    assert not tier._waving and not tier._frames
    return tier
