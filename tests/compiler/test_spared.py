"""What export makes of graphs and nodes: the same as torch's own, when it is asked for."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.fx.proxy
from torch import nn

from plait.compiler.capture.spared import TRACEBACK, no_modules, spared


def helper(x: torch.Tensor) -> torch.Tensor:
    return x.relu() + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = x * 2
        return helper(self.layers(x)) + helper(x)


def exported() -> torch.fx.GraphModule:
    return torch.export.export(Model(), (torch.zeros(2, 3),), strict=False).graph_module


def test_nodes_tell_where_they_come_from_as_torch_has_it() -> None:
    want = [(n.name, n.stack_trace) for n in exported().graph.nodes]
    with spared():
        have = [(n.name, n.stack_trace) for n in exported().graph.nodes]
    # They were called from different lines of this test, which torch does not take in.
    assert have == want
    assert any("return helper(self.layers(x))" in (trace or "") for _, trace in have)
    assert len({trace for _, trace in have}) > 3


def test_code_is_written_when_it_is_read() -> None:
    written = []

    def counted(self: torch.fx.GraphModule, *args: object) -> object:
        written.append(self)
        return original(self, *args)

    original = torch.fx.GraphModule.recompile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.fx.GraphModule, "recompile", counted)
        with spared():
            result = torch.fx.symbolic_trace(helper)
        assert not written
        x = torch.randn(4)
        assert torch.equal(result(x), helper(x)) and "relu" in result.code
        assert len(written) == 1


def test_torch_is_left_as_it_was() -> None:
    before = vars(torch.fx.proxy)[TRACEBACK]
    with pytest.raises(ZeroDivisionError), spared():
        assert vars(torch.fx.proxy)[TRACEBACK] is not before
        raise ZeroDivisionError
    assert vars(torch.fx.proxy)[TRACEBACK] is before
    assert type(torch.fx.symbolic_trace(helper)).__mro__[1] is torch.fx.GraphModule


def test_modules_methods_are_replaced_for_whoever_traces_modules() -> None:
    seen: list[bool] = []
    plain = vars(nn.Module)["__call__"]

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(vars(nn.Module)["__call__"] is plain)
        return helper(x)

    torch.fx.symbolic_trace(watched)
    with no_modules():
        torch.fx.symbolic_trace(watched)
        other = threading.Thread(target=torch.fx.symbolic_trace, args=(watched,))
        other.start()
        other.join()
    torch.fx.symbolic_trace(watched)
    assert seen == [False, True, False, False]
