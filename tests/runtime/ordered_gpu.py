"""A GPU for tests that knows what comes after what, and fails where nothing says so.

Every stream has a vector clock (Fidge, "Timestamps in message-passing systems", 1988): events carry
it to the streams that wait for them, and to the host. Two accesses to the same place of which one
writes must be ordered by it, whatever order they happen to run in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .fake_gpu import FakeGpu

Clock = dict[Any, int]
Access = tuple[Any, int, Clock, bool]
"""Stream, number in it, what came before, and whether it writes."""


class OrderedGpu(FakeGpu):
    """Copies that nobody waits for, and what kernels say that they `touch`, must be ordered."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._clocks: dict[Any, Clock] = defaultdict(dict)
        self._host: Clock = {}
        self._at: dict[Any, Clock] = {}
        self._accesses: dict[int, list[Access]] = defaultdict(list)
        self._running: tuple[Any, int, Clock] = ("host", 0, {})
        self.copies = 0

    def _add(self, stream: Any, kind: str, what: Any) -> None:
        if self._graph is not None:
            super()._add(stream, kind, what)
            return
        clock = self._clocks[stream]
        _merge(clock, self._host)
        if kind == "run":
            clock[stream] = clock.get(stream, 0) + 1
            stamp = stream, clock[stream], dict(clock)
            super()._add(stream, kind, lambda: self._at_work(stamp, what))
            return
        if kind == "record":
            self._at[what] = dict(clock)
        else:
            _merge(clock, self._at.get(what, {}))
        super()._add(stream, kind, what)

    def _at_work(self, stamp: tuple[Any, int, Clock], what: Callable[[], None]) -> None:
        self._running = stamp
        what()

    def attend(self, event: Any) -> None:
        super().attend(event)
        _merge(self._host, self._at[self._latest[event]])

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("non_blocking"):
            return super().call(function, *args, **kwargs)
        assert function is torch.Tensor.copy_
        into, source = args
        self.copies += 1

        def copy() -> None:
            self.touch(source.data_ptr(), False)
            self.touch(into.data_ptr(), True)
            into.copy_(source)

        self._add(self.current(), "run", copy)
        return into

    def touch(self, address: int, writes: bool) -> None:
        """What runs now reads or writes what begins at an address."""
        own = (*self._running, writes)
        for other in self._accesses[address]:
            if writes or other[3]:
                message = f"{other[0]} and {own[0]} touch one place in no order"
                assert _before(other, own) or _before(own, other), message
        self._accesses[address].append(own)


def _merge(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def _before(a: Access, b: Access) -> bool:
    return b[2].get(a[0], 0) >= a[1]
