"""Attributes that a program has read: changes are seen at the next call, others cost nothing."""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


class Config:
    def __init__(self) -> None:
        self.scale, self.inner, self.unread = 2.0, SimpleNamespace(shift=1), 0


class Mode(enum.Enum):
    ADD = 1
    TAKE = 2


class Part(nn.Module):
    power = 1

    def __init__(self) -> None:
        super().__init__()
        self.act, self.sizes, self.later = nn.LeakyReLU(0.5), (1, -1), None
        self.calls, self.mode = 0, Mode.ADD

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x).view(self.sizes) ** self.power
        y = y + 1 if self.mode is Mode.ADD else y - 1
        return y * self.later if self.later is not None else y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.part = Config(), Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * self.config.scale + self.config.inner.shift


def replaced(model: Net) -> None:
    model.config = Config()
    model.config.scale = 7.0


CHANGES: list[Callable[[Net], Any]] = [
    lambda m: setattr(m.config, "scale", 3.0),
    lambda m: setattr(m.config.inner, "shift", -4),
    lambda m: setattr(m.part, "sizes", (-1, 2)),
    lambda m: setattr(m.part, "power", 3),
    lambda m: setattr(m.part, "later", 5),
    lambda m: setattr(m.part.act, "negative_slope", 0.25),
    lambda m: setattr(m.part, "mode", Mode.TAKE),
    replaced,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_attributes_are_seen(change: Callable[[Net], Any]) -> None:
    model, x = Net().eval(), torch.tensor([-2.0, 3.0, 0.5, -1.0])
    compiled = plait.compile(model, tune="off")
    torch.testing.assert_close(compiled(x), model(x))
    change(model)
    torch.testing.assert_close(compiled(x), model(x))
    first = compiled.programs
    compiled(x)
    assert compiled.programs == first and len(first) == 1


def test_what_no_program_reads_may_change() -> None:
    model, x = Net().eval(), torch.randn(4)
    compiled = plait.compile(model, tune="off")
    compiled(x)
    first = compiled.programs
    for k in range(12):
        model.part.calls, model.config.unread = k, str(k)  # type: ignore[assignment]
        model.extra = k  # type: ignore[assignment]
        torch.testing.assert_close(compiled(x), model(x))
    model.train()
    model.eval()
    compiled(x)
    assert compiled.programs == first
    assert "__getattribute__" not in vars(nn.Module) and "__getattribute__" not in vars(Config)


def test_changes_before_the_first_call_cost_nothing() -> None:
    model, x = Net().eval(), torch.randn(4)
    compiled = plait.compile(model, tune="off")
    model.config.scale, model.part.power = 5.0, 2
    torch.testing.assert_close(compiled(x), model(x))
    first = compiled.programs
    compiled(x)
    assert compiled.programs == first


def test_the_router_of_a_compiled_model_may_change() -> None:
    torch.manual_seed(0)
    branches = [nn.Linear(4, 4) for _ in range(3)]
    model = plait.Router(branches, nn.Linear(4, 3), top_k=1).eval()
    compiled, x = plait.compile(model, tune="off"), torch.randn(5, 4)
    torch.testing.assert_close(compiled(x), model(x))
    model.top_k = 2
    torch.testing.assert_close(compiled(x), model(x))


def test_attributes_that_a_side_of_a_cond_reads() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.LeakyReLU(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() < 0, self.act, lambda x: x * 2, (x,))

    model, x = Chosen().eval(), torch.tensor([-3.0, 1.0])
    compiled = plait.compile(model, tune="off")
    assert compiled(x).tolist() == [-1.5, 1.0] and len(compiled.programs) == 1
    model.act.negative_slope = 0.25
    assert compiled(x).tolist() == [-0.75, 1.0] and len(compiled.programs) == 1


def test_what_changes_at_every_call_ends_with_the_original() -> None:
    model, x = Net().eval(), torch.randn(4)
    compiled = plait.compile(model, tune="off")
    with pytest.warns(UserWarning, match="PLT-CAP-026"):
        for k in range(1, 12):
            model.config.scale = float(k)
            torch.testing.assert_close(compiled(x), model(x))
    assert [r.id for r in compiled.remarks].count("PLT-CAP-026") == 1
    assert not compiled.programs
