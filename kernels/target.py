"""What the code generator needs to know of the machine: vector width, registers, CPU name."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .files import replacing
from .loader import cache_directory


@dataclass(frozen=True)
class Target:
    """A machine to generate code for.

    ``kind`` is "cpu" or "cuda"; ``arch`` is LLVM's CPU name or "sm_90"; ``vector_bytes`` the
    width of a vector register and ``vector_registers`` how many there are; ``bf16_pairs`` whether
    it multiplies vectors of pairs of bfloat16 (AVX512-BF16), ``tiles`` whether it has a unit for
    products of small 16-bit matrices (AMX), which only the library uses.
    """

    kind: str
    arch: str
    vector_bytes: int
    vector_registers: int
    bf16_pairs: bool = False
    tiles: bool = False

    def lanes(self, dtype: torch.dtype) -> int:
        """Elements of ``dtype`` in one vector register."""
        return max(1, self.vector_bytes // dtype.itemsize)

    def pairs(self, dtype: torch.dtype) -> bool:
        """Whether steps of a product of this type can be pairs of elements."""
        return self.bf16_pairs and dtype == torch.bfloat16

    def key(self) -> str:
        pairs = ":bf16" if self.bf16_pairs else ""
        return f"{self.kind}:{self.arch}:{self.vector_bytes}{pairs}"

    def tvm(self):
        """The TVM target. Imports TVM."""
        import tvm

        if self.kind == "cpu":
            features = {"mattr": ["+avx512bf16"]} if self.bf16_pairs else {}
            # Templates unroll what gains by it: level 3 unrolls the rest too, for 1.6 times the
            # code and time, and the same speed.
            level = {"opt-level": 2}
            return tvm.target.Target(
                {"kind": "llvm", "mcpu": self.arch, "num-cores": 1, **level, **features}
            )
        return tvm.target.Target(
            {
                "kind": "cuda",
                "arch": self.arch,
                "max_threads_per_block": 1024,
                "max_shared_memory_per_block": 49152,
                "thread_warp_size": 32,
            },
            host={"kind": "llvm"},
        )


@functools.cache
def host() -> Target:
    """The CPU this process runs on."""
    arch = _cpu_name()
    capability = torch.backends.cpu.get_cpu_capability()
    if "AVX512" in capability:
        pairs = torch.cpu._is_avx512_bf16_supported()
        return Target("cpu", arch, 64, 32, pairs, torch.cpu._is_amx_tile_supported())
    if "AVX2" in capability:
        return Target("cpu", arch, 32, 16)
    arm = platform.machine() in ("aarch64", "arm64")
    return Target("cpu", arch, 16, 32 if arm else 16)


def _cpu_name() -> str:
    """LLVM's name of this CPU. Importing TVM to ask takes a second, so the answer is kept."""
    kept = cache_directory() / f"cpu-{_cpu_identity()}.txt"
    with contextlib.suppress(OSError, UnicodeError):
        name = kept.read_text("ascii").strip()
        if re.fullmatch(r"[\w.+-]+", name):
            return name
    import tvm

    name = str(tvm.get_global_func("target.llvm_get_system_cpu")())
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as scratch:
            scratch.write_text(name, "ascii")
    return name


def _cpu_identity() -> str:
    """Text that differs between machines whose CPUs LLVM may name differently."""
    parts = [platform.machine(), platform.processor(), importlib.metadata.version("apache-tvm")]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0]
        wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
        parts += [line for line in first.splitlines() if line.startswith(wanted)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
