"""Runs a Plan on a GPU: launches over streams, captured once and replayed as one CUDA graph.

A step runs on its lane's stream, after the events of the steps that its lane waits for; nothing
else orders steps. `GpuExecutor` issues them through a `Device`, of which `TorchDevice` is the one
for CUDA: everything that torch does (allocations, library operators) then happens on the stream
that a step is on.

Memory of library results is given back to torch only where that cannot hurt: torch hands a block
that was freed on a stream to whatever that stream allocates next, so a result is kept until a step
of the stream which made it is issued that begins after all readers of it have ended.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from . import library
from .plan import KernelStep, LibraryStep, Plan, PlanError, Step, TensorRef, touched
from .sizes import evaluate
from .spans import ITEMSIZE

ALIGNMENT = 16
"""Every tensor that a kernel gets begins at a multiple of so many bytes: those of a vector."""
Function = Callable[[Sequence[int], int], None]
"""Launches a kernel: pointers to its step's arguments, and a stream (a CUstream)."""


class Device(Protocol):
    """What the executor needs of a GPU and of torch on it. Streams and events are its own."""

    def activate(self) -> AbstractContextManager[None]:
        """Makes this the device on which everything inside happens."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Zeros that nothing else uses (uint8)."""
        ...

    def current(self) -> Any:
        """The caller's stream."""
        ...

    def stream(self, urgent: bool) -> Any:
        """A new stream; an urgent one goes first where there is a choice."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Makes torch use ``stream``."""
        ...

    def event(self) -> Any:
        """A new event."""
        ...

    def record(self, event: Any, stream: Any) -> None:
        """The event happens when ``stream`` has done what it was given so far."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """What ``stream`` is given from now on starts after the event."""
        ...

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a torch function on the current stream."""
        ...

    def launch(self, function: Function, pointers: Sequence[int], stream: Any) -> None:
        """Launches a kernel on ``stream``."""
        ...

    def capture(self, stream: Any, body: Callable[[], None]) -> Callable[[], None]:
        """What replays everything that ``body`` issued, beginning and ending on ``stream``, on the
        caller's stream. Raises RuntimeError where something cannot be captured.
        """
        ...


class TorchDevice:
    """A GPU of this machine, through torch (`Device`)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def activate(self) -> AbstractContextManager[None]:
        """`torch.cuda.device`, without autocast and gradients."""
        stack = contextlib.ExitStack()
        stack.enter_context(torch.cuda.device(self.device))
        stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(torch.no_grad())
        return stack

    def allocate(self, nbytes: int) -> torch.Tensor:
        """From torch's allocator, whose blocks start at multiples of 512 bytes."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def current(self) -> Any:
        """torch's current stream."""
        return torch.cuda.current_stream(self.device)

    def stream(self, urgent: bool) -> Any:
        """One of torch's streams; urgent ones have priority -1."""
        return torch.cuda.Stream(self.device, priority=-1 if urgent else 0)

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """`torch.cuda.stream`."""
        return torch.cuda.stream(stream)

    def event(self) -> Any:
        """An event without time stamps."""
        return torch.cuda.Event()

    def record(self, event: Any, stream: Any) -> None:
        """See `Device`."""
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        """See `Device`."""
        stream.wait_event(event)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See `Device`."""
        return function(*args, **kwargs)

    def launch(self, function: Function, pointers: Sequence[int], stream: Any) -> None:
        """See `Device`."""
        function(pointers, stream.cuda_stream)

    def capture(self, stream: Any, body: Callable[[], None]) -> Callable[[], None]:
        """`torch.cuda.graph`, after everything issued before has ended."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            body()
        return graph.replay


