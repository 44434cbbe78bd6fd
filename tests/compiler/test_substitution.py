"""Triangular systems that a loop solves row by row become one operator, and nothing else does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.compiler.capture.substitution import substituted

SOLVE = torch.ops.aten.linalg_solve_triangular.default


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers does, which looks for another implementation."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@wrapped
def chunked(x: Tensor, chunk_size: int = 6) -> Tensor:
    """Transformers' loop."""
    mask = torch.triu(
        torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device), diagonal=0
    )
    attn = -(x * 0.5).masked_fill(mask, 0)
    for i in range(1, chunk_size):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)

    attn = attn + torch.eye(chunk_size, dtype=attn.dtype, device=attn.device)
    total = attn.sum()
    for i in range(chunk_size):
        total = total + attn[..., i, 0].sum()
    return attn * total


def diagonal(x: Tensor, n: int = 6) -> Tensor:
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=1)
    attn = x.masked_fill(mask, 0)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return attn


def another_mask(x: Tensor, n: int = 6) -> Tensor:
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    mask = ~mask
    attn = x.masked_fill(mask, 0)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return attn


def narrower_mask(x: Tensor, n: int = 6) -> Tensor:
    mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    mask &= torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    attn = x.masked_fill(mask, 0)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return attn


def written_in_place(x: Tensor, n: int = 6) -> Tensor:
    x = x.clone()
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    attn = x.masked_fill_(mask, 0)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return attn + x


def filled_with_ones(x: Tensor, n: int = 6) -> Tensor:
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    attn = x.masked_fill(mask, 1)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return attn


def inverted(x: Tensor, n: int = 6) -> Tensor:
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    attn = ~(x * 9).long().masked_fill(mask, 0)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return attn


def smaller_mask(x: Tensor, n: int = 1) -> Tensor:
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    n = 6
    attn = (x[..., :6, :6] * ~mask[0, 0] + x).masked_fill(mask[0, 0], 0)
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    n = 4
    attn = x.masked_fill(mask, 0) + attn
    attn = attn.masked_fill(mask, 0)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return attn


def another_loop(x: Tensor, n: int = 6) -> Tensor:
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    attn = x.masked_fill(mask, 0)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row - (row.unsqueeze(-1) * sub).sum(-2)
    return attn


def reads_a_row(x: Tensor, n: int = 6) -> Tensor:
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    attn = x.masked_fill(mask, 0)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return row  # pyright: ignore[reportPossiblyUnbound]


def reads_the_number(x: Tensor, n: int = 6) -> Tensor:
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=0)
    attn = x.masked_fill(mask, 0)
    for i in range(1, n):
        row = attn[..., i, :i].clone()
        sub = attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return attn * i  # pyright: ignore[reportPossiblyUnbound]


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def solves(compiled: plait.Compiled) -> bool:
    (program,) = compiled.programs
    return any(n.target is SOLVE for n in program.captured.graph_module.graph.nodes)


@pytest.mark.parametrize("shape", [(6, 6), (2, 3, 6, 6), (0, 6, 6)])
def test_a_loop_becomes_an_operator(shape: tuple[int, ...]) -> None:
    model = Calls(chunked).eval()
    compiled = plait.compile(model, tune="off")
    x = torch.randn(shape)
    torch.testing.assert_close(compiled(x), model(x))
    assert solves(compiled)


def test_types_that_have_no_such_operator_keep_the_loop() -> None:
    model = Calls(chunked).eval()
    compiled = plait.compile(model, tune="off")
    x = torch.randn(2, 6, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(x), model(x))
    assert not solves(compiled)


@pytest.mark.parametrize(
    "function",
    [
        diagonal, another_mask, narrower_mask, written_in_place, filled_with_ones, inverted,
        smaller_mask, another_loop, reads_a_row, reads_the_number,
    ],
)  # fmt: skip
def test_what_is_another_loop_stays(function: Callable[..., Any]) -> None:
    x = torch.randn(2, 6, 6)
    with substituted([Calls(function)]):
        found = function(x)
    torch.testing.assert_close(found, function(x), rtol=0, atol=0)


def test_functions_are_theirs_again() -> None:
    inner = chunked.__wrapped__  # type: ignore[attr-defined]
    before = inner.__code__
    with substituted([Calls(chunked)]):
        assert inner.__code__ is not before
        with substituted([Calls(chunked)]):  # a model within another one
            pass
        assert inner.__code__ is not before
    assert inner.__code__ is before
