"""How arguments are given: by position, by name, and to forwards inside of decorators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plait

compile = functools.partial(plait.compile, tune="off")


def programs(compiled: plait.Compiled) -> int:
    return compiled.explain().count("program ")


def doubling(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A decorator that looks for an argument among the named ones only."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(self, *args, **kwargs) * (2 if kwargs.get("double") else 1)

    return wrapper


class Plain(nn.Linear):
    def forward(self, input: torch.Tensor, shift: Any = None, double: bool = False) -> Any:
        return super().forward(input) + (0 if shift is None else shift)


class Decorated(Plain):
    forward = doubling(Plain.forward)


def test_by_name_and_by_position_share_a_program() -> None:
    model, x, shift = Plain(3, 2).eval(), torch.randn(4, 3), torch.randn(2)
    compiled = compile(model)
    for args, kwargs in (((x, shift), {}), ((), {"shift": shift, "input": x})):
        torch.testing.assert_close(compiled(*args, **kwargs), model(x, shift))
    assert programs(compiled) == 1


def test_a_decorator_sees_arguments_as_they_were_given() -> None:
    model, x, shift = Decorated(3, 2).eval(), torch.randn(4, 3), torch.randn(2)
    compiled = compile(model)
    for args, kwargs in (
        ((x, shift, True), {}),
        ((x,), {"double": True, "shift": shift}),
        ((), {"shift": shift, "double": True, "input": x}),
        ((x,), {"shift": shift, "double": True}),
    ):
        torch.testing.assert_close(compiled(*args, **kwargs), model(*args, **kwargs))
    assert not [r for r in compiled.remarks if r.pass_name == "capture"]
    assert programs(compiled) == 3


def test_a_saved_program_has_no_decorator_left(tmp_path: Path) -> None:
    model, x, shift = Decorated(3, 2).eval(), torch.randn(4, 3), torch.randn(2)
    compiled = compile(model)
    want = compiled(x, double=True, shift=shift)
    compiled.save(tmp_path / "named.plait")
    loaded = plait.load(tmp_path / "named.plait")
    for have in (loaded(x, shift, True), loaded(double=True, input=x, shift=shift)):
        assert torch.equal(have, want)


def test_other_columns_than_those_that_are_indices_may_hold_anything() -> None:
    small, large = torch.randn(3, 2), torch.randn(40, 2)
    compiled = compile(lambda i: small[i[:, :2, 0]] + large[i[..., 1].t()[:2]].max())
    index = torch.tensor([[[2, 39]] * 2 + [[9, -40]]] * 2)
    want = small[index[:, :2, 0]] + large[index[..., 1].t()[:2]].max()
    with torch.no_grad():
        assert torch.equal(compiled(index), want)
    assert not [r for r in compiled.remarks if r.id.startswith("PLT-INP")]
    index[0, 1, 0] = 3
    with pytest.raises(IndexError, match="out of bounds"):
        compiled(index)
