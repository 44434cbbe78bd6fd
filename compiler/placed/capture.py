"""Capture for placed models: one static graph, its weights named but not held.

Parameters may be on the meta device. While such a model is traced they are memory that is reserved
but never touched, so a model larger than this machine is captured on it.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from ...passes.ir import is_random
from ..capture.captured import Captured
from ..capture.export import capture
from ..errors import CaptureError, FileError, InputError, OptionError
from ..weights.absent import Checkpoint, ModuleSource, Rows, Source

_SMALL = 1 << 16
"""Buffers of at most so many elements travel with the graph, whose passes may then fold them."""

_NORESERVE = 0x4000
"""Linux's MAP_NORESERVE, which older Pythons have no name for."""


@dataclass
class Whole:
    """A captured model: its graph with weights on the meta device, where their values are, and the
    names by which ``source`` knows the graph's weights.
    """

    captured: Captured
    source: Source
    names: dict[str, str | Rows]


def capture_whole(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Any
) -> Whole:
    """Captures one call of ``model``; ``weights`` is a path of safetensors files, or None.

    Raises OptionError, CaptureError or FileError where the model cannot be divided.
    """
    if model.training:
        raise OptionError("PLT-DST-002", "the model is in training mode", "call .eval() first")
    source = Checkpoint(weights) if weights is not None else ModuleSource(model)
    with stand_ins(model) as hollow:
        if hollow and weights is None:
            raise FileError(
                "PLT-DST-007", f"{hollow[0]!r} is on the meta device", "name its files by weights="
            )
        with torch.no_grad():
            captured = capture(model, args, kwargs)
        for kind, found in (
            ("writes to its arguments or buffers", captured.mutations or captured.states),
            ("changes a state object that it is given", captured.updates),
            ("draws random numbers", _random(captured.graph_module)),
        ):
            if found:
                hint = "place a model whose results depend on its arguments alone"
                raise CaptureError("PLT-DST-002", f"the model {kind}", hint)
        names = _hollow(captured, source, model, set(hollow))
    return Whole(captured, source, names)


def _random(module: fx.GraphModule) -> bool:
    return any(is_random(node) for node in module.graph.nodes)


def _hollow(
    captured: Captured, source: Source, model: nn.Module, hollow: set[str]
) -> dict[str, str | Rows]:
    """Puts the weights of a graph on the meta device; the source's name of each by target."""
    module = captured.graph_module
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names: dict[str, str | Rows] = {}
    for target, tensor in captured.constants().items():
        own = captured.names.get(target)
        if own is None:
            continue  # made while tracing
        known = [own, *(n for n, t in captured.aliases.items() if t == target)]
        if isinstance(source, Checkpoint):
            found = next((n for n in known if n in source.where), None)
            if found is None and (own in parameters or hollow.intersection(known)):
                raise FileError(
                    "PLT-DST-007", f"{source.path} has no weight {own!r}",
                    "build the model as it was when the file was saved"
                    if own in parameters else "keep buffers in memory: plait.empty_weights()",
                )  # fmt: skip
            if found is not None:
                _check(source, found, tensor)
        else:
            found = own if own in parameters or tensor.numel() > _SMALL else None
        if found is not None:
            names[target] = found
            meta = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            setattr(module, target, meta)
    return names


def _check(source: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    """Raises FileError unless the file's weight is what the model has."""
    found = source.where[name]
    has, wanted = (str(dtype).removeprefix("torch.") for dtype in (found.dtype, tensor.dtype))
    if found.shape != tuple(tensor.shape) or has != wanted:
        raise FileError(
            "PLT-DST-007",
            f"{name!r} is {has}{list(found.shape)} in {source.path}, "
            f"{wanted}{list(tensor.shape)} in the model",
            "build the model as it was when the file was saved",
        )


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[list[str]]:
    """Within it, what is on the meta device has memory that nothing should read; yields its names.

    The memory is reserved address space: it costs nothing until it is written.
    """
    made: dict[int, torch.Tensor] = {}
    changed: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    names: list[str] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for place in (module._parameters, module._buffers):
            for key, tensor in place.items():
                if tensor is not None and tensor.is_meta:
                    names.append(f"{prefix}.{key}" if prefix else key)
                    changed.append((place, key, tensor))
    try:
        for place, key, tensor in changed:
            if id(tensor) not in made:
                stand_in = _reserved(tensor)
                trained = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(stand_in, False) if trained else stand_in
            place[key] = made[id(tensor)]
        yield names
    finally:
        for place, key, tensor in changed:
            place[key] = tensor


def _reserved(like: torch.Tensor) -> torch.Tensor:
    """A CPU tensor of the shape and strides of ``like`` whose memory is reserved only."""
    reach = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    nbytes = reach * like.element_size()
    if not like.numel() or not sys.platform.startswith("linux"):
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    memory = mmap.mmap(-1, nbytes, flags=flags)
    flat = torch.frombuffer(memory, dtype=like.dtype, count=reach)
    return flat.as_strided(like.shape, like.stride())


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Within it, parameters of new modules are made on the meta device, buffers as ever.

    A model of any size is so built without memory for its weights, while tables that no file holds
    (rotary frequencies) keep their values. One parameter at a time exists before it is dropped.
    """
    register = nn.Module.register_parameter

    def hollow(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.to("meta"), param.requires_grad)

    nn.Module.register_parameter = hollow  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def check_plain(tensors: Sequence[torch.Tensor]) -> None:
    """Raises InputError for arguments of a call that a placed model does not take."""
    if any(t.requires_grad for t in tensors) and torch.is_grad_enabled():
        raise InputError(
            "PLT-DST-002", "an argument requires gradients", "call under torch.no_grad()"
        )
