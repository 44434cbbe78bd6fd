"""One rank's part of a placed model: segments compiled, weights loaded, memory watched."""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from ...kernels.ops.bounds import IndexCheck, index_checks
from ...passes.ir import attribute
from ...runtime import driver
from ...runtime.pipeline import RankProgram
from ...runtime.workspace import Arena
from .. import pipeline
from ..capture.captured import Captured, InputSpec
from ..errors import InputError, PlaitError
from ..modes import plain_modes
from ..options import Options
from ..serialize.graph import Symbols, graph_from_json, graph_to_json
from ..weights.absent import Renamed, Rows, Source, fill
from .pipe import pack, unpack
from .segments import captured_of

SLACK = 64 << 20
"""Bytes that a process may use beyond its base and its device's memory: stacks of threads, buffers
of the transport, and what the interpreter needs while it runs."""


_SPARE = 0.03
"""Share of its weights' bytes that a rank keeps for results to come."""
_M_MMAP_THRESHOLD = -3
_OWN_PAGES = 64 << 10
"""Bytes from which an allocation has pages of its own: so few that no tensor's rounding matters."""


class DistributedError(PlaitError, RuntimeError):
    """A placed model cannot run, or a rank of it failed: one error for all ranks."""


def failure(rank: int, error: Exception) -> PlaitError:
    """A rank's error as one that all ranks can be told."""
    if isinstance(error, PlaitError):
        return error
    if _is_shortage(error):
        hint = "give its device more memory, or more devices"
        return DistributedError("PLT-DST-006", f"rank {rank} is out of memory: {error}", hint)
    lines = [x.strip() for x in traceback.format_exception(error)]
    where = next((x.splitlines()[0] for x in reversed(lines) if x.startswith("File")), "")
    reason = f"rank {rank} failed: {type(error).__name__}: {error} ({where})"
    return DistributedError("PLT-DST-010", reason)


def segment_to_json(captured: Captured, names: Mapping[str, str | Rows]) -> dict[str, Any]:
    """A segment without the weights that ``names`` maps to a source's; other constants with it."""
    module = captured.graph_module
    constants = captured.constants()
    return {
        "graph": graph_to_json(module),
        "hollow": {
            t: [_plain(names[t]), str(c.dtype)[6:], list(c.shape), list(c.stride())]
            for t, c in constants.items() if t in names
        },
        "constants": pack({t: c for t, c in constants.items() if t not in names}),
        "inputs": [[s.name, str(s.dtype)[6:], list(s.shape)] for s in captured.inputs],
    }  # fmt: skip


def _plain(name: str | Rows) -> str | list[Any]:
    return [name.name, list(name.rows)] if isinstance(name, Rows) else name


def segment_from_json(data: Mapping[str, Any]) -> tuple[Captured, dict[str, str | Rows]]:
    """A segment, its weights on the meta device, and their names in the source by target."""
    tensors = unpack(data["constants"])
    names: dict[str, str | Rows] = {}
    for target, (name, dtype, shape, stride) in data["hollow"].items():
        kind = getattr(torch, dtype)
        tensors[target] = torch.empty_strided(shape, stride, dtype=kind, device="meta")
        names[target] = name if isinstance(name, str) else Rows(name[0], tuple(name[1]))
    module = graph_from_json(data["graph"], tensors, Symbols({}, {}), "Segment")
    cpu = torch.device("cpu")
    specs = [InputSpec(n, getattr(torch, d), tuple(s), cpu) for n, d, s in data["inputs"]]
    return captured_of(module, specs), names


