"""What plait knows of one FX node: a single typed record under ``node.meta["plait"]``.

Passes talk to each other and to the lowering through this record and nothing else, so any other
FX tool may read, print or drop a plait graph. Records are immutable: `annotate` replaces the
record of a node, which lets a copied graph share records with the graph it was copied from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch.fx as fx

KEY = "plait"
"""The one key of ``node.meta`` that plait writes."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """The record of one node; None means "not decided".

    Attributes:
        group: number of the kernel group that the node belongs to (`passes.fuse_vertical`).
        kind: kind of that group: the template or mechanism that will run it.
        anchor: whether the node is the heavy operator of its group.
        stage: position of the group in the schedule.
        device: device that runs the node, such as "cpu" or "cuda:0".
        layout: memory layout asked for the node's result, such as "nhwc".
        apart: whether the node is to be computed by itself, not with what it reads.
        load: fraction of a router's slots that a routed product is likely to get; None: all.
        made_by: name of the pass that created the node; None for a captured one.
    """

    group: int | None = None
    kind: str | None = None
    anchor: bool = False
    stage: int | None = None
    device: str | None = None
    layout: str | None = None
    apart: bool = False
    load: float | None = None
    made_by: str | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made a graph: the pass as pipeline text, and the time it took. Under ``meta["plait"]``
    of the graph module."""

    made_by: str
    seconds: float


_NOTHING = Annotation()


def annotation(node: fx.Node) -> Annotation:
    """The record of ``node``; the empty record where there is none."""
    return node.meta.get(KEY, _NOTHING)


def annotate(node: fx.Node, **changes: Any) -> Annotation:
    """Replace fields of the record of ``node`` and return the new record.

    Raises:
        TypeError: a name in ``changes`` is not a field of `Annotation`.
    """
    record = replace(annotation(node), **changes)
    node.meta[KEY] = record
    return record


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from: ``file``, ``line`` and source text; dotted path of its module."""

    file: str = ""
    line: int = 0
    code: str = ""
    module: str = ""

    def __str__(self) -> str:
        place = f"{self.file.rsplit('/', 1)[-1]}:{self.line}" if self.file else ""
        return " ".join(part for part in (self.module, place) if part)


_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+), in [^\n]*\n?(?P<code>[^\n]*)')
_CALLER_LIBRARY = re.compile(r"[/\\]torch[/\\](nn[/\\]|_|fx[/\\]|functional)")


def origin(node: fx.Node) -> Origin:
    """Source line and module path of ``node``, from ``stack_trace`` and ``nn_module_stack``.

    The innermost frame outside torch itself is preferred; the innermost frame otherwise.
    """
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    own = [frame for frame in frames if not _CALLER_LIBRARY.search(frame["file"])]
    frame = (own or frames or [None])[-1]
    stack = node.meta.get("nn_module_stack") or {}
    module = ""
    for entry in stack.values():
        module = str(entry[0]) or module
    if frame is None:
        return Origin(module=module)
    return Origin(frame["file"], int(frame["line"]), frame["code"].strip(), module)
