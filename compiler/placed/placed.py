"""`Placed`: what `plait.compile(model, devices=...)` returns, and the three ways it runs."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...passes.placement.placement import Placement
from ...passes.remarks import Remark, render
from ..capture.arguments import as_call, canonical, canonical_tree, is_wrapped, signature_of
from ..capture.captured import check_tensors
from ..capture.state import Given
from ..capture.tree import flatten, unflatten
from ..errors import InputError
from ..guards.keys import FLOATS
from ..options import Options
from .capture import check_plain
from .device import Device
from .engines import Engine, InlineEngine, LocalEngine, Model, Tensors
from .options import Here, PlacementOptions, devices_here
from .part import DistributedError, Memory, check_range
from .plan import Division


class Placed:
    """A model divided among devices. Calling it gives the original's result.

    It is divided at the first call, or right away with ``example_inputs``, for the shapes of that
    call and its other arguments by value; other shapes raise InputError. Weights are copied: what
    changes in the original afterwards is not seen. Results carry no gradients. One call runs at a
    time; `map` keeps several batches in flight. `close` (or a ``with`` block) ends processes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        devices: str | Sequence[Device | str],
        placement: PlacementOptions,
        options: Options,
    ) -> None:
        self.original, self.options = model, options
        self.placement_options = placement
        self.devices: list[Here] = devices_here(devices)
        self._signature = signature_of(model)
        self._engine: Engine | None = None
        self._ran = False
        # No RLock: an iterator of `map` may be closed by another thread than began it, by garbage
        # collection for one.
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread that began what holds the lock

    # -- calling --------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result. Raises InputError for arguments that it was not divided for, and
        DistributedError where a rank fails, after which nothing runs any more; only where the very
        first call fails in processes started here does the next one divide the model again.
        """
        with self._alone():
            (result,) = self._stream([(args, kwargs)])
            return result

    def map(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Results of batches in order: each a tuple of positional or a dict of keyword arguments,
        or one argument. As many batches are in flight as the pipeline has stages; where ranks are
        processes, nothing else runs until all results are taken or the iterator is closed.
        """
        with self._alone():
            yield from self._stream(as_call(batch) for batch in batches)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for other threads' calls. Raises DistributedError where this thread has results of
        `map` still to come, and ranks are at work on them: what they send next belongs to those.
        """
        if not self._lock.acquire(blocking=False):
            gc.collect()  # an iterator that nobody can reach any more may hold it
            if not self._lock.acquire(blocking=self._owner != threading.get_ident()):
                if not isinstance(self._engine, InlineEngine):
                    raise DistributedError(
                        "PLT-DST-011", "not all results of map have been taken",
                        "take them, or close() the iterator",
                    )  # fmt: skip
                yield  # batches in one process are done one by one, whoever asks
                return
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()

    def _stream(self, calls: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]) -> Iterator[Any]:
        calls = iter(calls)
        first = next(calls, None)
        if first is None:
            return
        self._divide(*first)
        engine = self._engine
        assert engine is not None

        def given() -> Iterator[Tensors]:
            yield self._inputs(*first)
            for args, kwargs in calls:
                yield self._inputs(args, kwargs)

        kept: list[Tensors] = []  # batches whose inputs are results too

        def noted() -> Iterator[Tensors]:
            for inputs in given():
                kept.append(inputs)
                yield inputs

        try:
            for results in engine.stream(noted()):
                self._ran = True
                yield self._result({**kept.pop(0), **results})
        except DistributedError:
            # The arguments that it was divided for may be at fault: others divide it anew.
            if not self._ran and isinstance(engine, LocalEngine):
                self._engine = None
            raise

    def prepare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Placed:
        """Divides the model for these arguments, once. Returns itself."""
        if self._engine is None:
            with self._alone():
                self._divide(args, kwargs)
        return self

    def _divide(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self._engine is not None:
            return
        as_given = is_wrapped(self.original)
        args, kwargs, _ = canonical(self._signature, tuple(args), dict(kwargs), as_given)
        engines: dict[str, Any] = {"inline": InlineEngine, "processes": LocalEngine}
        how = self.placement_options.how()
        if how == "torchrun":
            from .spmd import SpmdEngine

            engines["torchrun"] = SpmdEngine
        model = Model(self.original, self.devices, self.placement_options, self.options)
        self._engine = engines[how](model, args, kwargs)

    def _inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensors:
        """A call's tensors by name. Raises InputError where they are not as compiled for."""
        division = self.division
        captured = division.call
        args, kwargs, _ = canonical(self._signature, tuple(args), dict(kwargs))
        leaves, tree = flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        fixed = [None if isinstance(x, torch.Tensor) else (x,) for x in leaves]
        known = canonical_tree(self._signature, captured.in_tree)
        if tree != known or not _same(fixed, captured.in_leaves):
            raise InputError(
                "PLT-INP-001", "arguments differ from those that the model was divided for",
                f"it takes ({captured.signature()})",
            )  # fmt: skip
        wrong = check_tensors(captured, tensors)
        if wrong:
            text = "; ".join(f"argument {n!r}: {why}" for n, why in wrong.items())
            raise InputError("PLT-INP-002", text, "compile the model again for other sizes")
        check_plain(tensors)
        for check in division.checks:
            check_range(captured.inputs[check.input].name, check, tensors[check.input])
        return dict(zip(division.names, [t.detach() for t in tensors], strict=True))

    def _result(self, values: Tensors) -> Any:
        division = self.division

        def leaf(x: Any) -> Any:
            if type(x) is int:
                return values[division.results[x]].to(captured_device)
            return values[division.names[x.number]] if type(x) is Given else x[0]

        captured = division.call
        return unflatten(captured.out_tree, [leaf(x) for x in captured.out_leaves])

    # -- looking at it --------------------------------------------------------------------------

    @property
    def division(self) -> Division:
        """Graphs, problem, placement and programs. Raises InputError before the first call."""
        if self._engine is None:
            raise InputError("PLT-DST-011", "nothing is divided yet", "call the model first")
        return self._engine.division

    @property
    def placement(self) -> Placement:
        """Where each unit runs; its report has makespan, bound, gap and planned peaks."""
        return self.division.placement

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What was done, or not done and why."""
        return () if self._engine is None else tuple(self._engine.division.remarks)

    def memory(self) -> list[Memory]:
        """Bytes of each rank's process: base, after loading, peak; empty when run inline."""
        with self._alone():
            return [] if self._engine is None else self._engine.memory()

    def explain(self) -> str:
        """A text for people: the prediction, what each rank runs, and remarks."""
        if self._engine is None:
            return "nothing divided yet: the first call divides"
        division = self.division
        what = "result" if self.placement_options.objective == "throughput" else "step"
        lines = [f"predicted: {division.predicted_s * 1e3:.3g} ms a {what}"]
        planned = zip(division.planned_bytes, division.flight_bytes, strict=True)
        for device, program, (most, flight) in zip(
            self.devices, division.programs, planned, strict=True
        ):
            lines.append(
                f"{device.placed.device.name} on {device.torch}: {most / 1e6:.1f} MB planned, "
                f"{flight / 1e6:.1f} MB of that for batches in flight"
            )
            lines += [f"  {line}" for line in str(program).splitlines()]
        return "\n".join([*lines, render(self.remarks)])

    def close(self) -> None:
        """Ends the processes that were started for it."""
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> Placed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(d.placed.device.name for d in self.devices)
        return f"Placed({type(self.original).__name__} on {names})"


captured_device = torch.device("cpu")
"""Models are captured on the CPU, so that is where their results are."""


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether leaves of calls are equal; 0.0 and -0.0 differ, nan equals itself."""
    key = [(type(x[0]), repr(x[0]) if isinstance(x[0], FLOATS) else x[0]) if x else x for x in a]
    other = [(type(x[0]), repr(x[0]) if isinstance(x[0], FLOATS) else x[0]) if x else x for x in b]
    return key == other
