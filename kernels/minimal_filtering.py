"""Minimal filtering: short correlations with fewer multiplications than their definition.

A `Filter` computes ``outputs`` neighbouring results of a correlation with ``taps`` weights,
``y[i] = sum of w[t] x[i * stride + t]``, as ``A ((G w) * (B x))``: one multiplication for each row
of G and B, and additions. G w is known ahead. Two filters, one along each axis, make a 2-d one
(Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", CVPR 2016).

The basic ones are F(2, 2), F(2, 3) and F(3, 2), whose transforms only add and subtract: they
evaluate polynomials at 0, 1, -1 and infinity. Longer kernels and strides are made of them rather
than of more points, which would cost digits:

* taps side by side are filters of their own whose results are added, and so are the two phases of
  stride 2 (Huang et al., "DWM: A Decomposable Winograd Method for Convolution Acceleration",
  AAAI 2020);
* outputs side by side are, too;
* pairs of taps and outputs are the elements of a shorter filter (nesting; Agarwal and Burrus,
  "Fast One-Dimensional Digital Convolution by Multidimensional Techniques", 1974).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

Matrix = tuple[tuple[Fraction, ...], ...]
OUTPUTS = (2, 3, 4, 6)  # of a filter of several taps
MOST_TAPS = 9
_ZERO, _ONE = Fraction(0), Fraction(1)


@dataclass(frozen=True)
class Filter:
    """``y = gather ((weights w) * (inputs x))``.

    ``gather`` is [outputs, products], ``weights`` [products, taps] and ``inputs`` [products, span],
    where ``span`` elements of x give all outputs. Elements of ``gather`` and ``inputs`` are 0, 1
    and -1.
    """

    gather: Matrix
    weights: Matrix
    inputs: Matrix

    @property
    def outputs(self) -> int:
        return len(self.gather)

    @property
    def products(self) -> int:
        return len(self.weights)

    @property
    def taps(self) -> int:
        return len(self.weights[0])

    @property
    def span(self) -> int:
        return len(self.inputs[0])

    @property
    def saved(self) -> float:
        """Multiplications of the definition for each of this one's."""
        return self.outputs * self.taps / self.products

    @property
    def noise(self) -> float:
        """How many times the definition's rounding error this one has, for independent inputs.

        The error of a product's sum over channels grows with that sum's own standard deviation.
        """
        sizes = [
            float(sum(g * g for g in row) * sum(b * b for b in data))
            for row, data in zip(self.weights, self.inputs, strict=True)
        ]
        total = sum(
            float(a * a) * s for row in self.gather for a, s in zip(row, sizes, strict=True)
        )
        return math.sqrt(total / (self.outputs * self.taps))


