"""The surroundings of a compilation: no modes of the caller's, no garbage collection."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .captured import Captured
from .options import Executable, Options

if TYPE_CHECKING:
    from .weights import WeightStore


def build(captured: Captured, options: Options, store: WeightStore | None = None) -> Executable:
    """Compiles outside of whatever modes the caller happens to be in.

    ``store`` keeps the weights where there is a budget for them.
    """
    from .pipeline import compile_graph  # the passes are imported when they are needed

    with plain_modes():
        return compile_graph(captured, options, store)


@contextlib.contextmanager
def plain_modes() -> Iterator[None]:
    """The modes that compilation runs in."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def store_for(options: Options) -> WeightStore | None:
    """What keeps the weights of a model compiled with these options; None without a budget."""
    if options.weight_budget is None:
        return None
    from .weights import WeightStore

    return WeightStore(options.weight_budget)


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
