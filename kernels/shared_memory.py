"""Shared memory of a GPU launch whose blocks run different kernels: one place for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tvm
import tvm.tirx as tir
import tvm_ffi

from .group import Unsupported
from .occupancy import Gpu

_ALIGNMENT = 64  # of every shared array, as in TVM's own code


class SharedMemory:
    """The shared memory of a fused function: what its most demanding part needs.

    Arrays of a part lie one after the other in a pool per scope, and each part begins anew.
    Volatile ones (the staging words of TVM's reductions) keep an array of their own type, since a
    pointer into the pool would not be volatile: the n-th of all parts share one.
    """

    def __init__(self, functions: Sequence[Any]) -> None:
        found: list[tuple[Any, tuple[Any, ...], int]] = []  # buffer, its array, byte there
        need: dict[tuple[Any, ...], int] = {}
        annotations: dict[tuple[Any, ...], Any] = {}
        for function in functions:
            used: dict[tuple[Any, ...], int] = {}
            for stmt in _shared_allocations(function):
                buffer, scope = stmt.buffer, str(stmt.buffer.scope())
                key: tuple[Any, ...] = (scope,)
                start, size = 0, _bytes(buffer)
                if stmt.annotations:
                    kind = (scope, str(buffer.dtype), str(stmt.annotations))
                    key = (*kind, used.get(kind, 0))
                    used[kind] = used.get(kind, 0) + 1
                    annotations[key] = stmt.annotations
                else:
                    start = used.get(key, 0)
                    used[key] = _aligned(start + size)
                need[key] = max(need.get(key, 0), start + size)
                found.append((buffer, key, start))
        self._found = found
        self._annotations = annotations
        self._arrays = {key: _array(key, size) for key, size in need.items()}
        self.static_bytes = sum(_aligned(n) for k, n in need.items() if k[0] == "shared")

    def allocations(self) -> list[Any]:
        """The statements that allocate it."""
        return [tir.AllocBuffer(b, self._annotations.get(k)) for k, b in self._arrays.items()]

    def place(self, stmt: Any) -> Any:
        """An allocation as it is, or where it is a block's, a view of the common memory."""
        for buffer, key, start in self._found:
            if stmt.buffer.same_as(buffer):
                data = self._arrays[key].data
                data = tir.handle_add_byte_offset(data, start) if start else data
                return tir.DeclBuffer(stmt.buffer, data=data)
        return stmt

    def check(self, dynamic_bytes: int, gpu: Gpu) -> None:
        """Raises `Unsupported` where a block may not have so much beside its dynamic memory."""
        both = self.static_bytes + dynamic_bytes
        if self.static_bytes > gpu.static_bytes or both > gpu.block_bytes:
            raise Unsupported(
                "PLT-HFU-005",
                f"a block would declare {self.static_bytes} bytes of shared memory, of at most"
                f" {gpu.static_bytes}, and have {both}, of at most {gpu.block_bytes}",
                "leave out the part that needs the most, or choose a smaller tile for it",
            )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _shared_allocations(function: Any) -> list[Any]:
    found: list[Any] = []

    def visit(stmt: Any) -> None:
        if str(stmt.buffer.scope()).startswith("shared"):
            found.append(stmt)

    tvm_ffi.structural_walk(function.body, (tir.AllocBuffer, visit), order="pre")
    return found


def _array(key: tuple[Any, ...], size: int) -> Any:
    """The buffer behind a pool (by its scope) or an annotated array (by scope, type, ...)."""
    scope, *kind = key
    dtype = kind[0] if kind else "uint8"
    name = "_".join([scope.replace(".", "_"), *(str(n) for n in kind[2:])])
    return tir.decl_buffer((size // _itemsize(dtype),), dtype, name, scope=scope)


def _bytes(buffer: Any) -> int:
    return math.prod(int(e) for e in buffer.shape) * _itemsize(str(buffer.dtype))


def _itemsize(dtype: str) -> int:
    kind = tvm.DataType(dtype)
    return -(-kind.bits * kind.lanes // 8)
