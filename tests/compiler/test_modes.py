"""Modes of the caller's that change what operators do: the original runs, or another program."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import plait

compile = functools.partial(plait.compile, tune="off")


class Cosine(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = torch.cos if func is torch.sin else func
        return func(*args, **(kwargs or {}))


def test_function_modes_see_the_original() -> None:
    compiled, x = compile(lambda x: torch.sin(x) * 2), torch.randn(3)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), torch.sin(x) * 2)
        with Cosine():
            torch.testing.assert_close(compiled(x), torch.cos(x) * 2)
            with torch.device("cpu"):
                torch.testing.assert_close(compiled(x), torch.cos(x) * 2)


@pytest.mark.filterwarnings("ignore:plait")
def test_a_default_device_is_part_of_what_a_program_is_made_for() -> None:
    compiled, x = compile(lambda x: (x * 2, torch.ones(3) + 1)), torch.randn(3)
    compiled(x)
    for _ in range(2):
        with torch.device("cpu"):
            assert compiled(x)[1].device.type == "cpu"
            assert compiled.programs
        with torch.device("meta"):
            assert compiled(x)[1].device.type == "meta"
        compiled.recompile()
        assert compiled(x)[1].device.type == "cpu"


def test_results_on_the_meta_device_are_the_originals() -> None:
    compiled = compile(lambda x: (x * 2, torch.ones(x.shape, device="meta") + 1))
    with pytest.warns(UserWarning, match="PLT-CAP-008: .*meta"):
        assert compiled(torch.randn(3))[1].is_meta


@pytest.mark.filterwarnings("ignore:plait")
def test_a_trace_that_ends_in_the_midst_leaves_functions_as_they_were() -> None:
    """As Dynamo does by a guard that raises."""

    def function(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            torch._C._set_torch_function_state(torch._C._TorchFunctionState.ALL_DISABLED)
            raise RuntimeError("a guard")
        return torch.sin(x)

    compiled, x = compile(function), torch.randn(3)
    torch.testing.assert_close(compiled(x), torch.sin(x))
    assert not compiled.programs
    assert torch._C._get_torch_function_state() == torch._C._TorchFunctionState.ENABLED
