"""What runs a divided model: all devices in this process, or a process for each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ...runtime.pipeline import Inline
from ..options import Options
from ..pipeline import prepare
from ..weights.absent import of
from .local import START, Ranks
from .options import Here, PlacementOptions, threads_of
from .part import Memory, SegmentRun
from .plan import Division, Planned, plan_model

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """A model to divide, and how."""

    module: torch.nn.Module
    devices: Sequence[Here]
    placement: PlacementOptions
    options: Options

    def plan(self, args: Sequence[Any], kwargs: Mapping[str, Any], link: Any = None) -> Planned:
        """See `plan_model`."""
        how = (self.devices, self.placement, self.options)
        return plan_model(self.module, args, kwargs, *how, link)


class Engine(Protocol):
    """Runs a division."""

    division: Division

    def stream(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """The results of each batch, in order."""
        ...

    def memory(self) -> list[Memory]:
        """What each rank's process takes; nothing where ranks are no processes."""
        ...

    def close(self) -> None:
        """Ends what was started."""
        ...


class InlineEngine:
    """All devices in this process."""

    def __init__(self, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        planned = model.plan(args, kwargs)
        self.division, whole = planned.division, planned.whole
        runs = {
            s.name: SegmentRun(
                planned.graphs[s.name], whole.names, whole.source, model.options,
                model.devices[s.rank].torch,
            )
            for s in planned.segments
        }  # fmt: skip
        self.division.remarks += [r for run in runs.values() for r in run.remarks]
        devices = [d.torch for d in model.devices]
        self.player = Inline(self.division.programs, runs, devices)

    def stream(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """See `Engine.stream`."""
        with torch.no_grad():
            for inputs in batches:
                yield self.player.run(inputs)

    def memory(self) -> list[Memory]:
        """See `Engine.memory`."""
        return []

    def close(self) -> None:
        """See `Engine.close`."""


class LocalEngine:
    """One process for each device, started here."""

    def __init__(self, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        options, devices = model.placement, model.devices
        self.ranks = Ranks(len(devices), options.timeout, threads_of(options, devices))
        try:
            self._load(model, args, kwargs)
        except BaseException:
            self.close()
            raise

    def _load(self, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        options, ranks = model.placement, self.ranks
        how = {"pipeline": model.options.pipeline, "tune": model.options.tune}
        ranks.join()
        link = ranks.measure_link if len(model.devices) > 1 else None
        planned = model.plan(args, kwargs, link)
        self.division = division = planned.division
        for captured in planned.graphs.values():  # once here, instead of in each process
            prepare(captured, model.options)
        with tempfile.TemporaryDirectory(prefix="plait-weights-") as folder:
            for rank, device in enumerate(model.devices):
                weights = options.weights or _shard(planned, rank, Path(folder))
                if not planned.weights(rank):
                    weights = ""
                ranks.send(
                    rank, "load", division.programs[rank].to_json(),
                    planned.payload(rank, shard=options.weights is None),
                    str(weights), how, device.limit,
                )  # fmt: skip
            loaded = ranks.gather("loaded", START)
        division.remarks += [r for _, remarks in loaded for r in remarks]
        self._inputs = [p.inputs for p in division.programs]
        self._owners = [p.rank for p in division.programs if p.results]

    def stream(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """See `Engine.stream`."""
        ahead = self.division.programs[0].stages + 1
        return self.ranks.stream(batches, self._inputs, self._owners, ahead)

    def memory(self) -> list[Memory]:
        """See `Engine.memory`."""
        for rank in range(self.ranks.count):
            self.ranks.send(rank, "memory")
        return [m[0] for m in self.ranks.gather("memory")]

    def close(self) -> None:
        """See `Engine.close`."""
        self.ranks.close()


def _shard(planned: Planned, rank: int, folder: Path) -> Path:
    """A file with the weights of one rank, written from the model's own."""
    from safetensors.torch import save_file

    source, names = planned.whole.source, planned.weights(rank)
    file = folder / f"rank{rank}.safetensors"
    kept = {str(n): of(source, n).clone(memory_format=torch.contiguous_format) for n in names}
    save_file(kept, file)
    return file
