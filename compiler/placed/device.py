"""`plait.Device`: a device to place ops on, named by what it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from ...passes.placement.devices import KINDS, Placed, parse_devices
from ..errors import OptionError


@dataclass(frozen=True)
class Device:
    """A device such as ``"h100:80GB"``, ``"cpu"`` or ``"cuda:0"``, which looks at that GPU.

    ``memory`` (bytes) replaces the kind's own, ``speed`` scales its times: 0.5 is half as fast.
    Raises OptionError where the spec is not understood.
    """

    spec: str
    memory: float | None = None
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.spec, str):
            kind = type(self.spec).__name__
            raise OptionError("PLT-PLC-003", f"a {kind} is no device", 'name one, such as "cpu"')
        memory = 0 if self.memory is None else self.memory
        if not (_is_size(memory) and _is_size(self.speed) and self.speed > 0):
            raise OptionError("PLT-PLC-003", f"{self} has no meaning", "memory >= 0, speed > 0")
        if not self.spec.startswith("cuda") and len(parse_devices(self.spec)) != 1:
            raise OptionError("PLT-PLC-003", f"{self.spec!r} is more than one device", "name one")

    def placed(self, number: int) -> Placed:
        """The device for a problem, named by its kind and ``number``."""
        spec = self.spec
        if spec.startswith("cuda"):
            spec, memory = _cuda(spec)
        else:
            memory = None
        (found,) = parse_devices(spec)
        kind = found.device.name.partition(":")[0]
        room = self.memory if self.memory is not None else memory
        room = found.device.memory_bytes if room is None else room
        named = replace(found.device, name=f"{kind}:{number}", memory_bytes=room, speed=self.speed)
        return Placed(named, found.kind)


def _is_size(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf


def as_devices(devices: Any) -> list[Device]:
    """A list of devices, some of which may be text. Raises OptionError where it is none."""
    if not isinstance(devices, Iterable):
        kind = type(devices).__name__
        raise OptionError("PLT-PLC-003", f"devices is a {kind}", 'give a list or "4xcpu:2GB"')
    return [x if isinstance(x, Device) else Device(x) for x in devices]


def _cuda(spec: str) -> tuple[str, float]:
    """Kind and bytes of a GPU of this machine."""
    import torch

    try:
        found = torch.cuda.get_device_properties(torch.device(spec))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise OptionError(
            "PLT-PLC-004", f"there is no {spec!r}: {reason}", "name a kind"
        ) from error
    name = found.name.lower()
    kind = next((k for k in KINDS if k in name), None)
    if kind is None:
        known = ", ".join(KINDS)
        raise OptionError("PLT-PLC-004", f"{spec!r} is a {found.name}, of no known kind", known)
    return kind, float(found.total_memory)
