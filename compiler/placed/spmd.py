"""Ranks that torchrun started: each process is one device and runs the same script.

The first rank divides the model; the others get their parts from it. Every rank is given the same
batches and gets every result. A failure on one rank while loading is raised by all; later ones are
noticed by those that wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...runtime import distributed
from ...runtime.pipeline import LinkError, Player
from ..errors import OptionError, PlaitError
from ..weights.absent import Checkpoint, ModuleSource, Source
from .engines import Model, Tensors
from .local import late, lost
from .options import threads_of
from .part import DistributedError, Memory, Part
from .plan import Division, Planned


class SpmdEngine:
    """This process's part among the ranks of torch's default process group."""

    def __init__(self, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        options, devices = model.placement, model.devices
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if dist.is_initialized():
            ranks = dist.get_world_size()
        if ranks != len(devices):
            raise OptionError(
                "PLT-DST-003", f"there are {ranks} processes for {len(devices)} devices",
                f"start as many: torchrun --nproc-per-node {len(devices)}",
            )  # fmt: skip
        kinds = {d.torch.type for d in devices}
        self.joined = not dist.is_initialized()
        if self.joined:
            backend = "nccl" if kinds == {"cuda"} else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=options.timeout))
        self.rank = dist.get_rank()
        here = devices[self.rank]
        if here.torch.type == "cuda":
            torch.cuda.set_device(here.torch)
        else:
            torch.set_num_threads(threads_of(options, devices))
        self.broken: DistributedError | None = None
        whole: list[Any] = [None, None]
        if self.rank == 0:
            whole = self._plan(lambda: model.plan(args, kwargs), ranks)
        self._guard(lambda: dist.broadcast_object_list(whole, 0))
        error, self.payload = whole
        if error is not None:
            raise error
        self.division: Division = self.payload["division"]
        source: Source = ModuleSource(model.module)
        if options.weights is not None:
            source = Checkpoint(options.weights)
        failed: BaseException | None = None
        part: Part | None = None
        try:
            part = Part(
                self.division.programs[self.rank], self.payload["parts"][self.rank], source,
                model.options, here.torch, here.limit,
            )  # fmt: skip
        except PlaitError as found:
            failed = found
        outcomes: list[Any] = [None] * ranks
        self._guard(lambda: dist.all_gather_object(outcomes, failed))
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        assert part is not None
        self.part = part
        self.device = here.torch
        empty = part.arena.empty if here.torch.type == "cpu" else None
        self.player = Player(part.program, part.runs, distributed.Group(), here.torch, empty=empty)

    @staticmethod
    def _plan(plan: Callable[[], Planned], ranks: int) -> list[Any]:
        """[error, what all ranks need to know]: an error must not leave the others waiting."""
        try:
            planned = plan()
        except Exception as error:
            return [error, None]
        parts = [planned.payload(rank) for rank in range(ranks)]
        return [None, {"division": planned.division, "parts": parts}]

    def _guard(self, call: Callable[[], Any]) -> Any:
        """What a call gives that needs all ranks. Raises DistributedError where one is missing."""
        if self.broken is not None:
            raise DistributedError("PLT-DST-011", f"the ranks have ended: {self.broken.reason}")
        try:
            return call()
        except LinkError as error:
            self.broken = _error(self.rank, error.rank, str(error))
        except RuntimeError as error:
            if isinstance(error, PlaitError):
                raise
            self.broken = _error(self.rank, None, str(error))
        self.close()  # others wait for this rank: now they learn that it is gone
        raise self.broken from None

    def stream(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """See `Engine.stream`."""
        with torch.no_grad():
            for inputs in batches:
                done = self._guard(lambda inputs=inputs: self._all(self.player.feed(inputs)))
                yield from done
            while self.player.busy:
                yield from self._guard(lambda: self._all(self.player.drain()))

    def _all(self, done: list[tuple[int, dict[str, torch.Tensor]]]) -> list[dict[str, Any]]:
        """Results of batches, those of other ranks too."""
        found = []
        for _, mine in done:
            whole = {}
            for name, (owner, dtype, shape) in self.payload["division"].owners.items():
                kind = getattr(torch, dtype)
                tensor = mine[name].contiguous() if owner == self.rank else torch.empty(
                    shape, dtype=kind, device=self.device
                )  # fmt: skip
                if tensor.numel():
                    dist.broadcast(tensor, owner)
                whole[name] = tensor
            found.append(whole)
        return found

    def memory(self) -> list[Memory]:
        """See `Engine.memory`."""
        found: list[Any] = [None] * dist.get_world_size()
        self._guard(lambda: dist.all_gather_object(found, self.part.watch()))
        return found

    def close(self) -> None:
        """See `Engine.close`."""
        if self.joined:
            self.joined = False
            distributed.leave()


def _error(rank: int, other: int | None, reason: str) -> DistributedError:
    who = "another rank" if other is None else f"rank {other}"
    return late(rank, who) if "timed out" in reason.lower() else lost(rank, who, reason)
