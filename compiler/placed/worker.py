"""A local rank: ``python -m plait.compiler.placed.worker FD [TAKE GIVE]``, started by `local`.

It is told what to do over the pipe ``FD`` and ends when that closes. Whatever goes wrong is one
message on the pipe; nothing is printed. ``TAKE`` and ``GIVE`` are those of `turns`.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...runtime import distributed
from ...runtime.pipeline import LinkError, Player, RankProgram
from ...runtime.turns import Turns
from ..options import Options
from ..weights.absent import Checkpoint
from . import pipe
from .part import Part, failure
from .pipe import pack, unpack


class Worker:
    """Answers the messages of the process that started it."""

    def __init__(self, connection: Connection, turns: Turns | None = None) -> None:
        self.connection, self.turns = connection, turns
        self.part: Part | None = None
        self.player: Player | None = None
        self.rank = -1

    def serve(self) -> None:
        """Until the pipe closes, or something fails: then says so and returns."""
        try:
            while True:
                kind, *message = pipe.receive(self.connection)
                getattr(self, f"do_{kind}")(*message)
        except EOFError:
            return
        except Exception as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        if isinstance(error, LinkError):
            answer = ("link-error", error.rank, str(error))
        else:
            told = failure(self.rank, error)
            answer = ("error", told.remark, told.reason, told.hint)
        try:
            pipe.send(self.connection, answer)
        except OSError:
            pass  # nobody listens any more

    def do_join(
        self, rank: int, ranks: int, store: str, start: float, timeout: float, threads: int
    ) -> None:
        """Joins the other ranks."""
        self.rank = rank
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        distributed.join(rank, ranks, store, start, timeout)
        pipe.send(self.connection, ("joined",))

    def do_link(self, peers: tuple[int, int]) -> None:
        """Measures the link between two ranks."""
        found = distributed.measure_link(peers) if self.rank in peers else None
        pipe.send(self.connection, ("link", found))

    def do_load(
        self,
        program: str,
        segments: dict[str, Any],
        weights: str,
        options: dict[str, Any],
        limit: float | None,
    ) -> None:
        """Compiles this rank's segments and loads their weights."""
        plan = RankProgram.from_json(program)
        part = Part(
            plan, segments, Checkpoint(weights) if weights else _Nothing(), Options(**options),
            torch.device("cpu"), limit,
        )  # fmt: skip
        self.part = part
        self.player = Player(
            plan, part.runs, distributed.Group(), turns=self.turns, empty=part.arena.empty
        )
        remarks = [r for run in part.runs.values() for r in run.remarks]
        pipe.send(self.connection, ("loaded", part.memory, remarks))

    def do_feed(self, inputs: dict[str, Any]) -> None:
        """Plays a period with a new batch."""
        assert self.player is not None
        self._answer(self.player.feed(unpack(inputs)))

    def do_drain(self) -> None:
        """Plays until all batches are done."""
        assert self.player is not None
        while self.player.busy:
            self._answer(self.player.drain())

    def do_memory(self) -> None:
        """Tells what memory was used."""
        assert self.part is not None
        pipe.send(self.connection, ("memory", self.part.watch()))

    def _answer(self, done: list[tuple[int, dict[str, torch.Tensor]]]) -> None:
        assert self.player is not None
        for number, results in done if self.player.program.results else ():
            pipe.send(self.connection, ("result", number, pack(results)))


class _Nothing:
    """The source of a rank that has no weights."""

    def get(self, name: str, row: int | slice | None = None) -> torch.Tensor:
        """See `Source.get`."""
        raise KeyError(name)


def main() -> None:
    """Serves the pipe whose descriptor is the only argument."""
    end, *turns = map(int, sys.argv[1:])
    Worker(Connection(end), Turns(*turns) if turns else None).serve()


if __name__ == "__main__":
    main()
