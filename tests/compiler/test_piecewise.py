"""Programs are decomposed operator by operator where that gives what tracing them anew gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait
from plait.compiler.capture import piecewise
from plait.compiler.capture.export import capture


class Parts(nn.Module):
    """Composites, operators with a decomposition, and writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)
        )
        self.linear = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convs(F.pad(x, (1, 1, 1, 1)))
        y = F.silu(x.mean((2, 3)), inplace=True)
        q, k, v = self.linear(x.flatten(2).mT).reshape(x.shape[0], -1, 3, 4).unbind(2)
        scores = (q @ k.transpose(1, 2)).softmax(-1).logsumexp(-1)
        a, b = v.contiguous().split([1, 3], -1)
        total = scores[..., None] + b.sum(-1, keepdim=True)
        total += a
        return y.unflatten(1, (2, 2)), total.permute(2, 0, 1).contiguous()


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an item whenever a program is traced anew."""
    seen: list[Any] = []
    whole = piecewise.decomposed_anew

    def noted(program: Any) -> Any:
        seen.append(program)
        return whole(program)

    monkeypatch.setattr(piecewise, "decomposed_anew", noted)
    return seen


@pytest.mark.parametrize("is_open", [False, True])
@torch.no_grad()
def test_nothing_is_traced_anew(anew: list[Any], is_open: bool) -> None:
    model, x = Parts().eval(), torch.randn(2, 3, 8, 9)
    sizes = torch.export.Dim.AUTO
    captured = capture(model, (x,), {}, [{0: sizes, 2: sizes, 3: sizes}] if is_open else None)
    assert not anew
    names = Counter(str(n.target) for n in captured.graph_module.graph.nodes)
    assert not {n for n in names if n.partition(".")[2].split(".")[0].endswith("_")}
    composites = {"pad.default", "matmul.default", "logsumexp.default", "unflatten.int"}
    assert not {f"aten.{name}" for name in composites} & set(names)
    for given in (x, torch.randn(5, 3, 12, 7)) if is_open else (x,):
        for got, want in zip(captured.graph_module(given), model(given), strict=True):
            assert torch.equal(got, want)


def _of_a_strided_view(x: Tensor) -> Tensor:
    y = (x * 2)[:, :1]
    y += x[:, 1:2]
    return y.contiguous()


def _of_an_item(x: Tensor) -> Tensor:
    y = x * 2
    y.unbind()[0].relu_()
    return y + 1


def _of_an_input(x: Tensor) -> Tensor:
    x.mT.relu_()
    return x + 1


def _of_an_input_that_nobody_reads_again(x: Tensor) -> Tensor:
    y = x + 1
    x.relu_()
    return y


def _of_sizes_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.t_()
    return y + 1


def _of_a_sum(x: Tensor) -> Tensor:
    y = x * 2
    return y.cumsum_(1) + 1


def _of_a_copy_that_is_none(x: Tensor) -> Tensor:
    y = x * 2
    y.contiguous().to(torch.float32).reshape(4, 2).sigmoid_()
    return y + 1


@pytest.mark.parametrize(
    "function",
    [
        _of_a_strided_view,
        _of_an_item,
        _of_an_input,
        _of_an_input_that_nobody_reads_again,
        _of_sizes_in_place,
        _of_a_sum,
        _of_a_copy_that_is_none,
    ],
)
def test_writing_to_what_is_not_its_own_is_left_to_torch(
    function: Callable[[Tensor], Tensor], anew: list[Any]
) -> None:
    x = torch.randn(2, 4)
    captured = capture(function, (x,), {})
    assert len(anew) == 1
    given = x.clone()
    results, want = captured.graph_module(given), function(x)
    assert torch.equal(results[0], want)
    assert len(results) == 1 + len(captured.mutations)
    assert bool(captured.mutations) == (not torch.equal(x, given))


def test_writing_keeps_what_it_writes_to(anew: list[Any]) -> None:
    """Where the ordinary operator gives another dtype, writing in place does not."""

    def function(x: Tensor) -> Tensor:
        y = x.half() + 1
        y *= x.sum(1, keepdim=True)
        return y

    x = torch.randn(2, 4)
    (got,) = capture(function, (x,), {}).graph_module(x)
    assert len(anew) == 1
    assert got.dtype == torch.float16
    assert torch.equal(got, function(x))


def test_windows_with_gaps_are_not_written() -> None:
    def function(x: Tensor) -> Tensor:
        x.unfold(0, 2, 2).add_(1)
        return x * 2

    compiled = plait.compile(function, tune="off")
    for rows in (4, 5):
        x, own = torch.zeros(rows, 2), torch.zeros(rows, 2)
        torch.testing.assert_close(compiled(x), function(own))
        assert torch.equal(x, own)
    assert len(compiled.programs) == 1 and "PLT-CAP-010" in [r.id for r in compiled.remarks]


def test_written_twice(anew: list[Any]) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        z = y + 1
        y.add_(z).relu_()
        return y.view(-1) + 3, z

    x = torch.randn(2, 4)
    got = capture(function, (x,), {}).graph_module(x)
    assert not anew
    for a, b in zip(got, function(x), strict=True):
        assert torch.equal(a, b)


def test_constants_that_are_made(anew: list[Any]) -> None:
    def function(x: Tensor) -> Tensor:
        grid = F.affine_grid(x[None, :2, :1].expand(1, 2, 3), (1, 1, 1, 2), align_corners=False)
        return x * torch.tensor([1.0, 2.0]) + torch.arange(2) + grid[0, 0, :1, :1]

    x = torch.randn(3, 2)
    (got,) = capture(function, (x,), {}).graph_module(x)
    assert not anew
    assert torch.equal(got, function(x))


def test_training_is_traced_anew(anew: list[Any]) -> None:
    x = torch.randn(4, 3)
    batch = nn.BatchNorm1d(3, track_running_stats=False)
    for module in (nn.Dropout(0.5), nn.BatchNorm1d(3), batch, nn.RReLU()):
        capture(module.train(), (x,), {})
    assert len(anew) == 4


def _without_gradients(x: Tensor) -> Tensor:
    with torch.enable_grad():
        return F.pad(x, (1, 1)) * 2


def _of_data(x: Tensor) -> Tensor:
    return x * x.sum().item()


def _by_chance(x: Tensor) -> Tensor:
    return x * 0 + torch.rand_like(x).ceil()


@torch.no_grad()
def test_sizes_that_data_tells_keep_their_symbols(anew: list[Any]) -> None:
    branches = [nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2)]
    router, x = plait.Router(branches, nn.Linear(4, 2)).eval(), torch.randn(5, 4)
    for target, args in (router, (x,)), (_places, (x,)):
        captured = capture(target, args, {}, [{0: torch.export.Dim.AUTO}])
        (got,) = captured.graph_module(x)
        assert torch.equal(got, target(x))
        targets = {str(node.target) for node in captured.graph_module.graph.nodes}
        assert "aten.numpy_T.default" not in targets
    assert not anew


@pytest.mark.parametrize("is_open", [False, True])
@torch.no_grad()
def test_sides_of_a_cond_are_taken_apart_too(anew: list[Any], is_open: bool) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            def inner(y: Tensor) -> Tensor:
                less, more = (lambda z: self.b(z).flatten(0)), (lambda z: self.a(z).T.flatten(0))
                return torch.cond(y.mean() > 1, more, less, (y,)).relu().square()

            return torch.cond(x.sum() > 0, inner, lambda y: self.a(y).flatten(), (x,)) + 1

    model, x = Nested(), torch.randn(3, 4)
    captured = capture(model, (x,), {}, [{0: torch.export.Dim.AUTO}] if is_open else None)
    assert not anew
    modules = [m for m in captured.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = {str(n.target) for m in modules for n in m.graph.nodes}
    assert len(modules) == 5 and "aten.numpy_T.default" not in names
    for value in (x.abs() + 1, x.abs() / 9, -x.abs()):
        (got,) = captured.graph_module(value)
        torch.testing.assert_close(got, model(value))


def _places(x: Tensor) -> Tensor:
    return x.nonzero().T + 1


@pytest.mark.parametrize("function", [_without_gradients, _of_data, _by_chance])
@torch.no_grad()
def test_regions_and_what_only_a_run_knows_are_traced_anew(
    function: Callable[[Tensor], Tensor], anew: list[Any]
) -> None:
    x = torch.randn(2, 4)
    (got,) = capture(function, (x,), {}).graph_module(x)
    assert len(anew) == 1
    assert torch.equal(got, function(x))


def test_autocast_around_a_call_is_traced_anew(anew: list[Any]) -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = capture(model, (x,), {}).graph_module(x)
        assert len(anew) == 1
        assert torch.equal(got, model(x))


def test_sparse_tensors_are_traced_anew(anew: list[Any]) -> None:
    x = torch.randn(2, 2)
    (got,) = capture(lambda x: torch.sparse.mm(x.to_sparse(), x), (x,), {}).graph_module(x)
    assert len(anew) == 1
    torch.testing.assert_close(got, x @ x)


def test_functions_over_a_dimension_are_traced_anew(anew: list[Any]) -> None:
    x, layer = torch.randn(2, 3, 4), nn.Linear(4, 2)
    rows = torch.vmap(lambda row: F.relu(layer(row)).sum(0), in_dims=1)
    with torch.no_grad():
        (got,) = capture(rows, (x,), {}).graph_module(x)
        assert len(anew) == 1
        torch.testing.assert_close(got, rows(x))


def test_sizes_that_are_open_are_told_by_the_parts(anew: list[Any]) -> None:
    x, sizes = torch.randn(2, 3, 4), torch.export.Dim.AUTO
    for shapes, whole in ((None, True), ([{1: sizes, 2: sizes}], False)):
        nodes = capture(lambda x: x.flatten(1) * 2, (x,), {}, shapes).graph_module.graph.nodes
        assert ("aten.flatten.using_ints" in {str(n.target) for n in nodes}) == whole
    assert not anew
