"""cellwise: which branches may run on some of their cells, or on strangers' too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait
from plait.kernels.routing import route, routed_linear
from plait.passes.cellwise import mixing
from plait.passes.ir import branches_of

Make = Callable[[Tensor], Tensor]


class Does(nn.Module):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(x)


class Attends(nn.Module):
    """Attention among the second dimension; ``x`` is [rows, positions, 8]."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class Experts(nn.Module):
    """Two of three experts for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, 8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        index = x[:, :3].topk(2, -1).indices
        offsets, order = route(index, 3)
        y = routed_linear(x, offsets, order, self.up, None, False, 2, False)
        y = routed_linear(y.relu(), offsets, order, self.down, None, False, 0, True)
        return y.view(x.shape[0], 2, 8).sum(1)


def inner(*branches: nn.Module) -> nn.Module:
    return plait.Router(branches, lambda x: x[:, : len(branches)].softmax(1), top_k=len(branches))


def among_rows(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def position(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]).unsqueeze(1)


VECTORS: dict[str, tuple[nn.Module | Make, bool]] = {
    "mlp": (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), True),
    "norms": (nn.Sequential(nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)), True),
    "softmax": (lambda x: x.softmax(1), True),
    "sorted": (lambda x: x.sort(-1).values + x.topk(8, -1).values, True),
    "views": (lambda x: x.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8).flip(-1), True),
    "cut": (lambda x: torch.cat([x[:, 2:], x.chunk(4, 1)[0]], 1), True),
    "gathered": (lambda x: x.gather(1, x.argsort(1)) + x[:, [1, 0, 2, 3, 4, 5, 7, 7]], True),
    "products": (lambda x: (x[:, :, None] @ x[:, None, :]).sum(1), True),
    "filled": (lambda x: x.new_ones(x.shape[0], 8) * x + torch.zeros_like(x), True),
    "spread": (lambda x: x[:, :1].expand(-1, 8) + torch.ones(8).expand(x.shape[0], -1), True),
    "folded": (lambda x: x.view(-1, 4).cumsum(1).view(-1, 8), True),
    "routed": (inner(nn.Linear(8, 8), nn.ReLU()), True),
    "experts": (Experts(), True),
    "sum": (lambda x: x - x.sum(0), False),
    "softmax of rows": (lambda x: x.softmax(0), False),
    "running sum": (lambda x: x.cumsum(0), False),
    "turned": (lambda x: x.flip(0), False),
    "shifted": (lambda x: torch.cat([x[1:], x[:1]]), False),
    "padded": (lambda x: F.pad(x, (0, 0, 1, 0))[: x.shape[0]], False),
    "counted": (lambda x: x / x.shape[0], False),
    "numbered": (lambda x: x + position(x), False),
    "sorted rows": (lambda x: x.sort(0).values, False),
    "first row": (lambda x: x + x[:1], False),
    "rows by rows": (lambda x: (x @ x.t()) @ x, False),
    "other half": (lambda x: x.view(2, -1, 4).transpose(0, 1).reshape(-1, 8), False),
    "halves": (lambda x: torch.stack([x, x.relu()], 0).view(-1, 2, 8).sum(1), False),
    "looked up": (lambda x: x[x[:, 0].argsort()], False),
    "routed sum": (inner(nn.Linear(8, 8), Does(lambda x: x - x.sum(0))), False),
}
SEQUENCES: dict[str, tuple[nn.Module | Make, bool]] = {
    "attention": (Attends(), True),
    "convolution": (nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.MaxPool1d(3, 1, 1)), True),
    "mixed": (lambda x: x.mean(1, keepdim=True) + x.transpose(1, 2).softmax(-1).mT, True),
    "attention of rows": (
        lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).mT.permute(2, 0, 1),
        False,
    ),
    "running sum": (lambda x: x.flatten(0, 1).cumsum(0).view(-1, 3, 8), False),
}


@pytest.mark.parametrize(("cases", "shape"), [(VECTORS, (8,)), (SEQUENCES, (3, 8))])
def test_what_is_said_of_branches_is_so(cases: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    branches = [b if isinstance(b, nn.Module) else Does(b) for b, _ in cases.values()]
    model = plait.Router(branches, lambda x: x.flatten(1)[:, 0].long(), combine="sum").eval()
    compiled = plait.compile(model, pipeline="normalize,outline-branches", tune="off")
    x = torch.rand(6, *shape) * len(cases)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        assert compiled.graph is not None, compiled.remarks
        graphs = dict(branches_of(compiled.graph))
        for b, (name, (_, alone)) in enumerate(cases.items()):
            whole, part = model.branches[b](x), model.branches[b](x[2:5])
            assert torch.allclose(whole[2:5], part, 1e-4, 1e-4) is alone, name
            assert (mixing(graphs[f"scatter_branch_{b}"]) is None) is alone, name
