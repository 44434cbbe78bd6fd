"""Runs a Plan on a GPU: launches over streams, captured once and replayed as one CUDA graph.

A step runs on its lane's stream, after the events of the steps that its lane waits for; nothing
else orders steps. `GpuExecutor` issues them through a `Device`, of which `TorchDevice` is the one
for CUDA: everything that torch does (allocations, library operators) then happens on the stream
that a step is on.

Memory of library results is given back to torch only where that cannot hurt: torch hands a block
that was freed on a stream to whatever that stream allocates next, so a result is kept until a step
of the stream which made it is issued that begins after all readers of it have ended.

Steps that choose among plans by what data tell cut a plan into *pieces*, each a CUDA graph of its
own that begins after everything before it has ended. Between two pieces the host reads the offsets
or the truth value that decide, and has the plans run that have something to do. Steps that bring
weights from host memory cut it, too, and so do the kernels that read these (`paging`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from . import library
from .counts import Counts
from .gpu_device import ALIGNMENT, Device, Function
from .paging import Paging
from .plan import (
    BranchStep,
    FetchStep,
    KernelStep,
    LibraryStep,
    Plan,
    PlanError,
    Step,
    TensorRef,
    cuts,
    touched,
)
from .sizes import evaluate
from .spans import ITEMSIZE


class GpuPart(Protocol):
    """What runs one of the plans that a `BranchStep` names."""

    def run_into(self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
        """See `GpuExecutor.run_into`."""
        ...

    def refusals(self, name: str) -> list[tuple[str, str]]:
        """See `GpuExecutor.refusals`."""
        ...

    def visits(self) -> list[str]:
        """See `GpuExecutor.visits`."""
        ...


@dataclass
class _Piece:
    """Steps ``first`` to ``end`` - 1 of a plan: what replays them, once they are captured, and the
    library results that this computes.
    """

    first: int
    end: int
    replay: Callable[[], None] | None = None
    made: dict[str, Any] = field(default_factory=dict)


class GpuExecutor:
    """A plan with lanes, its constants and kernels, ready to run. Safe to call from any thread.

    ``constants`` maps names to tensors on the device, ``functions`` kernel hashes to what launches
    them, ``calls`` names of library targets that are not operators to callables; ``keep`` holds
    what must stay alive, ``parts`` are what runs the plans that its branch steps name, ``paging``
    brings the weights that its fetch steps name. With
    ``graph`` the second run of the plan is captured and replayed from then on; where that fails,
    ``refusal`` says why and every call launches the steps.
    """

    def __init__(
        self,
        plan: Plan,
        constants: Mapping[str, torch.Tensor],
        functions: Mapping[str, Function],
        device: Device,
        calls: Mapping[str, Callable[..., Any]] | None = None,
        *,
        graph: bool = True,
        keep: Any = None,
        parts: Mapping[str, GpuPart] | None = None,
        fetching: Paging | None = None,
    ) -> None:
        if len(plan.lanes) != len(plan.steps) or plan.symbols:
            raise PlanError("the plan is not one for a GPU: compile again")
        missing = {s.kernel for s in plan.steps if isinstance(s, KernelStep)} - set(functions)
        if missing:
            raise PlanError(f"{len(missing)} kernels of the plan are not loaded: compile again")
        branches = [s for s in plan.steps if isinstance(s, BranchStep)]
        named = [name for step in branches for name in step.every_plan]
        self.parts = dict(parts or {})
        if set(named) - set(self.parts):
            raise PlanError("plans of branches are missing: compile again")
        fetches = [s for s in plan.steps if isinstance(s, FetchStep)]
        if fetches and fetching is None:
            raise PlanError("weights of the plan are in host memory, but nothing fetches them")
        self.fetching = fetching
        self.plan, self.functions, self.device, self.keep = plan, functions, device, keep
        self.counts = Counts(named)
        self.refusal = ""
        self._wanted = graph
        self._cuts = cuts(plan.steps)
        self._pieces = _pieces(plan.steps, self._cuts)
        self._lock = threading.Lock()
        calls = calls or {}
        self._targets = {
            s.target: calls.get(s.target) or library.resolve(s.target)
            for s in plan.steps
            if isinstance(s, LibraryStep)
        }
        self._release = releases(plan)
        with device.activate():
            self._memory = self._allocate(constants)
            count = max((lane.stream for lane in plan.lanes), default=0) + 1
            self._streams = [device.stream(s in plan.urgent) for s in range(count)]
            self._begin, self._idle = device.event(), device.event()
            self._joined = [device.event() for _ in self._streams]
            signalled = {k for lane in plan.lanes for k in lane.waits}
            self._ended = {k: device.event() for k in signalled}
            self._read = device.event()
            deciding = [*branches, *fetches]
            self._told = {s.name: device.host(_bytes(s.selector)) for s in deciding}
            device.record(self._idle, device.current())
        self._live: dict[str, Any] = {}
        self._warm = False

    # -- memory -------------------------------------------------------------------------------

    def _allocate(self, constants: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Memory of every buffer but the library's; it stays where it is."""
        plan = self.plan
        arena = self.device.allocate(max(1, evaluate(plan.arena_bytes, {})))
        memory: dict[str, torch.Tensor] = {}
        inputs = {ref.buffer: ref for ref in plan.inputs}
        for name, buffer in plan.buffers.items():
            nbytes = evaluate(buffer.nbytes, {})
            if buffer.kind == "arena":
                memory[name] = arena[evaluate(buffer.offset, {}) :]
            elif buffer.kind == "const":
                if self.fetching is not None and name in self.fetching:
                    continue  # that lies now here, now there
                if name not in constants:
                    raise PlanError(f"constant {name!r} of the plan is missing: compile again")
                memory[name] = constants[name]
            elif buffer.kind != "library":
                memory[name] = self.device.allocate(max(1, nbytes))
        for name, ref in inputs.items():
            memory.setdefault(name, self.device.allocate(max(1, _bytes(ref))))
        return memory

    def _view(self, ref: TensorRef) -> Any:
        base = self._memory.get(ref.buffer)
        if base is None:
            base = self._live[ref.buffer]
        return view(base, ref)

    # -- a call -------------------------------------------------------------------------------

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Runs on flat inputs, of the plan's shapes and dtypes; returns fresh tensors, except where
        an output is an input or a constant.
        """
        with self._turn():
            self._run_all(tensors)
            return [self._result(ref, tensors) for ref in self.plan.outputs]

    def run_into(self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
        """`run` with the results written to ``into``, on the caller's stream.

        The first of ``tensors`` and each of ``into`` may have fewer rows than in the plan: these
        come first there, and what is behind them belongs to earlier calls, or is zero.
        """
        with self._turn():
            self._run_all(tensors)
            for ref, result in zip(self.plan.outputs, into, strict=True):
                value = self._view(ref)
                if value.shape != result.shape:
                    value = value[: result.shape[0]]
                self.device.call(torch.Tensor.copy_, result, value)

    def refusals(self, name: str = "") -> list[tuple[str, str]]:
        """Of plans that could not be captured, this one called ``name``, name and reason."""
        found = [(name, self.refusal)] if self.refusal else []
        return found + [pair for n, part in self.parts.items() for pair in part.refusals(n)]

    def visits(self) -> list[str]:
        """How often each branch ran, as lines of text."""
        lines = []
        for name, part in self.parts.items():
            lines.append(f"{name} ran {self.counts['taken', name]} times")
            lines += [f"  {line}" for line in part.visits()]
        return lines

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time, on the device as well."""
        device, fetching = self.device, self.fetching
        with self._lock, device.activate():
            caller = device.current()
            device.wait(caller, self._idle)  # another caller's stream may have had the last call
            try:
                with contextlib.nullcontext() if fetching is None else fetching.turn(caller):
                    yield
            finally:
                device.record(self._idle, caller)

    def _run_all(self, tensors: Sequence[torch.Tensor]) -> None:
        """Runs all steps on inputs."""
        device = self.device
        caller = device.current()
        for ref, tensor in zip(self.plan.inputs, tensors, strict=True):
            place = self._view(ref)
            if place.shape != tensor.shape:
                place = place[: tensor.shape[0]]
            device.call(torch.Tensor.copy_, place, tensor)
        self._live = {}
        for piece in self._pieces:
            if piece.first < piece.end:
                self._run_piece(piece, caller)
            if piece.end < len(self.plan.steps):
                self._run_apart(self.plan.steps[piece.end], caller)
        self._warm = True

    def _run_piece(self, piece: _Piece, caller: Any) -> None:
        if self._wanted and self._warm and piece.replay is None:
            self._capture(piece)
        if piece.replay is not None and not self.refusal:
            piece.replay()
            self._live |= piece.made
        else:
            self._issue_from(caller, piece)

    def _capture(self, piece: _Piece) -> None:
        """Tried once, after a first run has warmed up the library. What a graph reads of earlier
        pieces stays where it is only if these are graphs, too: so either all are, or none.
        """
        before = dict(self._live)
        try:
            issue = functools.partial(self._issue, piece)
            piece.replay = self.device.capture(self._streams[0], issue)
            piece.made = {n: t for n, t in self._live.items() if before.get(n) is not t}
        except RuntimeError as error:
            self._live, self._wanted = before, False
            self.refusal = (str(error).strip().splitlines() or ["unknown"])[0]

    def _issue_from(self, caller: Any, piece: _Piece) -> None:
        """Issues a piece between what the caller's stream has done and what it does next."""
        device, main = self.device, self._streams[0]
        device.record(self._begin, caller)
        device.wait(main, self._begin)
        with device.on(main):
            self._issue(piece)
        device.record(self._joined[0], main)
        device.wait(caller, self._joined[0])

    def _issue(self, piece: _Piece) -> None:
        """Issues the steps of a piece, beginning and ending on the first stream."""
        device, streams = self.device, self._streams
        begun = {0}
        device.record(self._begin, streams[0])
        for number in range(piece.first, piece.end):
            step, lane = self.plan.steps[number], self.plan.lanes[number]
            stream = streams[lane.stream]
            if lane.stream not in begun:
                begun.add(lane.stream)
                device.wait(stream, self._begin)
            for other in lane.waits:
                if other >= piece.first:  # earlier pieces have ended
                    device.wait(stream, self._ended[other])
            for name in self._release[number]:
                self._live.pop(name, None)
            with device.on(stream):
                self._run(step, stream)
            if number in self._ended:
                device.record(self._ended[number], stream)
        for number in sorted(begun - {0}):
            device.record(self._joined[number], streams[number])
            device.wait(streams[0], self._joined[number])

    def _run(self, step: Step, stream: Any) -> None:
        if isinstance(step, KernelStep):
            pointers = [self._pointer(ref) for ref in step.args]
            self.device.launch(self.functions[step.kernel], pointers, stream)
        elif isinstance(step, LibraryStep):
            self._call(step)
        else:
            raise PlanError(f"{step.name} cannot be issued with others: compile again")

    # -- between pieces -----------------------------------------------------------------------

    def _run_apart(self, step: Step, caller: Any) -> None:
        """Runs a step at which a plan is cut, on the caller's stream."""
        if isinstance(step, BranchStep):
            self._choose(step, caller)
            return
        assert self.fetching is not None
        if isinstance(step, FetchStep):
            told = self._tell(step.selector, self._told[step.name], caller)
            self.fetching.fetch(step, told.tolist(), caller)
            return
        for _ in self.fetching.launches(step, caller):  # type: ignore[arg-type]
            self._run(step, caller)

    def _choose(self, step: Any, caller: Any) -> None:
        """Runs the plans of a `BranchStep` that have something to do, in their order."""
        told = self._tell(step.selector, self._told[step.name], caller)
        operands = [self._view(ref) for ref in step.refs]
        results = [self._view(ref) for ref in step.results]
        if step.kind == "cond":
            self._run_part(step.plans[0 if told.item() else 1], operands, results)
            return
        rows, *others = operands
        begin, *ends = told.tolist()
        for name, end in zip(step.plans, ends, strict=True):
            if begin < end:
                self._run_part(name, [rows[begin:end], *others], [results[0][begin:end]])
            begin = end

    def _tell(self, ref: TensorRef, memory: torch.Tensor, caller: Any) -> torch.Tensor:
        """The values of a tensor on the host, which waits for them and for nothing else."""
        device, source = self.device, self._view(ref)
        told = memory.view(source.dtype).view(source.shape)
        device.call(torch.Tensor.copy_, told, source, non_blocking=True)
        device.record(self._read, caller)
        device.attend(self._read)
        return told

    def _run_part(
        self, name: str, operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
    ) -> None:
        self.counts.add("taken", name)
        self.parts[name].run_into(operands, results)

    def _pointer(self, ref: TensorRef) -> int:
        base = self._memory.get(ref.buffer)
        if base is None and self.fetching is not None and ref.buffer in self.fetching:
            base = self.fetching.memory(ref.buffer)
        if base is None:
            base = self._live[ref.buffer]
        return base.data_ptr() + evaluate(ref.offset, {}) * ITEMSIZE[ref.dtype]

    def _call(self, step: LibraryStep) -> None:
        call = self.device.call
        operands = [self._view(ref) for ref in step.refs]
        args = library.bind(step.args, operands, {})
        kwargs = {k: library.bind(v, operands, {}) for k, v in step.kwargs.items()}
        results = call(self._targets[step.target], *args, **kwargs)
        if not isinstance(results, (tuple, list)):
            results = (results,)
        held = {x.untyped_storage().data_ptr() for x in operands if isinstance(x, torch.Tensor)}
        for ref, result in zip(step.results, results, strict=False):
            if ref is None:
                continue
            if ref.buffer in self._memory:
                call(torch.Tensor.copy_, self._view(ref), result)
                continue
            if isinstance(result, torch.Tensor):
                shared = result.untyped_storage().data_ptr() in held  # with other lifetimes
                if shared or result.data_ptr() % ALIGNMENT:
                    result = call(torch.clone, result)
                if ref.dtype and not _lies(result, _ints(ref.strides)):
                    shape, strides = _ints(ref.shape), _ints(ref.strides)
                    kind = {"dtype": result.dtype, "device": result.device}
                    planned = call(torch.empty_strided, shape, strides, **kind)
                    result = call(torch.Tensor.copy_, planned, result)
            self._live[ref.buffer] = result

    def _result(self, ref: TensorRef, tensors: Sequence[torch.Tensor]) -> Any:
        """An output: the caller's own memory where it is an input's, a copy of ours otherwise."""
        kind = self.plan.buffers[ref.buffer].kind
        if kind == "const":
            return self._view(ref)
        if kind == "input":
            for number, given in enumerate(self.plan.inputs):
                if given.buffer == ref.buffer and tensors[number].is_contiguous():
                    base = tensors[number]
                    offset = base.storage_offset() + evaluate(ref.offset, {})
                    return base.as_strided(_ints(ref.shape), _ints(ref.strides), offset)
        value = self._view(ref)
        if not isinstance(value, torch.Tensor):
            return value
        return self.device.call(torch.clone, value)


