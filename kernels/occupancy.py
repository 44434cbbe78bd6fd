"""How many blocks a GPU's multiprocessors hold, and which kernel variants suit one fused launch.

In a fused launch every block gets the registers and the shared memory of the most demanding part,
so the variant that is fastest alone may drive out blocks of all the others. `choose` weighs time
times resources for the launch as a whole, by a model of waves: a block takes as long in company as
it does alone, and blocks start as slots become free, the longest first. It is a model and not a
measurement; it orders variants, and what it says of seconds is no more than an estimate.

Limits and allocation units: NVIDIA, "CUDA C++ Programming Guide", technical specifications per
compute capability. The bound on the greedy order: Graham, "Bounds on Multiprocessing Timing
Anomalies", 1969.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .group import Unsupported


@dataclass(frozen=True)
class Gpu:
    """What one GPU offers: ``sms`` multiprocessors with the other limits each.

    ``shared_bytes`` is the shared memory of a multiprocessor, ``block_reserve`` what every block
    takes of it unasked, ``static_bytes`` what one block may declare statically and ``block_bytes``
    what it may have in all. Registers come in units for a warp (``register_unit``), from the
    share of one of the ``schedulers``. ``flops`` are float32 operations and ``bandwidth`` bytes of
    memory per second, both of the whole GPU.

    The last three are assumptions, in seconds: no kernel is shorter than ``least``; ``launch`` lies
    between the end of one and the start of what waits for it, and ``issue`` between the starts of
    two that wait for nothing, when both are nodes of a CUDA graph.
    """

    sms: int = 132
    threads: int = 2048
    blocks: int = 32
    registers: int = 64 << 10
    shared_bytes: int = 228 << 10
    static_bytes: int = 48 << 10
    block_bytes: int = 227 << 10
    block_reserve: int = 1 << 10
    warp: int = 32
    schedulers: int = 4
    register_unit: int = 256
    shared_unit: int = 128
    flops: float = 67e12
    bandwidth: float = 4.8e12
    least: float = 1.0e-6
    launch: float = 1.5e-6
    issue: float = 0.5e-6

    def seconds(self, flops: float, nbytes: float, share: float = 1.0) -> float:
        """The roofline: what so many operations and bytes take at least on a share of the GPU."""
        return max(flops / self.flops, nbytes / self.bandwidth) / share

    def share(self, blocks: int) -> float:
        """The share of the GPU that so many blocks can fill: a multiprocessor each."""
        return min(1.0, max(1, blocks) / self.sms)


SM90 = Gpu()
"""An H200 (SXM) as NVIDIA's data sheet describes it."""


@dataclass(frozen=True)
class Candidate:
    """One compiled variant of a kernel, alone.

    ``blocks`` of ``threads`` each, with ``registers`` per thread and ``shared_bytes`` per block,
    and the ``seconds`` that its launch takes.
    """

    blocks: int
    threads: int
    registers: int
    shared_bytes: int
    seconds: float

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.threads < 1 or not self.seconds > 0:
            raise ValueError(f"{self} has no blocks, no threads or no time")


@dataclass(frozen=True)
class Choice:
    """Which variant of each kernel (``picks``), and what the model says of the fused launch.

    ``resident`` blocks fit on a multiprocessor; ``seconds`` is the launch's estimated time.
    """

    picks: tuple[int, ...]
    resident: int
    seconds: float


