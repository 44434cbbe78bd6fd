"""What an executor, its instances and its parts know of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from .bank import Bank
from .bound import Bound
from .counts import Counts
from .fetching import Fetching, Wanted
from .plan import BranchStep, Plan
from .workspace import Arena

Recorder = Callable[[BranchStep, Any, int], None]
"""Told, for every `BranchStep` that runs, which way it went and how many rows it had."""


class Part(Protocol):
    """What runs one of the plans that a `BranchStep` names: an executor, or what becomes one."""

    def visits(self) -> list[str]:
        """See `Executor.visits`."""
        ...

    def observe(self, recorder: Recorder) -> None:
        """See `Executor.observe`."""
        ...

    def wants(self, make: bool = True) -> Wanted | None:
        """The weights of a slower tier that whoever runs it must fetch. Where it is not compiled
        yet it is now, if ``make``, and else they are None.
        """
        ...

    def made(self) -> Host | None:
        """The executor; None where it is not compiled yet."""
        ...

    def run(
        self, tensors: Sequence[torch.Tensor], into: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """See `Executor.run`."""
        ...


class Host(Protocol):
    """What instances read of their executor; see `Executor`."""

    plan: Plan
    constants: dict[str, torch.Tensor]
    functions: dict[str, int]
    targets: dict[str, Callable[..., Any]]
    parts: dict[str, Part]
    counts: Counts
    inside: int
    banks: dict[str, Bank]
    fetching: Fetching | None
    recorder: Recorder | None
    arena: Arena | None
    launch: Callable[[int, int], None]

    def instance(self, shapes: Sequence[Sequence[int]], threads: int) -> Hosted:
        """See `Executor.instance`."""
        ...


class Hosted(Bound):
    """A plan with its symbols bound, of an executor."""

    def __init__(
        self, executor: Host, values: Mapping[str, int], workers: int, stamped: bool = False
    ) -> None:
        super().__init__(executor.plan, values, workers, stamped)
        self.executor = executor

    def routes(self) -> dict[str, Any] | None:
        """Where steps go instead of where the data tells: offsets, or truth values, by step."""
        return None
