"""Memory in huge pages, where the system has them (Linux).

Whoever reads hundreds of megabytes of weights in every call meets a new page of 4 KiB every 64
cache lines; finding where it lies walks a page table, and on a virtual machine two. Pages of 2 MiB
make that rare.

Nothing depends on it: what the system declines stays in small pages.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
from typing import Any

import torch

HUGE = 1 << 21
CHUNK = 16 * HUGE
"""Address space that a `Pool` asks for at once."""
_LEAST = mmap.PAGESIZE
"""Bytes of a tensor that is worth a place in a `Pool`."""
_LINE = 64
_COLLAPSE = 25  # MADV_COLLAPSE of <linux/mman.h>, since Linux 6.1


def settle(tensor: torch.Tensor) -> torch.Tensor:
    """Moves the memory of a dense tensor to huge pages without moving it to other addresses;
    returns the tensor."""
    if tensor.device.type == "cpu":
        _collapse(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    return tensor


class Pool:
    """Keeps tensors next to each other, so that small ones share huge pages.

    Memory becomes the process's as it is filled, and the system's again when the last tensor of a
    chunk is gone. For one thread at a time.
    """

    def __init__(self) -> None:
        self._space: mmap.mmap | None = None
        self._base = self._used = self._settled = 0

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a dense tensor holds, contiguous: a copy in the pool, or ``tensor`` itself where it
        is large enough to have pages of its own, or too small to matter."""
        if tensor.nbytes >= CHUNK // 2:
            return settle(tensor)
        room = -(-tensor.nbytes // _LINE) * _LINE
        if tensor.device.type != "cpu" or tensor.nbytes < _LEAST or not self._reserve(room):
            return tensor
        assert self._space is not None
        count = math.prod(tensor.shape)
        flat = torch.frombuffer(self._space, dtype=tensor.dtype, count=count, offset=self._used)
        placed = flat.view(tensor.shape).copy_(tensor)
        self._used += room
        self._settled = _collapse(self._base + self._settled, self._base + self._used) - self._base
        return placed

    def _reserve(self, nbytes: int) -> bool:
        """Makes room in the current chunk or in a new one; False where the system gives none."""
        if self._space is None or self._used + nbytes > CHUNK:
            if sys.platform != "linux":
                return False
            try:
                self._space = mmap.mmap(-1, CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError:
                return False
            self._base = torch.frombuffer(self._space, dtype=torch.uint8).data_ptr()
            self._used = self._settled = 0
        return True


def _collapse(begin: int, end: int) -> int:
    """Puts what lies between two addresses into huge pages as far as it fills such; returns the
    address up to which it did."""
    first, last = -(-begin // HUGE) * HUGE, end // HUGE * HUGE
    if first >= last or sys.platform != "linux":
        return begin
    _libc().madvise(first, last - first, mmap.MADV_HUGEPAGE)  # where it cannot be done at once
    _libc().madvise(first, last - first, _COLLAPSE)
    return last


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