class SegmentRun:
    """A compiled segment: call it with its inputs in order."""

    def __init__(
        self, captured: Captured, names: Mapping[str, str | Rows], source: Source, options: Options,
        device: torch.device, prepared: pipeline.Prepared | None = None,
    ) -> None:  # fmt: skip
        renamed = Renamed(source, names, captured.constants())
        self.graph = captured.graph_module.graph
        if device.type == "cpu":
            captured.weights = renamed
            with plain_modes():
                ready = prepared or pipeline.prepare(captured, options)
                self.engine: Any = pipeline.finish(captured, ready)
            self.remarks = self.engine.remarks
            self.graph = self.engine.graph.graph
            self._call: Callable[[Sequence[torch.Tensor]], Any] = self.engine.run
        else:
            self.engine, self.remarks = on_device(captured, renamed, device), ()
            self._call = lambda tensors: list(self.engine(*tensors))
        self._checks = index_checks(self.graph)
        self._names = [s.name for s in captured.inputs]
        self._arena = Arena()

    def share(self, arena: Arena) -> None:
        """Lets the segment work in memory that it has with others."""
        executor = getattr(self.engine, "executor", None)
        if executor is not None:
            self._arena = arena
            executor.share(arena)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Raises InputError (PLT-INP-006) for an index out of range among the inputs."""
        for check in self._checks:
            check_range(self._names[check.input], check, tensors[check.input])
        with plain_modes(), self._arena.lock:
            return self._call(tensors)


def check_range(name: str, check: IndexCheck, tensor: torch.Tensor) -> None:
    """Raises InputError where an element that is an index is out of its range."""
    tensor, low, end = check.of(tensor), int(check.low), int(check.end)
    if tensor.numel():
        least, most = (int(x) for x in torch.aminmax(tensor))
        if least < low or most >= end:
            reason = (
                f"{name!r} holds indices from {least} to {most}, allowed are {low} to {end - 1}"
            )
            raise InputError("PLT-INP-006", reason)


def on_device(captured: Captured, source: Source, device: torch.device) -> fx.GraphModule:
    """A segment for torch to run on a GPU: constants there, devices in arguments replaced."""
    module = captured.graph_module
    for target in captured.constants():
        value = attribute(module, target)
        whole = source.get(target) if value.is_meta else value
        setattr(module, target, whole.to(device))
    for node in module.graph.nodes:
        here = lambda a: device if isinstance(a, torch.device) else a  # noqa: E731
        node.args = torch.utils._pytree.tree_map(here, node.args)
        node.kwargs = torch.utils._pytree.tree_map(here, node.kwargs)
    module.recompile()
    return module


@dataclass
class Memory:
    """Bytes of this process: before weights, after loading them, and the peak of all since."""

    base: int
    loaded: int = 0
    peak: int = 0


class Part:
    """What one rank runs. ``limit`` bytes beyond its base are all that the process may allocate.

    Raises DistributedError (PLT-DST-006) where the weights do not fit.
    """

    def __init__(
        self,
        program: RankProgram,
        segments: Mapping[str, Mapping[str, Any]],
        source: Source,
        options: Options,
        device: torch.device,
        limit: float | None = None,
    ) -> None:
        self.program, self.device = program, device
        parsed = {n: segment_from_json(data) for n, data in segments.items()}
        ready: dict[str, pipeline.Prepared] = {}
        if device.type == "cpu":
            driver.launch_function()
            ready = {n: pipeline.prepare(c, options) for n, (c, _) in parsed.items()}
        return_freed()
        reset_peak()
        self.memory = Memory(resident())
        before = enforce(limit)
        at: list[str] = []
        watched = _Told(source, at)
        runs: dict[str, SegmentRun] = {}
        try:
            sources = {
                n: Renamed(watched, names, c.constants()) for n, (c, names) in parsed.items()
            }
            fill(*((p.lowered, sources[n]) for n, p in ready.items()))
            for name, (captured, names) in parsed.items():
                runs[name] = SegmentRun(captured, names, watched, options, device, ready.get(name))
        except (RuntimeError, MemoryError) as error:
            if not _is_shortage(error):
                raise
            runs.clear()
            lift(before)
            raise DistributedError(
                "PLT-DST-006",
                f"rank {program.rank} is out of memory loading {at[-1] if at else 'its part'!r}"
                + (f": it may use {limit / 1e6:.0f} MB" if limit is not None else ""),
                "give its device more memory, or more devices",
            ) from None
        self.memory.loaded, self.memory.peak = resident(), peak()
        self.arena = Arena(int(_SPARE * max(self.memory.loaded - self.memory.base, 0)))
        for run in runs.values():
            run.share(self.arena)
        self.runs: dict[str, SegmentRun] = runs

    def watch(self) -> Memory:
        """What the process took so far."""
        self.memory.peak = max(peak(), self.memory.peak)
        return self.memory


class _Told:
    """A source that notes what is asked of it."""

    def __init__(self, source: Source, asked: list[str]) -> None:
        self._source, self._asked = source, asked

    def get(self, name: str, row: int | slice | None = None) -> torch.Tensor:
        """See `Source.get`."""
        self._asked.append(name)
        return self._source.get(name, row)


def _is_shortage(error: BaseException) -> bool:
    text = str(error).lower()
    words = (
        "can't allocate memory",
        "out of memory",
        "cannot allocate memory",
        "not enough memory",
        "failed to map segment",
    )
    return isinstance(error, MemoryError) or any(w in text for w in words)


def _status(field: str) -> int:
    """A field of this process's status in bytes; 0 where the system has none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def resident() -> int:
    """Bytes of memory that this process has in use."""
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Lets `peak` count from now on, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak() -> int:
    """The most bytes that were in use, since `reset_peak` where that works."""
    found = _status("VmHWM")
    if found or sys.platform == "win32":
        return found or resident()
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def return_freed() -> None:
    """Makes freed tensors return to the system at once, where the C library is glibc.

    Its heap would not use the room of an aligned tensor again for the next one of that size (a free
    block has to hold the alignment as well), and grow by what the plan knows nothing of.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)


def enforce(limit: float | None) -> tuple[int, int] | None:
    """Forbids this process more than ``limit`` + `SLACK` bytes beyond what it has now.

    Returns the limits of before, for `lift`; None where nothing was changed.
    """
    if limit is None or not sys.platform.startswith("linux"):
        return None
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = _status("VmData") + int(limit) + SLACK
    hard = before[1]
    if hard != resource.RLIM_INFINITY:
        allowed = min(allowed, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    return before


def lift(before: tuple[int, int] | None) -> None:
    """Puts the limits back."""
    if before is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, before)
