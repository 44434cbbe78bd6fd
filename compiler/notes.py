"""What a compiled model has to say of its calls: each thing once."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from ..passes.remarks import Remark

_OURS = (__name__.split(".")[0], "torch")
"""Packages between a user's call and what is to be said of it."""


class Notes:
    """Remarks on capture, in the order in which they came."""

    def __init__(self) -> None:
        self.remarks: list[Remark] = []
        self._said: set[str] = set()

    def add(self, remark: str, reason: str, hint: str = "", kind: Any = "missed") -> None:
        """Records something."""
        note = Remark(remark, kind, "capture", (), reason, hint)
        if note not in self.remarks:
            self.remarks.append(note)

    def say(self, remark: str, reason: str, hint: str = "") -> None:
        """Records why something did not happen; warns the first time, of the line that called."""
        if remark + reason not in self._said:
            self._said.add(remark + reason)
            self.add(remark, reason, hint)
            text = f"plait: {remark}: {reason}" + f" ({hint})" * bool(hint)
            warnings.warn(text, stacklevel=_level())


def _level() -> int:
    """How many frames above its caller the first one is that is not ours."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _package(frame) in _OURS:
        frame, level = frame.f_back, level + 1
    return level


def _package(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]
