"""divide-experts: the same slots, whichever devices hold the experts; and what stays together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plait.compiler.capture.export import capture
from plait.kernels.routing import route, routed_linear
from plait.kernels.routing_rows import take
from plait.passes.annotations import annotation
from plait.passes.divide_experts import Divided, Shares, divide_experts
from plait.passes.manager import PassManager

WIDTH, INNER = 6, 4
Between = Callable[[Tensor], Tensor]


def whole(*shape: int) -> Tensor:
    """Small whole numbers, whose sums are exact in any order."""
    return torch.randint(-4, 5, shape).float()


class Layer(nn.Module):
    """Experts of two products; ``tail`` is what becomes of the slots."""

    def __init__(
        self, experts: int, share: int, tail: str = "sum", between: Between = torch.relu
    ) -> None:
        super().__init__()
        self.experts, self.share, self.tail, self.between = experts, share, tail, between
        self.up = nn.Parameter(whole(experts, INNER, WIDTH))
        self.down = nn.Parameter(whole(experts, WIDTH, INNER))
        self.bias = nn.Parameter(whole(experts, WIDTH))

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        offsets, order = route(index, self.experts)
        y = routed_linear(x, offsets, order, self.up, None, False, self.share, False)
        y = self.between(y)
        y = routed_linear(y, offsets, order, self.down, self.bias, False, 0, True)
        if self.tail == "slots":
            return y
        y = y.view(x.shape[0], self.share, WIDTH) * gates.unsqueeze(-1)
        return y if self.tail == "weighed" else y.sum(1)


def graph_of(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    with torch.no_grad():
        return PassManager("normalize").run(capture(model, inputs, {}).graph_module).graph_module


def divide(module: fx.GraphModule, shares: Shares | None) -> Divided:
    return divide_experts(module, lambda node: ("layer", shares))


def run(module: fx.GraphModule, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return fx.Interpreter(module).run(*inputs)[0]


def inputs_of(
    tokens: int, share: int, experts: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.randint(-1, experts + 1, (tokens, share), generator=generator)  # some are nobody
    return whole(tokens, WIDTH), index, whole(tokens, share)


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_any_shares_make_the_same_slots(data: st.DataObject) -> None:
    """Neighbours and others, with copies, on devices that hold nothing; also no expert at all."""
    experts, share = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    inputs = inputs_of(data.draw(st.integers(1, 7)), share, experts, generator)
    holders = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
    held = [data.draw(holders) for _ in range(experts)]
    shares = {f"d{d}": [e for e in range(experts) if d in held[e]] for d in range(3)}
    tail = data.draw(st.sampled_from(["slots", "weighed", "sum"]))
    module = graph_of(Layer(experts, share, tail), *inputs)
    parts = divide(module, shares)
    assert parts.routers == ["layer"] and not parts.remarks
    for index in (inputs[1], torch.full_like(inputs[1], -(2**63)), inputs[1] * 0 + 2**63 - 1):
        given_ = (inputs[0], index, inputs[2])
        assert torch.equal(run(module, *given_), run(parts.module, *given_))


def products(module: fx.GraphModule) -> list[fx.Node]:
    wanted = "plait.routed_linear.default"
    return [n for n in module.graph.nodes if str(n.target) == wanted]


def test_each_device_has_its_experts_and_adds_up_its_slots() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = inputs_of(5, 2, 4, generator)
    module = graph_of(Layer(4, 2), *inputs)
    parts = divide(module, {"a": [0, 2, 3], "b": [1], "none": []})
    found = products(parts.module)
    held = [(annotation(n).device, annotation(n).load) for n in found]
    assert sorted(held) == [("a", 0.75), ("a", 0.75), ("b", 0.25), ("b", 0.25)]
    for node in found:
        weight: Any = node.args[3]
        assert weight.meta["val"].shape[0] == {"a": 3, "b": 1}[annotation(node).device]
    (output,) = parts.module.graph.find_nodes(op="output")
    (total,) = output.all_input_nodes
    assert str(total.target) == "aten.add.Tensor" and total.meta["val"].shape == (5, WIDTH)


def test_weights_that_are_not_here_become_rows_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = inputs_of(5, 2, 4, generator)

    class Twice(Layer):
        def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
            return super().forward(x, index, gates) + super().forward(-x, index, gates)

    module = graph_of(Twice(4, 2), *inputs)
    for name, weight in list(module.named_parameters()) + list(module.named_buffers()):
        if weight.dim() > 1 and weight.shape[0] == 4:
            setattr(module, name, torch.empty(weight.shape, device="meta"))
    parts = divide(module, {"a": [0, 3], "b": [1, 2]})
    assert sorted((p.target, p.rows) for p in parts.pieces.values()) == [
        (name, rows) for name in ("bias", "down", "up") for rows in ((0, 3), (1, 2))
    ]  # once for both calls
    held = {str(n.target) for n in parts.module.graph.find_nodes(op="get_attr")}
    assert held.isdisjoint({"up", "down", "bias"})


def test_others_slots_stay_zeros_whatever_they_are_weighed_with() -> None:
    index = torch.tensor([[0, 1], [1, 1], [0, 0], [0, 1]])
    inputs = torch.randn(4, WIDTH), index, torch.ones(4, 2)
    inputs[2][0, 0], inputs[2][1, 1], inputs[2][3, 1] = torch.inf, torch.nan, torch.inf
    module = graph_of(Layer(2, 2), *inputs)
    parts = divide(module, {"a": [0], "b": [1]})
    wanted = run(module, *inputs)
    assert wanted.isinf().any() and wanted.isnan().any()
    torch.testing.assert_close(run(parts.module, *inputs), wanted, equal_nan=True)


def test_16_bits_are_added_up_as_ever() -> None:
    generator = torch.Generator().manual_seed(0)
    x, index, gates = inputs_of(5, 2, 4, generator)
    inputs = x.bfloat16(), index, gates.bfloat16()
    module = graph_of(Layer(4, 2).bfloat16(), *inputs)
    parts = divide(module, {"a": [0, 1], "b": [2, 3]})
    assert torch.equal(run(module, *inputs), run(parts.module, *inputs))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda y: y - y.mean(0, keepdim=True), "may mix rows"),
        (lambda y: y.cumsum(0), "may mix rows"),
        (lambda y: y.flip(0), "may mix rows"),
        (lambda y: torch.softmax(y, 0), "may mix rows"),
        (lambda y: y + torch.arange(10.0)[:, None], "may mix rows"),
        (lambda y: y.reshape(-1, 2 * INNER).relu().reshape(-1, INNER), "may mix rows"),
        (lambda y: y.T.relu().T, "may mix rows"),
        (lambda y: torch.softmax(y, -2), "may mix rows"),
        (lambda y: y - y.sum(-2, keepdim=True), "may mix rows"),
        (lambda y: y - y.sum(), "may mix rows"),
        (lambda y: nn.functional.layer_norm(y, (10, INNER)), "may mix rows"),
        (lambda y: nn.functional.linear(torch.ones(10, INNER), y)[:, :INNER], "may mix rows"),
        (lambda y: nn.functional.linear(y[:, 0], torch.ones(10, 10))[:, None] * y, "may mix rows"),
        (lambda y: torch.cat([y, torch.arange(10.0)[:, None]], 1)[:, 1:], "may mix rows"),
        (lambda y: take(y, torch.arange(9, -1, -1), 1), "may mix rows"),
    ],
)
def test_rows_that_are_mixed_stay_together(between: Between, reason: str) -> None:
    inputs = whole(5, WIDTH), torch.randint(0, 4, (5, 2)), whole(5, 2)
    module = graph_of(Layer(4, 2, between=between), *inputs)
    parts = divide(module, {"a": [0, 1], "b": [2, 3]})
    (remark,) = parts.remarks
    assert remark.id == "PLT-DST-015" and reason in remark.reason and not parts.routers
    assert torch.equal(run(module, *inputs), run(parts.module, *inputs))


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y + y.select(1, 0),
        lambda y: nn.functional.layer_norm(y, (INNER,), y.select(1, 0)),
    ],
)
def test_a_number_of_each_row_is_no_row(between: Between) -> None:
    """There are as many slots as numbers in a row."""
    inputs = whole(2, WIDTH), torch.randint(0, 4, (2, 2)), whole(2, 2)
    module = graph_of(Layer(4, 2, between=between), *inputs)
    parts = divide(module, {"a": [0, 1], "b": [2, 3]})
    assert "may mix rows" in parts.remarks[0].reason
    assert torch.equal(run(module, *inputs), run(parts.module, *inputs))


@pytest.mark.parametrize(
    "between",
    [
        lambda y: torch.softmax(y, -1) * y.sum(1, keepdim=True) + 1,
        lambda y: torch.cat([y[:, 2:], y[:, :2].sigmoid()], 1),
        lambda y: torch.nn.functional.layer_norm(y, (INNER,)) + torch.arange(float(INNER)),
        lambda y: y.view(-1, 2, 2).relu().view(-1, INNER),
        lambda y: y + torch.ones(1, INNER),
        lambda y: nn.functional.glu(torch.cat([y, y], 1)),
        lambda y: nn.functional.linear(y, torch.ones(INNER, INNER)).unsqueeze(-1).squeeze(-1),
    ],
)
def test_rows_that_are_treated_alone_are_divided(between: Between) -> None:
    inputs = whole(5, WIDTH), torch.randint(0, 4, (5, 2)), whole(5, 2)
    module = graph_of(Layer(4, 2, "slots", between), *inputs)
    parts = divide(module, {"a": [0, 3], "b": [1, 2]})
    assert parts.routers and torch.equal(run(module, *inputs), run(parts.module, *inputs))


class Leaks(Layer):
    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Any:
        offsets, order = route(index, 4)
        y = routed_linear(x, offsets, order, self.up, None, False, 2, False)
        z = routed_linear(y, offsets, order, self.down, None, False, 0, True)
        return z, y.relu()


class Computes(Layer):
    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        offsets, order = route(index, 4)
        weight = self.up.transpose(1, 2) * gates.sum()
        return routed_linear(x, offsets, order, weight, None, True, 2, True)


class Reorders(Layer):
    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        y = routed_linear(x, *route(index, 4), self.up, None, False, 2, False)
        return routed_linear(y, *route(3 - index, 4), self.down, None, False, 0, True)


class Counts(Layer):
    """There are as many slots as there are bounds of experts."""

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        offsets, order = route(index, 9)
        y = routed_linear(x, offsets, order, self.up, None, False, 2, False)
        y = y * offsets.view(-1, 1)
        return routed_linear(y, offsets, order, self.down, None, False, 0, True)


class LooksUp(Layer):
    """A product that looks up cells where rows are, or rows where cells are."""

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        offsets, order = route(index, 4)
        if self.tail == "rows":
            x = x.repeat_interleave(2, 0)
            y = routed_linear(x, offsets, order, self.up, None, False, 0, False)
            return routed_linear(y, offsets, order, self.down, None, False, 0, True)
        y = routed_linear(x, offsets, order, self.up, None, False, 2, False)
        return routed_linear(y, offsets, order, self.down, None, False, 1, True)


class Adds(Layer):
    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        offsets, order = route(index, 4)
        y = routed_linear(x, offsets, order, self.up, None, False, 2, False)
        square = self.up[:, :, :INNER]
        return y + routed_linear(y, offsets, order, square, None, False, 0, True)


class Folds(Layer):
    """Two rows become one; half of the slots have experts, so there are enough."""

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        offsets, order = route(torch.where(torch.arange(2) > 0, index, -1), 4)
        y = routed_linear(x, offsets, order, self.up[:, :3], None, False, 2, False)
        y = y.view(5, WIDTH) if self.tail == "sum" else nn.functional.glu(torch.cat([y, y], 1), 0)
        return routed_linear(y, offsets, order, self.up, None, False, 0, True)


class Fewer(Layer):
    """The last expert has no matrix, and makes zeros."""

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        offsets, order = route(index, 4)
        return routed_linear(x, offsets, order, self.up[:3], None, False, 2, True)


class Sorts(nn.Module):
    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Any:
        return route(index, 4)[0] + 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Leaks(4, 2), "is read outside of the experts"),
        (Computes(4, 2), "is computed"),
        (Reorders(4, 2), "the order of another route"),
        (Counts(9, 2), "may mix rows"),
        (LooksUp(4, 2, "rows"), "may mix rows"),
        (LooksUp(4, 2, "cells"), "may mix rows"),
        (Adds(4, 2), "reads slots and experts' rows"),
        (Folds(4, 2), "may mix rows"),
        (Folds(4, 2, "glu"), "may mix rows"),
        (Fewer(4, 2), "no row for each expert"),
        (Sorts(), "no routed product"),
    ],
)
def test_what_cannot_be_told_apart_stays_together(model: nn.Module, reason: str) -> None:
    inputs = whole(5, WIDTH), torch.randint(0, 4, (5, 2)), whole(5, 2)
    module = graph_of(model, *inputs)
    parts = divide(module, {"a": [0, 1], "b": [2, 3]})
    assert reason in parts.remarks[0].reason and parts.remarks[0].hint
    assert torch.equal(run(module, *inputs), run(parts.module, *inputs))


def test_an_expert_without_a_device_and_layers_without_shares() -> None:
    inputs = whole(5, WIDTH), torch.randint(0, 4, (5, 2)), whole(5, 2)
    module = graph_of(Layer(4, 2), *inputs)
    assert "expert 2 is on no device" in divide(module, {"a": [0, 1], "b": [3]}).remarks[0].reason
    alone = divide(module, None)
    assert not alone.remarks and not alone.routers and len(products(alone.module)) == 2


class Stacked(nn.Module):
    """Each expert's weight is a parameter of its own, as in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ParameterList(nn.Parameter(whole(3, WIDTH)) for _ in range(4))

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        offsets, order = route(index, 4)
        weight = torch.stack(list(self.each))
        turned = weight.transpose(1, 2)
        return routed_linear(x, offsets, order, turned, None, True, 2, True)


def test_weights_of_modules_of_their_own_are_divided() -> None:
    inputs = whole(5, WIDTH), torch.randint(0, 4, (5, 2)), whole(5, 2)
    module = graph_of(Stacked(), *inputs)
    parts = divide(module, {"a": [3], "b": [0, 1, 2]})
    assert parts.routers and torch.equal(run(module, *inputs), run(parts.module, *inputs))
