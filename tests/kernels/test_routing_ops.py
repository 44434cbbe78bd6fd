"""Routing operators: torch's rules for operators, gradients, export, on every kind of routes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from plait.kernels import routes, routing
from plait.kernels.routing_cells import scatter_sized

BRANCHES = 3
INDICES = {
    "mixed": [[0, 2], [3, 1], [2, 2], [-1, 0], [5, 3]],  # duplicates, no branch, strangers
    "all to one": [[1, 1], [1, 1]],
    "to none": [[3, 3], [3, 3]],
    "one each": [2, 0, 1, 3],
    "no cells": torch.zeros(0, 2, dtype=torch.int64),
    "no slots": torch.zeros(4, 0, dtype=torch.int64),
}


@pytest.fixture(params=INDICES, ids=lambda k: k.replace(" ", "-"))
def index(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.as_tensor(INDICES[request.param])


def slots_of(index: torch.Tensor, branch: int) -> torch.Tensor:
    return (index.reshape(-1) == branch).nonzero().flatten()


def share(index: torch.Tensor) -> int:
    return index.shape[1] if index.dim() == 2 else 1


def plain_scatter(cells: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
    """The definition, in PyTorch's own operators."""
    return [cells[slots_of(index, b) // max(share(index), 1)] for b in range(BRANCHES)]


def plain_gather(
    outs: list[torch.Tensor], index: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """The definition, row by row."""
    cells, k = index.shape[0], share(index)
    rows = {int(s): outs[b][i] for b in range(BRANCHES) for i, s in enumerate(slots_of(index, b))}
    result = []
    for cell in range(cells):
        total = torch.zeros_like(outs[0].new_empty(outs[0].shape[1:]))
        for s in range(cell * k, cell * k + k):
            if s in rows:
                total = total + (rows[s] if weight is None else rows[s] * weight.reshape(-1)[s])
        result.append(total)
    return torch.stack(result) if result else outs[0].new_empty(0, *outs[0].shape[1:])


def outs_for(index: torch.Tensor, *rest: int, dtype: torch.dtype) -> list[torch.Tensor]:
    sizes = [slots_of(index, b).numel() for b in range(BRANCHES)]
    return [torch.randn(u, *rest, dtype=dtype, requires_grad=True) for u in sizes]


def test_operators_keep_torchs_rules(index: torch.Tensor) -> None:
    torch.manual_seed(0)
    cells = torch.randn(index.shape[0], 4, requires_grad=True)
    outs = outs_for(index, 3, dtype=torch.float32)
    weight = torch.rand(index.shape, requires_grad=True)
    torch.library.opcheck(routing.route, (index, BRANCHES))
    torch.library.opcheck(routing.scatter, (cells, index, BRANCHES))
    torch.library.opcheck(scatter_sized, (cells, index, [len(o) for o in outs]))
    torch.library.opcheck(routing.gather, (outs, index, None))
    torch.library.opcheck(routing.gather, (outs, index, weight))
    if share(index):
        offsets, order = routing.route(index, BRANCHES)
        matrices = torch.randn(BRANCHES, 5, 4, requires_grad=True)
        bias = torch.randn(BRANCHES, 5, requires_grad=True)
        arguments = (cells, offsets, order, matrices, bias, False, share(index), True)
        torch.library.opcheck(routing.routed_linear, arguments)


def test_cells_of_any_layout_come_out_contiguous() -> None:
    index = torch.tensor([[0, 1], [1, 1], [3, 0]])
    images = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(routing.scatter, (images, index, BRANCHES))
    outs = [o.to(memory_format=torch.channels_last) for o in plain_scatter(images.detach(), index)]
    torch.library.opcheck(routing.gather, (outs, index, None))
    torch.library.opcheck(routing.scatter, (torch.randn(3), index, BRANCHES))


def test_each_branch_gets_its_slots_cells_and_they_come_back(index: torch.Tensor) -> None:
    torch.manual_seed(0)
    cells = torch.randn(index.shape[0], 2, 3)
    parts = routing.scatter(cells, index, BRANCHES)
    for have, want in zip(parts, plain_scatter(cells, index), strict=True):
        assert torch.equal(have, want)
    outs = [o.detach() for o in outs_for(index, 2, 3, dtype=torch.float32)]
    weight = torch.rand(index.shape)
    for w in (None, weight):
        torch.testing.assert_close(routing.gather(outs, index, w), plain_gather(outs, index, w))


def test_results_share_no_memory() -> None:
    cells = torch.zeros(4, 3)
    parts = routing.scatter(cells, torch.zeros(4, 1, dtype=torch.int64), 2)
    parts[0].fill_(1)
    assert not cells.any() and parts[1].shape == (0, 3)


def test_sums_start_at_slot_0() -> None:
    index = torch.tensor([[0, 1, 2]])
    outs = [torch.tensor([[v]]) for v in (1e8, -1e8, 1.0)]
    assert routing.gather(outs, index, None).item() == 1.0  # (1e8 - 1e8) + 1, never 1e8 + (...)
    index = torch.tensor([[2, 0, 1]])
    assert routing.gather(outs, index, None).item() == 0.0  # 1 is lost in (1 + 1e8)


def test_a_slot_of_no_branch_adds_nothing_whatever_its_weight() -> None:
    index = torch.tensor([[0, 3], [3, -1]])
    weight = torch.tensor([[2.0, float("nan")], [float("inf"), float("nan")]], requires_grad=True)
    outs = [torch.tensor([[3.0]]), torch.empty(0, 1), torch.empty(0, 1)]
    result = routing.gather(outs, index, weight)
    assert result.tolist() == [[6.0], [0.0]]
    (grad,) = torch.autograd.grad(result, weight, torch.full_like(result, float("inf")))
    assert grad.tolist() == [[float("inf"), 0.0], [0.0, 0.0]]


def test_weights_take_the_dtype_of_outputs() -> None:
    index = torch.tensor([[0], [0]])
    outs = [torch.ones(2, 3, dtype=torch.bfloat16)]
    result = routing.gather(outs, index, torch.rand(2, 1, dtype=torch.float64))
    assert result.dtype == torch.bfloat16


def test_gradients_are_those_of_the_definition(index: torch.Tensor) -> None:
    torch.manual_seed(0)
    cells = torch.randn(index.shape[0], 3, dtype=torch.float64, requires_grad=True)
    outs = outs_for(index, 3, dtype=torch.float64)
    weight = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)

    def have(cells, weight, *outs):
        parts = routing.scatter(cells, index, BRANCHES)
        made = [p * o for p, o in zip(parts, outs, strict=True)]
        return routing.gather(made, index, weight), routing.gather(list(outs), index, None)

    def want(cells, weight, *outs):
        made = [p * o for p, o in zip(plain_scatter(cells, index), outs, strict=True)]
        return plain_gather(made, index, weight), plain_gather(list(outs), index, None)

    arguments = (cells, weight, *outs)
    results = []
    for function in (have, want):
        first, second = function(*arguments)
        loss = (first.sin() * torch.arange(1.0, 4)).sum() + second.cos().sum()
        grads = (
            torch.autograd.grad(loss, arguments, allow_unused=True) if loss.requires_grad else []
        )
        results.append([torch.zeros_like(a) if g is None else g for g, a in zip(grads, arguments)])  # noqa: B905
    for mine, plain in zip(*results, strict=False):
        torch.testing.assert_close(mine, plain)
    if index.numel():
        assert torch.autograd.gradcheck(have, arguments)
        assert torch.autograd.gradgradcheck(have, arguments)


@pytest.mark.parametrize("share", [0, 1, 2])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_routed_products(share: int, scatter: bool, transposed: bool) -> None:
    torch.manual_seed(0)
    index = torch.tensor([[0, 2], [3, 0], [2, 2], [-1, 0]])  # branch 1 gets nothing
    offsets, order = routing.route(index, 3)
    rows = index.numel() // share if share else index.numel()
    x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    shape = (3, 4, 5) if transposed else (3, 5, 4)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    rest = (transposed, share, scatter)
    assert torch.autograd.gradcheck(
        lambda x, w, b: routing.routed_linear(x, offsets, order, w, b, *rest), (x, weight, bias)
    )
    frozen = routing.routed_linear(x, offsets, order, weight.detach(), None, *rest)
    (grad,) = torch.autograd.grad(frozen.sum(), x)
    assert grad.shape == x.shape


def test_routes_have_no_gradient() -> None:
    offsets, order = routing.route(torch.tensor([[0, 1]]), 2)
    assert not offsets.requires_grad and not order.requires_grad


BAD = {
    "branch 1 returned torch.float64, branch 0 torch.float32": (
        [torch.zeros(1, 2), torch.zeros(1, 2).double()], [[0], [1]], None),
    r"branch 1 returned cells of shape \(3,\), branch 0 \(2,\)": (
        [torch.zeros(1, 2), torch.zeros(1, 3)], [[0], [1]], None),
    "branch 1 returned 3 dimensions, branch 0 2": (
        [torch.zeros(1, 2), torch.zeros(1, 2, 1)], [[0], [1]], None),
    "branch 0 returned 2 rows for 1 cells": (
        [torch.zeros(2, 2), torch.zeros(1, 2)], [[0], [1]], None),
    "at least one branch": ([], [[0]], None),
    r"weight \(2,\) must have the shape of index": (
        [torch.zeros(2, 2)], [[0], [0]], torch.ones(2)),
    r"weight \(2, 2\) must have index's shape \(2, 1\)": (
        [torch.zeros(2, 2)], [[0], [0]], torch.ones(2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_told_by_branch(message: str) -> None:
    outs, index, weight = BAD[message]
    with pytest.raises((ValueError, RuntimeError), match=message):
        routing.gather(outs, torch.tensor(index), weight)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), "index is torch.int32; branches are named by int64"),
        (torch.zeros(2, 1, 1, dtype=torch.int64), "index has 3 dimensions"),
        (torch.zeros(3, 1, dtype=torch.int64), "of 3 cells, but there are 2"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index: torch.Tensor, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        routing.scatter(torch.zeros(2, 4), index, 2)


def test_observers_see_each_route_once_and_no_gradients() -> None:
    seen: list[tuple[list[int], int]] = []
    index, x = torch.tensor([0, 1]), torch.randn(2, 3, requires_grad=True)
    with routes.observed(lambda i, n: seen.append((i.tolist(), n))):
        routing.route(index, 4)
        routing.gather(routing.scatter(x, index, 2), index, None).sum().backward()
    routing.route(index, 5)
    assert seen == [([0, 1], 4), ([0, 1], 2)]


# -- export ----------------------------------------------------------------------------------------


class Branchy(nn.Module):
    """scatter, branches of three kinds, gather; the routes are an input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "convolution":
            last = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2))
            parts = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), last]
        else:
            mlp = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 5))
            parts = [nn.Linear(6, 5), mlp, nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5))]
        self.branches = nn.ModuleList(parts)

    def forward(self, x, index, weight):
        parts = torch.ops.plait.scatter(x, index, 3)
        outs = [branch(part) for branch, part in zip(self.branches, parts, strict=True)]
        return torch.ops.plait.gather(outs, index, weight)


@pytest.mark.parametrize("kind", ["vectors", "sequences", "convolution"])
def test_it_exports_as_one_graph_for_any_routes(kind: str) -> None:
    torch.manual_seed(0)
    cell = {"vectors": (6,), "sequences": (7, 6), "convolution": (3, 8, 8)}[kind]
    model, size = Branchy(kind).eval(), Dim("n", min=1)
    with torch.no_grad():
        arguments = torch.randn(4, *cell), torch.randint(0, 4, (4, 2)), torch.rand(4, 2)
        sizes = ({0: size}, {0: size}, {0: size})
        program = export(model, arguments, dynamic_shapes=sizes, strict=False)
        names = [str(n.target) for n in program.graph.nodes]
        assert names.count("plait.scatter.default") == names.count("plait.gather.default") == 1
        assert not any(n.op == "call_module" for n in program.graph.nodes)
        run = program.module()
        routings = (
            [[0, 1], [2, 3]], [[1, 1], [1, 1], [1, 1]], [[3, 3], [-1, 9]], [[2, 0]],
            torch.randint(0, 4, (9, 2)).tolist(),
        )  # fmt: skip
        for routing_ in routings:
            index = torch.tensor(routing_)
            given = torch.randn(len(index), *cell), index, torch.rand(index.shape)
            torch.testing.assert_close(run(*given), model(*given))
