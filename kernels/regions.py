"""Memory that kernels of one GPU launch touch: whether two tensors may share a byte."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from .abi import TensorArg
from .group import Unsupported


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: some storage, known by name, and the byte of its logical element 0."""

    storage: Hashable
    start: int = 0


@dataclass(frozen=True)
class Region:
    """The bytes of a strided tensor: ``dims`` are (size, stride in bytes), sizes above 1."""

    storage: Hashable
    start: int
    itemsize: int
    dims: tuple[tuple[int, int], ...]

    @property
    def stop(self) -> int:
        """The byte after its last one."""
        return self.start + sum((n - 1) * s for n, s in self.dims) + self.itemsize


def region_of(arg: TensorArg, place: Place) -> Region:
    """The bytes of a tensor and its halo. Raises `Unsupported` (PLT-HFU-003) for symbolic sizes."""
    if not all(isinstance(d, int) for d in (*arg.shape, *arg.strides)):
        raise Unsupported(
            "PLT-HFU-003",
            "a tensor has a size known only at run time",
            "compile the kernels for the sizes at hand",
        )
    item = arg.dtype.itemsize
    sizes = [int(n) + sum(halo) for n, halo in zip(arg.shape, arg.halo, strict=True)]
    steps = [int(s) * item for s in arg.strides]
    before = sum(halo[0] * s for halo, s in zip(arg.halo, steps, strict=True))
    dims = tuple((n, s) for n, s in zip(sizes, steps, strict=True) if n > 1 and s != 0)
    return Region(place.storage, place.start - before, item, dims)


def disjoint(a: Region, b: Region) -> bool:
    """Whether two tensors certainly share no byte.

    Beside ranges that do not meet, that is so for slices of one concatenation: where all bytes of
    each, modulo some stride, lie in intervals that do not meet.
    """
    if a.storage != b.storage:
        return True
    if any(s < 0 for _, s in (*a.dims, *b.dims)):
        return False
    if a.stop <= b.start or b.stop <= a.start:
        return True
    for period in {s for _, s in (*a.dims, *b.dims)}:
        spans = []
        for region in (a, b):
            rest = sum((n - 1) * s for n, s in region.dims if s % period) + region.itemsize
            spans.append((region.start % period, region.start % period + rest))
        (low, high), (other_low, other_high) = spans
        if max(high, other_high) <= period and (high <= other_low or other_high <= low):
            return True
    return False
