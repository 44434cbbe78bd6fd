"""Decomposes exported programs, without preparing torch for that anew each time.

`torch.export.ExportedProgram.run_decompositions` asks the dispatcher for all composite operators,
once for every namespace, and gives each of five hundred some thirty kernels for as long as it
runs: more work than to trace a small program. What comes of it is the same as long as no operator
is registered, so it is kept. Where torch's own functions are not found, nothing is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_impls import op_implementations_dict as fake_rules
from torch.export import ExportedProgram, exported_program

from . import ops

SPLIT = "_split_decomp_table_to_cia_and_python_decomp"
"""torch's name of what takes composite operators out of a table of decompositions."""
OVERRIDE = "_override_composite_implicit_decomp"
"""torch's name of the context in which composite operators have the kernels of a table."""

Table = Mapping[Any, Callable[..., Any]]


@dataclass(frozen=True)
class _Placed:
    """What an operator has before and within the context `OVERRIDE`."""

    operator: Any
    before: dict[Any, Any]
    ruled: bool
    kernels: dict[Any, Any]
    rule: Any

    def holds(self) -> bool:
        """Whether the operator is as it was before."""
        operator = self.operator
        return operator.py_kernels == self.before and (operator in fake_rules) == self.ruled


class _Kept:
    """A table of decompositions, and what torch makes of it."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.table = dict(ops.decompositions())
        self.parts: tuple[Table, Table] | None = None
        self.placed: list[_Placed] = []

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within it, torch takes what is kept, in this thread: others may have tables of theirs."""
        names, here = vars(exported_program), threading.get_ident()
        split, override = names.get(SPLIT), names.get(OVERRIDE)
        if split is None or override is None:
            yield
            return

        def parts(table: Any) -> tuple[Table, Table]:
            if threading.get_ident() != here:
                return split(table)
            composites, others = self.parts or split(table)
            self.parts = composites, others
            return composites, dict(others)

        def overridden(composites: Table) -> Any:
            if threading.get_ident() != here:
                return override(composites)
            return self._overridden(composites, override)

        names.update({SPLIT: parts, OVERRIDE: overridden})
        try:
            yield
        finally:
            names.update({SPLIT: split, OVERRIDE: override})

    @contextlib.contextmanager
    def _overridden(self, composites: Table, override: Any) -> Iterator[None]:
        if not self.placed or not all(p.holds() for p in self.placed):
            before = [(o, dict(o.py_kernels), o in fake_rules) for o in composites]
            with override(composites):
                self.placed = [
                    _Placed(*item, dict(item[0].py_kernels), fake_rules.get(item[0]))
                    for item in before
                ]
                yield
            return
        try:
            for p in self.placed:
                _give(p.operator, p.kernels)
                fake_rules[p.operator] = p.rule
            yield
        finally:
            for p in self.placed:
                _give(p.operator, p.before)
                fake_rules.pop(p.operator, None)  # as torch does, whoever made the rule


def _give(operator: Any, kernels: dict[Any, Any]) -> None:
    operator.py_kernels.clear()
    operator.py_kernels.update(kernels)
    operator._dispatch_cache.clear()


_latest: _Kept | None = None


def decomposed_anew(program: ExportedProgram) -> ExportedProgram:
    """``program`` in the operators that a captured graph may hold. For one thread at a time."""
    kept = _current()
    with kept.used(), _plain_constants(program):
        return program.run_decompositions(kept.table)


@dataclass(frozen=True)
class Tables:
    """The table of decompositions, and what torch makes of it."""

    all: Table
    composites: Table
    """Of composite operators, those that stay whole included."""
    others: Table
    used: Callable[[], contextlib.AbstractContextManager[None]]
    """The context in which composite operators have their kernels of the table."""


def tables() -> Tables | None:
    """What programs are decomposed by; None where torch has no such functions."""
    names, kept = vars(exported_program), _current()
    split, override = names.get(SPLIT), names.get(OVERRIDE)
    if split is None or override is None:
        return None
    composites, others = kept.parts = kept.parts or split(dict(kept.table))
    return Tables(kept.table, composites, others, lambda: kept._overridden(composites, override))


def _current() -> _Kept:
    global _latest
    state = _registered()
    if _latest is None or _latest.state != state:
        _latest = _Kept(state)
    return _latest


@contextlib.contextmanager
def _plain_constants(program: ExportedProgram) -> Iterator[None]:
    """Within it, tensors that the sides of a `torch.cond` make of numbers are plain attributes of
    their graphs: torch puts others in the place of buffers, which a second trace cannot read.
    """
    root = program.graph_module
    inner = [m for m in root.modules() if m is not root and isinstance(m, fx.GraphModule)]
    moved = [(m, m._buffers.copy()) for m in inner if m._buffers]
    for module, buffers in moved:
        module._buffers.clear()
        module.__dict__.update(buffers)
    try:
        yield
    finally:
        for module, buffers in moved:
            for name in buffers:
                module.__dict__.pop(name, None)
            module._buffers.update(buffers)


def _registered() -> Any:
    """Changes where operators or decompositions are registered."""
    key = "CompositeImplicitAutograd"
    composites = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    # Not ATen's, which torch lists once for all: its names grow with every one that is looked up.
    spaces = ((name, getattr(torch.ops, name)) for name in torch.ops._dir if name != "aten")
    counts = {name: len(space._dir) for name, space in spaces if hasattr(space, "_dir")}
    return sorted(composites), counts, dict(torch._decomp.decomposition_table)
