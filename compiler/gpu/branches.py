"""What runs a plan for a GPU with the plans of its branches.

How many rows a branch of a router gets only data tell, and the kernels of a GPU are for sizes that
are known. A branch that treats each row alone gets programs for `bucket`s of rows, made when a call
first needs them; rows behind its own are computed and left. Any other branch runs its operators,
one by one, on exactly its rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from ...runtime.cuda_graph import GpuExecutor, GpuPart
from ...runtime.gpu_device import Device, Function
from ...runtime.paging import Paging
from ..capture.export import EXCLUSIVE
from ..errors import summary
from ..modes import plain_modes
from .lower import GpuLowered, RowBranch

LEAST = 8
"""Rows of the smallest program of a branch."""


class Loader(Protocol):
    """Brings what was compiled to a device."""

    def functions(self, lowered: GpuLowered) -> Mapping[str, Function]:
        """The kernels of a plan, without those of its parts, by hash."""
        ...

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """A constant on the device, where vectors of its elements are aligned."""
        ...


class Host(Protocol):
    """What keeps experts in host memory."""

    def paging(self, lowered: GpuLowered) -> Paging:
        """What fetches the banks of a plan."""
        ...

    def resident(self, tensor: torch.Tensor) -> torch.Tensor:
        """A constant in the device's own memory."""
        ...


def assemble(
    lowered: GpuLowered, device: Device, loader: Loader, host: Host | None = None
) -> GpuExecutor:
    """What runs a lowered plan on a device; the experts that it fetches are in ``host``."""
    parts: dict[str, GpuPart] = {
        name: assemble(part, device, loader, host) for name, part in lowered.parts.items()
    }
    for name, branch in lowered.rows.items():
        parts[name] = Bucketed(branch, device, loader)
    constants = {n: t for n, t in lowered.constants.items() if n not in lowered.banks}
    if host is not None:
        constants = {name: host.resident(tensor) for name, tensor in constants.items()}
    return GpuExecutor(
        lowered.plan,
        {name: loader.constant(tensor) for name, tensor in constants.items()},
        loader.functions(lowered),
        device,
        lowered.calls,
        graph=lowered.graphable,
        keep=loader,
        parts=parts,
        fetching=host.paging(lowered) if host is not None and lowered.banks else None,
    )


def bucket(rows: int, most: int) -> int:
    """Rows of the program that runs so many: the next power of two, `LEAST` at least."""
    return min(most, max(LEAST, 1 << (rows - 1).bit_length()))


class Bucketed:
    """A branch of a router: implements `GpuPart`. Its caller sees to it that calls take turns."""

    def __init__(self, branch: RowBranch, device: Device, loader: Loader) -> None:
        self.branch, self.device, self.loader = branch, device, loader
        self.programs: dict[int, GpuExecutor | str] = {}
        """By rows; a text where there is none, which says why."""

    def run_into(self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
        """See `GpuExecutor.run_into`."""
        program = None if self.branch.refusal else self._program(tensors[0].shape[0])
        if isinstance(program, GpuExecutor):
            program.run_into(tensors, into)
            return
        call = self.device.call
        for value, result in zip(call(self.branch.module, *tensors), into, strict=True):
            call(torch.Tensor.copy_, result, value)

    def _program(self, rows: int) -> GpuExecutor | str:
        size = bucket(rows, self.branch.most)
        if size not in self.programs:
            self.programs[size] = self._compile(size)
        return self.programs[size]

    def _compile(self, size: int) -> GpuExecutor | str:
        try:
            with plain_modes():
                with EXCLUSIVE:
                    lowered = self.branch.lower(size)
                return assemble(lowered, self.device, self.loader)
        except Exception as error:
            if os.environ.get("PLAIT_DEBUG"):
                raise
            return f"code generation failed ({summary(error)})"

    def refusals(self, name: str) -> list[tuple[str, str]]:
        """See `GpuExecutor.refusals`."""
        found: list[tuple[str, str]] = []
        for program in self.programs.values():
            found += [(name, program)] if isinstance(program, str) else program.refusals(name)
        return list(dict.fromkeys(found))

    def visits(self) -> list[str]:
        """The programs, and how often each branch within them ran, as lines of text."""
        lines = []
        for size, program in sorted(self.programs.items()):
            if isinstance(program, GpuExecutor):
                lines += [f"program for {size} rows", *(f"  {v}" for v in program.visits())]
        return lines
