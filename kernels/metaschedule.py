"""TVM's MetaSchedule as a source of kernels: search for a schedule of a `Definition`.

The search proposes schedules; each batch of them is turned into kernels (`kernels.scheduled`),
compiled into one library and timed in this process by calling the kernels themselves, on memory
that the caller provides. So what is measured is what will run, and a wrong result counts as a
failure. Records are kept in a directory, from which an interrupted search goes on.

Shao et al., "Tensor Program Optimization with Probabilistic Programs", NeurIPS 2022.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import tvm.tirx as tir
from tvm import s_tir
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from . import build as builder
from . import loader
from .abi import Kernel
from .definition import Definition
from .group import Unsupported
from .race import Candidate, race
from .scheduled import to_kernel
from .target import Target

BATCH = 16
_MOST_ROWS = 16
_MOST_STATEMENTS = 256
_TOO_SLOW = 1e3  # seconds: what the cost model is told of a schedule that failed


@dataclass
class Found:
    """The best kernel of a search (None when every schedule failed) and how the search went.

    ``trials`` counts all of them since the search was first begun; ``failures`` maps the reasons of
    failed ones to how often they came up.
    """

    kernel: Kernel | None
    seconds: float
    trials: int
    failures: dict[str, int] = field(default_factory=dict)


@dataclass
class Bench:
    """How to run a kernel: ``candidate(kernel, address)`` prepares a run of it, ``check`` and
    ``reset`` are those of `race`."""

    candidate: Callable[[Kernel, int], Candidate]
    check: Callable[[], float]
    reset: Callable[[], None]
    tolerance: float


def search(
    definition: Definition,
    target: Target,
    bench: Bench,
    directory: str | Path,
    *,
    name: str = "kernel",
    trials: int = 64,
    seconds: float = math.inf,
    seed: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> Found:
    """Searches a schedule for ``definition`` in ``trials`` measurements or ``seconds``.

    ``directory`` holds the records; trials already in it count. ``progress(trials, best seconds)``
    is called after each batch. The kernel found has ``name`` and a config that tells its schedule.
    Raises ValueError for a negative number of trials.
    """
    if trials < 0:
        raise ValueError(f"the number of trials must not be negative, got {trials}")
    directory = Path(directory)
    session = _Session(definition, target, bench, seconds, progress)
    with _bare():
        database = _open_database(directory)
        session.trials = len(database)
        session.best = _best_seconds(database)
        left = trials - session.trials
        if left > 0 and not session.is_late():
            try:
                context = ms.TuneContext(
                    mod=definition.func,
                    target=target.tvm(),
                    space_generator=_space(definition, target),
                    search_strategy=_strategy(),
                    task_name=name,
                    rand_state=seed,
                    num_threads=1,
                    logger=logging.getLogger(__name__),
                )
                ms.tune.tune_tasks(
                    tasks=[context],
                    task_weights=[1.0],
                    work_dir=str(directory),
                    max_trials_global=left,
                    num_trials_per_iter=min(BATCH, left),
                    builder=_Builder(session),  # type: ignore[arg-type]
                    runner=_Runner(session),  # type: ignore[arg-type]
                    database=database,
                    cost_model=_cost_model(),
                    measure_callbacks=[ms.measure_callback.AddToDatabase()],
                    task_scheduler="round-robin",
                )
            except Exception as error:
                # TVM changes the class of errors that pass through it, KeyboardInterrupt's too.
                if not isinstance(session.raised, _OutOfTime):
                    raise session.raised or error from None
        return session.result(database, name)


class _OutOfTime(Exception):
    """Ends a search early, which MetaSchedule offers no other way to do."""


class _Session:
    """One search: compiles and measures the schedules that MetaSchedule asks for."""

    def __init__(
        self,
        definition: Definition,
        target: Target,
        bench: Bench,
        seconds: float,
        progress: Callable[[int, float], None] | None,
    ) -> None:
        self.definition, self.target, self.bench = definition, target, bench
        self.deadline = time.monotonic() + seconds
        self.progress = progress
        self.trials, self.best = 0, math.inf
        self.raised: BaseException | None = None
        self.failures: dict[str, int] = {}
        self._built: dict[str, tuple[Kernel, loader.Library]] = {}
        self._count = 0

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Keeps what is raised inside, for `search` to raise again."""
        try:
            yield
        except BaseException as error:
            self.raised = error
            raise

    def is_late(self) -> bool:
        """Whether no further batch should begin."""
        return time.monotonic() > self.deadline

    def build(self, modules: Sequence[Any]) -> list[tuple[str | None, str | None]]:
        """(artifact, error) of each schedule; an artifact is the kernel's symbol."""
        if self.is_late():
            raise _OutOfTime
        kernels: list[Kernel | None] = []
        errors: list[str | None] = []
        for module in modules:
            self._count += 1
            try:
                kernel = self.convert(module, f"trial{self._count}", {})
                kernels.append(kernel)
                errors.append(None)
            except Exception as error:  # whatever TVM raises for a schedule it cannot lower
                kernels.append(None)
                errors.append(self._failed(error))
        good = [k for k in kernels if k is not None]
        failed: dict[str, str] = {}
        if good:
            try:
                bundle = builder.build(good, self.target)
                failed, library = bundle.failed, bundle.load()
                self._built.update({k.name: (k, library) for k in good if k.name not in failed})
            except builder.BuildError as error:
                failed = {k.name: str(error) for k in good}
        results: list[tuple[str | None, str | None]] = []
        for kernel, error in zip(kernels, errors, strict=True):
            if kernel is not None and kernel.name in failed:
                error = self._failed(RuntimeError(failed[kernel.name]))
            results.append((None, error) if kernel is None or error else (kernel.name, None))
        return results

    def convert(self, module: Any, name: str, config: dict[str, Any]) -> Kernel:
        """The kernel of a scheduled module."""
        return to_kernel(module["main"], self.definition, self.target, name, config)

    def measure(self, artifact: str) -> tuple[float | None, str | None]:
        """(seconds, error) of a compiled schedule."""
        kernel, library = self._built.pop(artifact)
        bench = self.bench
        (result,) = race(
            [bench.candidate(kernel, library.address(artifact))],
            check=bench.check,
            tolerance=bench.tolerance,
            reset=bench.reset,
            rounds=5,
            budget=1.0,
        )
        if result.seconds is None:
            return None, self._failed(RuntimeError(result.note))
        self.best = min(self.best, result.seconds)
        return result.seconds, None

    def finish_batch(self, count: int) -> None:
        self.trials += count
        if self.progress is not None:
            self.progress(self.trials, self.best)

    def _failed(self, error: Exception) -> str:
        text = str(error) if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}"
        reason = text.strip().splitlines()[0][:120]
        self.failures[reason] = self.failures.get(reason, 0) + 1
        return text

    def result(self, database: Any, name: str) -> Found:
        """The fastest record that still is a kernel."""
        records = list(database.get_all_tuning_records())
        records.sort(key=_seconds)
        for record in records[:5]:
            seconds = _seconds(record)
            if seconds >= _TOO_SLOW:
                break
            try:
                schedule = s_tir.Schedule(self.definition.func)
                record.trace.apply_to_schedule(schedule, remove_postproc=False)
                config = {"source": "metaschedule", "tiles": _decisions(record.trace)}
                kernel = self.convert(schedule.mod, name, config)
            except Exception as error:  # a record of another TVM, or of an edited definition
                self._failed(error)
                continue
            return Found(kernel, seconds, len(records), self.failures)
        return Found(None, math.inf, len(records), self.failures)


