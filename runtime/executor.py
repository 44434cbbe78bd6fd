"""Runs a Plan on the CPU.

For each distinct set of symbol values and thread count a plan is *instantiated* once: sizes become
numbers, segments of kernel steps become launch tables. An instance hands out workspaces, one per
call in flight, so any number of Python threads may call at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from . import driver, library
from .bank import Bank
from .counts import Counts
from .fetching import Wanted, beside, fetching_of
from .host import Part, Recorder
from .instance import Instance
from .plan import BranchStep, KernelStep, LibraryStep, Plan, PlanError, check_guards
from .sizes import evaluate
from .tier import Tier
from .workspace import Arena

MAX_INSTANCES = 64

_threads = torch.get_num_threads


class Executor:
    """A plan with its constants and kernels, ready to run.

    ``constants`` maps names to prepared tensors, ``functions`` kernel hashes to addresses,
    ``calls`` names of library targets that are not operators (subgraphs) to callables, ``parts``
    the plan's parts to executors. ``keep`` holds what must stay alive, such as loaded libraries.
    ``banks`` are those constants that lie on the slower tier ``tier``; those that the plan calls
    ``fetched`` are the caller's to fetch.
    """

    instance_type: ClassVar[type[Instance]] = Instance

    def __init__(
        self,
        plan: Plan,
        constants: Mapping[str, torch.Tensor],
        functions: Mapping[str, int],
        calls: Mapping[str, Callable[..., Any]] | None = None,
        keep: Any = None,
        parts: Mapping[str, Part] | None = None,
        tier: Tier | None = None,
        banks: Mapping[str, Bank] | None = None,
    ) -> None:
        self.plan = plan
        self.tier, self.banks = tier, dict(banks or {})
        self.parts = dict(parts or {})
        self.constants = dict(constants)
        self.functions = dict(functions)
        self.keep = keep
        self.calls = dict(calls or {})
        missing = {s.kernel for s in plan.steps if isinstance(s, KernelStep)} - set(functions)
        if missing:
            raise PlanError(f"{len(missing)} kernels of the plan are not loaded: compile again")
        self.counts = Counts(self.parts)
        """How often each part ran, and of a plan for a number of rows how often its branch had too
        few (``missed``) or more (``spilled``).
        """
        self.inside = 0
        """How many calls ran all within one launch, with branches or fetches."""
        self.recorder: Recorder | None = None
        self.arena: Arena | None = None
        if {*plan.parts, *plan.deferred} - self.parts.keys():
            raise PlanError("parts of the plan are not compiled: compile again")
        for buffer in plan.buffers.values():
            if buffer.kind == "const" and buffer.name not in self.constants:
                raise PlanError(f"constant {buffer.name!r} of the plan is missing")
        self.targets = {
            s.target: self.calls.get(s.target) or library.resolve(s.target)
            for s in plan.steps
            if isinstance(s, LibraryStep)
        }
        if set(plan.fetched) - self.banks.keys():
            raise PlanError("weights of the plan on a slower tier are missing: compile again")
        self.fetching = fetching_of(plan, tier, self.banks, self.parts)
        inner = 0 if tier is None else beside(plan, self.banks, self.parts)
        self._wanted = Wanted(tuple(self.banks[name] for name in plan.fetched), inner)
        self._symbols = list(plan.symbols.items())
        self._instances: OrderedDict[tuple[int, ...], Instance] = OrderedDict()
        self.launch = driver.launch_function()

    def share(self, arena: Arena) -> None:
        """Lets calls work in ``arena``, whose lock each of them must hold; parts keep their own
        memory, for they run within. The plan's sizes must be numbers.
        """
        arena.reserve(evaluate(self.plan.arena_bytes, {}))
        self.arena = arena
        self._instances.clear()

    def observe(self, recorder: Recorder) -> None:
        """Tells ``recorder`` of every `BranchStep` that runs, here and in parts."""
        self.recorder = recorder
        for part in self.parts.values():
            part.observe(recorder)

    def wants(self, make: bool = True) -> Wanted:
        """The weights of a slower tier that whoever runs it must fetch."""
        return self._wanted

    def apart(self) -> list[str]:
        """Why calls with branches or fetches are more than one launch."""
        reasons = (instance.apart for instance in list(self._instances.values()))
        return list(dict.fromkeys(filter(None, reasons)))

    def visits(self) -> list[str]:
        """How often each branch ran, as lines of text."""
        lines = []
        if self.inside:
            lines.append(f"{self.inside} calls ran all within one launch")
        sized = {n for s in self.plan.steps if isinstance(s, BranchStep) for _, n in s.sized}
        for name in self.parts:
            count = self.counts["taken", name]
            miss = ": a bet lost" if count and name in self.plan.deferred else ""
            state = " (deferred)" if name in self.plan.deferred else ""
            if name in sized:
                missed, spilled = self.counts["missed", name], self.counts["spilled", name]
                state = f" (a bet: {count} hits, {spilled} of them with spills, {missed} misses)"
            lines.append(f"{name} ran {count} times{state}{miss}")
            lines += [f"  {line}" for line in self.parts[name].visits()]
        return lines

    def run(
        self, tensors: Sequence[torch.Tensor], into: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Runs on flat inputs; returns flat outputs. Inputs must match the plan's ranks and dtypes.

        The only result of a plan is written to ``into`` (contiguous) where that is given. Raises
        ValueError when a guard on the sizes does not hold.
        """
        if self._symbols:
            key = (_threads(), *[tensors[i].shape[d] for _, (i, d) in self._symbols])
        else:
            key = (_threads(),)
        instance = self._instances.get(key)
        if instance is None:
            instance = self._instantiate(key)
        return instance.run(tensors) if into is None else instance.run_into(tensors, into)

    def made(self) -> Executor:
        """See `Part.made`."""
        return self

    def instance(self, shapes: Sequence[Sequence[int]], threads: int) -> Instance:
        """The plan for inputs of these shapes. Raises ValueError as `run` does."""
        key = (threads, *[shapes[i][d] for _, (i, d) in self._symbols])
        return self._instances.get(key) or self._instantiate(key)

    def _instantiate(self, key: tuple[int, ...]) -> Instance:
        threads, *sizes = key
        values = dict(zip((name for name, _ in self._symbols), sizes, strict=True))
        message = check_guards(self.plan, values)
        if message:
            raise ValueError(message)
        instance = self.instance_type(self, values, threads)
        self._instances[key] = instance
        while len(self._instances) > MAX_INSTANCES:
            self._instances.popitem(last=False)
        return instance
