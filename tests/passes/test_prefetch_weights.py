"""prefetch-weights: marks the weights that only routed products read, where there is a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx

from plait.kernels import routing  # noqa: F401 - defines the operators
from plait.kernels.routing_rows import branches
from plait.passes.outline_branches import INNER
from plait.passes.pipeline_text import parse_pipeline
from plait.passes.prefetch_weights import (
    BRANCH,
    BUDGET,
    EXPERTS,
    LEAST,
    TIERED,
    PrefetchWeights,
    bytes_of,
)

from .graphs import Builder, aten

linear = torch.ops.plait.routed_linear.default


def graph(budget: Any, shared: bool = False, bias: bool = False) -> Any:
    """Two routed products, of 4 experts each; the first one's weights are also summed if shared."""
    build = Builder()
    x, index = build.input(6, 8), build.input(6, 2, dtype=torch.int64)
    route = build.call(torch.ops.plait.route.default, index, 4)
    offsets, order = build.part(route, 0), build.part(route, 1)
    up = build.constant(torch.randn(4, 16, 8), "up")
    down = build.constant(torch.randn(4, 8, 16), "down")
    inner = build.call(linear, x, offsets, order, up, None, False, 2, False)
    added = build.constant(torch.randn(4, 8), "added") if bias else None
    outer = build.call(linear, inner, offsets, order, down, added, False, 0, True)
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
    assert {n.meta[TIERED] for n in result.graph.nodes if TIERED in n.meta} == {EXPERTS}
    assert [r.id for r in remarks] == ["PLT-PRE-001"]
    found = result.meta[TIERED]
    assert (found.total, found.tiered, found.budget) == (4096, 4096, 2048)
    assert not found.ahead and found.evict == "value" and found.cached


def test_weights_that_something_else_reads_stay() -> None:
    result, remarks = PrefetchWeights().run(graph(100, shared=True))
    assert marked(result) == ["down"]
    assert [r.id for r in remarks] == ["PLT-PRE-001", "PLT-PRE-002"]
    assert "sum" in remarks[1].reason


def test_what_products_add_stays() -> None:
    result, _ = PrefetchWeights().run(graph(100, bias=True))
    assert marked(result) == ["up", "down"]


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
    assert bytes_of("2GB", 10) == 2 * 10**9 and bytes_of(" 1.5 MiB", 10) == 3 << 19
    for wrong in (0, -1, True, 2.0, "40", "0%", "101%", "%", None):
        with pytest.raises(ValueError, match="a budget is"):
            bytes_of(wrong, 1000)  # type: ignore[arg-type]


# -- branches --------------------------------------------------------------------------------------

WIDE = LEAST // 4 // 8  # rows of a weight of the least size, 8 columns wide
LARGE, SMALL, TIED = torch.randn(WIDE, 8), torch.randn(WIDE - 1, 8), torch.randn(WIDE + 1, 8)


def branch(*weights: torch.Tensor) -> Any:
    """A branch that adds up products of its rows with each of the weights."""
    build = Builder()
    rows = build.input(3, 8)
    rows.meta[INNER] = True
    found = [build.constant(w, f"weight{k}") for k, w in enumerate(weights)]
    products = [build.call(aten.linear.default, rows, w) for w in found]
    return build.finish(*(build.call(aten.sum.dim_IntList, p, [1]) for p in products))


def routed(*inner: Any, outside: torch.Tensor | None = None, budget: Any = 1) -> Any:
    """A graph that routes to branches, and may read a weight itself."""
    build = Builder()
    rows, offsets = build.input(6, 8), build.input(len(inner) + 1, dtype=torch.int64)
    graphs = []
    for k, module in enumerate(inner):
        build.root.add_module(f"branch{k}", module)
        graphs.append(build.graph.get_attr(f"branch{k}"))
    ran = build.graph.call_function(branches, (tuple(graphs), rows, offsets, ()))
    ran.meta["val"] = rows.meta["val"]
    results = [ran]
    if outside is not None:
        results.append(build.call(aten.linear.default, rows, build.constant(outside, "own")))
    module = build.finish(*results)
    module.meta[BUDGET] = budget
    return module


def kinds(module: fx.GraphModule, name: str) -> list[Any]:
    inner = getattr(module, name)
    return [n.meta.get(TIERED) for n in inner.graph.find_nodes(op="get_attr")]


def test_large_weights_of_branches_are_marked() -> None:
    module = routed(branch(LARGE, SMALL), branch(TIED))
    result, remarks = PrefetchWeights().run(module)
    assert kinds(result, "branch0") == [BRANCH, None] and kinds(result, "branch1") == [BRANCH]
    assert kinds(module, "branch0") == [None, None]
    assert [r.id for r in remarks] == ["PLT-PRE-001"]
    found = result.meta[TIERED]
    assert found.tiered == LARGE.nbytes + TIED.nbytes
    assert found.total == found.tiered + SMALL.nbytes


def test_branches_may_share_weights_with_each_other_but_with_nothing_else() -> None:
    result, _ = PrefetchWeights().run(routed(branch(LARGE), branch(LARGE)))
    assert kinds(result, "branch0") == kinds(result, "branch1") == [BRANCH]
    assert result.meta[TIERED].tiered == result.meta[TIERED].total == LARGE.nbytes
    result, remarks = PrefetchWeights().run(routed(branch(LARGE, TIED), outside=TIED))
    assert kinds(result, "branch0") == [BRANCH, None]
    assert [r.id for r in remarks] == ["PLT-PRE-001", "PLT-PRE-006"]


def test_graphs_that_are_no_branches_keep_their_weights() -> None:
    module = routed(branch(LARGE))
    (ran,) = module.graph.find_nodes(op="call_function", target=branches)
    ran.target = torch.ops.higher_order.map_impl
    result, remarks = PrefetchWeights().run(module)
    assert kinds(result, "branch0") == [None] and not remarks


def test_variants_leave_weights_where_they_are() -> None:
    general, _ = PrefetchWeights().run(routed(branch(LARGE, TIED)))
    decided = general.meta[TIERED]
    sized = branch(LARGE, TIED, torch.randn(WIDE, 8))  # that of one branch alone
    sized.meta[BUDGET] = decided
    result, _ = PrefetchWeights().run(sized)
    marks = [n.meta.get(TIERED) for n in result.graph.find_nodes(op="get_attr")]
    assert marks == [BRANCH, BRANCH, None] and result.meta[TIERED].places == decided.places
    inlined, _ = PrefetchWeights().run(routed(branch(LARGE, TIED), outside=TIED, budget=decided))
    assert kinds(inlined, "branch0") == [BRANCH, None]
    assert inlined.meta[TIERED].tiered == decided.tiered - TIED.nbytes
