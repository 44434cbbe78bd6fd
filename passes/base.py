"""What a pass is, and the few services that every pass shares.

Invariants for pass writers:

* Valid graph in, valid graph out (`passes.verifier`); in between anything goes.
* The input is never touched: work on `copy_graph`, which shares tensors and ``meta`` values.
* The function computed stays the same for *every* input, NaN, infinities and -0 included.
* No output may start to alias an input, a constant or another output, if it did not before.
* Every node created gets ``meta["val"]``.
* Ask `allow` before each transformation; that is what makes bisecting possible.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch.fx as fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from .pipeline_print import print_pipeline
from .remarks import Remark


class PassResult(NamedTuple):
    """A new graph (or the very graph that came in, where nothing changed) and the remarks."""

    graph_module: fx.GraphModule
    remarks: tuple[Remark, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A graph transformation whose dataclass fields are its options.

    A subclass is a frozen dataclass, sets ``name`` (lower case, words joined by hyphens), gives
    every field a default and implements `run`. ``follows`` names the passes that a pipeline must
    not have behind it, because it has to see what they make.

    Option types that the pipeline text knows: bool, int, float, str, any of them "or None", and
    ``tuple[T, ...]`` of them.
    """

    name: ClassVar[str]
    follows: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Transform a copy of ``graph_module``; the argument itself stays as it was."""

    def __str__(self) -> str:
        return print_pipeline([self])

    def options(self) -> dict[str, Any]:
        """Option values by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with a graph of its own.

    Nodes keep name, type and (shallowly copied) ``meta``; tensors and submodules are shared;
    input and output structure (the code generator) are kept.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.set_codegen(copy.copy(graph_module.graph._codegen))
    return with_graph(graph_module, graph)


def module_of(root: Any, graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """A module that runs ``graph`` on attributes of ``root`` (or a dictionary of them).

    Its Python code is written when somebody runs or prints it: passes look at graphs.
    """
    return _LazyGraphModule(root, graph, class_name)


def with_graph(graph_module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module that runs ``graph`` on the attributes of ``graph_module`` that the graph reads."""
    result = module_of(graph_module, graph, type(graph_module).__name__)
    result.meta = copy.copy(graph_module.meta)
    result.training = graph_module.training
    return result


@dataclass
class Counter:
    """How many transformations were asked for, and how many may happen.

    ``limit`` None means all of them. ``last`` describes the last one allowed, which is the
    guilty one when a bisection over ``limit`` ends.
    """

    limit: int | None = None
    asked: int = 0
    last: str = ""

    def allow(self, what: str) -> bool:
        """Count one transformation, described by ``what``; whether it may happen."""
        self.asked += 1
        if self.limit is not None and self.asked > self.limit:
            return False
        self.last = what
        return True


_counter: contextvars.ContextVar[Counter | None] = contextvars.ContextVar("counter", default=None)


def allow(what: str, nodes: Sequence[fx.Node] = ()) -> bool:
    """Whether one more transformation may happen; always, outside `counting`."""
    counter = _counter.get()
    if counter is None:
        return True
    return counter.allow(" ".join([what, *(node.name for node in nodes)]))


@contextlib.contextmanager
def counting(counter: Counter) -> Iterator[Counter]:
    """Let ``counter`` decide what `allow` answers inside the ``with`` block (this thread)."""
    token = _counter.set(counter)
    try:
        yield counter
    finally:
        _counter.reset(token)
