"""Why a rank failed, told to all: a broken link says only which rank is at its other end.

A rank that fails leaves a note in torch's store before it ends its links. Others, whose links break
by that, read who waited for whom, up to the rank that is at fault.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..errors import PlaitError
from .local import late, lost
from .part import DistributedError

_GRACE = 2.0
"""Seconds to wait for notes of others, at most: a rank at work finds out when it is done."""


@dataclass(frozen=True)
class Broken:
    """A link that failed: the ``other`` rank, None where that is not known, and what the transport
    says.
    """

    other: int | None
    reason: str

    def error(self, rank: int) -> DistributedError:
        """The error of ``rank``, whose link it is."""
        who = "another rank" if self.other is None else f"rank {self.other}"
        if "timed out" in self.reason.lower():
            return late(rank, who)
        return lost(rank, who, self.reason)


class Causes:
    """The notes of the ranks of a process group."""

    def __init__(self, group: Any) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        self.store = dist.distributed_c10d.PrefixStore(f"plait/{group.group_name}", store)

    def leave(self, note: PlaitError | Broken) -> None:
        """Tells the others what failed here. Where the store is gone they find out without."""
        self._bounded(lambda: self.store.set(str(self.rank), pickle.dumps(note)))

    def of(self, mine: Broken) -> PlaitError:
        """The error that is at the bottom of a link that broke here, as far as it is known."""
        notes: dict[int, PlaitError | Broken] = {self.rank: mine}

        def look() -> None:
            end = time.monotonic() + _GRACE
            while time.monotonic() < end:
                for rank in set(range(self.ranks)) - notes.keys():
                    if self.store.check([str(rank)]):
                        notes[rank] = pickle.loads(self.store.get(str(rank)))
                if _settled(notes, self.ranks):  # not before: who ends its links has left a note
                    return
                time.sleep(0.01)

        self._bounded(look)
        return bottom(dict(notes), self.rank, self.ranks)

    @staticmethod
    def _bounded(work: Any) -> None:
        """Does it, but does not wait for a store that has stopped together with its process."""

        def quietly() -> None:
            with contextlib.suppress(RuntimeError):
                work()

        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        thread.join(_GRACE + 0.5)


def _settled(notes: Mapping[int, PlaitError | Broken], ranks: int) -> bool:
    """Whether more notes would say nothing new: somebody knows, or all but one only wait."""
    told = any(isinstance(note, PlaitError) for note in notes.values())
    return told or len(notes) >= ranks - 1


def bottom(notes: Mapping[int, PlaitError | Broken], rank: int, ranks: int) -> PlaitError:
    """What is at the bottom of the link that broke at ``rank``: an error that a rank had of its
    own, or else the rank that has not said anything.
    """
    waits: dict[int, Broken] = {}
    for waiting in sorted(notes):
        note = notes[waiting]
        if isinstance(note, PlaitError):
            return note
        waits[waiting] = note
    silent = set(range(ranks)) - notes.keys()
    if len(silent) == 1:  # whoever waited for it directly knows best how it was lost
        (gone,) = silent
        rank = next((k for k, note in waits.items() if note.other == gone), rank)
        return Broken(gone, waits[rank].reason).error(rank)
    seen: set[int] = set()
    while (other := waits[rank].other) is not None and other in waits and other not in seen:
        seen.add(rank)
        rank = other
    return waits[rank].error(rank)
