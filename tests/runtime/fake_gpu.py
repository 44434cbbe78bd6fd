"""A GPU for tests: what streams are given is kept, and run later in an order drawn by chance.

Any order may come up in which a stream does things one after the other and a wait comes after its
event, so what an executor forgot to order goes wrong sooner or later. Results are NaN until they
are computed, and again when they are given back.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from plait.runtime.gpu_device import HostMemory

CALLER = "caller"


def _spoil(tensor: torch.Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else 0)  # an index, too


class FakeGpu:
    """`runtime.gpu_device.Device` on the CPU; ``refuses`` says why nothing can be captured."""

    def __init__(self, seed: int = 0, refuses: str = "") -> None:
        self.refuses = refuses
        self.chance = random.Random(seed)
        self.caller = CALLER
        self.queues: dict[Any, deque[tuple[str, Any]]] = defaultdict(deque)
        self.log: list[tuple[str, Any]] = []  # what was issued: stream and what
        self.captures = self.replays = 0
        self._names = itertools.count()
        self._latest: dict[Any, Any] = {}
        self._happened: set[Any] = set()
        self._current: list[Any] = []
        self._allocated: list[torch.Tensor] = []
        self._spare: dict[tuple[Any, bool], list[torch.Tensor]] = {}
        self._graph: list[tuple[Any, str, Any]] | None = None
        self._joined: set[Any] = set()
        self._shown: list[HostMemory] = []

    def activate(self) -> contextlib.AbstractContextManager[None]:
        return torch.no_grad()

    def allocate(self, nbytes: int) -> torch.Tensor:
        raw = torch.zeros(nbytes + 512, dtype=torch.uint8)
        self._allocated.append(raw)  # what is issued may use it when whoever issued it is gone
        shift = -raw.data_ptr() % 512
        return raw[shift : shift + nbytes]

    def current(self) -> Any:
        return self._current[-1] if self._current else self.caller

    def stream(self, urgent: bool) -> Any:
        return f"stream {next(self._names)}" + " urgent" * urgent

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def event(self) -> Any:
        return f"event {next(self._names)}"

    def record(self, event: Any, stream: Any) -> None:
        token = (event, next(self._names))
        self._latest[event] = token
        self._add(stream, "record", token)

    def wait(self, stream: Any, event: Any) -> None:
        token = self._latest.get(event)
        if self._graph is not None:
            inside = any(kind == "record" and what == token for _, kind, what in self._graph)
            assert inside, "a captured stream waits for something outside of its graph"
            self._joined.add(stream)
        if token is not None:  # CUDA does not wait for an event that was never recorded
            self._add(stream, "wait", token)

    def launch(self, function: Callable[..., None], pointers: Sequence[int], stream: Any) -> None:
        self._add(stream, "run", lambda: function(pointers, 0))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if function is torch.Tensor.copy_:
            self._add(self.current(), "run", lambda: args[0].copy_(args[1]))
            return args[0]
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        results = function(*args, **kwargs)
        several = isinstance(results, (tuple, list))
        memory = list(results) if several else [results]
        held = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if any(m.untyped_storage().data_ptr() in held for m in memory):
            return results  # a view: nothing has to be computed
        for part in memory:
            _spoil(part)

        stream = self.current()
        spare = self._spare.pop((stream, self._graph is None), [])

        def later() -> None:
            for part in spare:  # torch may have given their memory to this result
                _spoil(part)
            found = function(*args, **kwargs)
            for part, value in zip(memory, found if several else [found], strict=True):
                part.copy_(value)

        self._add(stream, "run", later)
        given = [part.detach() for part in memory]
        for alias, part in zip(given, memory, strict=True):
            weakref.finalize(alias, self._freed, part, (stream, self._graph is None)).atexit = False
        return given if several else given[0]

    def _freed(self, memory: torch.Tensor, pool: tuple[Any, bool]) -> None:
        """What is freed goes to whatever is allocated next on the stream that it came from."""
        self._spare.setdefault(pool, []).append(memory)

    def capture(self, stream: Any, body: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        self.synchronize()
        self._graph, self._joined = [], {stream}
        try:
            with self.on(stream):
                body()
            if self.refuses:
                raise RuntimeError(self.refuses)
            graph = self._graph
        finally:
            self._graph = None
        self._check_joined(graph, stream)
        return lambda: self._replay(graph, stream)

    def _check_joined(self, graph: list[tuple[Any, str, Any]], main: Any) -> None:
        """CUDA ends a capture with an error where work of another stream is not waited for."""
        reached = {main}
        for stream, kind, what in reversed(graph):
            if kind == "wait" and stream in reached:
                reached.add(what)
            elif kind == "record" and what in reached:
                reached.add(stream)
            else:
                assert stream in reached, f"{stream} is not joined"

    def _replay(self, graph: list[tuple[Any, str, Any]], main: Any) -> None:
        self.replays += 1
        turn = self.replays
        self.record("begin of replay", self.current())
        for stream in {s for s, _, _ in graph}:
            self.wait((stream, turn), "begin of replay")
        for stream, kind, what in graph:
            self._add((stream, turn), kind, what if kind == "run" else (what, turn))
        self.record("end of replay", (main, turn))
        self.wait(self.current(), "end of replay")

    def _add(self, stream: Any, kind: str, what: Any) -> None:
        if self._graph is None:
            self.queues[stream].append((kind, what))
        else:
            assert stream in self._joined, f"{stream} is no part of the capture"
            self._graph.append((stream, kind, what))
        self.log.append((stream, kind))

    def host(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 77, dtype=torch.uint8)

    def shown(self, memory: HostMemory) -> torch.Tensor:
        self._shown.append(memory)
        return memory.host

    def attend(self, event: Any) -> None:
        assert self._graph is None, "the host cannot wait for what is captured"
        token = self._latest[event]
        self._work(lambda: token in self._happened)
        assert token in self._happened, "the host waits for what never happens"

    def synchronize(self) -> None:
        """Does everything, in an order drawn by chance. Fails where nothing can go on."""
        self._work(lambda: False)
        assert not any(self.queues.values()), "streams wait for each other"
        self.queues.clear()

    def _work(self, enough: Callable[[], bool]) -> None:
        """Goes on, in an order drawn by chance, until it is enough or nothing can go on."""
        while not enough() and (
            ready := [s for s, q in self.queues.items() if q and self._can(q[0])]
        ):
            stream = self.chance.choice(ready)
            for _ in range(self.chance.choice((1, 1, 2, 100))):
                queue = self.queues[stream]
                if not queue or not self._can(queue[0]) or enough():
                    break
                kind, what = queue.popleft()
                if kind == "run":
                    what()
                elif kind == "record":
                    self._happened.add(what)

    def _can(self, entry: tuple[str, Any]) -> bool:
        return entry[0] != "wait" or entry[1] in self._happened
