"""What runs a lowered plan, with those branches left out that are compiled when they are needed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx

from ..kernels import target as targets
from ..runtime import forked
from ..runtime.executor import Executor
from ..runtime.fetching import Wanted
from ..runtime.host import Part, Recorder
from .capture.export import EXCLUSIVE
from .errors import interrupted, summary
from .lowering import lower, select, subgraphs
from .lowering.least import marked_bytes
from .lowering.lowered import Lowered
from .weights.budget import WeightStore


def assemble(lowered: Lowered, kernels: select.Kernels, store: WeightStore | None) -> Executor:
    """The executor of a lowered plan and of its parts."""
    parts: dict[str, Part] = {
        name: assemble(part, kernels, store) for name, part in lowered.parts.items()
    }
    for name, module in lowered.deferred.items():
        parts[name] = Deferred(name, module, kernels.tune, store)
    return Executor(
        lowered.plan,
        lowered.constants,
        kernels.functions,
        lowered.calls,
        kernels.libraries,
        parts,
        None if store is None else store.tier,
        lowered.banks,
    )


def refusals(part: Any) -> Iterator[tuple[str, str]]:
    """Branches below an executor that could not be compiled when they were needed, and why."""
    if isinstance(part, Deferred) and part.refusal:
        yield part.name, part.refusal
    made = part.made()
    for inner in () if made is None else made.parts.values():
        yield from refusals(inner)


class Deferred:
    """A branch that a bet left out: compiled when a cell first goes there.

    That is in the midst of somebody's call. Where it fails, the branch's operators run one by one,
    and ``refusal`` says why.
    """

    def __init__(
        self, name: str, module: fx.GraphModule, tune: str, store: WeightStore | None
    ) -> None:
        self.name, self.module, self.tune, self.store = name, module, tune, store
        self.refusal = ""
        self._unlock()
        forked.in_child(self._unlock)
        self._executor: Executor | None = None
        self._recorder: Recorder | None = None
        self._tiered = store is not None and marked_bytes(module) > 0

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def observe(self, recorder: Recorder) -> None:
        """See `Executor.observe`."""
        with self._lock:
            self._recorder = recorder
            if self._executor is not None:
                self._executor.observe(recorder)

    def wants(self, make: bool = True) -> Wanted | None:
        """See `Part.wants`."""
        if not self._tiered:
            return Wanted()
        executor = self._compiled() if make else self._executor
        if executor is None:  # without kernels, weights are read where they lie
            return Wanted() if self.refusal else None
        return executor.wants()

    def made(self) -> Executor | None:
        """See `Part.made`."""
        return self._executor

    def visits(self) -> list[str]:
        """See `Executor.visits`."""
        return [] if self._executor is None else self._executor.visits()

    def run(
        self, tensors: Sequence[torch.Tensor], into: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """See `Executor.run`; the first call compiles."""
        executor = self._compiled()
        if executor is not None:
            return executor.run(tensors, into)
        with torch.no_grad():
            results = list(self.module(*tensors))
            return results if into is None else [into.copy_(results[0])]

    def _compiled(self) -> Executor | None:
        with self._lock:
            if self._executor is None and not self.refusal:
                try:
                    self._executor = self._compile()
                except Exception as error:
                    if interrupted(error):
                        raise KeyboardInterrupt from error
                    if os.environ.get("PLAIT_DEBUG"):
                        raise
                    self.refusal = f"code generation failed ({summary(error)})"
        return self._executor

    def _compile(self) -> Executor:
        from ..passes.fuse_vertical import groups_of

        module = self.module
        kernels = select.Kernels(targets.host(), select.database(), self.tune)
        bound = subgraphs.bound_symbols(module)
        with EXCLUSIVE, torch.no_grad():
            groups = groups_of(module)
            lowered = lower.lower(module, groups, kernels, bound, self.name, self.store)
        executor = assemble(lowered, kernels, self.store)
        if self._recorder is not None:
            executor.observe(self._recorder)
        return executor
