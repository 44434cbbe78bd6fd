"""Memory that steps touch: whether two views may share a byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .plan import TensorRef
from .sizes import evaluate

ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "float32": 4, "int64": 8, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Memory that a step touches: elements of a strided view, for telling overlap."""

    space: str  # "arena" or the buffer's name
    start: int  # bytes
    extent: int  # bytes from the first to past the last element
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def overlaps(self, other: Span) -> bool:
        """Whether the two views may share a byte (False only when they certainly do not)."""
        if self.space != other.space:
            return False
        if self.start + self.extent <= other.start or other.start + other.extent <= self.start:
            return False
        return _may_meet(self, other)


def _may_meet(a: Span, b: Span) -> bool:
    """Whether two views that lie across each other share an element.

    Exact for equal strides: an element is shared if the distance between the views is a sum of
    ``c_k * stride_k`` with every c_k in reach of both. So slices of one concatenation are told
    apart. Anything unusual counts as meeting.
    """
    if a.strides != b.strides or a.itemsize != b.itemsize or (b.start - a.start) % a.itemsize:
        return True
    order = sorted(range(len(a.strides)), key=lambda i: -a.strides[i])
    if any(a.strides[i] <= 0 for i in order):
        return True
    reach = [0] * (len(order) + 1)  # how far the dimensions from this one inwards go
    for k in reversed(range(len(order))):
        i = order[k]
        reach[k] = reach[k + 1] + (max(a.shape[i], b.shape[i]) - 1) * a.strides[i]

    def solvable(k: int, distance: int) -> bool:
        if k == len(order):
            return distance == 0
        i, inner = order[k], reach[k + 1]
        stride = a.strides[i]
        low = max(-((inner - distance) // stride), 1 - b.shape[i])
        high = min((distance + inner) // stride, a.shape[i] - 1)
        if high - low > 3:
            return True
        return any(solvable(k + 1, distance - c * stride) for c in range(low, high + 1))

    return solvable(0, (b.start - a.start) // a.itemsize)


def span_of(ref: TensorRef, space: str, base: int, values: Mapping[str, int]) -> Span:
    """The memory of ``ref`` inside ``space``, whose buffer starts at byte ``base`` of it."""
    size = ITEMSIZE[ref.dtype]
    shape = tuple(evaluate(d, values) for d in ref.shape)
    strides = tuple(evaluate(s, values) for s in ref.strides)
    offset = evaluate(ref.offset, values)
    reach = sum((d - 1) * s for d, s in zip(shape, strides, strict=True)) + 1 if all(shape) else 0
    start = base + offset * size
    kept = [(d, s) for d, s in zip(shape, strides, strict=True) if d != 1]
    return Span(
        space,
        start,
        max(0, reach) * size,
        size,
        tuple(d for d, _ in kept),
        tuple(s for _, s in kept),
    )
