"""The surroundings of a compilation: no modes of the caller's, no garbage collection."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain_modes() -> Iterator[None]:
    """The modes that compilation runs in."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without garbage collection: graphs are many live objects, which it would visit in vain, for
    a fifth of the time of a compilation.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
