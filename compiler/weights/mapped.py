"""The weights of a saved program, in a file of this process instead of in memory.

A model that is loaded under a budget must not be in memory as a whole at any moment, so its weights
are copied piece by piece from the saved file to a file without a name, checked on the way, and
mapped from there. What becomes of the saved file later does not matter then.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import IO, Any

import torch

from ...runtime.bank import HUGE
from .budget import WeightStore
from .safetensors_file import kind_of


def read_mapped(
    source: IO[bytes], store: WeightStore, saw: Callable[[bytes], object]
) -> dict[str, torch.Tensor]:
    """The tensors of a file in safetensors' format, each with a storage of its own.

    ``saw`` is told all bytes in order. Raises ValueError where ``source`` is no such file,
    FileError where there is no room for another.
    """
    file = store.file()
    while content := source.read(HUGE):
        saw(content)
        with store.reported():
            file.write(content)
    mapped = file.map()
    try:
        length = int.from_bytes(_bytes(mapped, 0, 8), "little")
        header: dict[str, Any] = json.loads(_bytes(mapped, 8, length))
        header.pop("__metadata__", None)
        tensors = {
            name: mapped.tensor(8 + length + int(entry["data_offsets"][0]), *kind_of(entry))
            for name, entry in header.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"weights: {error!r}") from None
    for tensor in filter(torch.Tensor.numel, tensors.values()):
        store.note(tensor, mapped)
    return tensors


def _bytes(mapped: Any, begin: int, count: int) -> bytes:
    return mapped.tensor(begin, (count,), torch.uint8).numpy().tobytes()
