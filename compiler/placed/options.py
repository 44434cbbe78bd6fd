"""How a model is divided and run on several devices: the options, and devices that exist here."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...passes.placement.devices import Placed as Kinded
from ...passes.placement.devices import parse_link
from ...passes.placement.experts import ExpertPlacement
from ...passes.placement.plan import NAMES, OBJECTIVES
from ..errors import OptionError
from .device import Device, as_devices

LAUNCHES = ("inline", "processes", "torchrun")
COSTS = ("roofline", "measured")
EXPERTS = ("together", "divided")


@dataclass(frozen=True)
class PlacementOptions:
    """Options of `plait.compile(model, devices=...)`.

    Attributes:
        launch: "inline" (all devices in this process), "processes" (one process for each device,
            started here), "torchrun" (this process is one of as many as there are devices), or
            None: "torchrun" where torchrun started this process, else "inline".
        weights: a safetensors file, or a folder of them; each process reads what it needs. None:
            the model's own.
        objective: "latency", or "throughput": the most batches a second through `Placed.map`.
        algorithm, budget, seed: see `plait.place`.
        link: what a transfer costs, such as "1GB/s,50us"; None: measured with ``costs="measured"``,
            else assumed.
        costs: what operators cost: "roofline", or "measured": timed on this machine's CPU.
        experts: "together" (a layer's experts are on one device), "divided" (each layer's are
            shared out evenly), a placement of `plait.place_experts` or its file (.json), whose
            devices are these in order, or None: divided only where the model fits no other way.
        timeout: seconds without an answer after which a rank counts as lost.
        threads: threads of each CPU process; None: the cores shared out.

    Raises OptionError for a value without meaning.
    """

    launch: str | None = None
    weights: str | Path | None = None
    objective: str = "latency"
    algorithm: str = "best"
    budget: float = 2.0
    seed: int = 0
    link: str | None = None
    costs: str = "roofline"
    experts: str | Path | ExpertPlacement | None = None
    timeout: float = 60.0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("launch", (None, *LAUNCHES)), ("objective", OBJECTIVES), ("costs", COSTS),
            ("algorithm", NAMES),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise _wrong(f"{name}={value!r} is unknown", f"use {', '.join(map(str, known))}")
        if not (
            self.experts in (None, *EXPERTS)
            or isinstance(self.experts, ExpertPlacement)
            or (isinstance(self.experts, str | Path) and str(self.experts).endswith(".json"))
        ):
            known = ", ".join(EXPERTS)
            hint = f"use {known}, or a placement of plait.place_experts or its .json file"
            raise _wrong(f"experts={self.experts!r} is unknown", hint)
        for name in ("budget", "timeout"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise _wrong(f"{name}={value!r} is no number of seconds", "give a positive number")
        if self.threads is not None and not (isinstance(self.threads, int) and self.threads > 0):
            raise _wrong(f"threads={self.threads!r} has no meaning", "give a positive number")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise _wrong(f"seed={self.seed!r} has no meaning", "give a number from 0 to 2**32 - 1")
        if not isinstance(self.weights, None | str | os.PathLike):
            raise _wrong(f"weights={self.weights!r} names no files", "give a path")
        if not isinstance(self.link, None | str):
            raise _wrong(f"link={self.link!r} is unknown", 'write it as "1GB/s,50us"')
        if self.link is not None:
            parse_link(self.link)

    def how(self) -> str:
        """The launch, decided."""
        if self.launch is not None:
            return self.launch
        return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "inline"


def _wrong(reason: str, hint: str) -> OptionError:
    return OptionError("PLT-DST-008", reason, hint)


@dataclass(frozen=True)
class Here:
    """A device of this machine: for the planner, for torch, and the bytes its process may use
    (None: as many as there are).
    """

    placed: Kinded
    torch: torch.device
    limit: float | None


def devices_here(devices: str | Sequence[Device | str]) -> list[Here]:
    """The devices to run on: "cpu" (with memory: "cpu:2GB") and "cuda:N", or "4xcpu:2GB".

    CPUs without a limit share the machine's memory. Raises OptionError (PLT-DST-001) for one that
    nothing can run on.
    """
    if isinstance(devices, str):
        devices = [part for text in devices.split(",") for part in _repeated(text.strip())]
    specs = as_devices(devices)
    if not specs:
        raise OptionError("PLT-DST-001", "there are no devices", 'such as devices=["cpu", "cpu"]')
    cpus = sum(_is_cpu(x) for x in specs)
    return [_here(x, k, cpus) for k, x in enumerate(specs)]


def _repeated(text: str) -> list[str]:
    match = re.fullmatch(r"([1-9]\d*)x(.+)", text)
    return [match[2]] * int(match[1]) if match else [text]


def _is_cpu(device: Device) -> bool:
    return device.spec.partition(":")[0].lower() == "cpu"


def _here(device: Device, number: int, cpus: int) -> Here:
    if _is_cpu(device):
        import psutil

        explicit = device.memory is not None or ":" in device.spec
        if not explicit:
            device = replace(device, memory=psutil.virtual_memory().total / cpus)
        placed = device.placed(number)
        limit = placed.device.memory_bytes if explicit else None
        return Here(placed, torch.device("cpu"), limit)
    if device.spec.startswith("cuda"):
        spec = device.spec
        if spec == "cuda":
            spec = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        return Here(replace(device, spec=spec).placed(number), torch.device(spec), None)
    raise OptionError(
        "PLT-DST-001", f"nothing runs on {device.spec!r}: it is a kind, not a device here",
        "name cpu or cuda:N; plait.place plans for other machines",
    )  # fmt: skip


def threads_of(options: PlacementOptions, devices: Sequence[Here]) -> int:
    """Threads of each CPU process."""
    if options.threads is not None:
        return options.threads
    if options.how() == "inline":
        return torch.get_num_threads()
    return max(1, cores() // max(1, ranks_here(options, devices)))


def ranks_here(options: PlacementOptions, devices: Sequence[Here]) -> int:
    """CPU ranks on a machine."""
    ranks = sum(d.torch.type == "cpu" for d in devices)
    if options.how() == "torchrun":
        return min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    return ranks


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
