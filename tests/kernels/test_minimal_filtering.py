"""Minimal filters compute correlations exactly; their additions are the matrices they stand for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest

from plait.kernels.minimal_filtering import (
    MOST_TAPS,
    additions,
    filter_of,
    filters,
)


def times(matrix: Any, vector: Sequence[Any]) -> list[Any]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_filters_correlate(stride: int) -> None:
    for taps in range(1, MOST_TAPS + 2):
        for made in filters(taps, stride):
            weights = [Fraction(random.randint(-99, 99)) for _ in range(taps)]
            data = [random.randint(-99, 99) for _ in range(made.span)]
            assert made.span == (made.outputs - 1) * stride + taps
            products = [
                a * b
                for a, b in zip(times(made.weights, weights), times(made.inputs, data), strict=True)
            ]
            want = [
                sum(w * data[i * stride + t] for t, w in enumerate(weights))
                for i in range(made.outputs)
            ]
            assert times(made.gather, products) == want
            assert {e for row in made.gather + made.inputs for e in row} <= {0, 1, -1}
            assert made.noise <= 2


def test_how_much_they_save() -> None:
    known = {
        (3, 1, 2): 4, (2, 1, 3): 4, (5, 1, 2): 7, (7, 1, 6): 23, (3, 2, 3): 7, (7, 2, 2): 10
    }  # fmt: skip
    for (taps, stride, outputs), products in known.items():
        assert filter_of(taps, stride, outputs).products == products
    assert [f.products for f in filters(1, 2)] == [1]
    assert [(f.outputs, f.products) for f in filters(MOST_TAPS + 1, 1)] == [(1, MOST_TAPS + 1)]
    assert [(f.outputs, f.products) for f in filters(3, 3)] == [(1, 3)]


def test_shared_sums_are_computed_once() -> None:
    for taps in range(1, MOST_TAPS + 1):
        for made in filters(taps, 1) + filters(taps, 2):
            for matrix in (made.inputs, made.gather):
                sums = additions(matrix)
                data = [random.randint(-99, 99) for _ in matrix[0]]
                values = list(data)
                for i, j, sign in sums.steps:
                    values.append(values[i] + sign * values[j])
                assert [values[i] * sign for i, sign in sums.rows] == times(matrix, data)
                plain = sum(sum(map(abs, row)) - 1 for row in matrix)
                assert len(sums.steps) <= plain
    assert len(additions(filter_of(7, 1, 6).inputs).steps) < 40  # 53 one by one


def test_noise_of_the_known_filter() -> None:
    # F(2, 3) evaluates at 0, 1, -1 and infinity; by hand.
    assert filter_of(3, 1, 2).noise == pytest.approx((5 / 3) ** 0.5)
