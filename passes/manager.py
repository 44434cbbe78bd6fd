"""Runs a pipeline of passes, with somebody watching.

Each pass runs between two checks of the verifier; its time is taken; what it claims is collected.
With a dump directory, every stage is written as Python text: ``00-input.py``,
``01-normalize.py``, ... A stage that changed nothing says "(unchanged)" instead of the same graph
again. With a limit, only the first so many transformations happen, over all passes: halving the
limit finds the transformation that breaks a model.

Environment variables (an argument of `PassManager` wins): ``PLAIT_BISECT_LIMIT``,
``PLAIT_DUMP_DIR``, ``PLAIT_VERIFY``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

import torch.fx as fx

from .annotations import KEY, Provenance
from .base import Counter, Pass, counting
from .pipeline_text import parse_pipeline
from .printer import print_graph
from .remarks import Remark
from .verifier import InvalidGraph, Level, verify


class PassFailed(RuntimeError):
    """A pass raised, or left an invalid graph. ``pass_text`` says which; the cause is chained."""

    def __init__(self, pass_text: str, reason: str) -> None:
        self.pass_text = pass_text
        super().__init__(f"pass {pass_text} failed: {reason}")


@dataclass(frozen=True)
class PassRecord:
    """How one pass went. ``transformations`` counts those that `base.allow` was asked for."""

    text: str
    seconds: float
    changed: bool
    nodes_before: int
    nodes_after: int
    transformations: int
    remarks: tuple[Remark, ...]

    def __str__(self) -> str:
        nodes = f"{self.nodes_before} -> {self.nodes_after} nodes"
        effect = nodes if self.changed else "(unchanged)"
        return f"{self.text}: {self.seconds * 1e3:.1f} ms, {effect}"


@dataclass(frozen=True)
class PipelineResult:
    """The graph after the last pass, and the record of each pass.

    ``last_transformation`` describes the last one that the limit allowed.
    """

    graph_module: fx.GraphModule
    records: tuple[PassRecord, ...]
    last_transformation: str = ""

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """The remarks of all passes, in order."""
        return tuple(remark for record in self.records for remark in record.remarks)

    @property
    def transformations(self) -> int:
        """How many transformations there were, or would have been without a limit."""
        return sum(record.transformations for record in self.records)


class Observer(Protocol):
    """Watches a pipeline. The graphs are not the observer's to change."""

    def start(self, graph_module: fx.GraphModule) -> None:
        """The graph before the first pass."""
        ...

    def after(self, record: PassRecord, graph_module: fx.GraphModule) -> None:
        """The record of a pass and the graph that it left."""
        ...


class DumpObserver:
    """Writes every stage to a directory, which is made if need be.

    Raises:
        NotADirectoryError: the path exists and is no directory.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"dump directory {self.directory} is a file")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._stage = 0
        self._body = ""

    def start(self, graph_module: fx.GraphModule) -> None:
        self._stage, self._body = 0, _body(graph_module)
        self._write("input", print_graph(graph_module))

    def after(self, record: PassRecord, graph_module: fx.GraphModule) -> None:
        self._stage += 1
        body = _body(graph_module)
        text = print_graph(graph_module)
        if body == self._body:
            text = f"# after {record.text} ({record.seconds * 1e3:.1f} ms)\n# (unchanged)\n"
        self._body = body
        self._write(record.text.split("{", 1)[0], text)

    def _write(self, name: str, text: str) -> None:
        (self.directory / f"{self._stage:02d}-{name}.py").write_text(text, encoding="utf-8")


def _body(graph_module: fx.GraphModule) -> str:
    """The printed graph without the line that says what made it."""
    lines = print_graph(graph_module).split("\n")
    return "\n".join(line for line in lines if not line.startswith("# after "))


class PassManager:
    """A pipeline ready to run on graphs.

    Args:
        pipeline: pipeline text (see `pipeline_text`), or passes.
        verify: how thoroughly graphs are checked before the first pass and after each:
            "off", "structure" (default) or "full".
        dump_dir: directory for the stages as text; None for no dumps.
        limit: how many transformations may happen in one `run`; None for all.
        observers: further observers.

    Raises:
        PipelineError: the text is not a pipeline.
        ValueError: another argument, or an environment variable, has a bad value.
    """

    def __init__(
        self,
        pipeline: str | Sequence[Pass],
        *,
        verify: Level | None = None,
        dump_dir: str | os.PathLike[str] | None = None,
        limit: int | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.passes = tuple(parse_pipeline(pipeline) if isinstance(pipeline, str) else pipeline)
        self.level: Level = _level(verify)
        self.limit = _limit(limit)
        dump_dir = dump_dir or os.environ.get("PLAIT_DUMP_DIR")
        self.observers = (*observers, *([DumpObserver(dump_dir)] if dump_dir else []))

    def run(self, graph_module: fx.GraphModule) -> PipelineResult:
        """Run every pass in turn. ``graph_module`` stays as it is.

        Raises:
            InvalidGraph: the graph that came in breaks an invariant.
            PassFailed: a pass raised an exception, or what it returned breaks an invariant.
        """
        verify(graph_module, self.level, "before the first pass")
        for observer in self.observers:
            observer.start(graph_module)
        records: list[PassRecord] = []
        counter = Counter(self.limit)
        with counting(counter):
            for item in self.passes:
                graph_module, record = self._step(item, graph_module, counter)
                records.append(record)
                for observer in self.observers:
                    observer.after(record, graph_module)
        return PipelineResult(graph_module, tuple(records), counter.last)

    def _step(
        self, item: Pass, graph_module: fx.GraphModule, counter: Counter
    ) -> tuple[fx.GraphModule, PassRecord]:
        text, asked = str(item), counter.asked
        before = len(graph_module.graph.nodes)
        start = time.perf_counter()
        try:
            result, remarks = item.run(graph_module)
        except Exception as error:
            raise PassFailed(text, f"{type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - start
        changed = result is not graph_module
        if changed:
            try:
                verify(result, self.level, f"after {text}")
            except InvalidGraph as error:
                raise PassFailed(text, str(error)) from error
            result.meta[KEY] = Provenance(text, seconds)
        after, count = len(result.graph.nodes), counter.asked - asked
        return result, PassRecord(text, seconds, changed, before, after, count, tuple(remarks))


def _level(level: str | None) -> Level:
    level = level or os.environ.get("PLAIT_VERIFY") or "structure"
    for known in get_args(Level):
        if level == known:
            return known
    levels = ", ".join(get_args(Level))
    raise ValueError(f"verify (or PLAIT_VERIFY) is one of {levels}, not {level!r}")


def _limit(limit: int | None) -> int | None:
    text = os.environ.get("PLAIT_BISECT_LIMIT", "")
    if limit is None and text:
        if not text.isdecimal():
            raise ValueError(f"PLAIT_BISECT_LIMIT must be a whole number, is {text!r}")
        limit = int(text)
    if limit is not None and limit < 0:
        raise ValueError(f"limit must not be negative, is {limit}")
    return limit
