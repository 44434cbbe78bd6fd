"""What each rank of a divided model does, as plain data, and what plays it.

A model is divided into *segments*, each on one rank. A segment's *stage* is one more than the
largest stage of a segment on another rank whose results it reads. Time goes in *periods*: a batch
fed in period p passes stage s in period p + s, so several batches are in flight, one period apart
(software pipelining; with one batch the ranks take turns). What a period reads from other ranks was
sent in an earlier period: no order of messages can make ranks wait for each other.

A rank asks for a tensor at the beginning of the period in which it is made. It arrives while ranks
compute; sends are waited for one period later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

PIPELINE_VERSION = 1

Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class Wire:
    """A tensor that goes from rank ``source`` to rank ``target``: sent in stage ``stage``, as the
    ``number``-th of all wires; ``dtype`` is torch's name.
    """

    tensor: str
    source: int
    target: int
    stage: int
    number: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SegmentStep:
    """Runs a segment: tensors that it reads and makes by name, wires that it needs before and
    feeds after, and the tensors that nobody on the rank needs afterwards.
    """

    segment: str
    stage: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    receives: tuple[Wire, ...] = ()
    sends: tuple[Wire, ...] = ()
    drops: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankProgram:
    """One rank's part of a model.

    ``steps`` are in order of stage. ``inputs`` are the call's tensors that it reads, ``results``
    the tensors it makes that the caller gets. ``stages`` is that of the whole model: so many
    periods after it was fed, a batch is done on every rank. ``wires`` counts those of the model.
    """

    rank: int
    ranks: int
    stages: int
    wires: int
    steps: tuple[SegmentStep, ...]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    version: int = PIPELINE_VERSION

    def to_json(self) -> str:
        """The program as text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RankProgram:
        """The inverse of `to_json`. Raises ValueError for another version."""
        data = json.loads(text)
        if data["version"] != PIPELINE_VERSION:
            raise ValueError(f"version {data['version']} of a rank's program: compile again")
        steps = tuple(_step(x) for x in data.pop("steps"))
        tuples = {k: tuple(data.pop(k)) for k in ("inputs", "results")}
        return RankProgram(steps=steps, **tuples, **data)

    def __str__(self) -> str:
        lines = [f"rank {self.rank} of {self.ranks}: {len(self.steps)} segments"]
        for step in self.steps:
            lines.append(f"  stage {step.stage}: {step.segment}")
            lines += [f"    from rank {w.source}: {_show(w)}" for w in step.receives]
            lines += [f"    to rank {w.target}: {_show(w)}" for w in step.sends]
        return "\n".join(lines)


def _show(wire: Wire) -> str:
    return f"{wire.tensor} {wire.dtype}{list(wire.shape)}"


def _step(data: dict[str, Any]) -> SegmentStep:
    wires = {
        k: tuple(Wire(**{**w, "shape": tuple(w["shape"])}) for w in data.pop(k))
        for k in ("receives", "sends")
    }
    names = {k: tuple(data.pop(k)) for k in ("inputs", "outputs", "drops")}
    return SegmentStep(**wires, **names, **data)


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> Any:
        """Returns when it is done. Raises RuntimeError when it failed or took too long."""
        ...


class Transport(Protocol):
    """Carries tensors between ranks, in the order in which they are sent on each pair."""

    def send(self, tensor: torch.Tensor, rank: int, tag: int) -> Pending:
        """Begins to send; ``tensor`` must stay as it is until that is done."""
        ...

    def receive(self, tensor: torch.Tensor, rank: int, tag: int) -> Pending:
        """Begins to receive into ``tensor``."""
        ...