def resident_blocks(threads: int, registers: int, shared_bytes: int, gpu: Gpu = SM90) -> int:
    """Blocks that one multiprocessor holds at a time; 0 where not even one fits."""
    warps = -(-threads // gpu.warp)
    limits = [gpu.blocks, gpu.threads // (warps * gpu.warp)]
    if registers:
        of_warp = _round_up(registers * gpu.warp, gpu.register_unit)
        held = gpu.registers // gpu.schedulers // of_warp * gpu.schedulers
        limits.append(held // warps)
    of_block = _round_up(shared_bytes + gpu.block_reserve, gpu.shared_unit)
    limits.append(gpu.shared_bytes // of_block)
    return min(limits)


def block_seconds(candidate: Candidate, gpu: Gpu = SM90) -> float:
    """How long one block of a launch takes, from how long the launch takes alone.

    Raises ValueError where not one block fits.
    """
    resident = _resident(candidate, gpu)
    if resident == 0:
        raise ValueError(f"no block of {candidate} fits on a multiprocessor")
    return candidate.seconds / math.ceil(candidate.blocks / (resident * gpu.sms))


def fused_seconds(candidates: Sequence[Candidate], gpu: Gpu = SM90) -> float:
    """The estimated time of one launch of all these, which have equal thread counts.

    Graham's bound for the greedy order is the longest block or the mean load of the slots,
    whichever is more, within a factor of two; the lower of the two sides is taken, as thousands of
    blocks come close to it.
    """
    resident = min(_resident(c, gpu) for c in candidates)
    if resident == 0:
        return math.inf
    each = [block_seconds(c, gpu) for c in candidates]
    work = sum(c.blocks * s for c, s in zip(candidates, each, strict=True))
    return max(*each, work / (resident * gpu.sms))


def choose(kernels: Sequence[Sequence[Candidate]], gpu: Gpu = SM90) -> Choice:
    """The variants, one of each kernel, whose fused launch the model finds fastest.

    Exact for the model: a launch holds as many blocks as its most demanding variant does alone,
    so for each such number and each longest block every kernel takes the least work that stays
    within both. Ties go to the launch with more resident blocks, then to the earlier variants.

    Raises `Unsupported` (PLT-HFU-001) where no thread count is common to all kernels; ValueError
    where a kernel has no variant.
    """
    if not kernels or not all(kernels):
        raise ValueError("every kernel needs at least one variant to choose from")
    known = [[(i, c, _resident(c, gpu)) for i, c in enumerate(ks)] for ks in kernels]
    fitting = [[k for k in ks if k[2] > 0] for ks in known]
    common = set.intersection(*({c.threads for _, c, _ in ks} for ks in fitting))
    if not common:
        counts = [sorted({c.threads for c in ks}) for ks in kernels]
        raise Unsupported(
            "PLT-HFU-001",
            f"the kernels' variants share no number of threads in a block: {counts}",
            "add variants with the number of threads that the other kernels have",
        )
    best: Choice | None = None
    for threads in sorted(common):
        chosen = _choose([[k for k in ks if k[1].threads == threads] for ks in fitting], gpu)
        if best is None or (chosen.seconds, -chosen.resident) < (best.seconds, -best.resident):
            best = chosen
    assert best is not None
    return best


def _choose(kernels: list[list[tuple[int, Candidate, int]]], gpu: Gpu) -> Choice:
    flat = [k for ks in kernels for k in ks]
    best: tuple[float, int, tuple[int, ...]] | None = None
    for least in sorted({r for _, _, r in flat}, reverse=True):
        for longest in sorted({block_seconds(c, gpu) for _, c, _ in flat}):
            picks: list[tuple[int, Candidate, int]] = []
            for variants in kernels:
                allowed = [
                    k for k in variants if k[2] >= least and block_seconds(k[1], gpu) <= longest
                ]
                if not allowed:
                    break
                picks.append(min(allowed, key=lambda k: k[1].blocks * block_seconds(k[1], gpu)))
            if len(picks) < len(kernels):
                continue
            seconds = fused_seconds([c for _, c, _ in picks], gpu)
            found = (seconds, -min(r for _, _, r in picks), tuple(i for i, _, _ in picks))
            best = found if best is None else min(best, found)
    assert best is not None  # the least of all numbers and the longest block allow everything
    return Choice(best[2], -best[1], best[0])


def _resident(candidate: Candidate, gpu: Gpu) -> int:
    return resident_blocks(candidate.threads, candidate.registers, candidate.shared_bytes, gpu)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
