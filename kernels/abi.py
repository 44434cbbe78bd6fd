"""The contract between a compiled kernel and whoever calls it.

Every CPU kernel is one C function that works through a range of its own tasks::

    void kernel(int64 lo, int64 hi, T0 *in0, ..., U0 *out0, ..., int64 sym0, ...)

* A *task* is the unit of parallel work. A kernel has ``Kernel.tasks`` of them; any
  partition of ``[0, tasks)`` into calls, on any threads and in any order, computes the
  same bits. That is what lets the runtime split, balance and fuse launches as data.
* Tensor arguments are inputs first, then outputs, then symbol values, in the order
  of ``Kernel.inputs``, ``Kernel.outputs`` and ``Kernel.symbols``. A pointer addresses *logical
  element 0* of its tensor; strides are baked into the code.
* A kernel allocates nothing that outlives the call, raises nothing and keeps no state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

MOST_ARGUMENTS = 128
"""Most tensors and symbols, together, of a kernel: what the runtime's driver passes on."""

Dim = int | sympy.Expr
"""A dimension, stride or count: a Python int, or a sympy expression over shape symbols."""


@dataclass(frozen=True)
class TensorArg:
    """How a kernel sees one tensor in memory.

    ``shape`` and ``strides`` are in elements and have one entry per dimension. ``halo``
    gives, per dimension, how many elements before and after the logical extent may be read;
    those elements are zero. ``const`` marks a weight, which may be packed ahead of time.
    """

    dtype: torch.dtype
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    halo: tuple[tuple[int, int], ...] = ()
    const: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.strides):
            raise ValueError(f"rank of shape {self.shape} and strides {self.strides} differ")
        if not self.halo:
            object.__setattr__(self, "halo", ((0, 0),) * len(self.shape))

    @property
    def is_contiguous(self) -> bool:
        return self.strides == contiguous_strides(self.shape)

    def key(self) -> str:
        """Text that is equal for arguments that a kernel cannot tell apart."""
        dims = ",".join(str(d) for d in self.shape)
        strides = ",".join(str(s) for s in self.strides)
        halo = ",".join(f"{a}:{b}" for a, b in self.halo) if any(map(any, self.halo)) else ""
        return f"{str(self.dtype)[6:]}[{dims}|{strides}|{halo}]{'c' if self.const else ''}"


def contiguous_strides(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Row-major strides of ``shape``; a zero-sized dimension counts as one, as in torch."""
    strides: list[Dim] = []
    acc: Dim = 1
    for dim in reversed(shape):
        strides.append(acc)
        acc = acc * (max(dim, 1) if isinstance(dim, int) else dim)
    return tuple(reversed(strides))


def product(dims: Iterable[Dim]) -> Dim:
    """The product of sizes."""
    total: Any = 1
    for dim in dims:
        total = total * dim
    return total if isinstance(total, int) else sympy.expand(total)


def ceil_div(value: Dim, by: int) -> Dim:
    """``value / by`` rounded up."""
    if isinstance(value, int):
        return -(-value // by)
    result: Any = FloorDiv(value + (by - 1), by)
    return result


def symbol_names(args: Iterable[TensorArg]) -> tuple[str, ...]:
    """Names of the shape symbols that the arguments depend on, sorted."""
    return names_in(d for a in args for d in (*a.shape, *a.strides))


def names_in(dims: Iterable[Any]) -> tuple[str, ...]:
    """Names of the symbols in sizes, sorted."""
    return tuple(
        sorted({str(s) for d in dims if isinstance(d, sympy.Expr) for s in d.free_symbols})
    )


def compulsory_bytes(args: Iterable[TensorArg]) -> Dim:
    """Bytes of all arguments, each touched once."""
    total: Any = 0
    for arg in args:
        total = total + product(arg.shape) * arg.dtype.itemsize
    return total


@dataclass(frozen=True)
class Pack:
    """A reordering of a constant argument done once, before the first call.

    ``op`` names a function in `kernels.packing`; ``params`` are its keyword arguments (plain JSON
    values).
    """

    op: str
    params: tuple[tuple[str, Any], ...] = ()


@dataclass
class Kernel:
    """A lowered kernel, before code generation.

    ``func`` is a TVM PrimFunc that follows the ABI above. ``packs[i]`` says how input ``i``
    is to be packed (None: as it is). ``flops`` and ``bytes`` are compulsory work for one call.
    """

    name: str
    func: Any
    inputs: tuple[TensorArg, ...]
    outputs: tuple[TensorArg, ...]
    symbols: tuple[str, ...]
    tasks: Dim
    packs: tuple[Pack | None, ...] = ()
    flops: Dim = 0
    bytes: Dim = 0
    config: dict[str, Any] = field(default_factory=dict)
