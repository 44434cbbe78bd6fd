"""Sizes that only the data tells: a mask selects rows, `nonzero` counts. The rest stays compiled.

Such values are computed by library operators; what follows them must neither compare their sizes
while compiling nor be left to the original.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import plait


class LastMarked(nn.Module):
    """The classifier head of encoder-decoders: the last marked position of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        x = self.body(x)
        chosen = x[marks.bool(), :].view(x.shape[0], -1, x.shape[-1])[:, -1, :]
        return torch.tanh(self.head(chosen))


def _scatter_rows(x: Tensor, marks: Tensor) -> Tensor:
    rows = torch.nonzero(marks)
    return torch.zeros_like(x).index_put((rows[:, 0], rows[:, 1]), x[rows[:, 0], rows[:, 1]] * 2)


def _softmax_of_selected(x: Tensor, marks: Tensor) -> Tensor:
    return torch.softmax(x[marks.bool()] * 2, -1).sum(0) + x.mean((0, 1))


def _joined(x: Tensor, marks: Tensor) -> Tensor:
    chosen = x[marks.bool()]
    return torch.cat([chosen.transpose(0, 1), torch.relu(x[0]).transpose(0, 1)], 1).contiguous() + 1


def _windows(x: Tensor, marks: Tensor) -> Tensor:
    chosen = x[marks.bool()].unsqueeze(1).expand(-1, 2, -1)
    return (chosen.reshape(-1, x.shape[-1]) @ x[0].t()).relu()


def _normed(x: Tensor, marks: Tensor) -> Tensor:
    chosen = nn.functional.layer_norm(x[marks.bool()], (8,))
    first, second = chosen.chunk(2, -1)
    return nn.functional.gelu(first) * second


def _masked_scatter(x: Tensor, marks: Tensor) -> Tensor:
    return x.masked_scatter(marks.bool().unsqueeze(-1), x.flip(1) * 3) + 1


def _last_place(x: Tensor, marks: Tensor) -> Tensor:
    return x[marks.bool()].argmax(0) + x[marks.bool()].amax(0).round().long()


CASES: dict[str, Callable[..., Tensor]] = {
    "last-marked": LastMarked().eval(),
    "scatter-rows": _scatter_rows,
    "softmax": _softmax_of_selected,
    "joined": _joined,
    "windows": _windows,
    "normed": _normed,
    "masked-scatter": _masked_scatter,
    "extremes": _last_place,
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_from_data(name: str) -> None:
    function = CASES[name]
    compiled = plait.compile(function, tune="off")
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for marked in (2, 1, 4):
            marks = torch.zeros(2, 5, dtype=torch.int64)
            marks[:, 5 - marked :] = 1
            torch.testing.assert_close(compiled(x, marks), function(x, marks))
    assert compiled.plan is not None, compiled.remarks


def _from_number(x: Tensor, marks: Tensor) -> Tensor:
    count: int = marks[0].sum().item()  # type: ignore[assignment]
    torch._check(count >= 1)
    torch._check(count <= 5)
    return torch.relu(x.narrow(1, 0, count)).sum(1) * 2 + x[:, 0]


def test_a_size_from_a_number() -> None:
    compiled = plait.compile(_from_number, tune="off")
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for marked in (2, 1, 4):
        marks = torch.zeros(2, 5, dtype=torch.int64)
        marks[:, :marked] = 1
        torch.testing.assert_close(compiled(x, marks), _from_number(x, marks))
    assert compiled.plan is not None, compiled.remarks


def _complex_parts(x: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    pairs = torch.view_as_complex((x * 2 + marks[..., None]).reshape(2, 5, 4, 2).contiguous())
    other = torch.relu(torch.relu(x @ x.transpose(1, 2)) @ x)
    return torch.view_as_real(pairs).sum(-1) + other[..., :4], pairs


def test_views_of_the_workspace_live_on() -> None:
    """A library operator that returns a view of an intermediate: its memory is used again."""
    compiled = plait.compile(_complex_parts, tune="off")
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    marks = torch.ones(2, 5, dtype=torch.int64)
    got, want = compiled(x, marks), _complex_parts(x, marks)
    compiled(x + 1, marks)
    torch.testing.assert_close(got, want)
    assert compiled.plan is not None, compiled.remarks