@functools.cache
def filters(taps: int, stride: int) -> tuple[Filter, ...]:
    """Filters that multiply less than the definition, one for each number of outputs.

    For one tap, or where none is known, the definition of a single output.
    """
    found = []
    if 1 < taps <= MOST_TAPS and stride in (1, 2):
        for outputs in OUTPUTS:
            firsts = list(range(stride))
            phases = [_least(outputs, -(-(taps - p) // stride)) for p in firsts]
            made = _added(phases, firsts, stride, taps)
            if made.products < outputs * taps:
                found.append(made)
    return tuple(found) or (_definition(taps),)


def filter_of(taps: int, stride: int, outputs: int) -> Filter:
    """The one of `filters` with so many outputs."""
    return next(f for f in filters(taps, stride) if f.outputs == outputs)


@functools.cache
def _least(outputs: int, taps: int) -> Filter:
    """The filter of stride 1 with the fewest products, and of those the one with the least noise.

    With at most six outputs none has a noise of more than 2; deeper nesting would cost digits.
    """
    if taps == 1:
        return Filter(_identity(outputs), ((_ONE,),) * outputs, _identity(outputs))
    if outputs == 1:
        return _definition(taps)
    found = [_evaluated(outputs, taps)] if outputs + taps <= 5 else []
    for k in range(1, taps):
        found.append(_added([_least(outputs, k), _least(outputs, taps - k)], [0, k], 1, taps))
    for k in range(1, outputs):
        found.append(_below(_least(k, taps), _least(outputs - k, taps)))
    if outputs % 2 == 0 and taps > 2:
        outer = _least(outputs // 2, -(-taps // 2))
        found.append(_cut(_nested(outer, _evaluated(2, 2)), taps))
    return min(found, key=lambda f: (f.products, f.noise))


def _identity(size: int) -> Matrix:
    return tuple(tuple(_ONE if i == j else _ZERO for j in range(size)) for i in range(size))


def _definition(taps: int) -> Filter:
    return Filter(((_ONE,) * taps,), _identity(taps), _identity(taps))


def _evaluated(outputs: int, taps: int) -> Filter:
    """F(outputs, taps), of at most four points: 0, 1, -1 and infinity."""
    return {(2, 2): _F22, (2, 3): _F23, (3, 2): _F32}[outputs, taps]


def _matrix(rows: str, divisor: int = 1) -> Matrix:
    return tuple(tuple(Fraction(int(e), divisor) for e in row.split()) for row in rows.split(","))


_F22 = Filter(
    _matrix("1 1 0, 0 1 1"),
    _matrix("1 0, 1 1, 0 1"),
    _matrix("1 -1 0, 0 1 0, 0 -1 1"),
)
_F23 = Filter(
    _matrix("1 1 1 0, 0 1 -1 1"),
    _matrix("2 0 0, 1 1 1, 1 -1 1, 0 0 2", 2),
    _matrix("1 0 -1 0, 0 1 1 0, 0 -1 1 0, 0 -1 0 1"),
)
_F32 = Filter(
    _matrix("1 1 1 0, 0 1 -1 0, 0 1 1 1"),
    _matrix("2 0, 1 1, 1 -1, 0 2", 2),
    _matrix("1 0 -1 0, 0 1 1 0, 0 -1 1 0, 0 -1 0 1"),
)


def _placed(matrix: Matrix, width: int, first: int, step: int = 1) -> Matrix:
    """The matrix with its columns at ``first``, ``first + step``, ... of ``width``."""
    rows = []
    for row in matrix:
        wide = [_ZERO] * width
        wide[first : first + step * len(row) : step] = row
        rows.append(tuple(wide))
    return tuple(rows)


def _added(parts: list[Filter], firsts: list[int], stride: int, taps: int) -> Filter:
    """The sum of filters that have one tap in ``stride`` of ``taps`` each, from ``firsts`` on."""
    span = (parts[0].outputs - 1) * stride + taps
    weights: Matrix = ()
    inputs: Matrix = ()
    for part, first in zip(parts, firsts, strict=True):
        weights += _placed(part.weights, taps, first, stride)
        inputs += _placed(part.inputs, span, first, stride)
    gather = tuple(sum(rows, ()) for rows in zip(*(p.gather for p in parts), strict=True))
    return Filter(gather, weights, inputs)


def _below(first: Filter, second: Filter) -> Filter:
    """Outputs of one after those of the other."""
    products = first.products + second.products
    span = first.outputs + second.outputs + first.taps - 1
    return Filter(
        _placed(first.gather, products, 0) + _placed(second.gather, products, first.products),
        first.weights + second.weights,
        _placed(first.inputs, span, 0) + _placed(second.inputs, span, first.outputs),
    )


def _nested(outer: Filter, inner: Filter) -> Filter:
    """The outer filter with pairs for elements, whose products the inner one computes."""
    assert inner.outputs == inner.taps == 2
    span = 2 * outer.outputs + 2 * outer.taps - 1
    inputs = []
    for row in outer.inputs:
        for data in inner.inputs:
            sums = [_ZERO] * span
            for i, a in enumerate(row):
                for j, b in enumerate(data):
                    if a and b:
                        sums[2 * i + j] += a * b
            inputs.append(tuple(sums))
    return Filter(
        _product(outer.gather, inner.gather), _product(outer.weights, inner.weights), tuple(inputs)
    )


def _product(a: Matrix, b: Matrix) -> Matrix:
    """Kronecker's product."""
    return tuple(tuple(x * y for x in row for y in other) for row in a for other in b)


def _cut(whole: Filter, taps: int) -> Filter:
    """With the last taps zero: inputs that only those would meet are not read."""
    weights = tuple(row[:taps] for row in whole.weights)
    inputs = tuple(row[: whole.outputs + taps - 1] for row in whole.inputs)
    kept = [i for i in range(whole.products) if any(weights[i]) and any(inputs[i])]
    return Filter(
        tuple(tuple(row[i] for i in kept) for row in whole.gather),
        tuple(weights[i] for i in kept),
        tuple(inputs[i] for i in kept),
    )


@dataclass(frozen=True)
class Additions:
    """A matrix of 0, 1 and -1 times a vector, as additions of two values each.

    Values are numbered: the vector's elements, then the result of each step ``(i, j, sign)``, which
    is value i plus ``sign`` times value j. Row r of the product is value ``rows[r][0]`` times
    ``rows[r][1]``, a sign.
    """

    steps: tuple[tuple[int, int, int], ...]
    rows: tuple[tuple[int, int], ...]


@functools.cache
def additions(matrix: Matrix) -> Additions:
    """The product with a matrix; sums that several rows share are computed once.

    The pair of terms that most rows hold is summed first (Paar, "Optimized arithmetic for
    Reed-Solomon encoders", 1997).
    """
    rows = [{j: int(e) for j, e in enumerate(row) if e} for row in matrix]
    steps: list[tuple[int, int, int]] = []
    size = len(matrix[0])
    while True:
        pairs = Counter((i, j, row[i] * row[j]) for row in rows for i in row for j in row if i < j)
        if not pairs:
            break
        most = max(pairs.values())
        i, j, sign = min(pair for pair, count in pairs.items() if count == most)
        holders = [row for row in rows if i in row and j in row and row[i] * row[j] == sign]
        if sum(row[i] for row in holders) < 0 and sign < 0:
            i, j = j, i  # so that few rows are negative
        value = size + len(steps)
        steps.append((i, j, sign))
        for row in holders:
            row[value] = row.pop(i)
            row.pop(j)
    return Additions(tuple(steps), tuple(next(iter(row.items())) for row in rows))
