"""A captured graph of tensors on one GPU, compiled and ready to run."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...kernels.cuda_loader import GpuKernel, GpuLibrary
from ...kernels.occupancy import SM90, Gpu
from ...passes.remarks import Remark
from ...runtime.cuda_graph import GpuExecutor
from ...runtime.gpu_device import ALIGNMENT, Function, TorchDevice
from ..capture.captured import Captured
from ..options import Bettable, Options
from ..weights.host import HostStore
from .branches import assemble
from .lower import GpuLowered, Launchable
from .pipeline import planned

_ROUNDS = 30  # replays of either plan, in turns, to tell whether fused launches are faster


class CompiledForGpu:
    """A graph compiled for a GPU: implements `options.Executable`."""

    def __init__(
        self,
        captured: Captured,
        options: Options,
        device: torch.device,
        store: HostStore | None = None,
    ) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        arch, model = f"sm_{major}{minor}", model_of(torch.cuda.get_device_properties(device))
        kept = () if store is None else (store.budget, store.layout)
        plan = planned(captured, options.pipeline, arch, model, *kept)
        self.graph = plan.graph
        self.lowered = plan.lower()
        told = [] if store is None else store.admit(captured, plan, self.lowered)
        self.executor = executor(self.lowered, device, store)
        self._remarks = [*plan.remarks, *self.lowered.remarks, *told]
        if self.lowered.fused and options.tune != "off":
            apart = plan.lower(fused=False)
            other = executor(apart, device, store)
            with contextlib.nullcontext() if store is None else store.trying():
                fused, alone = race(
                    [self.executor.run, other.run], _made_up(captured, device), _Clock(device)
                )
            if fused >= alone:
                self.lowered, self.executor = apart, other
                reason = f"{fused * 1e6:.1f} us with fused launches, {alone * 1e6:.1f} us without"
                self._remarks = [*plan.remarks, *apart.remarks, *told]
                self._remarks.append(Remark("PLT-GPU-006", "missed", "fuse-horizontal", (), reason))
        if store is not None:
            store.served(self.executor, plan, self.lowered)
            if isinstance(options.profile, Bettable):
                store.learn(self.executor, options.profile)
        self.plan = self.lowered.plan
        self.run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]] = self.executor.run

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What was done, or not done and why, in order."""
        found = list(self._remarks)
        for name, refusal in self.executor.refusals():
            reason = f"{refusal}, so every call launches the plan's steps one by one"
            nodes = (name,) if name else ()
            found.append(Remark("PLT-GPU-004", "missed", "cuda-graph", nodes, reason))
        return tuple(found)

    def visits(self) -> list[str]:
        """How often each branch ran, as lines of text."""
        return self.executor.visits()


def model_of(properties: Any) -> Gpu:
    """The model of a GPU with these properties: an H200's, scaled by the multiprocessors."""
    scale = properties.multi_processor_count / SM90.sms
    return replace(
        SM90,
        sms=properties.multi_processor_count,
        threads=properties.max_threads_per_multi_processor,
        flops=SM90.flops * scale,
        bandwidth=SM90.bandwidth * scale,
    )


def executor(
    lowered: GpuLowered, device: torch.device, store: HostStore | None = None
) -> GpuExecutor:
    """What runs a lowered plan on a GPU; the experts that it fetches are in ``store``."""
    return assemble(lowered, TorchDevice(device), _Loader(device), store)


class _Loader:
    """Loads images to a GPU, each once (`branches.Loader`)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._libraries: dict[bytes, GpuLibrary] = {}

    def functions(self, lowered: GpuLowered) -> dict[str, Function]:
        """See `branches.Loader`."""
        functions: dict[str, Function] = {}
        with torch.cuda.device(self.device):
            torch.cuda.init()
            torch.zeros(1, device=self.device)  # makes the context current for the driver
            for name, found in lowered.kernels.items():
                image = lowered.images[found.image]
                if image not in self._libraries:
                    self._libraries[image] = GpuLibrary(image)
                functions[name] = launcher(self._libraries[image].launch, found)
        return functions

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `branches.Loader`."""
        tensor = tensor.to(self.device)
        return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def launcher(launch: Callable[..., None], found: Launchable) -> Function:
    """A kernel as the executor calls it: with its step's arguments instead of its own."""
    return functools.partial(_launch, launch, found.kernel, found.order)


def _launch(
    launch: Callable[..., None],
    kernel: GpuKernel,
    order: Sequence[int],
    pointers: Sequence[int],
    stream: int,
) -> None:
    count = len(kernel.offsets)
    ordered = [pointers[k] for k in order]
    launch(kernel, ordered[:count], ordered[count:], stream)


class _Clock:
    """Times a call on the device by events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def race(
    runs: Sequence[Callable[..., Any]],
    inputs: Sequence[torch.Tensor],
    clock: Callable[[Callable[[], Any]], float],
) -> list[float]:
    """Median seconds of each of ``runs`` on ``inputs``, which take turns, after warming up."""
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(_ROUNDS + 3):
        for run, times in zip(runs, taken, strict=True):
            seconds = clock(lambda run=run: run(inputs))
            if turn >= 3:  # warm up, capture, first replay
                times.append(seconds)
    return [statistics.median(times) for times in taken]


def _made_up(captured: Captured, device: torch.device) -> list[torch.Tensor]:
    """Inputs of a graph of known sizes: zeros, which are valid as indices, too."""
    return [
        torch.zeros([int(d) for d in s.shape], dtype=s.dtype, device=device)
        for s in captured.inputs
    ]
