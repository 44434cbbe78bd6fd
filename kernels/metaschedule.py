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
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


class OutOfTime(Exception):
    """Raised through the search when its time is spent; what was found so far is kept."""


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
    seed: int = 0,
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
    with _quiet():
        database = _open_database(directory)
        session.trials = len(database)
        session.best = _best_seconds(database)
        left = trials - session.trials
        if left > 0 and not session.is_late():
            with contextlib.suppress(OutOfTime):
                ms.tune_tir(
                    definition.func,
                    target.tvm(),
                    str(directory),
                    max_trials_global=left,
                    num_trials_per_iter=min(BATCH, left),
                    builder=_Builder(session),  # type: ignore[arg-type]
                    runner=_Runner(session),  # type: ignore[arg-type]
                    database=database,
                    cost_model=_cost_model(),
                    space=_space(target),
                    strategy=ms.SearchStrategy.create(
                        "evolutionary", population_size=256, genetic_num_iters=3
                    )
                    if False
                    else "evolutionary",
                    measure_callbacks=[ms.measure_callback.AddToDatabase()],
                    num_tuning_cores=1,
                    seed=seed,
                )
        return session.result(database, name)


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
        self.failures: dict[str, int] = {}
        self._built: dict[str, tuple[Kernel, loader.Library]] = {}
        self._count = 0

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def build(self, modules: Sequence[Any]) -> list[tuple[str | None, str | None]]:
        """(artifact, error) of each schedule; an artifact is the kernel's symbol."""
        if self.is_late():
            raise OutOfTime
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
                config = {"source": "metaschedule", "trace": str(record.trace)}
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
        results = self._session.build([i.mod for i in build_inputs])
        return [ms.builder.BuilderResult(artifact, error) for artifact, error in results]


@derived_object
class _Runner(ms.runner.PyRunner):
    def __init__(self, session: _Session) -> None:
        super().__init__()
        self._session = session

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        futures = []
        for task in runner_inputs:
            seconds, error = self._session.measure(str(task.artifact_path))
            result = ms.runner.RunnerResult([seconds] if seconds is not None else None, error)
            futures.append(_Done(result))
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


def _space(target: Target) -> Any:
    """The schedules considered: one tiled nest with its epilogue inside, vectors, unrolling.

    Left out of TVM's own rules for CPUs is what could not become one loop over tasks: reductions
    split over threads and stages computed at the root.
    """
    rule, post, mutator = ms.schedule_rule, ms.postproc, ms.mutator
    lanes = target.vector_bytes // 4
    return ms.space_generator.PostOrderApply(
        sch_rules=[
            rule.AutoInline(
                into_producer=False,
                into_consumer=True,
                inline_const_tensor=True,
                disallow_if_then_else=True,
                require_injective=True,
                require_ordered=True,
            ),
            rule.MultiLevelTiling(
                structure="SSRSRS",
                max_innermost_factor=4 * lanes,
                reuse_write=rule.ReuseType(req="must", levels=[1, 2], scope="global"),
            ),
            rule.ParallelizeVectorizeUnroll(
                max_jobs_per_core=64,
                max_vectorize_extent=4 * lanes,
                unroll_max_steps=[16, 64, 256],
                unroll_explicit=True,
            ),
        ],
        postprocs=[
            post.DisallowDynamicLoop(),
            post.RewriteParallelVectorizeUnroll(),
            post.RewriteReductionBlock(),
        ],
        mutator_probs={
            mutator.MutateTileSize(): 0.9,
            mutator.MutateUnroll(): 0.05,
            mutator.MutateParallel(max_jobs_per_core=64): 0.05,
        },
    )


def _cost_model() -> str:
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
def _quiet() -> Iterator[None]:
    """Keeps TVM's tables of tasks and trials off the terminal."""
    names = [n for n in logging.root.manager.loggerDict if n.startswith("tvm")]
    loggers = [logging.getLogger(n) for n in (*names, "tvm.s_tir.meta_schedule")]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory():
            yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
