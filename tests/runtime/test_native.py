"""Native code kept in the cache directory, and what is done where it cannot be."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from plait.runtime import native

FUNCTION = native.Function(
    "plait_none", ("x",), "define void @plait_none_body(ptr %x) { ret void }"
)


@pytest.mark.parametrize("free", [1 << 40, 1 << 12], ids=["room", "no room"])
def test_nothing_is_written_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free))
    assert native.load("none", [FUNCTION])["plait_none"]
    assert bool(list(tmp_path.iterdir())) == (free == 1 << 40)
