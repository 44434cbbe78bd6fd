"""What is written through views is seen by all that shares their memory, in a graph that writes
nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.compiler.capture import piecewise
from plait.compiler.capture.export import capture
from plait.passes.ir import is_mutating


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is traced anew."""
    monkeypatch.delattr(piecewise, "decomposed_anew")


def _shifted(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y[:, 1:] = x[:, :-1].clone()
    y[:, 0] = 7.0
    return y


def _rows_in_a_loop(x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for k in range(1, 4):
        row = x[..., k, :k].clone()
        total[..., k, :k] = row + (row.unsqueeze(-1) * total[..., :k, :k].clone()).sum(-2)
    return total


def _by_a_mask(x: Tensor) -> Tensor:
    y = x * 2
    y.transpose(0, 1)[0][y[:, 0] > 0] = 3.0
    return y + y.mT.sum(0, keepdim=True).mT


def _views_of_before(x: Tensor) -> tuple[Tensor, ...]:
    y = x + 1
    flat, turned, first, old = y.view(-1), y.mT, y[0], y.clone()
    y[1:].mul_(x[1:])
    first.zero_()
    turned[2] += 5
    return flat * 2, turned.contiguous(), first + old[0], y


def _of_other_types(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64)
    y[0] = x[1]
    y[1:2] = 3
    return y * 2


@pytest.mark.parametrize(
    "function", [_shifted, _rows_in_a_loop, _by_a_mask, _views_of_before, _of_other_types]
)
@pytest.mark.parametrize("is_open", [False, True])
@torch.no_grad()
def test_models_that_write_parts(
    function: Callable[[Tensor], Any], is_open: bool, pieces: None
) -> None:
    x = torch.randn(4, 4)
    sizes = [{0: torch.export.Dim.AUTO}] if is_open and function is not _rows_in_a_loop else None
    captured = capture(function, (x,), {}, sizes)
    assert not any(map(is_mutating, captured.graph_module.graph.nodes))
    for given_x in (x, torch.randn(6, 4)) if sizes else (x,):
        want = function(given_x)
        want = want if isinstance(want, tuple) else (want,)
        for a, b in zip(captured.graph_module(given_x), want, strict=True):
            assert torch.equal(a, b)


Step = tuple[int, int, int]


def _play(steps: list[Step], x: Tensor) -> list[Tensor]:
    """Views, writes and reads of tensors that share memory, as the numbers say."""
    shared, read = [x * 2], [x]
    for what, which, how in steps:
        t = shared[which % len(shared)]
        dim = how % max(t.dim(), 1)
        other = read[how % len(read)].sum() * 0.5
        if what < 7 and not t.dim():
            continue
        if what == 0:
            shared.append(t.select(dim, how % t.shape[dim]))
        elif what == 1:
            shared.append(t[(slice(None),) * dim + (slice(how % t.shape[dim], None, 1 + how % 2),)])
        elif what == 2:
            shared.append(t.unsqueeze(dim))
        elif what == 3:
            shared.append(t.transpose(0, dim))
        elif what == 4:
            shared.append(t.permute(*reversed(range(t.dim()))))
        elif what == 5 and t.is_contiguous():
            shared.append(t.view(-1))
        elif what == 6:
            t[how % t.shape[0]] = other
        elif what == 7:
            t.add_(other)
        elif what == 8:
            t.copy_(t.sin() + other)
        elif what == 9:
            t.fill_(how)
        elif what == 10:
            shared.append(t.mul_(how))
        elif what == 11:
            t.masked_fill_(t > other, 1.5)
        else:
            read.append(t + 1)
    return [*read[1:], *(t.clone() for t in shared)]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9), st.integers(0, 9)), max_size=14),
    st.permutations(range(3)),
)
@torch.no_grad()
def test_any_order_of_views_and_writes(steps: list[Step], order: list[int]) -> None:
    x = (torch.arange(24.0).view(2, 3, 4) - 11).permute(order)
    with pytest.MonkeyPatch.context() as patched:
        if order == [0, 1, 2]:  # else layouts may be what only tracing anew tells
            patched.delattr(piecewise, "decomposed_anew")
        captured = capture(lambda x: _play(steps, x), (x,), {})
    for a, b in zip(captured.graph_module(x), _play(steps, x), strict=True):
        assert torch.equal(a, b)
