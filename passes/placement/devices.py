"""Named devices: what the roofline model knows of them, and specs such as ``4xh100:80GB``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import PlacementError
from .problem import MOST, Device, Link

MOST_DEVICES = 1024
"""More are a slip of the pen: times, links and plans have a number for each, or for each two."""
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*"


@dataclass(frozen=True)
class Kind:
    """A kind of device: peak FLOP/s by element width in bytes, memory bytes/s, bytes, launch s.

    Figures are the makers' for dense products (16-bit tensor cores; TF32 counts as 4 bytes wide).
    """

    flops: dict[int, float]
    bandwidth: float
    memory: float
    launch: float

    def seconds(self, flops: float, nbytes: float, width: int) -> float:
        """Roofline time (Williams et al., 2009) of an op of ``flops`` on ``nbytes``, seconds."""
        peak = self.flops.get(width) or self.flops[max(self.flops)]
        return self.launch + max(flops / peak, nbytes / self.bandwidth)


KINDS = {
    "b200": Kind({1: 4.5e15, 2: 2.25e15, 4: 1.1e15}, 8.0e12, 180e9, 2e-6),
    "h200": Kind({1: 1.98e15, 2: 9.89e14, 4: 4.95e14}, 4.8e12, 141e9, 2e-6),
    "h100": Kind({1: 1.98e15, 2: 9.89e14, 4: 4.95e14}, 3.35e12, 80e9, 2e-6),
    "a100": Kind({1: 6.24e14, 2: 3.12e14, 4: 1.56e14}, 2.0e12, 80e9, 2e-6),
    "v100": Kind({2: 1.25e14, 4: 1.57e13}, 9.0e11, 32e9, 3e-6),
    "l40s": Kind({1: 7.33e14, 2: 3.62e14, 4: 1.83e14}, 8.64e11, 48e9, 2e-6),
    "t4": Kind({1: 1.3e14, 2: 6.5e13, 4: 8.1e12}, 3.2e11, 16e9, 3e-6),
    "cpu": Kind({2: 1.5e12, 4: 1.5e12}, 1.0e11, 256e9, 1e-6),
}


@dataclass(frozen=True)
class Placed:
    """A device of a plan with its kind: the problem's device, and what its times come from."""

    device: Device
    kind: Kind


def parse_devices(text: str) -> list[Placed]:
    """``4xh100:80GB,cpu:512GB`` as devices h100:0 ... h100:3, cpu:0.

    Raises PlacementError naming the part that is not understood.
    """
    devices: list[Placed] = []
    counts: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(?:(\d+)x)?([a-zA-Z][\w-]*?)(?::(.+))?", part.strip())
        if match is None or match[1] == "0":
            raise PlacementError(f"device {part!r} is not understood; write it as 4xh100:80GB")
        name = match[2].lower()
        if name not in KINDS:
            raise PlacementError(f"device kind {name!r} is unknown; use {', '.join(KINDS)}")
        kind = KINDS[name]
        memory = parse_bytes(match[3], f"device {part!r}") if match[3] else kind.memory
        count = int(match[1] or 1)
        if len(devices) + count > MOST_DEVICES:
            raise PlacementError(f"device {part!r}: at most {MOST_DEVICES} devices; name fewer")
        for _ in range(count):
            number = counts[name] = counts.get(name, -1) + 1
            devices.append(Placed(Device(f"{name}:{number}", memory), kind))
    return devices


def parse_link(text: str) -> Link:
    """``450GB/s,5us`` as a link; the latency may be left out. Raises PlacementError."""
    rate, _, delay = text.partition(",")
    if not rate.strip().endswith("/s"):
        raise PlacementError(f"link {text!r} is not understood; write it as 450GB/s,5us")
    bandwidth = parse_bytes(rate.strip()[:-2], f"link {text!r}")
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
    match = re.fullmatch(_NUMBER + "(s|ms|us|ns)", delay.strip()) if delay.strip() else None
    if bandwidth <= 0 or (delay.strip() and match is None):
        raise PlacementError(f"link {text!r} is not understood; write it as 450GB/s,5us")
    return Link(float(match[1]) / scale[match[2]] if match else 0.0, bandwidth)


def host_links(devices: Sequence[Placed], link: Link) -> dict[tuple[str, str], Link]:
    """The same link both ways between each CPU and each device of another kind, by names."""
    hosts = {x.device.name for x in devices if x.kind is KINDS["cpu"]}
    names = [x.device.name for x in devices]
    return {(a, b): link for a in names for b in names if (a in hosts) != (b in hosts)}


def parse_bytes(text: str, what: str) -> float:
    """``80GB``, ``64KiB`` or a number of bytes. Raises PlacementError naming ``what``."""
    match = re.fullmatch(_NUMBER + "([kKMGT]?)(i?)B?", text.strip())
    if match is None or (match[3] and not match[2]):
        raise PlacementError(f"{what}: {text!r} is no number of bytes; write it as 80GB")
    prefix = match[2].replace("K", "k")
    unit = 2.0 ** (10 * "kMGT".index(prefix) + 10) if match[3] else _UNITS[prefix]
    value = float(match[1]) * unit
    if not value < MOST:
        raise PlacementError(f"{what}: {text!r} is more than any device has; write it as 80GB")
    return value


def times(devices: Sequence[Placed], flops: float, nbytes: float, width: int) -> tuple[float, ...]:
    """Roofline seconds of one op on each device, at the device's speed."""
    return tuple(x.kind.seconds(flops, nbytes, width) / x.device.speed for x in devices)
