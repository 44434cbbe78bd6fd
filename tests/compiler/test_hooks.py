"""Forward hooks, modules of torch.jit and other wrappers: the original's effects at every call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import plait

compile = functools.partial(plait.compile, tune="off")


def ids(compiled: plait.Compiled) -> list[str]:
    return [r.id for r in compiled.remarks if r.pass_name == "capture"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


kept: list[Any] = []


def keeps(module: nn.Module, args: Any, out: torch.Tensor) -> None:
    kept.append(out.shape)


class Keeps:
    def __call__(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        kept.append(out.shape)
        return out


def counter() -> Callable[..., None]:
    count = 0

    def counts(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        nonlocal count
        count += 1
        kept.append(count)

    return counts


@pytest.mark.parametrize(
    "make",
    [
        lambda: keeps,
        lambda: Keeps(),
        lambda: functools.partial(keeps),
        lambda: lambda module, args, out: kept.append(out),
        lambda: lambda module, args, out, store=kept: store.append(out),
        lambda: lambda module, args, out: [kept.append(x) for x in out] and None,
        counter,
    ],
)
def test_hooks_that_keep_something_are_called_each_time(make: Callable[[], Any]) -> None:
    model, x = net(), torch.randn(2, 4)
    compiled = compile(model)
    compiled(x)
    handle = model[1].register_forward_hook(make())
    kept.clear()
    with pytest.warns(UserWarning, match="PLT-CAP-024"):
        compiled(x)
    once = len(kept)
    compiled(x)
    assert once and len(kept) == 2 * once and not compiled.programs
    assert all(not isinstance(k, torch.Tensor) or type(k) is torch.Tensor for k in kept)
    handle.remove()
    compiled(x)
    assert len(kept) == 2 * once and len(compiled.programs) == 1


def test_hooks_that_only_compute_are_part_of_the_program() -> None:
    model, x, shift = net(), torch.randn(2, 4), torch.ones(3)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * math.pi,))
    model[2].register_forward_hook(lambda module, args, out: torch.tanh(out) + shift)
    compiled = compile(model)
    for _ in range(2):
        torch.testing.assert_close(compiled(x).detach(), model(x).detach())
    assert len(compiled.programs) == 1 and ids(compiled) == []


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 4))])
def test_modules_of_torch_jit_run_as_they_are(make: Callable[..., Any]) -> None:
    model, x = net(), torch.randn(2, 4)
    for given in (make(model), nn.Sequential(make(model)).eval()):
        compiled = compile(given)
        with pytest.warns(UserWarning, match="PLT-CAP-025"):
            torch.testing.assert_close(compiled(x), model(x))
        assert compiled.state_dict().keys() == given.state_dict().keys()


def test_what_torch_compile_returned_can_be_compiled() -> None:
    model, x = net(), torch.randn(2, 4)
    compiled = compile(torch.compile(model, backend="eager"))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        model[1] = nn.Dropout(0.5).train()
        compiled(x)
    assert "PLT-CAP-016" in ids(compiled)