@derived_object
class _Builder(ms.builder.PyBuilder):
    def __init__(self, session: _Session) -> None:
        super().__init__()
        self._session = session

    def build(self, build_inputs: list[Any]) -> list[Any]:
        with self._session.remembered():
            results = self._session.build([i.mod for i in build_inputs])
        return [ms.builder.BuilderResult(artifact, error) for artifact, error in results]


@derived_object
class _Runner(ms.runner.PyRunner):
    def __init__(self, session: _Session) -> None:
        super().__init__()
        self._session = session

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        with self._session.remembered():
            futures = []
            for task in runner_inputs:
                seconds, error = self._session.measure(str(task.artifact_path))
                runs = [seconds] if seconds is not None else None
                futures.append(_Done(ms.runner.RunnerResult(runs, error)))
            self._session.finish_batch(len(runner_inputs))
            return futures


@derived_object
class _Done(ms.runner.PyRunnerFuture):
    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self._result


def _space(definition: Definition, target: Target) -> Any:
    """The schedules considered, see `_sketch`; mutation changes tile sizes."""

    def sketches(schedule: Any) -> list[Any]:
        return [
            _sketch(schedule.copy(), definition, target, panels_first)
            for panels_first in (False, True)
        ]

    return ms.space_generator.ScheduleFn(
        sketches,
        sch_rules=[],
        postprocs=[cast(Any, _FitsRegisters(definition, target))],
        mutator_probs={ms.mutator.MutateTileSize(): 1.0},
    )


