"""Runs a plan along routes that are given, whatever its inputs say: to time what routes cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from .executor import Executor
from .host import Part
from .instance import Instance
from .plan import BranchStep

Script = Mapping[str, Sequence[float] | None]
"""For each router where, as shares of all rows, its branches end; None for no rows. Of a
`torch.cond` the share of the first side, 0.0 or 1.0, and after it 1.0."""


class _Scripted(Instance):
    def _choice(self, step: BranchStep, selector: torch.Tensor) -> Any:
        executor = self.executor
        assert isinstance(executor, Rehearsal)
        if step.router not in executor.script:
            return super()._choice(step, selector)
        ends = executor.script[step.router]
        if step.kind == "cond":
            return bool(ends and ends[0] > 0.5)
        count = self.geometry(step.refs[0])[0][0]
        return [0, *(round(e * count) for e in ends or [0.0] * len(step.plans))]

    def routes(self) -> dict[str, Any]:
        executor = self.executor
        assert isinstance(executor, Rehearsal)
        steps = (s for s in self.segments if isinstance(s, BranchStep))
        none = torch.empty(0)
        return {s.name: self._choice(s, none) for s in steps if s.router in executor.script}


class Rehearsal(Executor):
    """An executor whose routers go where ``script`` says; those that it does not name, where their
    cells belong. Its results mean nothing. `script` may be replaced between runs.
    """

    instance_type: ClassVar[type[Instance]] = _Scripted

    def __init__(self, executor: Executor, script: Script) -> None:
        parts: dict[str, Part] = {
            name: Rehearsal(part, script) if isinstance(part, Executor) else part
            for name, part in executor.parts.items()
        }
        super().__init__(
            executor.plan,
            executor.constants,
            executor.functions,
            executor.calls,
            parts=parts,
            tier=executor.tier,
            banks=executor.banks,
        )
        self.script = script

    def play(self, script: Script) -> None:
        """Follow another script from now on."""
        self.script = script
        for part in self.parts.values():
            if isinstance(part, Rehearsal):
                part.play(script)
