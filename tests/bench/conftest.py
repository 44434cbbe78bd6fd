"""Tests train nothing for minutes and leave nothing in the user's cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from plait.bench import trained_moe


@pytest.fixture(scope="session", autouse=True)
def short_training(kernel_cache: str) -> Iterator[None]:
    """Three steps for whoever does not say how many, kept in the tests' own cache directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_moe, "STEPS", 3)
        patch.setattr(trained_moe, "CACHE", Path(kernel_cache))
        yield