def _sketch(schedule: Any, definition: Definition, target: Target, panels_first: bool) -> Any:
    """One nest: tasks, tiles within a task, and in a tile the sums, kept in registers.

    The stages are the product and one elementwise stage with the same spatial axes, the last of
    which lie side by side in memory. Every other axis is cut into tasks, tiles and rows of a tile;
    the innermost sum is cut, too. ``panels_first`` makes neighbouring tasks share weights.
    """
    lanes = target.vector_bytes // 4
    product, out = (schedule.get_sblock(b) for b in definition.blocks)

    def vectors(loop: Any) -> tuple[Any, Any]:
        pieces = schedule.split(loop, [None, lanes])
        schedule.vectorize(pieces[1])
        schedule.unroll(pieces[0])
        return pieces[0], pieces[1]

    *axes, width = schedule.get_loops(out)
    cuts = []
    for axis in axes:
        factors = schedule.sample_perfect_tile(axis, n=3, max_innermost_factor=_MOST_ROWS)
        cuts.append(schedule.split(axis, factors))
    tasks = [c[0] for c in cuts]
    schedule.reorder(*tasks, *(c[1] for c in cuts), *(c[2] for c in cuts), width)
    if panels_first:
        tasks = [tasks[-1], *tasks[:-1]]
        schedule.reorder(*tasks)
    tile = cuts[-1][1]
    schedule.parallel(schedule.fuse(*tasks))
    schedule.compute_at(product, tile, preserve_unit_loops=True)
    vectors(width)

    inside = schedule.get_loops(product)[1 + len(cuts) :]
    rows, columns, sums = inside[: len(cuts)], inside[len(cuts)], inside[len(cuts) + 1 :]
    depth = schedule.sample_perfect_tile(sums[-1], n=2, max_innermost_factor=8)
    *taps, long = sums
    long, short = schedule.split(long, depth)
    schedule.reorder(*taps, long, short, *rows, columns)
    vectors(columns)
    for loop in (short, *rows):
        schedule.unroll(loop)
    schedule.decompose_reduction(product, (*taps, long)[0])
    return schedule


@derived_object
class _FitsRegisters(ms.postproc.PyPostproc):
    """Refuses tiles of more sums than registers can hold, and code that would be too long."""

    def __init__(self, definition: Definition, target: Target) -> None:
        super().__init__()
        self._definition, self._target = definition, target

    def _initialize_with_tune_context(self, context: Any) -> None:
        del context

    def apply(self, sch: Any) -> bool:
        sums = sch.get_sblock(f"{self._definition.blocks[0]}_update")
        loops = [sch.get(loop) for loop in sch.get_loops(sums)]
        unrolled = [int(f.extent) for f in loops if f.kind == tir.ForKind.UNROLLED]
        depth, *tile = unrolled
        vectors = math.prod(tile)
        return vectors <= self._target.vector_registers and depth * vectors <= _MOST_STATEMENTS

    def clone(self) -> Any:
        return _FitsRegisters(self._definition, self._target)


def _strategy() -> Any:
    return ms.search_strategy.EvolutionarySearch(
        population_size=64, init_min_unmeasured=BATCH, genetic_num_iters=3, max_fail_count=50
    )


def _decisions(trace: Any) -> list[list[int]]:
    """The tile sizes that a trace chose, in the order of its instructions."""
    found = (trace.decisions[i] for i in trace.insts if i in trace.decisions)
    return [[int(factor) for factor in tile] for tile in found]


def _cost_model() -> Any:
    try:
        import xgboost  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "random"
    return "xgb"


def _open_database(directory: Path) -> Any:
    """The records in ``directory``; records that cannot be read are thrown away."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        database = ms.database.JSONDatabase(work_dir=str(directory))
        len(database)
        return database
    except Exception:  # TVM raises several kinds for a file that was cut short
        shutil.rmtree(directory)
        directory.mkdir(parents=True)
        return ms.database.JSONDatabase(work_dir=str(directory))


def _seconds(record: Any) -> float:
    runs = [float(s) for s in record.run_secs or ()]
    return min(sum(runs) / len(runs), _TOO_SLOW) if runs else _TOO_SLOW


def _best_seconds(database: Any) -> float:
    best = min(map(_seconds, database.get_all_tuning_records()), default=_TOO_SLOW)
    return best if best < _TOO_SLOW else math.inf


@contextlib.contextmanager
def _bare() -> Iterator[None]:
    """Keeps MetaSchedule from loading tensor intrinsics and from printing its tables.

    A tuning context imports every tensor intrinsic of every target, which takes half a minute, for
    rules that `_sketch` does not use.
    """
    intrinsics = "tvm.s_tir.tensor_intrin"
    absent = intrinsics not in sys.modules
    if absent:
        sys.modules[intrinsics] = types.ModuleType(intrinsics)
        s_tir.tensor_intrin = sys.modules[intrinsics]  # type: ignore[attr-defined]
    logger = logging.getLogger(__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if absent:
            del sys.modules[intrinsics]
            del s_tir.tensor_intrin  # type: ignore[attr-defined]
