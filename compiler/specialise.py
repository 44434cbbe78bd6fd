"""Captures a call and compiles it, with those dimensions open that have been seen to vary."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..passes.remarks import Remark
from ..runtime import forked
from .build import build, gpu_of, store_at
from .capture.arguments import argument_names, positional, tensor_names
from .capture.captured import Captured
from .capture.dynamic import Declared, opening
from .capture.export import EXCLUSIVE, capture
from .capture.limits import SizeError
from .capture.tree import flatten_call
from .errors import BudgetError, CaptureError, ChangeError, PlaitError, interrupted, summary
from .guards.quick import limits
from .guards.watch import Stamps
from .modes import plain_modes
from .notes import Notes
from .options import Executable, Options
from .program import Program

if TYPE_CHECKING:
    from .weights.budget import WeightStore

DEBUG = "PLAIT_DEBUG"
"""Environment variable: errors of code generation are raised instead of being remarked on."""

DECIDABLE = ("PLT-CAP-001", "PLT-CAP-006", "PLT-CAP-011", "PLT-CAP-012")
"""Refusals that there may be no reason for where values are known."""
MAX_UNUSED = 4
"""Programs for values in a row that only the call ran that they were made for, before it ends."""


@dataclass
class Bucket:
    """Programs for one structure of arguments, and the shapes it was called with."""

    programs: list[Program] = field(default_factory=list)
    seen: list[list[torch.Size]] = field(default_factory=list)
    closed: list[Any] = field(default_factory=list)  # dimensions that could not be left open
    stuck: frozenset[tuple[int, int]] = frozenset()  # those that were to blame
    hopeless: bool = False
    decides: bool = False  # whether programs are for values of arguments

    def fickle(self) -> bool:
        """Whether values decide anew at every call, so that programs serve for one each."""
        latest = self.programs[-MAX_UNUSED:] if self.decides else []
        return len(latest) == MAX_UNUSED and all(p.calls <= 1 for p in latest)


class Refused(Exception):
    """A call that was not captured. ``bucket`` is its structure's, for which that is final."""

    def __init__(self, error: CaptureError, bucket: Bucket | None = None) -> None:
        super().__init__(str(error))
        self.error, self.bucket = error, bucket
        self.settles = isinstance(error, ChangeError) or error.remark == "PLT-CAP-020"
        """Whether there may be nothing wrong any more once the original ran."""


