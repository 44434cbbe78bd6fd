"""Recurrent layers and packed sequences: one program for all lengths, and all lengths are right."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import plait
from plait.kernels import recurrent

compile = functools.partial(plait.compile, tune="off", pipeline="normalize")
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True, proj_size=3, dropout=0.5),
        lambda: nn.GRU(4, 6, 2, batch_first=True, bias=False),
        lambda: nn.RNN(4, 6, batch_first=True, nonlinearity="relu"),
    ],
)
def test_lengths_share_a_program(make: Any) -> None:
    model = make().eval()
    compiled = compile(model)
    with torch.no_grad():
        for batch, length in ((3, 5), (3, 7), (3, 9), (2, 4), (4, 11)):
            x = torch.randn(batch, length, 4)
            close(compiled(x), model(x))
    assert len(compiled.programs) <= 3 and sum(p.calls for p in compiled.programs) == 5


class Packs(nn.Module):
    """Packs, goes on with the packed data, and pads again."""

    def __init__(self, kind: Any, total: bool = False) -> None:
        super().__init__()
        self.cells, self.total = kind(4, 6, batch_first=True, bidirectional=True), total
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, lengths: Tensor, states: Any = None) -> Any:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.total)
        data = torch.relu(packed.data) + packed.data
        packed = PackedSequence(
            data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
        out, last = self.cells(packed, states)
        total = x.size(1) if self.total else None
        out, found = pad_packed_sequence(out, True, padding_value=-1.0, total_length=total)
        return self.head(out).softmax(-1), last, found


def lengths() -> list[list[int]]:
    return [[7, 5, 2], [6, 5, 2], [3, 3, 1], [9, 3, 1], [9, 8, 7, 6], [5, 1, 1, 1, 1]]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("total", [False, True])
def test_packed_sequences_share_a_program(kind: Any, total: bool) -> None:
    model = Packs(kind, total).eval()
    compiled = compile(model)
    with torch.no_grad():
        for found in lengths():
            size = torch.tensor(found if total else found[::-1])
            x = torch.randn(len(found), 9, 4)
            close(compiled(x, size), model(x, size))
    assert len(compiled.programs) <= 3 and sum(p.calls for p in compiled.programs) == 6
    assert not [r for r in compiled.remarks if r.kind == "missed" and r.pass_name == "capture"]


def test_packed_sequences_are_arguments_and_results() -> None:
    model = nn.LSTM(4, 6, bidirectional=True).eval()
    compiled = compile(model)
    with torch.no_grad():
        for found in lengths():
            x = [torch.randn(n, 4) for n in found[::-1]]
            packed = pack_sequence(x, enforce_sorted=False)
            have, want = compiled(packed), model(packed)
            assert type(have[0]) is PackedSequence
            close(have, want)
    assert len(compiled.programs) <= 3 and sum(p.calls for p in compiled.programs) == 6


def test_first_states_go_with_their_sequences() -> None:
    model = Packs(nn.GRU).eval()
    compiled = compile(model)
    x, states = torch.randn(3, 9, 4), torch.randn(2, 3, 6)
    with torch.no_grad():
        for found in ([2, 9, 4], [9, 1, 8]):
            size = torch.tensor(found)
            close(compiled(x, size, states), model(x, size, states))
    assert len(compiled.programs) == 1


@pytest.mark.parametrize("wrong", [[2, 5, 7], [10, 5, 2], [5, 2, 0], [5, 2]])
def test_lengths_that_do_not_fit_are_torchs_error(wrong: list[int]) -> None:
    model = Packs(nn.GRU, total=True).eval()
    compiled = compile(model)
    x = torch.randn(3, 9, 4)
    with torch.no_grad():
        compiled(x, torch.tensor([7, 5, 2]))
        with pytest.raises(RuntimeError) as expected:
            model(x, torch.tensor(wrong))
        with pytest.raises(RuntimeError) as found:
            compiled(x, torch.tensor(wrong))
    assert str(found.value) == str(expected.value)


def test_a_saved_program_takes_other_lengths(tmp_path: Path) -> None:
    model = Packs(nn.LSTM).eval()
    compiled = compile(model)
    x = torch.randn(3, 9, 4)
    with torch.no_grad():
        compiled(x, torch.tensor([2, 9, 4]))
        compiled.save(tmp_path / "packs.plait")
        size = torch.tensor([5, 1, 6])
        close(plait.load(tmp_path / "packs.plait")(x, size), model(x, size))


def test_a_switched_on_dropout_between_layers_is_torchs() -> None:
    weights = [torch.randn(18, n) for _ in range(2) for n in (6, 6)]

    def drops(x: Tensor) -> Tensor:
        return torch.gru(x, x.new_zeros(2, 3, 6), weights, False, 2, 0.5, True, False, False)[0]

    compiled = compile(drops)
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("kind", recurrent.KINDS)
def test_operators_are_as_they_are_registered(kind: str) -> None:
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    states = [torch.randn(1, 3, 6) for _ in range(1 + (kind == "lstm"))]
    weights = [torch.randn(gates * 6, n) for n in (4, 6)]
    options = (states, weights, False, 1, False)
    x, size = torch.randn(3, 7, 4), torch.tensor([7, 5, 2])
    data, sizes = recurrent.pack(x, size, True)
    tests = ("test_schema", "test_faketensor")
    check = functools.partial(torch.library.opcheck, test_utils=tests)
    check(recurrent.recur, (kind, x, *options, True))
    check(recurrent.recur_packed, (kind, data, sizes, *options))
    check(recurrent.unpack, (data, sizes, 3, 8, True, 0.5))
    check(recurrent.pack, (x, size, True))
