"""A plan whose sizes are numbers: what follows from these alone, before there is memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .plan import BranchStep, Buffer, FetchStep, KernelStep, LibraryStep, Plan, PlanError, TensorRef
from .sizes import evaluate
from .spans import ITEMSIZE, Span, span_of


class Bound:
    """A plan with its symbols bound to ``values``, for ``workers`` threads. A ``stamped`` one notes
    when each part of a kernel ran.

    `segments` are steps of other kinds, and between them lists of kernels that are one launch.
    `ext` numbers the buffers whose memory each call brings.
    """

    def __init__(
        self, plan: Plan, values: Mapping[str, int], workers: int, stamped: bool = False
    ) -> None:
        self.plan, self.values, self.workers, self.stamped = plan, values, workers, stamped
        self.segments: list[list[KernelStep] | LibraryStep | BranchStep | FetchStep] = []
        for step in plan.steps:
            if not isinstance(step, KernelStep):
                self.segments.append(step)
            elif self.segments and isinstance(self.segments[-1], list):
                self.segments[-1].append(step)
            else:
                self.segments.append([step])
        self.ext: dict[str, int] = {}
        for buffer in plan.buffers.values():
            if buffer.kind in ("input", "output", "library"):
                self.ext[buffer.name] = len(self.ext)
        self.windows = False
        """Whether an output shows only a part of its buffer."""
        self.inputs = [(self.ext.get(ref.buffer, -1), ref.buffer) for ref in plan.inputs]
        """Of each input its number in `ext`, -1 for none, and its buffer."""
        self.fresh = [
            (self.ext[b.name], b.name, *self._fresh_spec(b))
            for b in plan.buffers.values()
            if b.kind == "output"
        ]
        """Of each buffer of outputs its number in `ext`, its name, shape, strides and type."""
        self.direct = (
            not self.windows
            and [r.buffer for r in plan.outputs] == [name for _, name, *_ in self.fresh]
            and all(
                self.geometry(r) == (f[2], f[3])
                for r, f in zip(plan.outputs, self.fresh, strict=True)
            )
        )
        """Whether every output is its own fresh tensor."""
        self.simple = self.direct and all(isinstance(s, list) for s in self.segments)
        """The common case: besides, all steps are kernels."""

    def _fresh_spec(self, buffer: Buffer) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
        """Shape, strides and type of a fresh buffer: those of an output that is all of it, else
        flat.
        """
        refs = [r for r in self.plan.outputs if r.buffer == buffer.name]
        nbytes = evaluate(buffer.nbytes, self.values)
        for ref in refs:
            shape, strides = self.geometry(ref)
            if evaluate(ref.offset, self.values) == 0:
                if math.prod(shape) * ITEMSIZE[ref.dtype] == nbytes and ref.dtype:
                    return shape, strides, getattr(torch, ref.dtype)
        if not refs:
            raise PlanError(f"output buffer {buffer.name!r} is not part of any output")
        self.windows = True
        return (nbytes // ITEMSIZE[refs[0].dtype],), (1,), getattr(torch, refs[0].dtype)

    def geometry(self, ref: TensorRef) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (
            tuple(evaluate(d, self.values) for d in ref.shape),
            tuple(evaluate(s, self.values) for s in ref.strides),
        )

    def span(self, ref: TensorRef) -> Span:
        buffer = self.plan.buffers[ref.buffer]
        if buffer.kind == "arena":
            return span_of(ref, "arena", evaluate(buffer.offset, self.values), self.values)
        return span_of(ref, buffer.name, 0, self.values)