class Specialiser:
    """Makes programs of ``target``. What it says goes to ``notes``; ``store`` keeps the weights
    where there is a budget for them, of a loaded program that which they were read into.
    """

    def __init__(
        self,
        target: Callable[..., Any] | None,
        options: Options,
        signature: inspect.Signature | None,
        notes: Notes,
        store: WeightStore | None,
        modules: Sequence[Any],
    ) -> None:
        self.target, self.options, self.signature = target, options, signature
        self.notes, self.store, self.modules = notes, store, modules
        self._unlock()
        forked.in_child(self._unlock)

    def _unlock(self) -> None:
        self.tracing = threading.RLock()
        """Held while a trace has stand-ins for weights: others wait to run the model."""

    def specialise(
        self,
        bucket: Bucket,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        declared: Sequence[Declared],
        automatic: Sequence[dict[int, Any]],
    ) -> Program | None:
        """Captures and compiles a call. Raises Refused; None means no code could be generated."""
        names = argument_names(flatten_call((args, kwargs))[1], positional(self.signature))
        stamps = Stamps(t for m in self.modules for t in (*m.parameters(), *m.buffers()))
        while True:
            dims = opening(declared, automatic, bucket.closed, bucket.stuck)
            try:
                with EXCLUSIVE, self.tracing:  # in this order: a trace may run another's original
                    captured = _attempt(bucket, self.target, args, kwargs, dims or None)
                break
            except CaptureError as error:
                if not dims or error.remark != "PLT-CAP-001":
                    raise Refused(error, bucket) from None
                bucket.closed.append(dims)
                if isinstance(cause := error.__cause__, SizeError):
                    bucket.stuck |= cause.places
                self.notes.add("PLT-CAP-004", f"a dimension could not be left open: {error.reason}")
        if dims and any(automatic):
            where = ", ".join(
                f"{n}[{d}]"
                for n, a, left in zip(
                    tensor_names(names, args, kwargs), automatic, dims, strict=True
                )
                for d in a
                if d in left
            )
            if where:
                reason = f"more than one size was seen of {where}"
                self.notes.add("PLT-CAP-002", reason, kind="done")
        self.notes.remarks += [r for r in deciding(captured) if r not in self.notes.remarks]
        return self._compile(captured, stamps)

    def _compile(self, captured: Captured, stamps: Stamps) -> Program | None:
        executable = self.build(captured)
        if executable is None:
            return None
        slow = limits() if self.modules else ""
        if slow:
            reason = f"changes of {slow} cannot be read from memory, so each is asked at every call"
            self.notes.add("PLT-CAP-022", reason, kind="note")
        program = Program(captured, executable, self.modules, stamps)
        if program.watch is not None and program.watch.uncounted:
            self.notes.add(
                "PLT-CAP-028",
                "torch counts no changes of weights that were made in inference mode, so only some "
                "of their elements are compared before a call",
                "make or load the model outside of torch.inference_mode()",
                "note",
            )
        return program

    def renew(self, program: Program) -> bool:
        """Prepares a program again from other weights; False where that fails."""
        self.forget_weights()
        executable = self.build(program.captured)
        if executable is not None:
            program.executable = executable
            program.ready()
        return executable is not None

    def forget_weights(self) -> None:
        """What is kept of weights may be of others by now."""
        if self.store is not None:
            self.store.forget()

    def build(self, captured: Captured) -> Executable | None:
        """The executable, or None (said) where code generation fails: the original still runs."""
        try:
            if self.store is None:
                return build(captured, self.options)
            device = gpu_of(captured)
            if device is not None and self.target is None:
                reason = "weights of a loaded program on a GPU are not kept to a budget"
                self.notes.say("PLT-PRE-010", reason, "leave out weight_budget, or use the CPU")
                return None
            self.store = store_at(self.store, device)
            with plain_modes(), self.store.moved(captured, self.modules) as stuck:
                if stuck:
                    self.notes.say(
                        "PLT-PRE-008",
                        f"{stuck / 2**20:.1f} MiB of weights were made in inference mode: the "
                        "model's own copy stays in memory, beside the budget",
                        "make or load the model outside of torch.inference_mode()",
                    )
                made = build(captured, self.options, self.store)
                self.store.lenient = True  # a call must not end because of the next program
                return made
        except BudgetError as error:
            if self.target is None or self.store is None or not self.store.lenient:
                raise
            self.notes.say("PLT-PRE-009", f"{error.reason}; the original runs", error.hint)
            return None
        except PlaitError:
            raise
        except Exception as error:
            if interrupted(error):
                raise KeyboardInterrupt from error
            if os.environ.get(DEBUG):
                raise
            self.notes.say(
                "PLT-CAP-015",
                f"code generation failed ({summary(error)}); the original runs",
                f"set {DEBUG}=1 to raise the error instead",
            )
            return None


def _attempt(bucket: Bucket, *call: Any) -> Captured:
    """The graph of a call; where it depends on values, the one for those at hand.

    Raises CaptureError.
    """
    if bucket.decides:
        return capture(*call, decide=True)
    captured = captured_call(*call)
    bucket.decides = captured.decisions is not None
    return captured


def deciding(captured: Captured) -> list[Remark]:
    """What to say of a program that is for some values of its arguments only."""
    if captured.decisions is None:
        return []
    count = len(captured.decisions)
    reason = f"{count} values that arguments tell decide; others get their own program"
    return [Remark("PLT-CAP-023", "note", "capture", (), reason)]


def captured_call(*call: Any) -> Captured:
    """`capture` of a call; where that depends on values, for those at hand.

    Raises CaptureError.
    """
    try:
        return capture(*call)
    except CaptureError as error:
        # What `limits` ends is too much for any values.
        if error.remark not in DECIDABLE or isinstance(error.__cause__, NotImplementedError):
            raise
        failure = error
    try:
        return capture(*call, decide=True)
    except ChangeError:
        raise
    except CaptureError:
        raise failure from None
