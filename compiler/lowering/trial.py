"""Trial runs of a group: memory as its kernel sees it, random contents, and the eager meaning.

Used to race candidates: each gets the same inputs in the layout it will meet in the plan, and its
result is compared with the group's operators run by torch in float64.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from ...kernels.abi import Dim, Kernel, Pack, TensorArg
from ...kernels.group import Group
from ...runtime.sizes import evaluate
from .. import sizes


def numbers(dims: Sequence[Dim], values: Mapping[str, int]) -> tuple[int, ...]:
    """Sizes as numbers for given symbol values."""
    return tuple(evaluate(sizes.text(d), values) for d in dims)


def allocate(arg: TensorArg, values: Mapping[str, int]) -> torch.Tensor:
    """A zeroed tensor that lies in memory as ``arg`` says, halo included."""
    shape, strides = numbers(arg.shape, values), numbers(arg.strides, values)
    before = sum(h[0] * s for h, s in zip(arg.halo, strides, strict=True))
    extent = sum(
        (max(d, 1) - 1 + sum(h)) * s for d, h, s in zip(shape, arg.halo, strides, strict=True)
    )
    storage = torch.zeros(extent + 1 + 64 // arg.dtype.itemsize, dtype=arg.dtype)
    shift = -storage.data_ptr() % 64 // arg.dtype.itemsize
    return storage[shift:].as_strided(shape, strides, storage[shift:].storage_offset() + before)


def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random contents that keep sums of products near one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    once = [d if step or not d else 1 for d, step in steps]  # what is expanded is written once
    tensor = tensor.as_strided(once, tensor.stride())
    if tensor.dtype.is_floating_point:
        tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.5)
    else:
        tensor.copy_(torch.randint(0, 2, tensor.shape, generator=generator))


class Trial:
    """Inputs, outputs and the reference result of one group at given symbol values."""

    def __init__(
        self, group: Group, io: Mapping[fx.Node, TensorArg], values: Mapping[str, int]
    ) -> None:
        self.group, self.values = group, dict(values)
        generator = torch.Generator().manual_seed(0)
        self.inputs = [allocate(io[n], values) for n in group.inputs]
        for tensor in self.inputs:
            fill(tensor, generator)
        self.outputs = [allocate(io[n], values) for n in group.outputs]
        self._packed: dict[tuple[int, Pack], torch.Tensor] = {}
        self._reference: list[torch.Tensor] | None = None

    @property
    def tolerance(self) -> float:
        """The largest `error` of a right kernel."""
        return 4e-2 if any(t.dtype != torch.float32 for t in self.outputs) else 1e-4

    def words(self, kernel: Kernel, packs: Sequence[Pack | None]) -> Any:
        """The argument words of ``kernel`` on this trial's memory, as a ctypes array."""
        tensors = []
        for k, (tensor, pack) in enumerate(zip(self.inputs, packs, strict=True)):
            if pack is not None:
                if (k, pack) not in self._packed:
                    from ...kernels import packing

                    self._packed[k, pack] = packing.apply(pack, tensor).contiguous()
                tensor = self._packed[k, pack]
            tensors.append(tensor)
        pointers = [t.data_ptr() for t in (*tensors, *self.outputs)]
        return (ctypes.c_int64 * (len(pointers) + len(kernel.symbols)))(
            *pointers, *(self.values[s] for s in kernel.symbols)
        )

    def eager(self, double: bool = False) -> list[torch.Tensor]:
        """The group's operators run by torch on the inputs (in float64 with ``double``)."""
        env: dict[fx.Node, Any] = {}
        for node, tensor in zip(self.group.inputs, self.inputs, strict=True):
            lift = double and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
            env[node] = tensor.double() if lift else tensor

        def value(node: fx.Node) -> Any:
            if node in env:
                return env[node]
            return evaluate(sizes.text(node.meta["val"]), self.values)

        for node in self.group.nodes:
            kwargs = dict(fx.map_arg(node.kwargs, value))
            if double and kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
            env[node] = node.target(*fx.map_arg(node.args, value), **kwargs)  # type: ignore[operator]
        return [env[n] for n in self.group.outputs]

    def library_seconds(self, rounds: int = 5, seconds: float = 0.05) -> float:
        """Best wall time of the group's operators run by torch, on tensors laid as torch likes."""
        strided = self.inputs
        try:
            self.inputs = [
                t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()
                for t in strided
            ]
            best, started = math.inf, time.perf_counter()
            with torch.no_grad():
                self.eager()  # the first call pays for cold code
                for _ in range(rounds):
                    begin = time.perf_counter()
                    self.eager()
                    best = min(best, time.perf_counter() - begin)
                    if time.perf_counter() - started > seconds:
                        break
            return best
        finally:
            self.inputs = strided

    def spoil(self) -> None:
        """Fills the outputs with values that no kernel leaves behind."""
        for tensor in self.outputs:
            tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 85)

    def error(self) -> float:
        """Largest error of the outputs, relative to the largest element of torch's result."""
        if self._reference is None:
            self._reference = self.eager()
        worst = 0.0
        for have, want in zip(self.outputs, self._reference, strict=True):
            if not want.numel():
                continue
            have, want = have.double(), want.double()
            scale = max(float(want.nan_to_num(0.0, 0.0, 0.0).abs().max()), 1e-30)
            same = (have == want) | (have.isnan() & want.isnan())
            error = float((have - want).abs().masked_fill_(same, 0.0).max()) / scale
            if not error <= worst:  # NaN is the worst error of all, and compares as false
                worst = error
        return worst