class LinkError(RuntimeError):
    """A transfer failed. ``rank`` is the other side."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank = rank


@dataclass
class _Batch:
    number: int
    values: dict[str, torch.Tensor]
    coming: dict[str, tuple[Wire, Pending]] = field(default_factory=dict)
    results: dict[str, torch.Tensor] = field(default_factory=dict)


class Player:
    """Plays a rank's program. Batches go in by `feed`, results come out of `feed` and `drain`.

    A segment is run and its results are sent within ``turns``, where ranks share too few cores.
    What is received goes to tensors that ``empty`` makes of shape, strides (None) and dtype.
    """

    def __init__(
        self,
        program: RankProgram,
        segments: Mapping[str, Run],
        transport: Transport,
        device: torch.device | None = None,
        turns: AbstractContextManager[Any] | None = None,
        empty: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.program, self.segments, self.transport = program, dict(segments), transport
        self.turns = nullcontext() if turns is None else turns
        self._empty = self._plain if empty is None else empty
        self.device = torch.device("cpu") if device is None else device
        self._period = 0
        self._batches: dict[int, _Batch] = {}  # by the period in which they were fed
        self._fed = 0
        self._sent: list[tuple[int, Wire, torch.Tensor, Pending]] = []
        wires = (w for s in program.steps for w in s.receives)
        # On each pair in the order in which the other side sends.
        self._incoming = sorted(dict.fromkeys(wires), key=lambda w: (w.stage, w.number))

    def feed(self, inputs: Mapping[str, torch.Tensor]) -> list[tuple[int, dict[str, Any]]]:
        """Plays one period with a new batch: the numbers and results of batches that are done.

        Raises LinkError when another rank fails.
        """
        values = {name: inputs[name].to(self.device) for name in self.program.inputs}
        self._batches[self._period] = _Batch(self._fed, values)
        self._fed += 1
        return self._play()

    @property
    def busy(self) -> bool:
        """Whether batches are in flight."""
        return bool(self._batches)

    def drain(self) -> list[tuple[int, dict[str, Any]]]:
        """`feed` without a new batch, to be called while `busy`: results go out period by period,
        for whoever kept those of all batches would need room for them.
        """
        return self._play()

    def abandon(self) -> None:
        """Lets go of all batches in flight, and with them of their transfers under way."""
        self._batches.clear()
        self._sent.clear()

    def _play(self) -> list[tuple[int, dict[str, Any]]]:
        now = self._period
        for wire in self._incoming:
            if now - wire.stage in self._batches:
                self._ask(now - wire.stage, wire)
        for step in self.program.steps:
            if now - step.stage in self._batches:
                self._run(now - step.stage, step)
        self._finish_sends(now)
        self._period += 1
        over = self._batches.pop(now - self.program.stages + 1, None)
        return [] if over is None else [(over.number, over.results)]

    def _tag(self, fed: int, wire: Wire) -> int:
        """Tags of transfers that may be under way at once differ."""
        return fed % (self.program.stages + 2) * self.program.wires + wire.number

    def _ask(self, fed: int, wire: Wire) -> None:
        dtype = getattr(torch, wire.dtype)
        tensor = self._empty(wire.shape, None, dtype)
        batch = self._batches[fed]
        batch.values[wire.tensor] = tensor
        if tensor.numel():
            pending = self._begin(wire.source, self.transport.receive, tensor, self._tag(fed, wire))
            batch.coming[wire.tensor] = (wire, pending)

    def _run(self, fed: int, step: SegmentStep) -> None:
        batch = self._batches[fed]
        for wire in step.receives:
            if wire.tensor in batch.coming:
                _wait(wire.source, batch.coming.pop(wire.tensor)[1])
        values = batch.values
        with self.turns:  # sends are of the turn: others wait for them
            made = self.segments[step.segment]([values[name] for name in step.inputs])
            values.update(zip(step.outputs, made, strict=True))
            for wire in step.sends:
                tensor = values[wire.tensor].contiguous()
                if tensor.numel():
                    tag = self._tag(fed, wire)
                    pending = self._begin(wire.target, self.transport.send, tensor, tag)
                    self._sent.append((self._period, wire, tensor, pending))
        for name in self.program.results:
            if name in step.outputs:
                batch.results[name] = values[name]
        for name in step.drops:
            values.pop(name, None)

    def _plain(self, shape: Sequence[int], _: None, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    @staticmethod
    def _begin(rank: int, begin: Callable[..., Pending], tensor: torch.Tensor, tag: int) -> Pending:
        try:
            return begin(tensor, rank, tag)
        except RuntimeError as error:
            raise LinkError(rank, str(error)) from error

    def _finish_sends(self, now: int) -> None:
        """Waits for what was sent before period ``now``: its reader has asked for it by then."""
        while self._sent and self._sent[0][0] < now:
            _, wire, _, pending = self._sent.pop(0)
            _wait(wire.target, pending)


def _wait(rank: int, pending: Pending) -> None:
    try:
        pending.wait()
    except RuntimeError as error:
        raise LinkError(rank, str(error)) from error


class Inline:
    """Plays all ranks of a program in one process: tensors move at the cuts."""

    def __init__(
        self,
        programs: Sequence[RankProgram],
        segments: Mapping[str, Run],
        devices: Sequence[torch.device],
    ) -> None:
        self.segments, self.devices = dict(segments), list(devices)
        steps = [(s.stage, p.rank, s) for p in programs for s in p.steps]
        self._steps = sorted(steps, key=lambda x: (x[0], x[1]))
        self._results = {name for p in programs for name in p.results}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The results of one batch, by name, each on the device that made it."""
        here: list[dict[str, torch.Tensor]] = [{} for _ in self.devices]
        results: dict[str, torch.Tensor] = {}
        for _, rank, step in self._steps:
            values, device = here[rank], self.devices[rank]
            for name in step.inputs:
                if name not in values:
                    values[name] = inputs[name].to(device)
            made = self.segments[step.segment]([values[name] for name in step.inputs])
            for name, tensor in zip(step.outputs, made, strict=True):
                values[name] = tensor
                if name in self._results:
                    results[name] = tensor
            for wire in step.sends:
                tensor = values[wire.tensor].contiguous()
                here[wire.target][wire.tensor] = tensor.to(
                    self.devices[wire.target], non_blocking=True
                )
            for name in step.drops:
                values.pop(name, None)
        return results
