"""Values among the inputs that are errors: indices out of range, division by zero, assertions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plait

compile = functools.partial(plait.compile, tune="off")
pytestmark = pytest.mark.filterwarnings("ignore")


def _cross_entropy(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, i)


@pytest.mark.parametrize("wrong", [4, -5])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, i: F.embedding(i, x) + 1,
        lambda x, i: F.embedding(i.view(1, 2).int(), x) + 1,
        lambda x, i: F.embedding(i * 1 + 0, x) + 1,
        lambda x, i: x[i] + 1,
        lambda x, i: x[:, i] + 1,
        lambda x, i: x[i * 2 - i] + 1,
        lambda x, i: x.index_select(0, i) + 1,
        lambda x, i: x.gather(0, i[:, None]) + 1,
        lambda x, i: F.one_hot(i, 4) + 1,
        lambda x, i: _cross_entropy(x[:2], i),
        lambda x, i: x.scatter(0, i[:, None], 1.0),
    ],
)
def test_indices_out_of_range_are_errors(function: Callable[..., Any], wrong: int) -> None:
    compiled, x = compile(function), torch.randn(4, 4)
    good = torch.tensor([1, 3])
    torch.testing.assert_close(compiled(x, good), function(x, good))
    bad = torch.tensor([1, wrong])
    with pytest.raises((IndexError, RuntimeError)):
        function(x, bad)
    with pytest.raises((IndexError, RuntimeError)):
        compiled(x, bad)
    torch.testing.assert_close(compiled(x, good), function(x, good))


def test_indices_that_eager_wraps_are_wrapped() -> None:
    compiled, x = compile(lambda x, i: torch.take_along_dim(x, i, 1) + 1), torch.randn(4, 4)
    for i in ([[1, 3]], [[1, 4]], [[-5, 0]]):
        index = torch.tensor(i)
        torch.testing.assert_close(compiled(x, index), torch.take_along_dim(x, index, 1) + 1)


def test_indices_known_to_be_in_range_stay_kernels() -> None:
    def function(x: torch.Tensor) -> Any:
        best = x.topk(2, -1)[1]
        rows = torch.arange(x.shape[0])
        return x.gather(-1, best), x[rows], x[x.argmax(0)], x[:, torch.tensor([0, -1])]

    compiled = compile(function)
    for n in (4, 5, 6):
        x = torch.randn(n, 7)
        torch.testing.assert_close(compiled(x), function(x))
    calls = [s.target for s in compiled.plan.steps if hasattr(s, "target")]
    assert not any("gather" in c or "index" in c for c in calls)


def test_indices_into_a_dimension_that_varies() -> None:
    compiled = compile(lambda x, i: x[i] + 1)
    for n in (4, 6, 9):
        compiled(torch.randn(n), torch.tensor([n - 1, -n]))
        with pytest.raises(IndexError, match="out of bounds"):
            compiled(torch.randn(n), torch.tensor([n, 0]))


def test_indices_into_nothing() -> None:
    compiled = compile(lambda x, i: x[i] + 1)
    with pytest.raises(IndexError):
        compiled(torch.randn(0), torch.tensor([0, 0]))


def test_a_loaded_program_names_the_input_with_wrong_indices(tmp_path: Any) -> None:
    compiled = compile(nn.Embedding(5, 2).eval(), example_inputs=(torch.tensor([1, 2]),))
    compiled.save(tmp_path / "m.plait")
    loaded = plait.load(tmp_path / "m.plait")
    with pytest.raises(plait.InputError, match="PLT-INP-006: 'input'.* from 1 to 7, .* 0 to 4"):
        loaded(torch.tensor([1, 7]))


@pytest.mark.parametrize(
    "function", [lambda x, y: x // y, lambda x, y: x % y, lambda x, y: torch.fmod(x, y)]
)
def test_integer_division_by_zero_is_an_error(function: Callable[..., Any]) -> None:
    compiled, x = compile(function), torch.tensor([7, -7])
    assert torch.equal(compiled(x, torch.tensor([2, 3])), function(x, torch.tensor([2, 3])))
    with pytest.raises(RuntimeError, match="ZeroDivision"):
        compiled(x, torch.tensor([2, 0]))
    by_number = compile(lambda x: x // 3)
    assert torch.equal(by_number(x), x // 3)
    assert not [s for s in by_number.plan.steps if hasattr(s, "target")]


def test_the_extreme_of_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="max"):
        compile(lambda x: x.max() + 1)(torch.randn(0, 3))
    compiled = compile(lambda x: x.min(0))
    assert torch.equal(compiled(torch.eye(3)).values, torch.zeros(3))
    with pytest.raises(IndexError, match="non-zero size"):
        compiled(torch.randn(0, 3))
    assert compiled(torch.randn(3, 0)).indices.shape == (0,)


def _statistics(x: torch.Tensor) -> Any:
    mean = x[0, :2] * 2
    return F.instance_norm(x[None, :2], mean, x[1, :2].square() + 1, momentum=0.3), mean


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.l1_loss(x, x.mT, weight=x.abs()),
        lambda x: torch.linspace(0, 7, 50, dtype=torch.int32) + x[0, 0],
        lambda x: torch.linspace(x[0, 1].abs() * 9, 17.6, 50, dtype=torch.uint8),
        lambda x: F.multi_margin_loss(x.log(), torch.tensor([0, 1, 2, 3]), reduction="sum"),
        _statistics,
    ],
)
def test_what_torch_itself_would_decompose_wrongly(function: Callable[..., Any]) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compile(function)(x), function(x))


def test_assertions_of_the_model_are_kept() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch.ops.aten._assert_async.msg((x > 0).all(), "not positive")
        return x * 2

    compiled = compile(function)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="not positive"):
        compiled(-torch.ones(2))
