"""Tensors made where others of the same size were freed.

Memory that returns to the system when a tensor is freed is mapped again for the next one, page by
page, which takes longer than writing it does. A process whose tensors come and go in the same sizes
can keep some of it, and still hold little more than what lives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

_users: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_LEAST = 32 << 10
"""Bytes below which the C library keeps freed memory itself."""


class Recycled:
    """Makes tensors on the CPU. Where it asks the system for memory, it keeps no more
    than ``spare`` bytes that nobody uses. For one thread at a time.
    """

    def __init__(self, spare: int) -> None:
        self.spare = spare
        self._kept: list[torch.UntypedStorage] = []  # who was used last is last

    def __call__(
        self, shape: Sequence[int], strides: Sequence[int] | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """An uninitialised tensor, dense, of these strides; None for those of a contiguous one."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _LEAST or _users is None:
            empty = torch.empty(shape, dtype=dtype)
            return empty if strides is None else empty.as_strided(shape, strides)
        free = [k for k, s in enumerate(self._kept) if _users(s._cdata) == 1]
        found = next((k for k in free if self._kept[k].nbytes() == nbytes), None)
        if found is None:
            self._forget(free)
            self._kept.append(torch.UntypedStorage(nbytes))
        else:
            self._kept.append(self._kept.pop(found))
        return torch.empty(0, dtype=dtype).set_(self._kept[-1], 0, tuple(shape), strides or ())

    def _forget(self, free: Sequence[int]) -> None:
        """Lets go what is too much of the ``free``, those that were used first."""
        sizes = {k: self._kept[k].nbytes() for k in free}
        left, gone = sum(sizes.values()), set[int]()
        for k, size in sizes.items():
            if left > self.spare:
                gone.add(k)
                left -= size
        self._kept = [s for k, s in enumerate(self._kept) if k not in gone]
