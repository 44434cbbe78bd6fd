"""Constants that only one side of a `torch.cond` reads become that side's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

from plait.passes.base import Counter, counting
from plait.passes.ir import COND
from plait.passes.normalize import Normalize
from plait.passes.sides import own_operands
from plait.passes.verifier import verify

from .graphs import captured, normalized, targets

aten = torch.ops.aten


class Sides(nn.Module):
    """A `torch.cond` of the sides that ``make`` makes of this module."""

    def __init__(self, make: Callable[[Sides], tuple[Any, Any]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.make(self)
        return torch.cond(x.sum() > 0, first, second, (x,))


MODELS: dict[str, Callable[[Sides], tuple[Any, Any]]] = {
    "apart": lambda m: (lambda x: m.a(x), lambda x: m.b(x)),
    "both": lambda m: (lambda x: m.c(m.a(x)), lambda x: m.c(m.b(x))),
    "none": lambda m: (lambda x: x + 1, lambda x: m.b(x)),
    "norm": lambda m: (lambda x: m.norm(m.a(x)), lambda x: m.b(x)),
    "nested": lambda m: (
        lambda x: torch.cond(x.amax() > 1, lambda x: m.a(x), lambda x: m.b(x), (x,)),
        lambda x: m.c(x),
    ),
    "no input": lambda m: (lambda x: m.a.weight * 2, lambda x: m.b.weight.clone()),
}

AB = [["a_bias", "a_weight"], ["b_bias", "b_weight"]]


def conds(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="call_function", target=COND))


def sides(module: fx.GraphModule) -> list[fx.GraphModule]:
    (node,) = conds(module)
    args: Any = node.args
    return [getattr(module, str(graph.target)) for graph in args[1:3]]


def held(module: fx.GraphModule) -> list[str]:
    """The constants of a graph."""
    return sorted(str(n.target) for n in module.graph.find_nodes(op="get_attr"))


@pytest.mark.parametrize("kind", MODELS)
def test_any_input_gives_the_same(kind: str) -> None:
    x = torch.rand(4, 4)
    model = Sides(MODELS[kind]).eval()
    graph_module = captured(model, x)
    result = normalized(graph_module)
    with torch.no_grad():
        for value in (x, -x, x + 2, torch.full((4, 4), torch.nan)):
            torch.testing.assert_close(result(value), model(value), equal_nan=True)
    assert Normalize().run(result).graph_module is result


def test_each_side_holds_what_it_reads() -> None:
    graph_module = captured(Sides(MODELS["apart"]).eval(), torch.rand(4, 4))
    result, remarks = Normalize().run(graph_module)
    verify(result, "full")
    (node,) = conds(result)
    assert len(node.args[3]) == 1  # type: ignore[arg-type]
    assert [held(side) for side in sides(result)] == AB
    assert len(conds(graph_module)[0].args[3]) == 5  # type: ignore[arg-type]
    (remark,) = (r for r in remarks if r.id == "PLT-NRM-010")
    assert len(remark.nodes) == 4


def test_what_both_sides_read_stays_outside() -> None:
    result = normalized(captured(Sides(MODELS["both"]).eval(), torch.rand(4, 4)))
    (node,) = conds(result)
    outside = [str(a.target) for a in node.args[3] if a.op == "get_attr"]  # type: ignore[union-attr]
    assert sorted(outside) == ["c.bias", "c.weight"]
    assert own_operands(result, node) == []


def test_a_side_within_a_side_holds_its_own() -> None:
    result = normalized(captured(Sides(MODELS["nested"]).eval(), torch.rand(4, 4)))
    first, second = sides(result)
    assert [held(side) for side in sides(first)] == AB
    assert held(second) == ["c_bias", "c_weight"]


def test_batch_norms_of_a_side_are_folded_into_its_weights() -> None:
    kept = []

    def keep(made: Tensor, source: Tensor) -> Tensor:
        kept.append(made.shape)
        return made

    graph_module = captured(Sides(MODELS["norm"]).eval(), torch.rand(4, 4))
    graph_module.meta["keep"] = keep
    result = Normalize().run(graph_module).graph_module
    assert targets(sides(result)[0]) == [aten.linear.default] and kept == [(4, 4)]


def test_a_graph_that_two_conds_run_takes_what_it_took() -> None:
    graph_module = captured(Sides(MODELS["apart"]).eval(), torch.rand(4, 4))
    (node,) = conds(graph_module)
    (output,) = graph_module.graph.find_nodes(op="output")
    with graph_module.graph.inserting_after(node):
        again = graph_module.graph.call_function(COND, node.args)
    again.meta = dict(node.meta)
    graph_module.recompile()
    result = Normalize().run(graph_module).graph_module
    assert all(len(n.args[3]) == 5 for n in conds(result))  # type: ignore[arg-type]
    assert output in graph_module.graph.nodes


def test_a_bisection_reaches_it() -> None:
    graph_module = captured(Sides(MODELS["apart"]).eval(), torch.rand(4, 4))
    with counting(Counter(limit=0)) as counter:
        result = Normalize().run(graph_module).graph_module
    assert counter.asked and len(conds(result)[0].args[3]) == 5  # type: ignore[arg-type]
