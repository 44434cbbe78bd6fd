"""Runs a Plan on the CPU.

For each distinct set of symbol values and thread count a plan is *instantiated* once: sizes become
numbers, segments of kernel steps become launch tables. An instance hands out workspaces, one per
call in flight, so any number of Python threads may call at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from . import driver, library
from .bank import Bank
from .bound import Bound
from .fetching import Wanted, beside, fetching_of
from .plan import (
    BranchStep,
    FetchStep,
    KernelStep,
    LibraryStep,
    Plan,
    PlanError,
    TensorRef,
    check_guards,
)
from .sizes import evaluate
from .spans import ITEMSIZE
from .tier import Tier
from .workspace import Arena, Workspace

MAX_INSTANCES = 64

_threads = torch.get_num_threads


def _slow_empty(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


# Inductor's entry point, a third of the time of torch.empty_strided: it parses no keywords.
_empty: Callable[..., torch.Tensor] = getattr(
    torch._C._dynamo.guards, "_empty_strided_cpu", _slow_empty
)


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

    def run(
        self, tensors: Sequence[torch.Tensor], into: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """See `Executor.run`."""
        ...


class Executor:
    """A plan with its constants and kernels, ready to run.

    ``constants`` maps names to prepared tensors, ``functions`` kernel hashes to addresses,
    ``calls`` names of library targets that are not operators (subgraphs) to callables, ``parts``
    the plan's parts to executors. ``keep`` holds what must stay alive, such as loaded libraries.
    ``banks`` are those constants that lie on the slower tier ``tier``; those that the plan calls
    ``fetched`` are the caller's to fetch.
    """

    instance_type: ClassVar[type[Instance]]

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
        self.taken = dict.fromkeys(self.parts, 0)
        """How often each part has run."""
        sized = [n for s in plan.steps if isinstance(s, BranchStep) for _, n in s.sized if n]
        self.missed = dict.fromkeys(sized, 0)
        """How often a branch had too few rows for the plan that it has for a number of them."""
        self.spilled = dict.fromkeys(sized, 0)
        """How often it had more."""
        self.recorder: Recorder | None = None
        self.arena: Arena | None = None
        if {*plan.parts, *plan.deferred} - self.parts.keys():
            raise PlanError("parts of the plan are not compiled: compile again")
        for buffer in plan.buffers.values():
            if buffer.kind == "const" and buffer.name not in self.constants:
                raise PlanError(f"constant {buffer.name!r} of the plan is missing")
        self._targets = {
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
        self._launch = driver.launch_function()

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

    def visits(self) -> list[str]:
        """How often each branch ran, as lines of text."""
        lines = []
        for name, count in self.taken.items():
            miss = ": a bet lost" if count and name in self.plan.deferred else ""
            state = " (deferred)" if name in self.plan.deferred else ""
            if name in self.missed:
                missed, spilled = self.missed[name], self.spilled[name]
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


class Instance(Bound):
    """A plan with its symbols bound, and the memory of its calls in flight."""

    def __init__(
        self,
        executor: Executor,
        values: Mapping[str, int],
        workers: int,
        stamped: bool = False,
    ) -> None:
        super().__init__(executor.plan, values, workers, stamped)
        self.executor = executor
        self._slots = [slot for slot, _ in self.inputs]
        self._made = [(slot, tuple(geometry)) for slot, _, *geometry in self.fresh]
        self._launch = executor._launch
        self._free: list[Workspace] = []
        self.on_step = None

    @property
    def on_step(self) -> Callable[[], None] | None:
        """Called after every segment, for profiling."""
        return self._on_step

    @on_step.setter
    def on_step(self, call: Callable[[], None] | None) -> None:
        self._on_step = call
        # One input, one result, one launch: worth a path without loops.
        self._whole = self.only_fetches and call is None and not self.stamped
        counts = (len(self._slots), len(self._made), len(self.segments))
        self._lean = self.simple and call is None and counts == (1, 1, 1) and self._slots[0] >= 0

    def _workspace(self) -> Workspace:
        executor = self.executor
        return Workspace(self, executor.functions, executor.constants, executor.arena)

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = self._workspace()
        ext = workspace.ext
        if self._lean and tensors[0].is_contiguous():
            slot, (shape, strides, dtype) = self._made[0]
            ext[self._slots[0]] = tensors[0].data_ptr()
            out = _empty(shape, strides, dtype)
            ext[slot] = out.data_ptr()
            self._launch(workspace.launches[0], workspace.ext_address)
            self._free.append(workspace)
            return [out]
        held = []
        for slot, tensor in zip(self._slots, tensors, strict=True):
            if slot >= 0:
                if not tensor.is_contiguous():
                    tensor = tensor.contiguous()
                    held.append(tensor)
                ext[slot] = tensor.data_ptr()
        fresh = []
        for slot, geometry in self._made:
            out = _empty(*geometry)
            ext[slot] = out.data_ptr()
            fresh.append(out)
        if self.simple and self.on_step is None:
            for address in workspace.launches:
                self._launch(address, workspace.ext_address)
            self._free.append(workspace)
            return fresh
        if self.executor.fetching is None:
            return self._run_mixed(workspace, tensors, held, fresh)
        with self.executor.fetching.tier.using():
            if self._whole and self.executor.fetching.run_whole(self, workspace):
                self._free.append(workspace)
                return fresh
            return self._run_mixed(workspace, tensors, held, fresh)

    def run_into(self, tensors: Sequence[torch.Tensor], into: torch.Tensor) -> list[torch.Tensor]:
        """`run` with its only result written to ``into``, of the result's shape and contiguous."""
        if not (self._lean and tensors[0].is_contiguous() and into.is_contiguous()):
            (result,) = self.run(tensors)
            return [into.copy_(result)]
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = self._workspace()
        workspace.ext[self._slots[0]] = tensors[0].data_ptr()
        workspace.ext[self._made[0][0]] = into.data_ptr()
        self._launch(workspace.launches[0], workspace.ext_address)
        self._free.append(workspace)
        return [into]

    def _run_mixed(
        self,
        workspace: Workspace,
        tensors: Sequence[torch.Tensor],
        held: list[torch.Tensor],
        fresh: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        live: dict[str, torch.Tensor] = {}
        for (_, name), tensor in zip(self.inputs, tensors, strict=True):
            live[name] = tensor if tensor.is_contiguous() else tensor.contiguous()
        for (_, name, *_), tensor in zip(self.fresh, fresh, strict=True):
            live[name] = tensor
        waves: Callable[[int], None] | None = None  # what was fetched last does not fit at once
        for number, (segment, table) in enumerate(
            zip(self.segments, workspace.tables, strict=True)
        ):
            if isinstance(segment, FetchStep):
                assert self.executor.fetching is not None
                offsets = self._view(workspace, segment.selector, live).numpy()
                waves = self.executor.fetching.fetch(self, workspace, segment, offsets)
            elif table is not None and waves is not None:
                waves(number)
            elif table is not None:
                self._launch(table.address, workspace.ext_address)
            elif isinstance(segment, BranchStep):
                self._run_branches(workspace, segment, number, live)
            else:
                assert isinstance(segment, LibraryStep)
                self._call_library(workspace, segment, number, live)
            if self.on_step is not None:
                self.on_step()
        outputs = [self._view(workspace, ref, live) for ref in self.plan.outputs]
        self._free.append(workspace)
        return outputs

    def _run_branches(
        self, workspace: Workspace, step: BranchStep, number: int, live: dict[str, torch.Tensor]
    ) -> None:
        """Runs the plans of a step that have something to do, in their order."""
        selector, *whole = [
            self._operand(workspace, ref, live, (number, k))
            for k, ref in enumerate((step.selector, *step.refs, *step.results))
        ]
        choice = self._choice(step, selector)
        operands, results = whole[: len(step.refs)], whole[len(step.refs) :]
        if self.executor.recorder is not None:
            self.executor.recorder(step, choice, operands[0].shape[0] if step.kind == "rows" else 1)
        # A `torch.cond` is a router of one row, which goes to its first side or to its second one.
        offsets = choice if step.kind == "rows" else (0, 1, 1) if choice else (0, 0, 1)

        def run(first: int, last: int) -> None:
            if step.kind == "rows":
                self._run_range(first, last, step, offsets, operands, results[0])
            else:  # a single row is never divided
                self._run_side(step.plans[0 if choice else 1], operands, results)

        fetching = self.executor.fetching
        if fetching is None or step.name not in fetching.sites:
            run(0, len(step.plans))
        else:
            fetching.run_branches(step, offsets, run)

    def _run_side(
        self, name: str, operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
    ) -> None:
        """Runs a side of a `torch.cond`."""
        self.executor.taken[name] += 1
        values = self.executor.parts[name].run(operands)
        for result, value in zip(results, values, strict=True):
            result.copy_(value)

    def _run_range(
        self,
        first: int,
        last: int,
        step: BranchStep,
        offsets: Sequence[int],
        operands: Sequence[torch.Tensor],
        result: torch.Tensor,
    ) -> None:
        """Runs branches ``first`` to ``last - 1`` on their rows, where they have any."""
        rows, *others = operands
        for b in range(first, last):
            begin, end = offsets[b], offsets[b + 1]
            if step.sized and step.sized[b][0] and begin < end:
                begin = self._run_sized(step.sized[b], begin, end, rows, others, result)
            if begin < end:
                name = step.plans[b]
                self.executor.taken[name] += 1
                part = self.executor.parts[name]
                part.run([rows[begin:end], *others], into=result[begin:end])

    def _choice(self, step: BranchStep, selector: torch.Tensor) -> Any:
        """Which way a step goes: offsets of the branches' rows, or a truth value."""
        return selector.item() if step.kind == "cond" else selector.tolist()

    def _run_sized(
        self,
        sized: tuple[int, str],
        begin: int,
        end: int,
        rows: torch.Tensor,
        others: Sequence[torch.Tensor],
        result: torch.Tensor,
    ) -> int:
        """Runs the plan for so many rows on the first of a branch's; returns where it stopped."""
        count, name = sized
        if end - begin < count:
            self.executor.missed[name] += 1
            return begin
        middle = begin + count
        self.executor.taken[name] += 1
        self.executor.parts[name].run([rows[begin:middle], *others], into=result[begin:middle])
        self.executor.spilled[name] += middle < end
        return middle

    def _call_library(
        self,
        workspace: Workspace,
        step: LibraryStep,
        number: int,
        live: dict[str, torch.Tensor],
    ) -> None:
        operands = [
            self._operand(workspace, ref, live, (number, k)) for k, ref in enumerate(step.refs)
        ]
        args = library.bind(step.args, operands, self.values)
        kwargs = {k: library.bind(v, operands, self.values) for k, v in step.kwargs.items()}
        results = self.executor._targets[step.target](*args, **kwargs)
        if not isinstance(results, (tuple, list)):
            results = (results,)
        for ref, result in zip(step.results, results, strict=False):
            if ref is None:
                continue
            buffer = self.plan.buffers[ref.buffer]
            if buffer.kind == "library":
                # Others (sparse ones) have no address, and only library operators read them.
                if isinstance(result, torch.Tensor) and result.layout == torch.strided:
                    if workspace.holds(result):
                        result = result.clone()  # a view, of memory that gets other contents
                    result = self._as_planned(result, ref)
                    workspace.ext[self.ext[ref.buffer]] = result.data_ptr()
                live[ref.buffer] = result
            else:
                self._view(workspace, ref, live).copy_(result)

    def _as_planned(self, result: torch.Tensor, ref: TensorRef) -> torch.Tensor:
        """A library result in the strides that the plan promised to its readers."""
        if not ref.strides and not ref.shape and ref.dtype == "":
            return result
        shape, strides = self.geometry(ref)
        if tuple(result.stride()) == strides or result.numel() <= 1:
            return result
        if all(s == w or d == 1 for s, w, d in zip(result.stride(), strides, shape, strict=True)):
            return result
        planned = torch.empty_strided(shape, strides, dtype=result.dtype)
        return planned.copy_(result)

    def _operand(
        self,
        workspace: Workspace,
        ref: TensorRef,
        live: Mapping[str, torch.Tensor],
        key: tuple[int, int],
    ) -> torch.Tensor:
        if ref.buffer in live:
            return self._view(workspace, ref, live)
        view = workspace.views.get(key)
        if view is None:
            view = workspace.views[key] = self._view(workspace, ref, live)
        return view

    def _view(
        self, workspace: Workspace, ref: TensorRef, live: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        base = live.get(ref.buffer)
        if base is not None:
            if not isinstance(base, torch.Tensor) or ref.dtype == "":
                return base
            shape, strides = self.geometry(ref)
            offset = base.storage_offset() + evaluate(ref.offset, self.values)
            if base.dtype != getattr(torch, ref.dtype):
                base = base.view(getattr(torch, ref.dtype))
            if base.shape == shape and base.stride() == strides and base.storage_offset() == offset:
                return base
            return base.as_strided(shape, strides, offset)
        storage = workspace.storage(self.plan.buffers[ref.buffer])
        shape, strides = self.geometry(ref)
        dtype = getattr(torch, ref.dtype)
        if storage.dtype != dtype:
            size = ITEMSIZE[ref.dtype]
            storage = storage[: storage.numel() // size * size].view(dtype)
        offset = storage.storage_offset() + evaluate(ref.offset, self.values)
        return storage.as_strided(shape, strides, offset)


Executor.instance_type = Instance
