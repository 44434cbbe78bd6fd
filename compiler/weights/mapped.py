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

# Names of safetensors' format: https://huggingface.co/docs/safetensors/index
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


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
            name: mapped.tensor(8 + length + int(entry["data_offsets"][0]), *_kind(entry))
            for name, entry in header.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"weights: {error!r}") from None
    for tensor in filter(torch.Tensor.numel, tensors.values()):
        store.note(tensor, mapped)
    return tensors


def _bytes(mapped: Any, begin: int, count: int) -> bytes:
    return mapped.tensor(begin, (count,), torch.uint8).numpy().tobytes()


def _kind(entry: dict[str, Any]) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(map(int, entry["shape"])), _DTYPES[entry["dtype"]]
