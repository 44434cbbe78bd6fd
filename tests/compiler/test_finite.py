"""Branches that ask whether numbers are finite are part of one program."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.compiler.capture import finite


class Clamps(nn.Module):
    """As encoder layers of BART and DETR do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            limit = torch.finfo(x.dtype).max - 1000
            x = torch.clamp(x, min=-limit, max=limit)
        return x * 1.5


class Wraps(nn.Module):
    """As transformers' layers, whose forwards are wrapped when their classes are made."""

    def __init_subclass__(cls) -> None:
        forward = cls.forward

        @functools.wraps(forward)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        cls.forward = wrapper


class Wrapped(Wraps):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """A text of several lines, which are indented:

        Args:
            x: what is clamped.
        """
        x = self.linear(x)
        if not torch.isfinite(x).all():
            x = torch.clamp(x, min=-3.0, max=3.0)
        return x * 1.5


class Replaces(nn.Module):
    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        x = x * scale
        if torch.isnan(x).any():
            x = torch.nan_to_num(x, nan=7.0)
        return x + 1


class Counts(nn.Module):
    """Its branch does more than compute."""

    def __init__(self) -> None:
        super().__init__()
        self.overflows = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.isinf(x).any():
            x = torch.clamp(x, max=9.0)
            self.overflows += 1
        return x


class Leaves(nn.Module):
    """What its branch sets beside the tensor is read afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        limit = 3.0
        if torch.isinf(x).any():
            limit = 5.0
            x = torch.clamp(x, max=limit)
        return x + limit


class Otherwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.isinf(x).any():
            x = torch.clamp(x, max=1.0)
        else:
            x = x * 2
        return x


class Calls(nn.Module):
    """Its branch calls what may do anything."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.isinf(x).any():
            x = self.told(x)
        return x

    def told(self, x: Tensor) -> Tensor:
        """Does more than compute."""
        self.overflows = True
        return x.clamp(max=9.0)


class Keeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.isinf(x).any():
            x = self.last = torch.clamp(x, max=1.0)
        return x


class Inherits(Replaces):
    """Its code has a cell, for ``super``."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if torch.isinf(x).any():
            x = torch.clamp(x, max=1.0)
        return x


class OfAnother(nn.Module):
    """What is called torch in its file is something else."""

    forward = types.FunctionType(Replaces.forward.__code__, {"torch": types.SimpleNamespace()})


def _around(function: Any) -> Any:
    def wrapper(self: Any, x: Tensor) -> Tensor:
        if torch.isinf(x).any():
            x = torch.clamp(x, max=1.0)
        return function(self, x)

    return functools.update_wrapper(wrapper, functools.partial(function))


class Around(nn.Module):
    """What it says it is made around has no code."""

    forward = _around(Replaces.forward)


def missed(compiled: Any) -> list[str]:
    return [r.id for r in compiled.remarks if r.pass_name == "capture" and r.kind == "missed"]


@pytest.mark.parametrize("kind", [Clamps, Wrapped])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_layer_that_clamps_what_overflowed_is_one_program(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = kind().to(dtype).eval()
    compiled = plait.compile(model)
    ends = torch.tensor([[6e4, 1, 1, 1], [-65504, 0, 65500, 1]])
    for x in (torch.randn(2, 4), ends, ends * float("inf"), ends * float("nan"), ends[:1]):
        with torch.no_grad():
            want, have = model(x.to(dtype)), compiled(x.to(dtype))
        torch.testing.assert_close(have, want, equal_nan=True)
    assert not missed(compiled)
    assert "forward" not in vars(model)


def test_answers_differ_between_calls() -> None:
    model = Replaces().eval()
    compiled = plait.compile(model)
    for x in (torch.ones(3), torch.tensor([1, float("nan"), 3]), torch.ones(3)):
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(compiled(x, scale=3.0), model(x, scale=3.0))
    assert not missed(compiled)


@pytest.mark.parametrize(
    "kind", [Counts, Leaves, Otherwise, Calls, Keeps, Inherits, OfAnother, Around]
)
def test_a_branch_that_does_more_is_left_as_it_is(kind: type[nn.Module]) -> None:
    with finite.chosen([model := kind()]):
        assert "forward" not in vars(model)


def test_a_forward_that_somebody_put_there_stays() -> None:
    model = Clamps()
    model.forward = own = lambda x: x
    with finite.chosen([model]):
        assert model.forward is own
    assert model.forward is own


def test_a_file_that_was_changed_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = inspect.getsource(Otherwise.forward).partition("        else")[0] + "        return x\n"

    class Older(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.isinf(x).any():
                x = torch.clamp(x, max=2.0)
            return x

    for limit in (2.0, 1.0):
        finite._KNOWN.clear()
        monkeypatch.setattr(inspect, "getsource", lambda _, n=limit: text.replace("1.0", str(n)))
        with finite.chosen([model := Older()]):
            assert ("forward" in vars(model)) == (limit == 2.0)


def _doubled(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        return forward(self, x) * 2

    return wrapper


def test_a_forward_below_a_decorator() -> None:
    class Decorated(nn.Module):
        @_doubled
        def forward(self, x: Tensor) -> Tensor:
            if torch.isinf(x).any():
                x = torch.clamp(x, max=5.0)
            return x

    compiled = plait.compile(Decorated().eval())
    for x in (torch.ones(3), torch.tensor([1, float("inf"), 9.0])):
        assert torch.equal(compiled(x), Decorated()(x))
    assert not missed(compiled)


def test_a_branch_that_changes_the_shape_is_not_a_choice() -> None:
    class Grows(nn.Module):
        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            if torch.isnan(x).any():
                x = torch.where(kept, x, 0.0)
            return x

    compiled = plait.compile(Grows().eval())
    kept = torch.tensor([[True, False], [False, True]])
    for x in (torch.ones(2), torch.tensor([1, float("nan")])):
        want = Grows()(x, kept)
        torch.testing.assert_close(compiled(x, kept), want, equal_nan=True)
