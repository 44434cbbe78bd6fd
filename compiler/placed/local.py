"""Ranks as processes of this machine: started, fed, watched and ended by one parent.

The parent is no rank. Each worker has a pipe to it; a thread reads all of them and notes when a
process ends, so neither side waits for a dead one. The first failure ends all workers, and the
parent raises one error that names its cause.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection as pipes
from pathlib import Path
from typing import Any, NoReturn

import torch

from ...runtime.turns import offered
from . import pipe
from .options import cores
from .part import DistributedError
from .pipe import pack, unpack

START = 600.0
"""Seconds for ranks to start, or to load their weights."""
_GRACE = 2.0
"""Seconds that a failure waits for a more telling one: a rank's death breaks links first."""


class Ranks:
    """Worker processes, one a rank.

    ``timeout`` (seconds) is how long no rank may answer before the session ends. Raises
    DistributedError wherever a rank fails; after that, and after `close`, nothing works any more.
    """

    def __init__(self, count: int, timeout: float, threads: int) -> None:
        self.count, self.timeout, self.threads = count, timeout, threads
        self.folder = tempfile.TemporaryDirectory(prefix="plait-ranks-")
        self._messages: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._ends: list[pipes.Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.broken: DistributedError | None = None
        self._fed = 0
        turns = max(1, cores() // threads)
        shared = offered(turns) if count > turns else ()
        for _ in range(count):
            self._start(shared)
        for end in shared:
            os.close(end)
        self._stop = weakref.finalize(self, _end, self.processes, self._ends, self.folder)
        reader = threading.Thread(
            target=_read, args=(self._ends, self.processes, self._messages), daemon=True
        )
        reader.start()

    def _start(self, turns: tuple[int, ...]) -> None:
        mine, theirs = pipes.Pipe()
        with socket.socket(fileno=os.dup(mine.fileno())) as end:  # a stopped rank reads nothing
            seconds = struct.pack("ll", int(self.timeout), int(self.timeout % 1 * 1e6))
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)])
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": str(self.threads),
        }
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        ends = [theirs.fileno(), *turns]
        command = [sys.executable, "-m", f"{__package__}.worker", *map(str, ends)]
        self.processes.append(
            subprocess.Popen(command, pass_fds=ends, env=environment, stdin=subprocess.DEVNULL)
        )
        theirs.close()
        self._ends.append(mine)

    def join(self) -> None:
        """Waits until all have found each other."""
        store = str(Path(self.folder.name) / "store")
        for rank in range(self.count):
            self.send(rank, "join", rank, self.count, store, START, self.timeout, self.threads)
        self.gather("joined", START)

    def measure_link(self) -> tuple[float, float]:
        """Latency (seconds) and bandwidth (bytes/s) between the first two ranks."""
        for rank in range(self.count):
            self.send(rank, "link", (0, 1))
        return next(m[0] for m in self.gather("link") if m[0] is not None)

    def send(self, rank: int, *message: Any) -> None:
        """Tells a rank something."""
        if self.broken is not None:
            raise self._again()
        try:
            pipe.send(self._ends[rank], message)
        except BlockingIOError:
            self._late(f"rank {rank}")
        except OSError:
            self._fail(rank, ("ended",))

    def gather(self, kind: str, seconds: float | None = None) -> list[tuple[Any, ...]]:
        """One answer of ``kind`` from every rank, by rank, each within ``seconds`` (the timeout)
        of the one before.
        """
        found: dict[int, tuple[Any, ...]] = {}
        while len(found) < self.count:
            rank, message = self.next(
                f"ranks {sorted({*range(self.count)} - found.keys())}", seconds
            )
            assert message[0] == kind, (rank, message[0])
            found[rank] = tuple(message[1:])
        return [found[rank] for rank in range(self.count)]

    def next(self, who: str, seconds: float | None = None) -> tuple[int, Any]:
        """The next message of any rank. Raises DistributedError where that is a failure."""
        if self.broken is not None:
            raise self._again()
        rank, message = self._awaited(who, seconds or self.timeout)
        if message[0] in ("ended", "error", "link-error"):
            self._fail(rank, message)
        return rank, message

    def _awaited(self, who: str, seconds: float) -> tuple[int, Any]:
        """A message within ``seconds``, or until a rank that is stopped stays so for the timeout:
        it would not answer in the long time that is allowed for loading either.
        """
        began, before = time.monotonic(), set[int]()
        while (left := began + seconds - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return self._messages.get(timeout=min(left, self.timeout))
            stopped = {rank for rank, p in enumerate(self.processes) if _is_stopped(p.pid)}
            if before & stopped:
                self._late(f"rank {min(before & stopped)}, which was stopped,")
            before = stopped
        self._late(who, seconds)

    def _late(self, who: str, seconds: float | None = None) -> NoReturn:
        self.close()
        waited = seconds or self.timeout
        self.broken = DistributedError(
            "PLT-DST-005", f"no answer of {who} in {waited:g} s", "raise timeout="
        )
        raise self.broken from None

    def _fail(self, rank: int, message: Any) -> NoReturn:
        """Ends all ranks and raises the most telling of the failures that come in now."""
        if self.broken is not None:  # they were ended on purpose
            raise self._again()
        causes = [(rank, message)]
        deadline = time.monotonic() + _GRACE
        while causes[-1][1][0] != "error" and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                found = self._messages.get(timeout=0.05)
                if found[1][0] in ("ended", "error", "link-error"):
                    causes.append(found)
        codes = [p.poll() for p in self.processes]
        self.close()
        self.broken = most_telling(causes, codes)
        raise self.broken

    def _again(self) -> DistributedError:
        assert self.broken is not None
        return DistributedError(
            "PLT-DST-011", f"the ranks have ended: {self.broken.reason}", "compile the model again"
        )

    def close(self) -> None:
        """Ends all ranks, those that wait for others too."""
        if self.broken is None:  # at first, for a call under way in another thread
            self.broken = DistributedError("PLT-DST-011", "close() was called")
        self._stop()

    # -- running --------------------------------------------------------------------------------

    def stream(
        self,
        batches: Iterable[Mapping[str, torch.Tensor]],
        inputs: Sequence[Sequence[str]],
        owners: Sequence[int],
        ahead: int,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Results of each batch in order; ``ahead`` batches are in flight at most.

        ``inputs`` names what each rank reads, ``owners`` are the ranks that make results.
        """
        supply = iter(batches)
        flight: deque[_Flight] = deque()
        more = True
        try:
            while more or flight:
                while more and len(flight) < ahead:
                    batch = next(supply, None)
                    if batch is None:
                        more = False
                        self._drain()
                        break
                    flight.append(_Flight(self._fed, set(owners)))
                    self._fed += 1
                    for rank in range(self.count):
                        self.send(rank, "feed", pack({n: batch[n] for n in inputs[rank]}))
                if flight:
                    yield self._finish(flight)
        finally:
            if self.broken is None and flight:  # nobody wants the rest, but it is under way
                if more:
                    self._drain()
                while flight:
                    self._finish(flight)

    def _drain(self) -> None:
        for rank in range(self.count):
            self.send(rank, "drain")

    def _finish(self, flight: deque[_Flight]) -> dict[str, torch.Tensor]:
        """The results of the first batch in flight, which is none any more."""
        first = flight[0]
        while first.missing:
            waiting = ", ".join(map(str, sorted(first.missing)))
            rank, (_, number, content) = self.next(f"rank {waiting}")
            batch = flight[number - first.number]
            batch.results.update(unpack(content))
            batch.missing.discard(rank)
        return flight.popleft().results


@dataclass
class _Flight:
    """A batch under way: its number, the ranks whose results are still to come, the others'."""

    number: int
    missing: set[int]
    results: dict[str, torch.Tensor] = field(default_factory=dict)


def most_telling(
    causes: Sequence[tuple[int, Any]], codes: Sequence[int | None]
) -> DistributedError:
    """The error of that of the failures (rank, message) which says most of what went wrong.

    ``codes`` are the ranks' exit codes, None where they run. A rank that exits with 0 has told why,
    or somebody who listens closer will: its links broke because another is gone.
    """

    def vagueness(cause: tuple[int, Any]) -> int:
        rank, message = cause
        ended = 1 if codes[rank] else 3
        return {"error": 0, "ended": ended, "link-error": 2}[message[0]]

    rank, (kind, *content) = min(causes, key=vagueness)
    if kind == "error":
        return DistributedError(*content)
    if kind == "link-error":
        other, reason = content
        if "timed out" in reason.lower():
            return late(rank, f"rank {other}")
        return lost(rank, f"rank {other}", reason)
    code = codes[rank]
    how = "ended" if code is None else f"ended by signal {-code}" if code < 0 else f"exited: {code}"
    killed = " (9 is what the system sends when memory is short)" if code == -9 else ""
    return DistributedError("PLT-DST-004", f"rank {rank} {how}{killed}", "compile the model again")


def late(rank: int, other: str) -> DistributedError:
    """The error of a rank that waited in vain."""
    return DistributedError(
        "PLT-DST-005", f"rank {rank} waited too long for {other}", "raise timeout="
    )


def lost(rank: int, other: str, reason: str) -> DistributedError:
    """The error of a rank whose link to another broke."""
    first = re.sub(r"^\[[^]]*\]\s*", "", reason.strip()).split(". ")[0]  # what gloo says of itself
    return DistributedError(
        "PLT-DST-004", f"rank {rank} lost {other}: {first}", "start all ranks again"
    )


def _is_stopped(process: int) -> bool:
    """Whether a signal has stopped a process."""
    import psutil

    try:
        return psutil.Process(process).status() == psutil.STATUS_STOPPED
    except psutil.Error:  # it has ended, which its pipe tells
        return False


def _read(
    ends: list[pipes.Connection],
    processes: list[subprocess.Popen[bytes]],
    messages: queue.Queue[tuple[int, Any]],
) -> None:
    """Puts what ranks say into ``messages`` until all their pipes are closed."""
    live = {end: rank for rank, end in enumerate(ends)}
    while live:
        try:
            ready = pipes.wait(list(live))
        except (OSError, ValueError):  # closed by `_end`
            return
        for end in ready:
            rank = live[end]  # type: ignore[index]
            try:
                messages.put((rank, pipe.receive(end)))  # type: ignore[union-attr]
            except (EOFError, OSError, TypeError):  # the last: closed by `_end` meanwhile
                del live[end]  # type: ignore[arg-type]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    processes[rank].wait(1.0)
                messages.put((rank, ("ended",)))


def _end(
    processes: list[subprocess.Popen[bytes]],
    ends: list[pipes.Connection],
    folder: tempfile.TemporaryDirectory[str],
) -> None:
    """Ends what is left of the ranks: they hold nothing that needs saving."""
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
    for end in ends:
        with contextlib.suppress(OSError):
            end.close()
    folder.cleanup()
