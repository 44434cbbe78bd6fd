"""Experts of a model on a GPU under a budget: in host memory, with slots on the GPU for some.

Weights move once it is known that a plan fetches them: to memory of the host that the GPU copies
from by itself. The model's own parameters that they were made of go there, too. They stay tensors
of the GPU, which reads such memory where it lies, so whatever else reads them is slower, and right.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from ...kernels.ops import argument
from ...passes.ir import attribute
from ...passes.prefetch_weights import Tiered
from ...passes.remarks import Remark
from ...runtime.gpu_device import Device, HostMemory, TorchDevice
from ...runtime.host_tier import HostTier
from ...runtime.paging import Paging
from ...runtime.slots import HostBank, Matrix
from ..capture.captured import Captured
from ..gpu.lower import GpuLowered
from ..gpu.pipeline import Planned
from .budget import WeightStore, holders, same_memory

_SHOWN: dict[int, weakref.ref[HostMemory]] = {}
"""By the address at which a GPU sees it, host memory of all models: where two share weights, they
must not move them in turns."""


class HostStore(WeightStore):
    """Host memory, slots and the tier of one compiled model on the GPU ``place``."""

    where = "host memory"

    def __init__(self, budget: int | str, place: torch.device) -> None:
        super().__init__(budget)
        self.place = place
        self.device: Device = device_of(place)
        self.layout: tuple[Matrix, ...] | None = None
        """The matrices of an expert that slots are for, once there are any."""
        self._holders: dict[int, list[torch.Tensor]] = {}
        self._kept: weakref.WeakValueDictionary[Any, HostBank] = weakref.WeakValueDictionary()

    @contextlib.contextmanager
    def moved(self, captured: Captured, modules: Sequence[nn.Module]) -> Iterator[int]:
        """Within it `admit` may move parameters of ``modules``; nothing moves before."""
        self._holders = holders(modules)
        try:
            yield 0
        finally:
            self._holders = {}
            self.settle()

    def admit(self, captured: Captured, plan: Planned, lowered: GpuLowered) -> list[Remark]:
        """Moves what a plan fetches to host memory, and makes room for its slots.

        Raises OptionError where the budget is too small, before anything has moved.
        """
        tiered, remarks = plan.tiered, []
        if tiered is None:
            return []
        if lowered.banks:
            self.layout = plan.layout
        self.open(tiered)
        self.close(tiered, self.largest(lowered), lowered.stayed, remarks)
        stuck = self._take(captured, plan.graph, sorted(set(lowered.banks.values())))
        for name, target in lowered.banks.items():
            lowered.constants[name] = attribute(plan.graph, target)
        if stuck:
            reason = (
                f"{stuck / 2**20:.2f} MiB of experts' parameters are parts of larger tensors or"
                " were made in inference mode: the model's own stay on the GPU, beside the budget"
            )
            remarks.append(Remark("PLT-PRE-012", "missed", "weights", (), reason))
        return remarks

    def open(self, tiered: Tiered) -> None:
        """Gets ready for a program's weights."""
        if self.tier is None and self.layout is not None:
            evict: Any = tiered.evict
            self.tier = HostTier(tiered.budget, self.device, self.layout, tiered.ahead, evict)

    def served(self, engine: object, plan: Planned, lowered: GpuLowered) -> None:
        """See `serve`; ``engine`` runs a lowered plan."""
        tiered = plan.tiered
        if tiered is not None:
            capacity = tiered.budget - (tiered.total - tiered.tiered + lowered.stayed)
            filed = tiered.tiered - lowered.stayed
            self.serve(engine, capacity, self.largest(lowered), filed)

    def largest(self, lowered: GpuLowered) -> int:
        """Bytes of an expert that a plan fetches; 0 if it fetches none."""
        layout = self.layout if lowered.banks else None
        return sum(torch.Size(s).numel() * dtype.itemsize for s, dtype in layout or ())

    def paging(self, lowered: GpuLowered) -> Paging:
        """What fetches the banks of a plan."""
        assert isinstance(self.tier, HostTier)
        banks = {name: self._bank(lowered.constants[name]) for name in lowered.banks}
        return Paging(lowered.plan, self.device, self.tier, banks)

    def resident(self, tensor: torch.Tensor) -> torch.Tensor:
        """A constant in the GPU's own memory."""
        return tensor if _known(tensor) is None else self.device.call(torch.clone, tensor)

    def forget(self) -> None:
        """Weights may have changed unseen."""
        super().forget()
        self._kept.clear()

    # -- moving -----------------------------------------------------------------------------------

    def _take(self, captured: Captured, graph: fx.GraphModule, targets: Sequence[str]) -> int:
        """Moves the weights ``targets`` of a graph, and those that they were made of; returns the
        bytes of the model's own that stay where they are.
        """
        stuck, module = 0, captured.graph_module
        taken = {t: attribute(graph, t) for t in targets}
        gone: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by address
        addresses = {_address(tensor) for tensor in taken.values()}
        for name in sorted(_sources(module, addresses) if targets else ()):
            tensor = getattr(module, name)
            own = self._holders.get(_address(tensor), [])
            if _known(tensor) is not None:
                continue
            sound = all(same_memory(tensor, p) and not p.is_inference() for p in own)
            if tensor.is_inference() or not sound or not tensor.is_contiguous():
                stuck += tensor.nbytes
                continue
            address, before, shown = _address(tensor), tensor.detach(), self._copied(tensor)
            for parameter in own:
                parameter.data = shown
            if own:
                shown = own[0].detach()
                self._holders[_address(shown)] = own
            gone[address] = before, shown
            setattr(module, name, shown)
        for target, tensor in taken.items():
            if _known(tensor) is None:
                found = gone.get(_address(tensor))
                shown = self._copied(tensor) if found is None else found[1]
                _set(graph, target, shown)
        return stuck

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor like ``tensor`` in host memory, as the GPU sees it."""
        device = self.device
        with device.activate():
            memory = HostMemory(device.host(tensor.nbytes))
            there = memory.host.view(tensor.dtype).view(tensor.shape)
            device.call(torch.Tensor.copy_, there, tensor.detach())
            self._settled()
            shown = device.shown(memory)
        _SHOWN[shown.data_ptr()] = weakref.ref(memory)
        return shown.view(tensor.dtype).view(tensor.shape)

    def _settled(self) -> None:
        """Waits for what has been issued so far, such as writes to host memory."""
        event = self.device.event()
        self.device.record(event, self.device.current())
        self.device.attend(event)

    def _bank(self, tensor: torch.Tensor) -> HostBank:
        """Weights in host memory as a bank; the same one while nobody writes to them."""
        address = _address(tensor)
        versions = tuple(p._version for p in self._holders.get(address, []))
        key = address, tuple(tensor.shape), tensor._version, versions
        bank = self._kept.get(key)
        if bank is None:
            memory = _known(tensor)
            assert memory is not None
            with self.device.activate():
                self._settled()
            bank = self._kept[key] = HostBank(memory.host.view(tensor.dtype).view(tensor.shape))
        return bank


def device_of(place: torch.device) -> Device:
    """What the weights of models on a GPU are copied by."""
    return TorchDevice(place)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _known(tensor: torch.Tensor) -> HostMemory | None:
    """The host memory that a tensor of a GPU lies in, if it does."""
    found = _SHOWN.get(_address(tensor))
    return None if found is None else found()


def _set(graph: fx.GraphModule, target: str, tensor: torch.Tensor) -> None:
    *path, last = target.split(".")
    owner: Any = graph
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, tensor)


def _sources(module: fx.GraphModule, addresses: set[int]) -> set[str]:
    """Attributes of a captured graph that only matrices of routed products are made of: those at
    ``addresses``, and those that several make one.
    """
    made: dict[fx.Node, frozenset[str] | None] = {}  # None: depends on an input
    routed: set[str] = set()
    others: set[str] = set()
    for node in module.graph.nodes:
        found = [made[a] for a in node.all_input_nodes]
        known = node.op == "call_function" and None not in found
        made[node] = frozenset().union(*found) if known else None  # type: ignore[arg-type]
        if node.op == "get_attr":
            made[node] = frozenset([str(node.target)])
        if made[node] is not None:
            continue
        product = str(node.target) == "plait.routed_linear.default"
        weight = argument(node, "weight") if product else None
        for source in node.all_input_nodes:
            names = made[source] or frozenset()
            if source is not weight:
                others |= names
            elif source.op != "get_attr" or _address(attribute(module, *names)) in addresses:
                routed |= names
            else:
                others |= names
    return routed - others
