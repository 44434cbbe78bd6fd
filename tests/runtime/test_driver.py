"""The kept driver: found damaged or without a linker, it is made again or lives in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_USE = "from plait.runtime.driver import launch_function; assert launch_function(); print('fine')"


def _use(folder: Path, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", _USE],
        env={**os.environ, "PLAIT_CACHE_DIR": str(folder), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver that a process has made and kept."""
    folder = tmp_path_factory.mktemp("cache")
    assert _use(folder) == "fine\n"
    (found,) = folder.glob("driver-*.so")
    return found


@pytest.mark.parametrize("length", [9000, 0, None])
def test_a_driver_cut_short_or_altered_is_made_again(
    tmp_path: Path, made: Path, length: int | None
) -> None:
    kept, good = tmp_path / made.name, made.read_bytes()
    kept.write_bytes(good[:length] if length is not None else good[:5000] + b"?" + good[5001:])
    assert _use(tmp_path) == "fine\n"
    assert len(kept.read_bytes()) == len(good)


def test_without_a_linker_the_driver_lives_in_the_process(tmp_path: Path) -> None:
    assert _use(tmp_path, PATH=str(tmp_path)) == "fine\n"
    assert not list(tmp_path.glob("driver-*"))
