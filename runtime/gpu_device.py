"""What runs plans on a GPU needs of one: streams, events, memory, launches and captures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

ALIGNMENT = 16
"""Every tensor that a kernel gets begins at a multiple of so many bytes: those of a vector."""
Function = Callable[[Sequence[int], int], None]
"""Launches a kernel: pointers to its step's arguments, and a stream (a CUstream)."""


class HostMemory:
    """Memory of the host (uint8) that a device copies from, and reads where it lies."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        place = self.host.data_ptr(), False
        return {"shape": (self.host.numel(),), "typestr": "|u1", "data": place, "version": 2}


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

    def host(self, nbytes: int) -> torch.Tensor:
        """Memory of the host that the device copies to and from by itself (uint8)."""
        ...

    def shown(self, memory: HostMemory) -> torch.Tensor:
        """The same memory, which lives as long, as a tensor of the device (uint8)."""
        ...

    def attend(self, event: Any) -> None:
        """Returns once the event has happened."""
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

    def host(self, nbytes: int) -> torch.Tensor:
        """Pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def shown(self, memory: HostMemory) -> torch.Tensor:
        """Pinned memory has one address for the host and every GPU, which torch takes for that of
        the GPU it is pinned for.
        """
        return torch.as_tensor(memory, device=self.device)

    def attend(self, event: Any) -> None:
        """See `Device`."""
        event.synchronize()

    def capture(self, stream: Any, body: Callable[[], None]) -> Callable[[], None]:
        """`torch.cuda.graph`, after everything issued before has ended."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            body()
        return graph.replay
