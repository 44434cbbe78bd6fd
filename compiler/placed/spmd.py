"""Ranks that torchrun started: each process is one device and runs the same script.

The first rank divides the model; the others get their parts from it. Every rank is given the same
batches and gets every result. A failure on one rank while loading is raised by all. One of a later
rank ends its connections, so that those notice who wait for it; a note in the store tells all why.
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...runtime import distributed
from ...runtime.pipeline import LinkError, Player
from ..errors import OptionError, PlaitError
from ..weights.absent import Checkpoint, ModuleSource, Source
from .causes import Broken, Causes
from .engines import Model, Tensors
from .local import START
from .options import threads_of
from .part import DistributedError, Memory, Part, failure
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
            dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
        # Groups of its own: planning and loading may take longer than any step, the caller's group
        # has another timeout, and what ends with this model must not end that group.
        patience = timedelta(seconds=START + options.budget)
        self.setup: Any = dist.new_group(timeout=patience, backend="gloo")
        self.rank = dist.get_rank()
        here = devices[self.rank]
        if here.torch.type == "cuda":
            torch.cuda.set_device(here.torch)
        else:
            torch.set_num_threads(threads_of(options, devices))
        backend = "nccl" if kinds == {"cuda"} else "gloo"
        limit = timedelta(seconds=options.timeout)
        self.group: Any = dist.new_group(timeout=limit, backend=backend)
        self.causes = Causes(self.group)
        self.broken: PlaitError | None = None
        self.player: Player | None = None
        whole: list[Any] = [None, None]
        if self.rank == 0:
            whole = self._plan(lambda: model.plan(args, kwargs), ranks)
        self._guard(lambda: dist.broadcast_object_list(whole, 0, self.setup))
        error, self.payload = whole
        if error is not None:
            raise error
        self.division: Division = self.payload["division"]
        failed: BaseException | None = None
        part: Part | None = None
        try:
            source: Source = ModuleSource(model.module)
            if options.weights is not None:
                source = Checkpoint(options.weights)
            part = Part(
                self.division.programs[self.rank], self.payload["parts"][self.rank], source,
                model.options, here.torch, here.limit,
            )  # fmt: skip
        except Exception as error:
            failed = failure(self.rank, error)
        outcomes: list[Any] = [None] * ranks
        self._guard(lambda: dist.all_gather_object(outcomes, failed, self.setup))
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        assert part is not None
        self.part = part
        self.device = here.torch
        empty = part.arena.empty if here.torch.type == "cpu" else None
        self.player = Player(part.program, part.runs, distributed.Group(self.group), here.torch,
                             empty=empty)  # fmt: skip

    @staticmethod
    def _plan(plan: Callable[[], Planned], ranks: int) -> list[Any]:
        """[error, what all ranks need to know]: an error must not leave the others waiting."""
        try:
            planned = plan()
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # not every error can be sent
                return [failure(0, error), None]
            return [error, None]
        parts = [planned.payload(rank) for rank in range(ranks)]
        return [None, {"division": planned.division, "parts": parts}]

    def _guard(self, call: Callable[[], Any]) -> Any:
        """What a call gives that needs all ranks. Raises DistributedError where one is missing."""
        if self.broken is not None:
            raise DistributedError("PLT-DST-011", f"the ranks have ended: {self.broken.reason}")
        try:
            return call()
        except PlaitError as error:  # this rank's own
            note: PlaitError | Broken = error
            # What they hold are frames, and with them transfers under way.
            error.__cause__ = error.__context__ = error.__traceback__ = None
        except RuntimeError as error:
            note = Broken(error.rank if isinstance(error, LinkError) else None, str(error))
        self.broken = note if isinstance(note, PlaitError) else note.error(self.rank)
        self.causes.leave(note)
        self.close()  # others wait for this rank: now they learn that it is gone
        if isinstance(note, Broken):
            self.broken = self.causes.of(note)
        raise self.broken from None

    def stream(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """See `Engine.stream`."""
        with torch.no_grad():
            try:
                for inputs in batches:
                    yield from self._guard(lambda given=inputs: self._all(self._fed(given)))
                while self._in_flight():
                    yield from self._guard(lambda: self._all(self._fed()))
            finally:
                while self.broken is None and self._in_flight():  # nobody wants the rest
                    self._guard(self._fed)

    def _in_flight(self) -> bool:
        return self.player is not None and self.player.busy

    def _fed(self, inputs: Tensors | None = None) -> list[tuple[int, dict[str, torch.Tensor]]]:
        """What a period gives, with a new batch or without."""
        assert self.player is not None
        try:
            return self.player.drain() if inputs is None else self.player.feed(inputs)
        except LinkError:
            raise
        except Exception as error:
            raise failure(self.rank, error) from error

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
                    self._broadcast(tensor, owner)
                whole[name] = tensor
            found.append(whole)
        return found

    def _broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        try:
            dist.broadcast(tensor, owner, self.group)
        except RuntimeError as error:
            if owner == self.rank:
                raise
            raise LinkError(owner, str(error)) from error

    def memory(self) -> list[Memory]:
        """See `Engine.memory`."""
        found: list[Any] = [None] * dist.get_world_size()
        self._guard(lambda: dist.all_gather_object(found, self.part.watch(), self.group))
        return found

    def close(self) -> None:
        """See `Engine.close`."""
        if self.broken is None:
            self.broken = DistributedError("PLT-DST-011", "close() was called")
        if self.player is not None:
            self.player.abandon()
        self.player = None
        groups = [group for group in (self.setup, self.group) if group is not None]
        self.setup = self.group = None
        if dist.is_initialized():
            for group in groups:
                dist.destroy_process_group(group)
        if self.joined:
            self.joined = False
            distributed.leave()
        gc.collect()  # links end when nothing refers to them
