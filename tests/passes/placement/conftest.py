"""Searches for placements have so many seconds of the processor's, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from plait.passes.placement import alternatives_search, best, feasible, fitting, plan


@pytest.fixture(scope="module", autouse=True)
def own_time() -> Iterator[None]:
    """The clock of searches stands while others have the processor."""
    clock = SimpleNamespace(perf_counter=time.thread_time)
    with pytest.MonkeyPatch.context() as patch:
        for module in (alternatives_search, best, feasible, fitting, plan):
            patch.setattr(module, "time", clock)
        yield
