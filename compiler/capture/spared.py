"""What `torch.export` makes of every graph and every node, made only as far as somebody reads it.

It writes the Python code of each graph between its passes, and of every node it asks the profiler
for all frames of the stack and looks up each one's line: together a third of an export. Graphs'
code can wait until a graph is run or printed; frames are kept by place in the source. For each
trace it replaces methods of `nn.Module`, after which Python goes through all of its subclasses:
operators alone need none of that.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from traceback import FrameSummary, StackSummary
from types import CodeType
from typing import Any

import torch.fx.proxy
from torch import nn
from torch.fx import _symbolic_trace
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import uninteresting_files

TRACEBACK = "CapturedTraceback"
"""torch.fx's name of what it takes stacks by."""
PATCHER = "_Patcher"
"""torch.fx's name of what replaces functions while it traces."""


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """Within it, graphs write their code when it is read, and nodes get their stacks with less."""
    names: Any = vars(torch.fx.proxy)
    before = names.get(TRACEBACK)
    if before is not None:
        names[TRACEBACK] = _Stacks()
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        if before is not None:
            names[TRACEBACK] = before


@contextlib.contextmanager
def no_modules() -> Iterator[None]:
    """Within it, what this thread traces calls no module: their methods are not replaced."""
    here = threading.get_ident()
    names: Any = vars(_symbolic_trace)
    patcher = names.get(PATCHER)
    if patcher is None:
        yield
        return

    class Partial(patcher):
        def patch_method(self, cls: type, *args: Any, **kwargs: Any) -> None:
            if cls is not nn.Module:
                super().patch_method(cls, *args, **kwargs)

    def made() -> Any:
        return Partial() if threading.get_ident() == here else patcher()

    names[PATCHER] = made
    try:
        yield
    finally:
        names[PATCHER] = patcher


class _Stacks:
    """Stands for torch's class of stacks: `extract` takes one, `summary` gives its frames."""

    def __init__(self) -> None:
        # By identity, for codes compare all they hold; the codes are held so that they stay.
        self.frames: dict[tuple[int, int], tuple[CodeType, FrameSummary]] = {}

    def extract(self, **_: Any) -> _Stacks:
        return self

    def summary(self) -> StackSummary:
        """The caller's stack, outermost frame first, without torch's frames but for ``forward``.

        Of what is left torch takes the frames from the first ``forward`` on.
        """
        dull = uninteresting_files()
        result = StackSummary()
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_filename not in dull or code.co_name == "forward":
                result.append(self._frame(code, frame.f_lineno))
            frame = frame.f_back
        result.reverse()
        return result

    def _frame(self, code: CodeType, line: int) -> FrameSummary:
        known = self.frames.get((id(code), line))
        if known is None:
            known = code, FrameSummary(code.co_filename, line, code.co_name)
            self.frames[id(code), line] = known
        return known[1]
