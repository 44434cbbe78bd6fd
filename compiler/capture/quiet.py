"""Around `torch.export`: silence, for the thread that captures only, and no state left behind."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what export says of its own internals: warnings, logs, graphs printed on failure."""
    before = sys.stderr
    sys.stderr = _Muted(before)
    thread = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = (logging.getLogger(name) for name in [None, *logging.root.manager.loggerDict])
    handlers = list(dict.fromkeys(h for logger in loggers for h in logger.handlers))
    for handler in handlers:
        handler.addFilter(keep)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr = before
        for handler in handlers:
            handler.removeFilter(keep)


@contextlib.contextmanager
def functions_kept() -> Iterator[None]:
    """Leaves torch's functions with the modes and overrides that they had.

    Dynamo takes these off while it checks guards, and where a guard raises, leaves them so.
    """
    state = torch._C._get_torch_function_state()
    try:
        yield
    finally:
        torch._C._set_torch_function_state(state)


class _Muted(io.TextIOBase):
    """An error stream that drops what the thread that made it writes, and passes on the rest."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread and self._stream is not None:
            self._stream.write(text)
        return len(text)
