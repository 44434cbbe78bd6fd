"""Weights that a graph names but does not hold: where they come from, and when they are read.

A graph whose weights are on the meta device compiles like any other; what lowering would prepare
of them (a reordering for one kernel, or the weight itself) is noted as `lowered.Absent`. `fill`
makes them afterwards, a weight at a time, so that a process needs room for what its plan holds and
for little more, however large the model is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ...kernels import packing
from ..errors import FileError

if TYPE_CHECKING:
    from ..lowering.lowered import Absent, Lowered

_BY_BATCH = ("gemm_panels", "paired_panels")
"""Packs that reorder each matrix of a batch by itself."""


_PIECES = 16
"""A weight that is kept as it is is copied in so many pieces."""


class Source(Protocol):
    """Weights by name."""

    def get(self, name: str, row: int | slice | None = None) -> torch.Tensor:
        """A weight, or rows ``row`` of its first dimension. The caller does not write to it.

        Raises FileError where it cannot be read.
        """
        ...


class ModuleSource:
    """The weights of a module in this process."""

    def __init__(self, module: nn.Module) -> None:
        tensors = [*module.named_parameters(remove_duplicate=False)]
        tensors += module.named_buffers(remove_duplicate=False)
        self._tensors = dict(tensors)

    def get(self, name: str, row: int | slice | None = None) -> torch.Tensor:
        """See `Source.get`."""
        tensor = self._tensors[name].detach()
        return tensor if row is None else tensor[row]


class Checkpoint:
    """Weights in safetensors files: one file, or a folder of them, sharded as transformers does.

    Raises FileError (PLT-DST-007) where there are none or a file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.where: dict[str, Path] = {}
        index = self.path / "model.safetensors.index.json"
        try:
            if self.path.is_file():
                files = [self.path]
            elif index.is_file():
                shards = json.loads(index.read_text("utf-8"))["weight_map"].values()
                files = [self.path / name for name in dict.fromkeys(shards)]
            else:
                files = sorted(self.path.glob("*.safetensors"))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise self._error(f"{index} cannot be read: {error}") from error
        for file in files:
            with self._open(file) as content:
                self.where.update(dict.fromkeys(content.keys(), file))
        if not self.where:
            raise self._error(f"{self.path} holds no safetensors file with weights")

    def get(self, name: str, row: int | slice | None = None) -> torch.Tensor:
        """See `Source.get`."""
        if name not in self.where:
            raise self._error(f"{self.path} has no weight {name!r}")
        # Opened each time: what was read of a file stays in this process's memory until it closes.
        with self._open(self.where[name]) as content:
            return content.get_tensor(name) if row is None else content.get_slice(name)[row]

    def shape(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape of a weight and safetensors' name of its type."""
        with self._open(self.where[name]) as content:
            part = content.get_slice(name)
            return tuple(part.get_shape()), str(part.get_dtype())

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise self._error(f"{file} cannot be read: {error}") from error

    @staticmethod
    def _error(reason: str) -> FileError:
        return FileError("PLT-DST-007", reason, "weights= names safetensors files of this model")


class Renamed:
    """A source under a graph's names: ``names`` maps them to the source's."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def get(self, name: str, row: int | slice | None = None) -> torch.Tensor:
        """See `Source.get`."""
        return self._source.get(self._names[name], row)


def fill(*lowered: tuple[Lowered, Source]) -> None:
    """Makes what graphs miss, each from its source: those with the largest intermediate copies
    first, of all graphs, when little else is held.

    Raises what a source raises, and RuntimeError or MemoryError where memory is short.
    """
    wanted: list[tuple[int, str, Lowered, str, Source]] = []
    parts = [(part, source) for whole, source in lowered for part in _parts(whole)]
    for part, source in parts:
        for name, absent in part.absent.items():
            copies = part.constants[name].nbytes // _pieces(absent)
            wanted.append((-copies, absent.target, part, name, source))
    wanted.sort(key=lambda item: item[:2])
    with torch.no_grad():
        for _, _, part, name, source in wanted:
            part.constants[name] = _made(part.absent[name], source, part.constants[name])
    for part, _ in parts:
        part.absent.clear()


def _parts(lowered: Lowered) -> Iterator[Lowered]:
    yield lowered
    for part in lowered.parts.values():
        yield from _parts(part)


def _pieces(absent: Absent) -> int:
    """In how many pieces a constant can be made, each from so many rows of its weight."""
    rows = absent.shape[0] if absent.shape else 0
    if absent.pack is None:
        return max(1, min(rows, _PIECES))
    whole = absent.offset == 0 and absent.strides == _contiguous(absent.shape)
    return rows if rows and whole and len(absent.shape) == 3 and absent.pack.op in _BY_BATCH else 1


def _made(absent: Absent, source: Source, like: torch.Tensor) -> torch.Tensor:
    """One constant, in memory of its own, shaped and strided as ``like``."""
    pack, pieces = absent.pack, _pieces(absent)
    if pack is None:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        step = -(-made.shape[0] // pieces) if pieces > 1 else 0
        for begin in range(0, made.shape[0], step) if step else ():
            rows = slice(begin, begin + step)
            made[rows] = source.get(absent.target, rows)
        return made if step else made.copy_(source.get(absent.target))
    if pieces > 1:
        made = torch.empty(like.shape, dtype=like.dtype)
        for row in range(pieces):
            made[row] = packing.apply(pack, source.get(absent.target, row))
        return made
    weight = source.get(absent.target)
    viewed = weight.as_strided(
        absent.shape, absent.strides, weight.storage_offset() + absent.offset
    )
    return packing.apply(pack, viewed).contiguous()


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
