"""Compiles kernels that follow `kernels.abi` and calls them on torch tensors.

`run_kernel` is for one kernel; `Batch` compiles many in one module, which is far quicker than one
by one. Inputs may be strided as their `TensorArg` says; outputs are allocated here from theirs,
halo included, with every byte outside the interior checked to be left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from plait.kernels import loader
from plait.kernels.abi import Dim, Kernel, Pack, TensorArg
from plait.kernels.build import build
from plait.kernels.target import host

GUARD = 64  # bytes of canary on either side of an output
CANARY = 0xA5
Packer = Callable[[Pack, torch.Tensor], torch.Tensor]


def number(dim: Dim, symbols: Mapping[str, int]) -> int:
    """The value of a dimension for given symbol values."""
    if isinstance(dim, int):
        return dim
    return int(dim.subs({s: symbols[str(s)] for s in dim.free_symbols}))


def empty_output(arg: TensorArg, symbols: Mapping[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes filled with the canary, the logical tensor inside them)."""
    shape = [number(d, symbols) for d in arg.shape]
    strides = [number(s, symbols) for s in arg.strides]
    before = sum(h[0] * s for h, s in zip(arg.halo, strides, strict=True))
    after = sum((d - 1 + h[1]) * s for d, h, s in zip(shape, arg.halo, strides, strict=True) if d)
    size = arg.dtype.itemsize
    raw = torch.full((2 * GUARD + (before + after + 1) * size,), CANARY, dtype=torch.uint8)
    flat = raw[GUARD : GUARD + (before + after + 1) * size].view(arg.dtype)
    return raw, flat.as_strided(shape, strides, flat.storage_offset() + before)


class Batch:
    """Kernels compiled together into one shared library."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self.kernels = {k.name: k for k in kernels}
        if len(self.kernels) != len(kernels):
            raise ValueError("kernel names must differ")
        self._bundle = build(list(kernels), host())
        assert self._bundle.failed == {}, self._bundle.failed

    def run(
        self,
        name: str,
        tensors: Sequence[torch.Tensor],
        symbols: Mapping[str, int] | None = None,
        splits: int = 3,
        packer: Packer | None = None,
    ) -> list[torch.Tensor]:
        """Calls kernel ``name`` over its tasks in ``splits`` ranges, last range first.

        ``tensors`` are in the order of ``Kernel.inputs``, not yet packed; ``packer`` packs those
        for which the kernel asks.
        """
        kernel, symbols = self.kernels[name], symbols or {}
        packs = kernel.packs or (None,) * len(kernel.inputs)
        held = []
        for tensor, arg, pack in zip(tensors, kernel.inputs, packs, strict=True):
            if pack is None:
                assert tensor.dtype == arg.dtype
                shape = tuple(number(d, symbols) for d in arg.shape)
                assert tuple(tensor.shape) == shape, (tensor.shape, shape)
                if tensor.numel():
                    for i, s in enumerate(arg.strides):
                        assert shape[i] == 1 or tensor.stride(i) == number(s, symbols)
            if pack is not None:
                assert packer is not None, "the kernel wants a packed input"
                tensor = packer(pack, tensor)
            held.append(tensor)
        outputs = [empty_output(a, symbols) for a in kernel.outputs]
        before = [raw.clone() for raw, _ in outputs]
        pointers = [t.data_ptr() for t in held] + [t.data_ptr() for _, t in outputs]
        words = len(pointers) + len(kernel.symbols)
        call = loader.function(self._bundle.address(name), words)
        tasks = number(kernel.tasks, symbols)
        edges = [tasks * i // splits for i in range(splits + 1)]
        for lo, hi in reversed(list(zip(edges, edges[1:], strict=False))):
            call(lo, hi, *pointers, *(symbols[s] for s in kernel.symbols))
        for (raw, tensor), old in zip(outputs, before, strict=True):
            mask = torch.zeros(raw.numel(), dtype=torch.bool)
            if tensor.numel():
                start = tensor.storage_offset() * tensor.element_size()
                reach = [
                    torch.arange(n) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
                ]
                where = torch.zeros((), dtype=torch.long)
                for r in reach:
                    where = where.unsqueeze(-1) + r
                where = where.reshape(-1) * tensor.element_size() + start
                for byte in range(tensor.element_size()):
                    mask[where + byte] = True
            assert torch.equal(raw[~mask], old[~mask]), f"{name} wrote outside its output"
        return [tensor for _, tensor in outputs]


def run_kernel(
    kernel: Kernel,
    tensors: Sequence[torch.Tensor],
    symbols: Mapping[str, int] | None = None,
    splits: int = 3,
    packer: Packer | None = None,
) -> list[torch.Tensor]:
    """Compiles one kernel and calls it; see `Batch.run`."""
    return Batch([kernel]).run(kernel.name, tensors, symbols, splits, packer)
