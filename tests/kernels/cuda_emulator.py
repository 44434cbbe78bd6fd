"""Runs generated CUDA C on the CPU, thread by thread, so that it can be checked without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from plait.kernels.abi import contiguous_strides
from plait.kernels.cuda import DeviceKernel, device_kernel
from plait.kernels.cuda_loader import GpuKernel
from plait.kernels.definition import Definition, Physical
from plait.kernels.target import Target

from .search_check import Problem

_HEADER = Path(__file__).with_name("cuda_emulator.h")
_ERRORS = {1: "threads wait for each other", 2: "threads left before a barrier of theirs"}


def lowered(definitions: Mapping[str, Definition], target: Target) -> dict[str, DeviceKernel]:
    """Definitions as GPU kernels, by plain schedules where a rule's does not lower."""
    found = {}
    for name, definition in definitions.items():
        try:
            found[name] = device_kernel(name, definition, target)
        except Exception:  # TVM raises many kinds
            found[name] = device_kernel(name, definition, target, plain=True)
    return found


class EmulationError(Exception):
    """A block can never end as CUDA wants it to."""


class Emulator:
    """Kernels of one source, compiled for the CPU with the system's C++ compiler."""

    def __init__(self, source: str, kernels: Iterable[GpuKernel], scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        for name in ("cuda.h", "math_constants.h"):
            shutil.copy(_HEADER, scratch / name)
        names = sorted({k.function for kernel in kernels for k in kernel.launches})
        calls = "".join(
            f'extern "C" int run_{n}(void** p, const int* g, const int* b, int backwards) {{\n'
            f"  return emulator::launch({n}, p, g, b, backwards);\n}}\n"
            for n in names
        )
        (scratch / "kernels.cc").write_text(source + calls)
        library = scratch / "kernels.so"
        command = ["c++", "-std=c++17", "-w", "-O1", "-shared", "-fPIC", f"-I{scratch}"]
        # The arithmetic is to be what the source says, and a pool of bytes holds any type.
        command += ["-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno"]
        done = subprocess.run(
            [*command, "-o", str(library), str(scratch / "kernels.cc")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[:3000]
        self._library = ctypes.CDLL(str(library))

    def run(
        self, kernel: GpuKernel, tensors: Sequence[torch.Tensor], backwards: bool = False
    ) -> None:
        """Runs a kernel on physical buffers; ``backwards`` with blocks and threads in reverse.

        Raises `EmulationError` where the threads of a block do not meet at its barriers.
        """
        room = [torch.full((n,), 0xFF, dtype=torch.uint8) for n in kernel.temporaries]
        first = [t.data_ptr() + o for t, o in zip(tensors, kernel.offsets, strict=True)]
        self.launch(kernel, first, [t.data_ptr() for t in room], backwards)

    def launch(
        self,
        kernel: GpuKernel,
        tensors: Sequence[int],
        temporaries: Sequence[int],
        backwards: int = False,
    ) -> None:
        """Runs a kernel on pointers, as `GpuLibrary.launch` takes them."""
        pointers = kernel.pointers(tensors, temporaries)
        for launch in kernel.launches:
            assert launch.shared_bytes == 0, "dynamic shared memory is not emulated"
            arguments = (ctypes.c_void_p * len(launch.buffers))(
                *(pointers[b] for b in launch.buffers)
            )
            grid, block = (ctypes.c_int * 3)(*launch.grid), (ctypes.c_int * 3)(*launch.block)
            run = getattr(self._library, f"run_{launch.function}")
            status = run(arguments, grid, block, ctypes.c_int(backwards))
            if status:
                raise EmulationError(f"{launch.function}: {_ERRORS[status]}")


def buffer(tensor: torch.Tensor, physical: Physical) -> torch.Tensor:
    """The dense buffer behind a tensor."""
    strides = contiguous_strides(physical.shape)
    return tensor.as_strided(physical.shape, strides, tensor.storage_offset() - physical.offset)


def buffers(made: Problem, definition: Definition) -> list[torch.Tensor]:
    """The dense buffers of a problem's tensors, as a definition sees them."""
    physical = (*definition.inputs, *definition.outputs)
    return [buffer(t, p) for t, p in zip((*made.inputs, *made.outputs), physical, strict=True)]
