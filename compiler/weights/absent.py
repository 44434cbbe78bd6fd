"""Weights that a graph names but does not hold: where they come from, and when they are read.

A graph whose weights are on the meta device compiles like any other; what lowering would prepare
of them (a reordering for one kernel, or the weight itself) is noted as `lowered.Absent`. `fill`
makes them afterwards, a weight at a time, so that a process needs room for what its plan holds and
for little more, however large the model is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from ...kernels import packing
from ...runtime.pages import settle
from ..errors import FileError
from .safetensors_file import Stored, stored

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
        """See `Source.get`. Raises FileError (PLT-DST-007) where there is no such weight."""
        if name not in self._tensors:
            hint = "give every rank the same model"
            raise FileError("PLT-DST-007", f"the model has no weight {name!r}", hint)
        tensor = self._tensors[name].detach()
        return tensor if row is None else tensor[row]


class Checkpoint:
    """Weights in safetensors files: one file, or a folder of them, sharded as transformers does.

    Raises FileError (PLT-DST-007) where there are none or a file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError

        self.path = Path(path)
        self.where: dict[str, Stored] = {}
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
            try:
                self.where.update(stored(file))
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                raise self._error(f"{file} cannot be read: {error}") from error
        if not self.where:
            raise self._error(f"{self.path} holds no safetensors file with weights")

    def get(self, name: str, row: int | slice | None = None) -> torch.Tensor:
        """See `Source.get`."""
        if name not in self.where:
            raise self._error(f"{self.path} has no weight {name!r}")
        try:
            return self.where[name].read(row)
        except (OSError, EOFError) as error:
            raise self._error(f"{name!r} cannot be read: {error}") from error

    @staticmethod
    def _error(reason: str) -> FileError:
        return FileError("PLT-DST-007", reason, "weights= names safetensors files of this model")


@dataclass(frozen=True)
class Rows:
    """Some rows of a source's weight, at least one."""

    name: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}[{','.join(map(str, self.rows))}]"

    def of(self, source: Source, row: int | slice | None) -> torch.Tensor:
        """See `Source.get`; no more than these rows is read."""
        if isinstance(row, int):
            return source.get(self.name, self.rows[row])
        chosen = self.rows if row is None else self.rows[row]
        if chosen == tuple(range(chosen[0], chosen[0] + len(chosen))):
            return source.get(self.name, slice(chosen[0], chosen[-1] + 1)).contiguous()
        return torch.stack([source.get(self.name, r) for r in chosen])


class Renamed:
    """A source under a graph's names: ``names`` maps them to the source's, or to rows of them.

    Whole weights lie in memory as those of the graph do, ``hollow`` by name: files know nothing of
    channels-last weights, nor of transposed ones.
    """

    def __init__(
        self, source: Source, names: Mapping[str, str | Rows], hollow: Mapping[str, torch.Tensor]
    ) -> None:
        self._source, self._names, self._hollow = source, names, hollow

    def get(self, name: str, row: int | slice | None = None) -> torch.Tensor:
        """See `Source.get`."""
        found, like = of(self._source, self._names[name], row), self._hollow[name]
        if row is not None or found.stride() == like.stride():
            return found
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(found)


def of(source: Source, name: str | Rows, row: int | slice | None = None) -> torch.Tensor:
    """A weight of a source, or rows of it. See `Source.get`."""
    return name.of(source, row) if isinstance(name, Rows) else source.get(name, row)


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
            made = _made(part.absent[name], source, part.constants[name])
            part.constants[name] = settle(made)
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
