"""Tensors in files of safetensors' format, read piece by piece.

The library maps a file as memory that the process may write to, which counts as the process's own:
where that is limited to a share of a model, no file larger than the share could be opened. Here
bytes are read to where they are wanted.

The format: https://huggingface.co/docs/safetensors/index
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its first byte, shape and type."""

    file: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, row: int | slice | None = None) -> torch.Tensor:
        """The tensor, or rows of its first dimension, which follow each other.

        Raises OSError, and EOFError where the file has become shorter.
        """
        shape, begin = self.shape, self.begin
        if row is not None:
            count = shape[0]
            first, end, step = (
                (row % count, row % count + 1, 1) if isinstance(row, int) else row.indices(count)
            )
            assert step == 1, "rows that follow each other"
            begin += first * math.prod(shape[1:]) * self.dtype.itemsize
            shape = shape[1:] if isinstance(row, int) else (max(end - first, 0), *shape[1:])
        made = torch.empty(shape, dtype=self.dtype)
        if made.numel():
            wanted = memoryview(made.view(-1).view(torch.uint8).numpy())
            with open(self.file, "rb", buffering=0) as content:
                content.seek(begin)
                while wanted:
                    got = content.readinto(wanted)
                    if not got:
                        raise EOFError(f"{self.file} is cut short")
                    wanted = wanted[got:]
        return made


def stored(file: Path) -> dict[str, Stored]:
    """The tensors of a file by name.

    Raises OSError, SafetensorError or ValueError where it cannot be read or is no such file.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as checked:  # all of it is there, and nothing overlaps
        names = set(checked.keys())
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header: dict[str, Any] = json.loads(content.read(length))
    return {
        name: Stored(file, 8 + length + int(entry["data_offsets"][0]), *kind_of(entry))
        for name, entry in header.items()
        if name in names
    }


def kind_of(entry: Mapping[str, Any]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of an entry of a file's header. Raises KeyError for an unknown type."""
    return tuple(map(int, entry["shape"])), DTYPES[entry["dtype"]]
