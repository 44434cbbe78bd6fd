"""Slots of a GPU's memory for experts that lie in host memory, and who may touch them when.

All slots are alike: of every matrix that an expert has there is an array ``[slots, ...]``. Copies
into them go over streams of their own. A slot is overwritten when what was written to it before and
what read it last have ended, and read when its copy has: by events, so that the host waits for
neither. That the last reader is enough, users see to: their calls come one after the other on the
device, too (`Slots.turn`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .gpu_device import Device

Key = tuple[int, int]
"""A site and a unit of it."""
Matrix = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of one matrix of an expert."""


class HostBank:
    """Weights ``[units, ...]`` in memory of the host that a device copies from by itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.count = tensor, tensor.shape[0]
        self.unit_bytes = tensor.nbytes // self.count

    @property
    def matrix(self) -> Matrix:
        """What one unit is."""
        return tuple(self.tensor.shape[1:]), self.tensor.dtype


@dataclass
class _Slot:
    """``written`` happens when the latest copy has ended, ``read`` when the latest reader has."""

    written: Any
    was_written: bool = False
    read: Any = None
    fresh: bool = False  # no reader waited for the copy yet


class Slots:
    """As many slots for experts of ``layout`` as `resize` says. Calls take turns.

    Memory is taken with the first load.
    """

    def __init__(self, device: Device, layout: Sequence[Matrix]) -> None:
        self.device, self.layout = device, tuple(layout)
        self.nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout)
        self.count = 0
        self.of: dict[Key, int] = {}
        """The slot of each unit that has one."""
        self._arrays: list[torch.Tensor] = []
        self._slots: list[_Slot] = []
        self._free: list[int] = []
        with device.activate():
            self._urgent, self._ahead = device.stream(True), device.stream(False)
            self._ready, self._ended = device.event(), device.event()
            device.record(self._ended, device.current())

    @contextlib.contextmanager
    def turn(self, stream: Any) -> Iterator[None]:
        """A call, which uses slots on ``stream`` after those before have ended."""
        self.device.wait(stream, self._ended)
        try:
            yield
        finally:
            self.device.record(self._ended, stream)

    def resize(self, count: int) -> None:
        """From now on there are ``count`` slots; where these are others than so far, all of them
        must be free, and the host waits until they are.
        """
        if count == self.count:
            return
        assert not self.of
        self.count = count
        if not self._arrays:
            return
        with self.device.activate():
            self.device.attend(self._ended)
            for slot in self._slots:
                if slot.was_written:
                    self.device.attend(slot.written)
        self._arrays, self._slots = [], []

    def array(self, number: int) -> torch.Tensor:
        """The matrices ``number`` of all slots, where they are now."""
        if not self._arrays:
            self._allocate()
        return self._arrays[number]

    def _allocate(self) -> None:
        device = self.device
        for shape, dtype in self.layout:
            nbytes = self.count * math.prod(shape) * dtype.itemsize
            raw = device.allocate(nbytes)
            self._arrays.append(raw.view(dtype).view(self.count, *shape))
        self._slots = [_Slot(device.event()) for _ in range(self.count)]
        self._free = list(range(self.count))[::-1]
        device.record(self._ready, device.current())  # memory is zeros by then
        for stream in (self._urgent, self._ahead):
            device.wait(stream, self._ready)

    def load(self, key: Key, matrices: Sequence[torch.Tensor], ahead: bool) -> None:
        """Gives a unit a slot and has its ``matrices`` copied there, after what is wanted now if
        it is loaded ``ahead``.
        """
        device, stream = self.device, self._ahead if ahead else self._urgent
        arrays = [self.array(k) for k in range(len(self.layout))]
        number = self._free.pop()
        slot = self._slots[number]
        if slot.was_written:
            device.wait(stream, slot.written)
        if slot.read is not None:
            device.wait(stream, slot.read)
        with device.on(stream):
            for array, matrix in zip(arrays, matrices, strict=True):
                device.call(torch.Tensor.copy_, array[number], matrix, non_blocking=True)
        device.record(slot.written, stream)
        slot.was_written = slot.fresh = True
        self.of[key] = number

    def give(self, key: Key) -> None:
        """Takes a unit's slot away; what reads it still may end."""
        self._free.append(self.of.pop(key))

    def await_copies(self, keys: Iterable[Key], stream: Any) -> None:
        """What ``stream`` is given from now on may read the slots of units."""
        for key in keys:
            slot = self._slots[self.of[key]]
            if slot.fresh:
                slot.fresh = False
                self.device.wait(stream, slot.written)

    def were_read(self, keys: Iterable[Key], event: Any) -> None:
        """The slots of units have been read when ``event`` happens."""
        for key in keys:
            self._slots[self.of[key]].read = event
