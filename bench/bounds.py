"""What the machine can do at best, measured: the yardstick for a kernel's time.

A kernel that does F FLOPs on B bytes cannot take less than max(F / peak, B / bandwidth) (the
roofline of Williams et al., 2009). The peak is that of a matrix product in torch, the
bandwidth that of copying more than the caches hold; a kernel whose data lies in a cache may beat
it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """FLOPs per second and bytes per second with the current number of threads."""

    flops: float
    bandwidth: float

    def bound(self, flops: float, nbytes: float) -> float:
        """The least seconds for this work."""
        return max(flops / self.flops, nbytes / self.bandwidth)

    def bound_by(self, flops: float, nbytes: float) -> str:
        """Which of the two limits it: "compute" or "memory"."""
        return "compute" if flops / self.flops >= nbytes / self.bandwidth else "memory"

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.0f} GFLOP/s, {self.bandwidth / 1e9:.0f} GB/s"


def measure_machine(dtype: torch.dtype = torch.float32) -> Machine:
    """Measures for about a second.

    The rate of one thread, on a product short enough to run undisturbed now and then even on a busy
    machine, times the number of threads. For ``dtype`` or float32, whichever is faster: the library
    has no good product in float16 on most CPUs.
    """
    threads, n = torch.get_num_threads(), 384
    torch.set_num_threads(1)
    try:
        product = min(_product(n, t) for t in {torch.float32, dtype})
    finally:
        torch.set_num_threads(threads)
    source = torch.zeros(64 << 20, dtype=torch.uint8)
    copy = torch.empty_like(source)
    moved = _best(lambda: copy.copy_(source))
    return Machine(threads * 2 * n**3 / product, 2 * source.numel() / moved)


def _product(n: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    out = torch.empty_like(a)
    return _best(lambda: torch.mm(a, b, out=out))


def _best(call: Callable[[], object], seconds: float = 0.4) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
