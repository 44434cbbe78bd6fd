"""prefetch-weights: marks the weights that only routed products read, where there is a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plait.kernels import routing  # noqa: F401 - defines the operators
from plait.passes.pipeline_text import parse_pipeline
from plait.passes.prefetch_weights import BUDGET, TIERED, PrefetchWeights, bytes_of

from .graphs import Builder, aten

linear = torch.ops.plait.routed_linear.default


def graph(budget: Any, shared: bool = False) -> Any:
    """Two routed products, of 4 experts each; the first one's weights are also summed if shared."""
    build = Builder()
    x, index = build.input(6, 8), build.input(6, 2, dtype=torch.int64)
    route = build.call(torch.ops.plait.route.default, index, 4)
    offsets, order = build.part(route, 0), build.part(route, 1)
    up = build.constant(torch.randn(4, 16, 8), "up")
    down = build.constant(torch.randn(4, 8, 16), "down")
    inner = build.call(linear, x, offsets, order, up, None, False, 2, False)
    outer = build.call(linear, inner, offsets, order, down, None, False, 0, True)
    results = [outer, build.call(aten.sum.default, up)] if shared else [outer]
    module = build.finish(*results)
    if budget is not None:
        module.meta[BUDGET] = budget
    return module


def marked(module: Any) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.meta.get(TIERED)]


def test_without_a_budget_nothing_happens() -> None:
    module = graph(None)
    assert PrefetchWeights().run(module).graph_module is module


def test_routed_weights_are_marked_on_a_copy() -> None:
    module = graph("50%")
    result, remarks = PrefetchWeights(ahead=False).run(module)
    assert marked(result) == ["up", "down"] and not marked(module)
    assert [r.id for r in remarks] == ["PLT-PRE-001"]
    found = result.meta[TIERED]
    assert (found.total, found.tiered, found.budget) == (4096, 4096, 2048)
    assert not found.ahead and found.evict == "value" and found.cached


def test_weights_that_something_else_reads_stay() -> None:
    result, remarks = PrefetchWeights().run(graph(100, shared=True))
    assert marked(result) == ["down"]
    assert [r.id for r in remarks] == ["PLT-PRE-001", "PLT-PRE-002"]
    assert "sum" in remarks[1].reason


def test_a_budget_for_all_of_them_moves_nothing() -> None:
    result, remarks = PrefetchWeights().run(graph(4096))
    assert not marked(result) and [r.id for r in remarks] == ["PLT-PRE-004"]


def test_a_bisection_can_leave_weights_out() -> None:
    from plait.passes.manager import PassManager

    result = PassManager("prefetch-weights", limit=1).run(graph("50%"))
    assert marked(result.graph_module) == ["up"]


def test_options_are_text() -> None:
    (item,) = parse_pipeline("prefetch-weights{ahead=false,evict=lru,cached=false}")
    assert item == PrefetchWeights(ahead=False, evict="lru", cached=False)
    with pytest.raises(ValueError, match="evict"):
        PrefetchWeights(evict="random")


def test_budgets_are_bytes_or_shares() -> None:
    assert bytes_of("40%", 1000) == 400 and bytes_of(" 12.5 %", 800) == 100
    assert bytes_of(123, 10) == 123
    for wrong in (0, -1, True, 2.0, "40", "0%", "101%", "%", None):
        with pytest.raises(ValueError, match="a budget is"):
            bytes_of(wrong, 1000)  # type: ignore[arg-type]
