"""Models that ask tensors for values: a program for each set of answers, right for all of them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait

compile = functools.partial(plait.compile, tune="off")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def ids(compiled: plait.Compiled) -> list[str]:
    return [r.id for r in compiled.remarks if r.pass_name == "capture"]


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor, values: Tensor) -> Any:
        return self.function(self.linear(x), values)


def check(function: Callable[..., Any], *calls: Tensor, programs: int) -> plait.Compiled:
    """Calls a compiled `Net` with each of ``calls``, twice over; returns it."""
    model = Net(function).eval()
    compiled = compile(model)
    x = torch.randn(6, 4)
    for values in (*calls, *calls):
        torch.testing.assert_close(compiled(x, values.clone()), model(x, values.clone()))
    assert len(compiled.programs) == programs, ids(compiled)
    return compiled


def test_branch_on_values_has_a_program_for_each_answer() -> None:
    def function(x: Tensor, mask: Tensor) -> Tensor:
        return x.tanh() if bool(mask.any()) else x * 2

    masks = [torch.tensor(m, dtype=torch.bool) for m in ([0, 0], [0, 1], [1, 0])]
    compiled = check(function, *masks, programs=2)
    assert "PLT-CAP-023" in ids(compiled) and "PLT-CAP-001" not in ids(compiled)


def test_sizes_are_read_from_values() -> None:
    def function(x: Tensor, grid: Tensor) -> Tensor:
        sizes = (grid[:, 0] * grid[:, 1]).tolist()
        heights = [int(height) for height, _ in grid]
        return torch.stack([p.mean(0) * n for p, n in zip(x.split(sizes), heights, strict=True)])

    check(function, torch.tensor([[1, 2], [2, 2]]), torch.tensor([[2, 2], [2, 1]]), programs=2)


def test_masks_choose_rows() -> None:
    def function(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        y[mask] = x[mask].exp() * max(mask.nonzero().shape[0], 1)
        return y, x[mask].view(int(mask.sum()), 2, 2)

    masks = [torch.tensor(m, dtype=torch.bool) for m in ([1, 0, 1, 0, 0, 1], [1] * 6)]
    check(function, *masks, programs=2)


def test_tensors_made_of_numbers_follow_values() -> None:
    def function(x: Tensor, values: Tensor) -> Tensor:
        table = torch.zeros(3, dtype=torch.int64)
        table[1:] = values
        table += 1
        starts = torch.tensor([int(v) for v in values] + [values[0] + 1])
        chosen = torch.cat([torch.arange(n) for n in table.tolist()])
        return x[: chosen.numel()] * chosen[:, None] + starts.max().item()

    check(function, torch.tensor([1, 2]), torch.tensor([2, 1]), torch.tensor([0, 1]), programs=3)


def test_dimensions_that_do_not_decide_stay_open() -> None:
    model = Net(lambda x, mask: x + 1 if bool(mask.all()) else x - 1).eval()
    compiled = compile(model)
    for rows in (3, 5, 7, 9):
        for fill in (0, 1):
            given = torch.randn(rows, 4), torch.full((rows,), fill)
            torch.testing.assert_close(compiled(*given), model(*given))
    assert len(compiled.programs) == 4, compiled.explain()


def test_questions_about_tensors_that_sizes_shape_leave_these_open() -> None:
    def function(x: Tensor, mask: Tensor) -> Tensor:
        rows = mask.shape[0]
        padded = F.pad(mask, (0, -rows % 4)).view((rows + 3) // 4, 4)
        last = torch.arange(rows)[rows // 2 :] + torch.zeros(rows)[: rows - rows // 2]
        full = bool(mask.new_ones(rows).sum() == padded[: rows // 4].sum() + rows % 4)
        return x * 2 if full and bool(last.max() == rows - 1) else x - 1

    model = Net(function).eval()
    compiled = compile(model)
    for rows in (6, 7, 9, 11, 14, 23):
        for hidden in (0, 1):
            mask = torch.ones(rows)
            mask[:hidden] = 0
            x = torch.randn(rows, 4)
            torch.testing.assert_close(compiled(x, mask), model(x, mask))
    assert sorted(len(p.captured.symbols) for p in compiled.programs) == [0, 0, 2, 2]


def test_answers_outlive_the_example() -> None:
    model = Net(lambda x, v: x[: v.numpy().sum()] if bool(v[v > 0].sum() > 1) else x).eval()
    compiled = compile(model)
    x, values = torch.randn(6, 4), torch.tensor([2, 1])
    torch.testing.assert_close(compiled(x, values), model(x, values))
    values[:] = torch.tensor([3, 1])
    torch.testing.assert_close(compiled(x, values), model(x, values))


def test_what_weights_tell_is_no_decision() -> None:
    def function(x: Tensor, values: Tensor) -> Tensor:
        seen = values.clone()
        seen[0] = x.sum().long()  # of the linear layer's weights, too
        return x * 2 if bool((seen > 0).all()) else x

    compiled = check(function, torch.tensor([1, 1]), torch.tensor([0, 1]), programs=0)
    assert "PLT-CAP-001" in ids(compiled)


def test_tensors_filled_by_the_sizes_of_others_are_known() -> None:
    def function(x: Tensor, rows: Tensor) -> Tensor:
        keep = torch.full_like(x[:, 0], True).bool()
        keep[rows] = x.new_zeros(()).bool()
        return x[keep] * len(range(int(keep.sum())))

    check(function, torch.tensor([1, 2]), torch.tensor([0, 0]), programs=2)


def test_buffers_decide_too() -> None:
    class Masking(nn.Module):
        share: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("share", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.share[0] > 0 else x.tanh()

    model = Masking().eval()
    compiled, x = compile(model), torch.randn(3, 4)
    for share in (1.0, 0.5, 0.0, 0.0, 1.0):
        model.share.fill_(share)
        torch.testing.assert_close(compiled(x), model(x))
    model.share = torch.zeros(2)
    torch.testing.assert_close(compiled(x), model(x))
    assert len(compiled.programs) == 2 and "PLT-CAP-001" not in ids(compiled)


def test_an_argument_that_is_written_decides_nothing() -> None:
    def function(x: Tensor, values: Tensor) -> Tensor:
        values.view(-1).add_(1)
        return x * 2 if bool((values > 1).all()) else x

    check(function, torch.tensor([1, 1]), torch.tensor([0, 1]), programs=0)


@pytest.mark.parametrize("chance", [torch.default_generator, torch.Generator()])
def test_chance_decides_nothing(chance: torch.Generator) -> None:
    def function(x: Tensor, p: Tensor) -> Tensor:
        return x * 2 if bool(torch.bernoulli(p, generator=chance).any()) else x

    model = Net(function).eval()
    compiled, x = compile(model), torch.randn(6, 4)
    for seed in range(6):
        chance.manual_seed(seed)
        want = model(x, torch.tensor([0.5]))
        chance.manual_seed(seed)
        torch.testing.assert_close(compiled(x, torch.tensor([0.5])), want)


@pytest.mark.parametrize(("often", "programs"), [(1, 4), (2, 8)])
def test_many_answers_end_with_the_original(often: int, programs: int) -> None:
    model = Net(lambda x, v: x * len(range(v.item()))).eval()
    compiled, x = compile(model), torch.randn(6, 4)
    for n in range(1, 11):
        for _ in range(often):
            torch.testing.assert_close(compiled(x, torch.tensor([n])), model(x, torch.tensor([n])))
    assert len(compiled.programs) == programs
    assert "PLT-CAP-013" in ids(compiled)


def test_such_programs_cannot_be_saved(tmp_path: Path) -> None:
    compiled = check(lambda x, v: x * len(range(v.item())), torch.tensor([2]), programs=1)
    with pytest.raises(plait.PlaitError, match="depends on values"):
        compiled.save(tmp_path / "model.plait")


# -- attributes that a call leaves behind ----------------------------------------------------------


class Noting(nn.Module):
    """Leaves a tensor in an attribute; with ``reads``, what was there before matters."""

    noted: Tensor | None

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.noted, self.reads = nn.Linear(4, 4), None, reads

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.reads and self.noted is not None:
            y = y + self.noted.mean()
        self.noted = y.sum(0)
        return y * 2


def test_an_attribute_is_left_as_the_original_leaves_it() -> None:
    model, twin = Noting().eval(), Noting().eval()
    compiled = compile(model)
    for rows in (3, 3, 5, 7, 1):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), twin(x))
        assert type(model.noted) is Tensor
        torch.testing.assert_close(model.noted, twin.noted)
    assert "PLT-CAP-019" not in ids(compiled) and compiled.plan is not None
    model.noted = twin.noted = None
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(model.noted, twin.noted)


def test_an_attribute_that_is_read_runs_the_original() -> None:
    model, twin = Noting(reads=True).eval(), Noting(reads=True).eval()
    compiled = compile(model)
    for _ in range(4):
        x = torch.randn(3, 4)
        torch.testing.assert_close(compiled(x), twin(x))
        torch.testing.assert_close(model.noted, twin.noted)
    assert "PLT-CAP-019" in ids(compiled)


class Pyramid(nn.Module):
    """Keeps a list of levels; ``reads`` tells what becomes of the list before."""

    def __init__(self, reads: str = "") -> None:
        super().__init__()
        self.reads = reads
        self.levels = [torch.tensor(0.0)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.levels
        self.levels = [x * 2, x.sum(0)] + (before[-2:] if self.reads == "kept" else [])
        for _ in range(2):
            self.levels.append(self.levels[0] + 1)
        last = before[-1] if self.reads == "last" else x * 3
        return last, sum((t.mean() for t in self.levels), torch.tensor(0.0))


def test_a_list_of_tensors_is_left_as_the_original_leaves_it() -> None:
    model, twin = Pyramid().eval(), Pyramid().eval()
    compiled = compile(model)
    for rows in (3, 3, 5, 7, 1, 0):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), twin(x), equal_nan=True)
        torch.testing.assert_close(model.levels, twin.levels)
    assert "PLT-CAP-019" not in ids(compiled) and compiled.plan is not None
    model.levels = twin.levels = []
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(model.levels, twin.levels)


@pytest.mark.parametrize("reads", ["kept", "last"])
def test_a_list_of_tensors_that_is_read_runs_the_original(reads: str) -> None:
    model, twin = Pyramid(reads).eval(), Pyramid(reads).eval()
    compiled = compile(model)
    for _ in range(4):
        x = torch.randn(3, 4)
        torch.testing.assert_close(compiled(x), twin(x))
        torch.testing.assert_close(model.levels, twin.levels)
    assert "PLT-CAP-019" in ids(compiled)


def test_an_attribute_may_be_what_was_given() -> None:
    class Keeping(nn.Module):
        kept: Tensor | None = None

        def __init__(self) -> None:
            super().__init__()
            self.kept = None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = x
            return x * 2

    model = Keeping().eval()
    compiled = compile(model)
    for rows in (3, 3, 4, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), x * 2)
        assert model.kept is x


def test_sizes_may_be_given_as_tensors() -> None:
    """What is added to a size that only a number tells would be asked for later on."""

    def function(x: Tensor, values: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, 0, 0, values[0]))
        padded = nn.functional.interpolate(padded[None], size=values[1] * 2)[0]
        parts = padded.view(values[1], -1, 2)
        return parts if parts.shape[0] > 3 else parts.repeat(values[1], 1, 1)

    check(function, *map(torch.tensor, ([2, 2], [2, 4], [2, 2])), programs=2)


def test_indices_may_be_sequences_of_tensors() -> None:
    def function(x: Tensor, values: Tensor) -> Tensor:
        rows, columns = zip(*values, strict=True)
        free = torch.full_like(x, 1).bool()
        free[rows, columns] = False
        return x[free].view(2, -1).sum(1)

    check(function, torch.tensor([[0, 1], [5, 2]]), torch.tensor([[1, 1], [3, 3]]), programs=2)


def test_masks_may_have_the_size_of_what_they_mask() -> None:
    def function(x: Tensor, values: Tensor) -> Tensor:
        mask = (values == 1).unsqueeze(-1).expand_as(x)
        return x[mask] * 2 if x[mask].numel() > 4 else x.tanh()

    values = [[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0]]
    check(function, *map(torch.tensor, values), programs=3)


def test_what_a_mask_selects_may_be_other_values() -> None:
    def function(x: Tensor, values: Tensor) -> Tensor:
        mask = values >= 0
        chosen = values.masked_select(mask)
        return x[:, : len(chosen)] * chosen + values[mask].sum() if bool(mask.any()) else x

    check(function, *(torch.tensor(v) for v in ([3, -1, 5], [4, -2, 7], [-1, 2, 2])), programs=2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_of_sequences_of_several_lengths(reduction: str) -> None:
    def function(x: Tensor, labels: Tensor) -> Tensor:
        mask = labels >= 0
        lengths = torch.full((2,), 3), mask.sum(-1)
        found = x.view(3, 2, 4).log_softmax(-1)
        return F.ctc_loss(found, labels.masked_select(mask), *lengths, reduction=reduction)

    calls = [[[1, 2], [3, -100]], [[2, 1], [2, -100]], [[1, -100], [3, 2]]]
    check(function, *map(torch.tensor, calls), programs=2)


LOSSES: list[Callable[..., Tensor]] = [
    torch.ctc_loss,
    lambda x, labels, given, wanted: torch.ctc_loss(
        log_probs=x, targets=labels, input_lengths=given, target_lengths=wanted, reduction=0
    ),
    lambda x, labels, given, wanted: F.ctc_loss(x, labels, given.tolist(), wanted.tolist()),
    lambda x, labels, given, wanted: F.ctc_loss(
        x[:, 1], labels[1, : wanted[1]], given[1], wanted[1], blank=3, reduction="none"
    ),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_sequences_however_it_is_called(loss: Callable[..., Tensor]) -> None:
    def function(x: Tensor, labels: Tensor) -> Tensor:
        lengths = torch.full((2,), 3), (labels >= 0).sum(-1)
        return loss(x.view(3, 2, 4).log_softmax(-1), labels.clamp(min=0), *lengths)

    check(function, torch.tensor([[1, 2], [2, -1]]), torch.tensor([[2, 1], [1, 2]]), programs=2)
