"""The loading half of GPU kernels: cubins in, launches on a stream out, by CUDA's driver alone.

Imports neither torch nor TVM. The caller owns the memory (pointers are plain integers) and the
context: one must be current, as it is after ``torch.cuda.init()``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .loader import LoadError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED = 48 << 10  # what a launch may use without asking


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled function.

    ``buffers`` numbers its pointer arguments: inputs first, then outputs, then temporaries.
    """

    function: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    buffers: tuple[int, ...]


@dataclass(frozen=True)
class GpuKernel:
    """The launches that make up one kernel, in order.

    ``offsets`` tells for each input and output how many bytes before its logical element 0 its
    memory begins; ``temporaries`` are the sizes in bytes of what the launches share.
    """

    name: str
    launches: tuple[Launch, ...]
    offsets: tuple[int, ...]
    temporaries: tuple[int, ...]

    def pointers(self, tensors: Sequence[int], temporaries: Sequence[int]) -> list[int]:
        """The numbered buffers, from pointers to logical elements 0 and to temporaries."""
        if len(tensors) != len(self.offsets) or len(temporaries) != len(self.temporaries):
            raise ValueError(
                f"{self.name} takes {len(self.offsets)} tensors and {len(self.temporaries)}"
                f" temporaries, got {len(tensors)} and {len(temporaries)}"
            )
        return [t - o for t, o in zip(tensors, self.offsets, strict=True)] + list(temporaries)


class GpuLibrary:
    """A loaded cubin. Raises `LoadError` without a driver, a context or a fitting GPU."""

    def __init__(self, image: bytes) -> None:
        self._driver = _driver()
        self._image = image  # the driver may read it lazily
        self._module = ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        _check(self._driver, self._driver.cuModuleLoadData(ctypes.byref(self._module), image))

    def launch(
        self,
        kernel: GpuKernel,
        tensors: Sequence[int],
        temporaries: Sequence[int] = (),
        stream: int = 0,
    ) -> None:
        """Enqueues a kernel on ``stream`` (a CUstream); returns before it has run."""
        pointers = kernel.pointers(tensors, temporaries)
        for step in kernel.launches:
            values = [ctypes.c_void_p(pointers[b]) for b in step.buffers]
            addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            function = self._function(step)
            status = self._driver.cuLaunchKernel(
                function,
                *map(ctypes.c_uint, (*step.grid, *step.block)),
                ctypes.c_uint(step.shared_bytes),
                ctypes.c_void_p(stream),
                addresses,
                None,
            )
            _check(self._driver, status)

    def _function(self, step: Launch) -> ctypes.c_void_p:
        found = self._functions.get(step.function)
        if found is None:
            found = ctypes.c_void_p()
            name = step.function.encode()
            driver = self._driver
            _check(driver, driver.cuModuleGetFunction(ctypes.byref(found), self._module, name))
            if step.shared_bytes > _STATIC_SHARED:
                attribute = ctypes.c_int(_MAX_DYNAMIC_SHARED)
                size = ctypes.c_int(step.shared_bytes)
                _check(driver, driver.cuFuncSetAttribute(found, attribute, size))
            self._functions[step.function] = found
        return found


@functools.cache
def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LoadError(f"there is no CUDA driver: {error}") from error
    _check(driver, driver.cuInit(0))
    return driver


def _check(driver: Any, status: int) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        message = text.value.decode() if text.value else f"error {status}"
        raise LoadError(f"CUDA's driver: {message}")
