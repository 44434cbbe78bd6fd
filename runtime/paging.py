"""Experts of a GPU's plan that come from host memory when a route wants them.

At a `FetchStep` the host has read which experts have rows. They get slots, and the step's table
tells the kernels behind it which; on the device these begin when the copies have ended. Where not
all fit, each of these kernels is launched several times, with a table that has the experts of one
wave: every row is written by one of the launches, from the same operands as otherwise. Such kernels
are launched one by one, so that graphs lie between them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from .gpu_device import Device
from .host_tier import HostTier
from .plan import FetchStep, KernelStep, Plan, PlanError
from .site import Site
from .slots import HostBank

NOWHERE = -1
"""The slot of an expert that has none: kernels leave it out."""


class _Table:
    """The slots of a route's experts, as the device sees them, and what is copied there."""

    def __init__(self, device: Device, units: int) -> None:
        self.device, self.units = device, units
        self.memory = device.allocate(4 * units)
        self.shown: list[int] | None = None
        self._staged: list[torch.Tensor] = []
        self._begun = 0

    def begin(self) -> None:
        """All that was staged has been copied: the host waited for something behind that."""
        self._begun = 0

    def show(self, slots: Sequence[int]) -> None:
        """Kernels that are issued on the current stream from now on see ``slots``."""
        if slots == self.shown:
            return
        if self._begun == len(self._staged):
            self._staged.append(self.device.host(4 * self.units).view(torch.int32))
        staged = self._staged[self._begun]
        self._begun += 1
        staged.copy_(torch.tensor(slots, dtype=torch.int32))
        there = self.memory.view(torch.int32)
        self.device.call(torch.Tensor.copy_, there, staged, non_blocking=True)
        self.shown = list(slots)


class Paging:
    """What the fetches of one executor do. ``banks`` are those of the plan's steps by name.

    Raises PlanError where they do not fit the plan or the tier.
    """

    def __init__(
        self, plan: Plan, device: Device, tier: HostTier, banks: Mapping[str, HostBank]
    ) -> None:
        self.device, self.tier = device, tier
        self._tables: dict[str, _Table] = {}
        self.sites: dict[str, Site] = {}
        """By the name of the step that fetches."""
        self._sites: dict[str, Site] = {}  # by table: all its fetches bring the same
        self._number: dict[str, int] = {}  # which of the matrices of an expert a bank has
        self._counts: dict[str, list[int] | None] = {}  # by table, where experts come in waves
        self._wanted: dict[str, list[int]] = {}
        self._read: dict[str, list[Any]] = {}  # events, by kernel step
        for step in plan.steps:
            if not isinstance(step, FetchStep):
                continue
            if step.table in self._tables:
                self.sites[step.name] = self._sites[step.table]
                continue
            if any(name not in banks for name in step.banks):
                raise PlanError(f"weights that {step.name} fetches are missing: compile again")
            own = [banks[name] for name in step.banks]
            units = int(step.selector.shape[0]) - 1
            if [b.matrix for b in own] != list(tier.slots.layout) or own[0].count != units:
                raise PlanError(f"weights that {step.name} fetches are others: compile again")
            self._tables[step.table] = _Table(device, units)
            self.sites[step.name] = self._sites[step.table] = tier.site_of(own)
            self._number |= {name: k for k, name in enumerate(step.banks)}
        weakref.finalize(self, tier.leave, list(self._sites.values()))

    def __contains__(self, buffer: str) -> bool:
        """Whether a constant is a table or a bank."""
        return buffer in self._tables or buffer in self._number

    def memory(self, buffer: str) -> torch.Tensor:
        """Where a table, or what slots hold of a bank, lies now."""
        table = self._tables.get(buffer)
        return self.tier.slots.array(self._number[buffer]) if table is None else table.memory

    def turn(self, stream: Any) -> AbstractContextManager[Any]:
        """A call, issued from ``stream``."""
        stack = ExitStack()
        stack.enter_context(self.tier.using())
        stack.enter_context(self.tier.slots.turn(stream))
        return stack

    def fetch(self, step: FetchStep, offsets: Sequence[int], stream: Any) -> None:
        """Gives slots to the experts with rows, as far as they fit together."""
        site, table = self._sites[step.table], self._tables[step.table]
        table.begin()
        counts = [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]
        self._wanted[step.table] = [unit for unit, count in enumerate(counts) if count]
        if not self.tier.fetch(site, counts):
            self._counts[step.table] = counts
            return
        self._counts[step.table] = None
        self._show(step.table, self._wanted[step.table], stream)

    def launches(self, step: KernelStep, stream: Any) -> Iterator[None]:
        """As often as a kernel is to be launched: within each turn, on ``stream``."""
        name = next(a.buffer for a in step.args if a.buffer in self._tables)
        site, counts, wanted = self._sites[name], self._counts[name], self._wanted[name]
        if counts is None:
            yield
            self._note(step, 0, site, wanted, stream)
            return
        for turn, group in enumerate(self.tier.waves(site, counts)):
            self._show(name, group, stream)
            yield
            self._note(step, turn, site, group, stream)

    def _show(self, name: str, units: Sequence[int], stream: Any) -> None:
        """Has kernels find the experts of ``units``, of those with rows no others."""
        tier, site, table = self.tier, self._sites[name], self._tables[name]
        keys = tier.keys(site, units)
        tier.slots.await_copies(keys, stream)
        slots = [NOWHERE] * table.units if table.shown is None else list(table.shown)
        for unit in self._wanted[name]:
            slots[unit] = NOWHERE
        for unit, key in zip(units, keys, strict=True):
            slots[unit] = tier.slots.of[key]
        table.show(slots)

    def _note(
        self, step: KernelStep, turn: int, site: Site, units: Sequence[int], stream: Any
    ) -> None:
        events = self._read.setdefault(step.name, [])
        if turn == len(events):
            events.append(self.device.event())
        self.device.record(events[turn], stream)
        self.tier.slots.were_read(self.tier.keys(site, units), events[turn])
