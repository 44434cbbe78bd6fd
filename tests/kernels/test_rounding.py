"""float32 rounded to bfloat16, bit by bit, with the CPU's instruction and without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from plait.kernels.target import host
from plait.kernels.templates import pointwise

from . import harness
from .harness import run_kernel
from .traced import group_for, outputs_of, tensor_arg, trace

BF16 = torch.bfloat16
Function = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(params=[True, False], autouse=True)
def pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the instruction, or one without."""
    if request.param and not host().bf16_pairs:
        pytest.skip("this CPU has no AVX512-BF16")
    machine = dataclasses.replace(host(), bf16_pairs=request.param)
    monkeypatch.setattr(harness, "host", lambda: machine)


def numbers() -> torch.Tensor:
    """All kinds of float32: of every exponent, halfway between two results and beside it."""
    tops = torch.arange(0, 1 << 16, 37, dtype=torch.int32)
    bottoms = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    special = torch.tensor([0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x007FFFFF, 0x7F7FFFFF, 1, 0])
    special = special.to(torch.int32)
    bits = (tops[:, None] << 16 | bottoms).flatten()
    return torch.cat([bits, special, special | -(1 << 31)]).view(torch.float32)


def check(function: Function, x: torch.Tensor, abreast: int = 4) -> None:
    """Compares with eager mode bit by bit; any NaN is as good as another."""
    (out,) = outputs_of(trace(function, [x]))
    group = group_for([out])
    io = {n: tensor_arg(n.meta["val"]) for n in (*group.inputs, out)}
    kernel = pointwise.lower(group, io, host(), {"grain": 512, "abreast": abreast})
    (got,) = run_kernel(kernel, [x])
    want = function(x)
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))


@pytest.mark.parametrize("abreast", [1, 4])
def test_every_kind_of_number(abreast: int) -> None:
    check(lambda x: x.to(BF16), numbers(), abreast)


@pytest.mark.parametrize("size", [1, 7, 16, 33, 100])
def test_sizes(size: int) -> None:
    check(lambda x: x.to(BF16) * 1.5 + x, torch.randn(size).to(BF16))


FUNCTIONS: dict[str, Function] = {
    "relu": torch.relu,
    "neg": torch.neg,
    "abs": torch.abs,
    "between": lambda x: x.clamp(-0.5, 3),
    "limits that are rounded": lambda x: x.clamp(-0.3, 0.3),
    "hardtanh": lambda x: torch.nn.functional.hardtanh(x, -0.3, 6.0),
    "maximum": lambda x: torch.maximum(x, x * 2),
    "wider": lambda x: torch.minimum(x, x.float() * 1.001).to(BF16),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_pick(name: str) -> None:
    check(FUNCTIONS[name], numbers().to(BF16))
