"""Top-k and sorting of short rows, against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import plait
from plait.runtime.plan import KernelStep


def run(function, *tensors: Tensor) -> list[Tensor]:
    """The results of a compiled function that is all kernels."""
    compiled = plait.compile(function, tune="off")
    got = compiled(*tensors)
    assert all(isinstance(s, KernelStep) for s in compiled.plan.steps)
    return list(got) if isinstance(got, tuple) else [got]


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows without equal elements."""
    count = shape[-1]
    flat = torch.stack(
        [torch.randperm(count) for _ in range(max(1, torch.Size(shape[:-1]).numel()))]
    )
    return (flat.view(shape) - count // 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("largest", [True, False])
def test_topk_gives_values_and_their_places_in_order(dtype: torch.dtype, largest: bool) -> None:
    torch.manual_seed(0)
    x = rows(3, 5, 24, dtype=dtype)
    for k in (1, 2, 8, 17):
        values, places = run(lambda x, k=k: torch.topk(x, k, -1, largest), x)
        want = torch.topk(x, k, -1, largest)
        assert torch.equal(values, want.values) and torch.equal(places, want.indices)
        assert values.dtype == dtype


def test_any_dimension_and_strides() -> None:
    torch.manual_seed(1)
    x = rows(4, 6, 9).permute(2, 0, 1)
    for dim in (0, 1, 2):
        values, places = run(lambda x, dim=dim: torch.topk(x * 1.5, 3, dim), x)
        want = torch.topk(x * 1.5, 3, dim)
        assert torch.equal(values, want.values)
        assert torch.equal(torch.gather(x * 1.5, dim, places), want.values)


@pytest.mark.parametrize("largest", [True, False])
def test_of_equal_elements_those_come_first_that_torch_takes(largest: bool) -> None:
    """Partitions for most, heaps where k is small; NaN is larger than infinity."""
    torch.manual_seed(2)
    for size, k, ordered in ((11, 4, True), (40, 17, True), (40, 6, False), (130, 2, True)):
        x = torch.randn(60, size).relu().round()
        x[:, size // 2 :] += torch.where(torch.rand(60, size - size // 2) > 0.7, -torch.inf, 0.0)
        x[3, 1:5] = torch.nan
        found = run(lambda x, a=(k, -1, largest, ordered): torch.topk(x, *a), x)
        for got, want in zip(found, torch.topk(x, k, -1, largest, ordered), strict=True):
            assert torch.equal(got.nan_to_num(7.5), want.nan_to_num(7.5))


def test_many_lopsided_partitions_end_in_a_heap() -> None:
    """In this row the median of three is always among the first elements."""
    odd = [-32, -29, -30, -27, -28, -25, -26, -31, -64, -64, -64, -64]
    pairs = [v for k, value in enumerate(odd) for v in (value, -1 - 2 * k)]
    rest = [-38, -36, -34, -35, -37, -33, -39, -24, *range(0, -24, -2), *[-64] * 20]
    x = torch.tensor([pairs + rest, rest + pairs], dtype=torch.float32)
    _, places = run(lambda x: torch.topk(x, 40, -1, True, False), x)
    assert torch.equal(places, torch.topk(x, 40, -1, True, False).indices)


def test_where_torch_leaves_the_order_open_other_sorts_are_the_librarys() -> None:
    compiled = plait.compile(lambda x: (torch.argsort(x, -1), torch.sort(x)[1]), tune="off")
    x = torch.randn(9, 30).round()
    for got, want in zip(compiled(x), (torch.argsort(x, -1), torch.sort(x)[1]), strict=True):
        assert torch.equal(got, want)
    assert any(r.id == "PLT-TOP-005" for r in compiled.remarks)
    (values,) = run(lambda x: torch.sort(x)[0], x)
    assert torch.equal(values, torch.sort(x)[0])


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.sampled_from([-2, -1, 0, 1, 2]), min_size=1, max_size=40),
    descending=st.booleans(),
)
def test_stable_sort_is_torchs(values: list[int], descending: bool) -> None:
    x = torch.tensor([values, values[::-1]], dtype=torch.float32)
    found, places = _SORT[descending](x)
    want = torch.sort(x, stable=True, descending=descending)
    assert torch.equal(found, want.values) and torch.equal(places, want.indices)


def _sorter(descending: bool):
    return plait.compile(
        lambda x: tuple(torch.sort(x, stable=True, descending=descending)), tune="off"
    )


_SORT = {flag: _sorter(flag) for flag in (False, True)}


def test_argsort_and_no_elements() -> None:
    x = rows(2, 7)
    (places,) = run(lambda x: torch.argsort(x, dim=-1, stable=True), x)
    assert torch.equal(places, torch.argsort(x, -1))
    values, places = run(lambda x: torch.topk(x, 0), x)
    assert values.shape == places.shape == (2, 0)


def test_long_lists_stay_library_and_say_so() -> None:
    compiled = plait.compile(lambda x: torch.sort(x)[0], tune="off")
    x = rows(2, 500)
    assert torch.equal(compiled(x), torch.sort(x)[0])
    assert any(r.id == "PLT-TOP-004" for r in compiled.remarks)
