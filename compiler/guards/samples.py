"""Words of tensors that torch counts no changes of: what was made in inference mode.

All that notices a change within such a tensor is its memory, and to compare all of that would take
as long as a run. Whatever writes to a tensor as a whole, as an optimizer does or loading a state,
changes some of a few words spread over it; one element that is written alone may stay unnoticed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from torch import Tensor

from ..capture.arguments import extent, is_plain

COUNT = 16
"""Words of a tensor; of one of more dimensions at least one for each index of the first, as of
experts, up to `MOST`."""
MOST = 128
WORD = 8

Row = tuple[int, int]
"""An address, and the word there."""


def uncounted(tensor: Tensor) -> bool:
    """Whether torch does not count what is written to ``tensor``, but its memory can be read."""
    return tensor.is_inference() and tensor.device.type == "cpu" and is_plain(tensor)


def rows(tensors: Iterable[Tensor]) -> list[Row]:
    """A few words of each of some `uncounted` tensors, in the order of their addresses."""
    places: set[int] = set()
    for tensor in tensors:
        begin, end = extent(tensor)
        if begin == end:
            continue
        first, last = begin // WORD, (end - 1) // WORD
        count = max(COUNT, 2 * min(tensor.shape[0], MOST) if tensor.ndim > 1 else 0)
        places |= {first + (last - first) * k // (count - 1) for k in range(count)}
    return [(WORD * place, word(WORD * place)) for place in sorted(places)]


def word(address: int) -> int:
    """What is at ``address`` in memory."""
    return ctypes.c_uint64.from_address(address).value
