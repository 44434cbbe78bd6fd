"""Memory and launch tables of one call in flight."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping
from typing import Any

import torch

from . import forked
from .bound import Bound
from .plan import Buffer
from .recycled import Recycled
from .sizes import evaluate
from .table import Address, Table, build_table

ALIGNMENT = 64


def aligned_empty(nbytes: int) -> torch.Tensor:
    """``nbytes`` of uninitialised memory that start at a cache line (uint8)."""
    raw = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    shift = -raw.data_ptr() % ALIGNMENT
    return raw[shift : shift + nbytes]


class Arena:
    """Memory that several executors share, of which one runs at a time: whoever runs one holds
    ``lock``. It is as large as the most that any of them reserved before the first call. Results
    are made by ``empty``, which keeps ``spare`` bytes for them.
    """

    def __init__(self, spare: int = 0) -> None:
        self.empty = Recycled(spare)
        self.lock = threading.Lock()
        forked.in_child(self._unlock)
        self._nbytes = 0
        self._memory: torch.Tensor | None = None

    def _unlock(self) -> None:
        self.lock = threading.Lock()

    def reserve(self, nbytes: int) -> None:
        """Makes room for ``nbytes``. Raises RuntimeError when the memory is in use already."""
        if self._memory is not None:
            raise RuntimeError("an arena in use cannot grow")
        self._nbytes = max(self._nbytes, nbytes)

    def take(self, nbytes: int) -> torch.Tensor:
        """The first ``nbytes`` of the memory (uint8), the same for everybody."""
        if self._memory is None:
            self._memory = aligned_empty(self._nbytes)
        return self._memory[:nbytes]


class Memory:
    """Memory for one call in flight of a bound plan.

    ``constants`` maps names to tensors; ``shared`` is an arena to work in, not one of its own.
    """

    def __init__(
        self, bound: Bound, constants: Mapping[str, torch.Tensor], shared: Arena | None = None
    ) -> None:
        plan, values = bound.plan, bound.values
        self._values, self._constants = values, constants
        nbytes = evaluate(plan.arena_bytes, values)
        self.arena = aligned_empty(nbytes) if shared is None else shared.take(nbytes)
        self.static = {
            b.name: torch.zeros(evaluate(b.nbytes, values) + ALIGNMENT, dtype=torch.uint8)
            for b in plan.buffers.values()
            if b.kind == "static"
        }
        self.addresses: dict[str, Address] = {}
        for buffer in plan.buffers.values():
            if buffer.name in bound.ext:
                self.addresses[buffer.name] = Address(0, bound.ext[buffer.name])
            else:
                self.addresses[buffer.name] = Address(self.storage(buffer).data_ptr())

    def storage(self, buffer: Buffer) -> torch.Tensor:
        """The memory of a buffer that calls do not bring."""
        if buffer.kind == "arena":
            return self.arena[evaluate(buffer.offset, self._values) :]
        if buffer.kind == "static":
            raw = self.static[buffer.name]
            return raw[-raw.data_ptr() % ALIGNMENT :]
        return self._constants[buffer.name]


class Workspace(Memory):
    """Memory and tables for one call in flight; ``functions`` maps kernel hashes to addresses."""

    def __init__(
        self,
        bound: Bound,
        functions: Mapping[str, int],
        constants: Mapping[str, torch.Tensor],
        shared: Arena | None = None,
    ) -> None:
        super().__init__(bound, constants, shared)
        self.ext = array("q", [0] * max(1, len(bound.ext)))  # quicker to store into than ctypes
        self.ext_address = self.ext.buffer_info()[0]
        self.tables: list[Table | None] = [
            build_table(
                steps,
                [[bound.span(a) for a in s.args] for s in steps],
                self.addresses,
                functions,
                bound.values,
                bound.workers,
                placed=bound.workers == bound.plan.workers,
                stamped=bound.stamped,
            )
            if isinstance(steps, list)
            else None
            for steps in bound.segments
        ]
        self.launches = [table.address for table in self.tables if table is not None]
        self.whole: Any = None  # one launch of everything (`Whole`)
        self.views: dict[tuple[int, int], torch.Tensor] = {}
        self.singles: dict[tuple[int, int], Any] = {}  # launches of single steps (`Fetching`)
        own = (self.arena, *self.static.values())
        self._memory = frozenset(t.untyped_storage().data_ptr() for t in own)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in this memory, which later steps and calls write again."""
        return tensor.untyped_storage().data_ptr() in self._memory