class GpuExecutor:
    """A plan with lanes, its constants and kernels, ready to run. Safe to call from any thread.

    ``constants`` maps names to tensors on the device, ``functions`` kernel hashes to what launches
    them, ``calls`` names of library targets that are not operators to callables; ``keep`` holds
    what must stay alive. With ``graph`` the second run of the plan is captured and replayed from
    then on; where that fails, ``refusal`` says why and every call launches the steps.
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
    ) -> None:
        if len(plan.lanes) != len(plan.steps) or plan.symbols:
            raise PlanError("the plan is not one for a GPU: compile again")
        missing = {s.kernel for s in plan.steps if isinstance(s, KernelStep)} - set(functions)
        if missing:
            raise PlanError(f"{len(missing)} kernels of the plan are not loaded: compile again")
        self.plan, self.functions, self.device, self.keep = plan, functions, device, keep
        self.refusal = ""
        self._wanted = graph
        self._replay: Callable[[], None] | None = None
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
        device = self.device
        with self._lock, device.activate():
            caller = device.current()
            device.wait(caller, self._idle)  # another caller's stream may have had the last call
            for ref, tensor in zip(self.plan.inputs, tensors, strict=True):
                device.call(torch.Tensor.copy_, self._view(ref), tensor)
            if self._wanted and self._warm:
                self._capture()
            if self._replay is not None:
                self._replay()
            else:
                self._issue_from(caller)
            results = [self._result(ref, tensors) for ref in self.plan.outputs]
            device.record(self._idle, caller)
        return results

    def _capture(self) -> None:
        """Tried once, after a first run has warmed up the library."""
        self._wanted = False
        before = self._live
        try:
            self._replay = self.device.capture(self._streams[0], self._issue)
        except RuntimeError as error:
            self._live = before
            self.refusal = (str(error).strip().splitlines() or ["unknown"])[0]

    def _issue_from(self, caller: Any) -> None:
        """Issues all steps between what the caller's stream has done and what it does next."""
        device, main = self.device, self._streams[0]
        device.record(self._begin, caller)
        device.wait(main, self._begin)
        with device.on(main):
            self._issue()
        device.record(self._joined[0], main)
        device.wait(caller, self._joined[0])

    def _issue(self) -> None:
        """Issues all steps, beginning and ending on the first stream."""
        device, streams = self.device, self._streams
        self._live, self._warm = {}, True
        begun = {0}
        device.record(self._begin, streams[0])
        for number, (step, lane) in enumerate(zip(self.plan.steps, self.plan.lanes, strict=True)):
            stream = streams[lane.stream]
            if lane.stream not in begun:
                begun.add(lane.stream)
                device.wait(stream, self._begin)
            for other in lane.waits:
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
            raise PlanError(
                f"{step.name} chooses among plans, which no GPU plan may: compile again"
            )

    def _pointer(self, ref: TensorRef) -> int:
        base = self._memory.get(ref.buffer)
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


def releases(plan: Plan) -> list[list[str]]:
    """For every step the library results that may be given back before it is issued.

    These are results of its own stream all of whose readers have ended when it begins. A result
    that the caller gets is never given back.
    """
    before: list[int] = []
    last: dict[int, int] = {}
    for number, lane in enumerate(plan.lanes):
        bits = 0
        for k in (*lane.waits, *([last[lane.stream]] if lane.stream in last else [])):
            bits |= before[k] | 1 << k
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
        for number in _later_on(plan, maker[name]):
            if not bits & ~before[number]:
                found[number].append(name)
                break
    return found


def _later_on(plan: Plan, first: int) -> Iterator[int]:
    """Later steps on the stream of a step."""
    stream = plan.lanes[first].stream
    return (k for k in range(first + 1, len(plan.lanes)) if plan.lanes[k].stream == stream)


def _lies(tensor: torch.Tensor, strides: Sequence[int]) -> bool:
    """Whether a tensor has these strides, in every dimension where that matters."""
    steps = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(n == 1 or have == want for n, have, want in steps)


def _ints(sizes: Sequence[int | str]) -> tuple[int, ...]:
    return tuple(evaluate(s, {}) for s in sizes)


def _bytes(ref: TensorRef) -> int:
    return math.prod(_ints(ref.shape)) * ITEMSIZE[ref.dtype]
