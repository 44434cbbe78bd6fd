"""Which compiler a captured graph goes to, and what keeps its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from .capture.captured import Captured
from .modes import plain_modes
from .options import Executable, Options

if TYPE_CHECKING:
    from .weights.budget import WeightStore
    from .weights.host import HostStore


def build(captured: Captured, options: Options, store: WeightStore | None = None) -> Executable:
    """Compiles outside of whatever modes the caller happens to be in, for the device of the inputs
    and weights.

    ``store`` keeps the weights where there is a budget for them; it is one for the device
    (`store_at`). Raises NotImplementedError where it is not.
    """
    with plain_modes():
        device = gpu_of(captured)
        if device is not None:
            from .gpu.compiled import CompiledForGpu

            if store is None:
                return CompiledForGpu(captured, options, device)
            if store.place != device:
                raise NotImplementedError("weights of a model on a GPU are kept for another device")
            return CompiledForGpu(captured, options, device, cast("HostStore", store))
        from .pipeline import compile_graph  # the passes are imported when they are needed

        return compile_graph(captured, options, store)


def gpu_of(captured: Captured) -> torch.device | None:
    """The GPU that a captured graph is for; None where it is for the CPU.

    Raises NotImplementedError where its inputs and weights are on more than one device.
    """
    devices = {s.device for s in captured.inputs}
    devices |= {t.device for t in captured.constants().values() if t.dim() or t.is_cuda}
    if not any(d.type == "cuda" for d in devices):
        return None
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise NotImplementedError(f"inputs and weights are on several devices: {names}")
    return devices.pop()


def store_for(options: Options) -> WeightStore | None:
    """What keeps the weights of a model compiled with these options; None without a budget."""
    if options.weight_budget is None:
        return None
    from .weights.budget import WeightStore

    return WeightStore(options.weight_budget)


def store_at(store: WeightStore, device: torch.device | None) -> WeightStore:
    """What keeps weights to the budget of ``store`` on a GPU, or on the CPU: itself, if it does."""
    if store.place == device:
        return store
    if device is None:
        from .weights.budget import WeightStore

        return WeightStore(store.budget)
    from .weights.host import HostStore

    return HostStore(store.budget, device)
