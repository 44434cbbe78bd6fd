"""Compiled models as modules: the interface, weights that change, buffers and inputs written to."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import plait

compile = functools.partial(plait.compile, tune="off")


def ids(compiled: plait.Compiled) -> list[str]:
    return [r.id for r in compiled.remarks if r.pass_name == "capture"]


def programs(compiled: plait.Compiled) -> int:
    return compiled.explain().count("program ")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# -- the module's interface ------------------------------------------------------------------------


def test_module_interface_is_the_originals() -> None:
    model = net()
    compiled = compile(model)
    assert isinstance(compiled, nn.Module)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in model.parameters()]
    assert compiled[0] is model[0] and len(compiled) == 3 and list(compiled) == list(model)
    assert compiled.eval() is compiled and compiled.to(torch.float32) is compiled
    compiled.tag = "x"
    assert model.tag == "x" and compiled.tag == "x"
    assert compiled.training is False
    compiled.train()
    assert model.training
    with pytest.raises(AttributeError):
        _ = compiled.no_such_attribute


def test_copy_and_pickle() -> None:
    compiled = compile(net())
    x = torch.randn(2, 4)
    want = compiled(x)
    twin = copy.deepcopy(compiled)
    assert twin.original is not compiled.original
    torch.testing.assert_close(twin(x), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(compiled))(x), want)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
        lambda m: setattr(m[0].weight, "data", torch.randn(8, 4)),
        lambda m: setattr(m[2], "bias", nn.Parameter(torch.randn(3))),
        lambda m: m.__setitem__(1, nn.Tanh().eval()),
        lambda m: m.__setitem__(2, nn.Linear(8, 5).eval()),
        lambda m: m.double(),
    ],
    ids=["load", "assign", "data", "replace", "submodule", "shape", "dtype"],
)
def test_changed_weights_are_seen(change: Callable[[nn.Module], Any]) -> None:
    model = net()
    compiled = compile(model)
    compiled(torch.randn(2, 4))
    with torch.no_grad():
        change(model)
    x = torch.randn(2, 4, dtype=model[0].weight.dtype)
    torch.testing.assert_close(compiled(x), model(x))


class Recurrent(nn.Module):
    """A module that keeps its weights in attributes, too: nn.LSTM or nn.GRU."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cells = kind(4, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cells(x[:, None].expand(-1, 3, -1))[0]


DERIVING: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "weight_norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3))),
    "spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3))),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", DERIVING)
def test_attributes_made_of_the_weights_at_every_call(name: str) -> None:
    torch.manual_seed(0)
    model = DERIVING[name]().eval()
    compiled, x = compile(model), torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        for weight in model.parameters():
            weight.mul_(1.5)
        torch.testing.assert_close(compiled(x), model(x))
    assert "PLT-CAP-019" not in ids(compiled) and compiled.plan is not None


def test_untied_weights_are_seen() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = Tied().eval()
    compiled = compile(model)
    x = torch.randn(2, 3)
    compiled(x)
    model.b.weight = nn.Parameter(torch.randn(3, 3))
    torch.testing.assert_close(compiled(x), model(x))


def test_weights_that_change_at_every_call_end_compilation() -> None:
    model = net()
    compiled = compile(model)
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="PLT-CAP-017"):
        for _ in range(12):
            torch.testing.assert_close(compiled(x), model(x))
            with torch.no_grad():
                model[0].weight.add_(0.1)


def test_weights_in_a_closure_are_seen() -> None:
    model = net()
    compiled = compile(lambda x: model(x) + 1)
    x = torch.randn(2, 4)
    compiled(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    torch.testing.assert_close(compiled(x), model(x) + 1)
    model[2].weight = nn.Parameter(torch.randn(3, 8))
    torch.testing.assert_close(compiled(x), model(x) + 1)


# -- state -----------------------------------------------------------------------------------------


class Cache(nn.Module):
    """Writes into a buffer at a position, as key-value caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("store", torch.zeros(4, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.store.index_copy_(0, at, x)
        self.seen += 1
        return self.store * 2


def test_buffers_are_written_back() -> None:
    model, twin = Cache().eval(), Cache().eval()
    compiled = compile(model)
    for i in range(4):
        x, at = torch.randn(1, 3), torch.tensor([i])
        torch.testing.assert_close(compiled(x, at), twin(x, at))
    assert model.seen.item() == 4
    torch.testing.assert_close(model.store, twin.store)
    assert ids(compiled) == []


def test_inputs_are_written_back_and_views_of_them_survive() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        before = x.clone()
        x.add_(1)
        return before

    compiled = compile(function)
    x = torch.zeros(3)
    assert torch.equal(compiled(x), torch.zeros(3))
    assert torch.equal(x, torch.ones(3))


def test_swapped_buffers() -> None:
    class Swap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.zeros(2))
            self.register_buffer("b", torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            old = self.a.clone()
            self.a.copy_(self.b)
            self.b.copy_(old)
            return x + self.a

    model = Swap().eval()
    compiled = compile(model)
    for expected in (1.0, 0.0, 1.0):
        assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), expected))
    assert torch.equal(model.a, torch.ones(2)) and torch.equal(model.b, torch.zeros(2))


def test_hooks_that_a_trace_puts_on_are_taken_off() -> None:
    class Hooks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.register_forward_hook(lambda module, args, out: 2 * out)
            return super().forward(x)

    torch.manual_seed(0)
    model = Hooks(3, 2).eval()
    twin, compiled, x = copy.deepcopy(model), compile(model), torch.randn(2, 3)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), twin(x))
    assert len(model._forward_hooks) == 2 and "PLT-CAP-019" in ids(compiled)


def test_running_statistics_that_training_mode_wrote() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), torch.randn(5, 4)
    compiled = compile(model)
    for trained in (model, model[1]):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
            trained.train()
            model(x * 3 + 1)  # not through the compiled model, and no optimizer steps
            trained.eval()
            torch.testing.assert_close(compiled(x), model(x))
