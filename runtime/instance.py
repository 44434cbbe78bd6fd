"""A plan with numbers for sizes at work: launches, branches and library operators of its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from . import library
from .host import Host, Hosted
from .plan import BranchStep, FetchStep, LibraryStep, TensorRef
from .sizes import evaluate
from .spans import ITEMSIZE
from .whole import Whole, refusal
from .workspace import Workspace


def _slow_empty(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


# Inductor's entry point, a third of the time of torch.empty_strided: it parses no keywords.
_empty: Callable[..., torch.Tensor] = getattr(
    torch._C._dynamo.guards, "_empty_strided_cpu", _slow_empty
)


class Instance(Hosted):
    """A plan with its symbols bound, and the memory of its calls in flight."""

    def __init__(
        self,
        executor: Host,
        values: Mapping[str, int],
        workers: int,
        stamped: bool = False,
    ) -> None:
        super().__init__(executor, values, workers, stamped)
        self._slots = [slot for slot, _ in self.inputs]
        self._made = [(slot, tuple(geometry)) for slot, _, *geometry in self.fresh]
        self._empty = _empty if executor.arena is None else executor.arena.empty
        self._launch = executor.launch
        self._free: list[Workspace] = []
        self._branches = any(isinstance(s, BranchStep | FetchStep) for s in self.segments)
        self.apart = refusal(self) if self._branches else ""
        """Why branches or fetches make it more than one launch, "" if they do not."""
        self.on_step = None

    @property
    def on_step(self) -> Callable[[], None] | None:
        """Called after every segment, for profiling."""
        return self._on_step

    @on_step.setter
    def on_step(self, call: Callable[[], None] | None) -> None:
        self._on_step = call
        # One input, one result, one launch: worth a path without loops.
        self._inside = self._branches and not (self.apart or self.stamped) and call is None
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
            out = self._empty(shape, strides, dtype)
            ext[slot] = out.data_ptr()
            self._launch(workspace.launches[0], workspace.ext_address)
            self._free.append(workspace)
            return [out]
        held = list(tensors)
        for k, slot in enumerate(self._slots):
            if slot >= 0:
                if not held[k].is_contiguous():
                    held[k] = held[k].contiguous()
                ext[slot] = held[k].data_ptr()
        fresh = []
        for slot, geometry in self._made:
            out = self._empty(*geometry)
            ext[slot] = out.data_ptr()
            fresh.append(out)
        if self.simple and self.on_step is None:
            for address in workspace.launches:
                self._launch(address, workspace.ext_address)
            self._free.append(workspace)
            return fresh
        fetching = self.executor.fetching
        with nullcontext() if fetching is None else fetching.tier.using():
            if self._inside and self._run_inside(workspace):
                if not self.direct:
                    fresh = self._outputs(workspace, self._live(held, fresh))
                self._free.append(workspace)
                return fresh
            return self._run_mixed(workspace, held, fresh)

    def _run_inside(self, workspace: Workspace) -> bool:
        """Runs everything as one launch; False where that cannot be."""
        fetching = self.executor.fetching
        residency = None if fetching is None else fetching.tier.within()
        if fetching is not None and residency is None:
            return False
        if workspace.whole is None or not workspace.whole.fits():
            workspace.whole = Whole(self, workspace, residency)
        done = workspace.whole.run()
        if fetching is not None:
            done = fetching.tier.fetched() and done
        if done:
            self.executor.inside += 1
        elif workspace.whole.refused:
            self.apart, self._inside = workspace.whole.refused, False
            for other in (workspace, *self._free):
                other.whole = None
        return done

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
        inputs: Sequence[torch.Tensor],
        fresh: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        live = self._live(inputs, fresh)
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
        outputs = self._outputs(workspace, live)
        self._free.append(workspace)
        return outputs

    def _live(
        self, inputs: Sequence[torch.Tensor], fresh: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What a call brings, by buffer."""
        live = {name: tensor for (_, name), tensor in zip(self.inputs, inputs, strict=True)}
        live |= {name: tensor for (_, name, *_), tensor in zip(self.fresh, fresh, strict=True)}
        return live

    def _outputs(
        self, workspace: Workspace, live: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """The results, which may be parts of each other, of inputs or of constants."""
        return [self._view(workspace, ref, live) for ref in self.plan.outputs]

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
        if fetching is None:
            run(0, len(step.plans))
        else:
            fetching.run_branches(step, offsets, run)

    def _run_side(
        self, name: str, operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
    ) -> None:
        """Runs a side of a `torch.cond`."""
        self.executor.counts.add("taken", name)
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
                self.executor.counts.add("taken", name)
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
            self.executor.counts.add("missed", name)
            return begin
        middle = begin + count
        self.executor.counts.add("taken", name)
        self.executor.parts[name].run([rows[begin:middle], *others], into=result[begin:middle])
        self.executor.counts.add("spilled", name, middle < end)
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
        results = self.executor.targets[step.target](*args, **kwargs)
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
        once = tuple(slice(1) if w == 0 else slice(None) for w in strides)  # of expanded dimensions
        planned[once].copy_(result[once])
        return planned

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