def view(base: Any, ref: TensorRef) -> Any:
    """What ``ref`` shows of a buffer; the buffer itself where the plan knows no geometry."""
    if not isinstance(base, torch.Tensor) or not ref.dtype:
        return base
    dtype = getattr(torch, ref.dtype)
    if base.dtype != dtype:
        size = ITEMSIZE[ref.dtype]
        base = base[: base.numel() // size * size].view(dtype)
    offset = base.storage_offset() + evaluate(ref.offset, {})
    return base.as_strided(_ints(ref.shape), _ints(ref.strides), offset)


def _pieces(steps: Sequence[Step], cut: Set[int]) -> list[_Piece]:
    """What lies before, between and behind steps at which a plan is cut."""
    at = sorted(cut)
    firsts, ends = [0, *(k + 1 for k in at)], [*at, len(steps)]
    return [_Piece(first, end) for first, end in zip(firsts, ends, strict=True)]


def releases(plan: Plan) -> list[list[str]]:
    """For every step the library results that may be given back before it is issued.

    These are results of its own stream all of whose readers have ended when it begins. A result
    that the caller gets is never given back.
    """
    before: list[int] = []
    last: dict[int, int] = {}
    cut = cuts(plan.steps)
    earlier = 0  # everything up to the last step at which the plan is cut
    for number, lane in enumerate(plan.lanes):
        bits = earlier
        for k in (*lane.waits, *([last[lane.stream]] if lane.stream in last else [])):
            bits |= before[k] | 1 << k
        if number in cut:
            bits, earlier = (1 << number) - 1, (2 << number) - 1
        before.append(bits)
        last[lane.stream] = number
    users: dict[str, int] = {}
    maker: dict[str, int] = {}
    for number, step in enumerate(plan.steps):
        for ref in touched(step):
            if ref is not None and plan.buffers[ref.buffer].kind == "library":
                users[ref.buffer] = users.get(ref.buffer, 0) | 1 << number
                maker.setdefault(ref.buffer, number)
    for ref in plan.outputs:
        users.pop(ref.buffer, None)
    found: list[list[str]] = [[] for _ in plan.steps]
    for name, bits in users.items():
        for number in _later_on(plan, maker[name], cut):
            if not bits & ~before[number]:
                found[number].append(name)
                break
    return found


def _later_on(plan: Plan, first: int, cut: Set[int]) -> Iterator[int]:
    """Later steps that are issued on the stream of a step."""
    stream, later = plan.lanes[first].stream, range(first + 1, len(plan.lanes))
    issued = (k for k in later if k not in cut)
    return (k for k in issued if plan.lanes[k].stream == stream)


def _lies(tensor: torch.Tensor, strides: Sequence[int]) -> bool:
    """Whether a tensor has these strides, in every dimension where that matters."""
    steps = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(n == 1 or have == want for n, have, want in steps)


def _ints(sizes: Sequence[int | str]) -> tuple[int, ...]:
    return tuple(evaluate(s, {}) for s in sizes)


def _bytes(ref: TensorRef) -> int:
    return math.prod(_ints(ref.shape)) * ITEMSIZE[ref.dtype]
