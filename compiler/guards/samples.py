"""Words of tensors, for changes that torch does not count: those made through ``.data``, and all to
what was made in inference mode.

Nothing tells of them but the memory, and to compare all of that would take as long as a run.
Whatever writes to a tensor as a whole, as merging an adapter does or loading a state, changes some
of a few words spread over it; one element that is written alone may stay unnoticed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from torch import Tensor

from ..capture.arguments import extent, is_plain

FEW, COUNT = 3, 16
"""Words of a tensor that torch counts for, and of others; of one of three dimensions at least one
for each index of the first, as of experts, up to `MOST`."""
MOST = 128
WORD = 8

Row = tuple[int, int]
"""An address, and the word there."""


def rows(tensors: Iterable[Tensor]) -> list[Row]:
    """A few words of each of some tensors whose memory is here, in the order of their addresses."""
    places: set[int] = set()
    for tensor in tensors:
        if tensor.device.type != "cpu" or not is_plain(tensor):
            continue
        begin, end = extent(tensor)
        if begin == end:
            continue
        first, last = begin // WORD, (end - 1) // WORD
        count = COUNT if tensor.is_inference() else FEW
        if tensor.ndim == 3:
            count = max(count, 1 + min(tensor.shape[0], MOST))
        places |= {first + (last - first) * k // (count - 1) for k in range(count)}
    return [(WORD * place, word(WORD * place)) for place in sorted(places)]


def word(address: int) -> int:
    """What is at ``address`` in memory."""
    return ctypes.c_uint64.from_address(address).value
