"""`experts`: each row's weighted sum over the experts it names, by the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import plait
from plait.kernels.routing_experts import ACTIVATIONS

T, K, N, M, E = 6, 8, 12, 4, 5
INDEX = torch.tensor([[0, 2], [1, 1], [4, 5], [-1, 3], [7, -2], [3, 0]])  # 5, 7, -1, -2: none


def arguments(gated: bool, biased: bool, transposed: bool, dtype: torch.dtype) -> list[Any]:
    wide = 2 * N if gated else N
    first, second = torch.randn(E, wide, K, dtype=dtype), torch.randn(E, M, N, dtype=dtype)
    biases: list[Any] = [None, None]
    if biased:
        biases = [torch.randn(E, wide, dtype=dtype), torch.randn(E, M, dtype=dtype)]
    if transposed:
        first, second = (w.transpose(1, 2).contiguous() for w in (first, second))
    x, weight = torch.randn(T, K, dtype=dtype), torch.rand(T, 2, dtype=dtype)
    return [x, INDEX, weight, first, second, *biases]


def defined(values: list[Any], activation: str, transposed: bool) -> torch.Tensor:
    """The definition, slot by slot."""
    x, index, weight, first, second, *biases = values
    rows = []
    for row, numbers, factors in zip(x, index, weight, strict=True):
        total = row.new_zeros(M)
        for number, factor in zip(numbers.tolist(), factors, strict=True):
            if not 0 <= number < E:
                continue
            inner, outer = first[number], second[number]
            inner = row @ inner if transposed else inner @ row
            inner = inner if biases[0] is None else inner + biases[0][number]
            if inner.numel() == 2 * N:
                inner = ACTIVATIONS[activation](inner[:N]) * inner[N:]
            else:
                inner = ACTIVATIONS[activation](inner)
            out = inner @ outer if transposed else outer @ inner
            total = total + factor * (out if biases[1] is None else out + biases[1][number])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_each_row_is_what_its_experts_make_of_it(activation: str, gated: bool) -> None:
    for biased in (False, True):
        for transposed in (False, True):
            values = arguments(gated, biased, transposed, torch.float64)
            have = plait.experts(*values, activation=activation, transposed=transposed)
            torch.testing.assert_close(have, defined(values, activation, transposed))


@pytest.mark.parametrize("gated", [False, True])
def test_it_keeps_torchs_rules(gated: bool) -> None:
    values = arguments(gated, True, False, torch.float32)
    leaves = [v if v is INDEX else v.requires_grad_() for v in values]
    torch.library.opcheck(torch.ops.plait.experts.default, leaves)


def test_gradients_are_those_of_the_definition() -> None:
    values = arguments(True, True, True, torch.float64)
    leaves = [v.requires_grad_() for v in values if v is not INDEX]
    have = torch.autograd.grad(plait.experts(*values, transposed=True).sum(), leaves)
    want = torch.autograd.grad(defined(values, "silu", True).sum(), leaves)
    torch.testing.assert_close(have, want)


def test_a_slot_of_no_expert_adds_nothing_whatever_its_weight() -> None:
    values = arguments(True, True, False, torch.float64)
    values[2] = torch.where((INDEX >= 0) & (INDEX < E), values[2], torch.nan)
    torch.testing.assert_close(plait.experts(*values), defined(values, "silu", False))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(K, E)
        _, _, _, *weights = arguments(True, True, False, torch.float32)
        self.weights = nn.ParameterList(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.score(x).softmax(-1).topk(2)
        return torch.ops.plait.experts(x, index, weight, *self.weights)


def test_compiled_it_is_routed_products() -> None:
    model, x = Layer().eval(), torch.randn(T, K)
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x[:3]), model(x[:3]))
    steps = compiled.plan.steps
    assert all(hasattr(step, "kernel") for step in steps), "no operators of a library"
    assert sum(step.name.startswith("routed_linear") for step in steps) == 2


def test_dynamo_sees_one_operator() -> None:
    model, x = Layer().eval(), torch.randn(T, K)
    compiled: Any = torch.compile(model, backend="plait", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (0, torch.zeros(T, K + 1), "do not fit"),
        (0, torch.zeros(T), "rows"),
        (1, INDEX[:, :0], "k > 0"),
        (1, INDEX.int(), "int64"),
        (2, torch.zeros(T, 3), "weight"),
        (3, torch.zeros(E, 3 * N, K), "give 36 values; the second take 12"),
        (4, torch.zeros(E + 1, M, N), "experts' weights"),
        (7, "swish", "activation 'swish' is none of"),
    ],
)
def test_what_does_not_fit_is_an_error(place: int, value: Any, says: str) -> None:
    values = [*arguments(True, True, False, torch.float32), "silu"]
    values[place] = value
    with pytest.raises(ValueError, match=says):
        plait.experts(*values)
