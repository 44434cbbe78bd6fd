"""torch.compile(model, backend="plait")."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from plait.compiler import backend
from plait.compiler.specialise import Specialiser


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    if "plait" not in torch._dynamo.list_backends(exclude_tags=()):
        backend.register()
    yield
    torch._dynamo.reset()


compile = functools.partial(torch.compile, backend="plait", options={"tune": "off"})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).eval()


def test_model_without_gradients_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = Specialiser._compile

    def counted(self: Any, captured: Any, *others: Any) -> Any:
        calls.append(len(captured.constants()))
        return original(self, captured, *others)

    monkeypatch.setattr(Specialiser, "_compile", counted)
    model = net()
    compiled = compile(model)
    with torch.no_grad():
        for n in (2, 3, 5, 7, 1):
            x = torch.randn(n, 3, 8, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls and all(count >= 8 for count in calls), "weights are constants of the program"
    assert len(calls) <= 3


def test_gradients_flow() -> None:
    model = net()
    x = torch.randn(2, 3, 8, 8)
    compile(model)(x).sum().backward()
    got = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(got, model[0].weight.grad)


def test_changed_weights_are_seen() -> None:
    model = net()
    compiled = compile(model)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        compiled(x)
        model[4].weight.mul_(2)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        model[4].weight = nn.Parameter(torch.randn(5, 144))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_dynamic_sizes_and_containers() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": x @ y + x.shape[0], "b": (x * 2).relu()}

    compiled = compile(function, dynamic=True)
    for n in (3, 4, 7):
        x, y = torch.randn(n, 4), torch.randn(4, n)
        torch.testing.assert_close(compiled(x, y), function(x, y))


def test_a_piece_that_is_given_a_number_runs_as_it_is_and_says_so() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        count = 2 * x.shape[0] + 1
        x = x.relu()
        torch._dynamo.graph_break()
        return torch.ones(count) * x.sum()

    compiled = compile(function, dynamic=True)
    with pytest.warns(UserWarning, match="PLT-CAP-011"):
        for n in (3, 5, 4):
            torch.testing.assert_close(compiled(torch.ones(n)), function(torch.ones(n)))


def test_graph_break_runs_in_pieces() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        if x.sum() > 0:
            return x + 1
        return x - 1

    compiled = compile(function)
    for x in (torch.ones(3), -torch.ones(3)):
        torch.testing.assert_close(compiled(x), function(x))


def test_a_number_from_data_is_no_tensors_size() -> None:
    def function(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (x * 2)[:, : mask.sum().item()] + 1

    compiled = compile(function)
    x = torch.randn(3, 4)
    for count in (2, 3, 1, 0):
        mask = torch.arange(4) < count
        torch.testing.assert_close(compiled(x, mask), function(x, mask))
