"""Tensors between processes by torch.distributed: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .pipeline import LinkError, Pending


class Group:
    """All ranks of a process group, the default one unless another is given, as a
    `pipeline.Transport`.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def send(self, tensor: torch.Tensor, rank: int, tag: int) -> Pending:
        """See `Transport.send`."""
        return _started(dist.isend(tensor, rank, self.group, tag), rank)

    def receive(self, tensor: torch.Tensor, rank: int, tag: int) -> Pending:
        """See `Transport.receive`."""
        return _started(dist.irecv(tensor, rank, self.group, tag), rank)


def _started(work: Any, rank: int) -> Pending:
    if work is None:  # this process is not in the group
        raise LinkError(rank, f"rank {rank} is in no process group with this process")
    return work


def join(rank: int, ranks: int, store: str, start: float, timeout: float) -> None:
    """Makes the default process group, over gloo, through a file that all ranks see.

    ``start`` (seconds) is how long ranks wait for the last to come, ``timeout`` holds for each
    transfer. Raises RuntimeError when a rank stays away.
    """
    files = dist.FileStore(store, ranks)  # pyright: ignore[reportPrivateImportUsage]
    files.set_timeout(timedelta(seconds=start))
    files.set(f"here{rank}", "")
    files.wait([f"here{k}" for k in range(ranks)])
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=ranks, timeout=limit)


def leave() -> None:
    """Ends the default process group, if there is one, without waiting for others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def measure_link(peers: Sequence[int], rounds: int = 8, nbytes: int = 1 << 22) -> tuple:
    """Latency (seconds) and bandwidth (bytes/s) between two ranks, by messages there and back.

    Both ranks of ``peers`` must call it. The least time of ``rounds`` counts.
    """
    mine = dist.get_rank()
    first = mine == peers[0]
    other = peers[1] if first else peers[0]
    found = []
    for size in (64, nbytes):
        tensor = torch.zeros(size, dtype=torch.uint8)
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            for sends in (first, not first):
                if sends:
                    dist.isend(tensor, other).wait()  # type: ignore[union-attr]
                else:
                    dist.irecv(tensor, other).wait()  # type: ignore[union-attr]
            times.append((time.perf_counter() - begin) / 2)
        found.append(min(times))
    short, long = found
    return short, nbytes / max(long - short, 1e-9)
