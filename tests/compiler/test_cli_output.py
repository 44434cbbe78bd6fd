"""The command line's output where it cannot be written as it is."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from plait.compiler.cli import main

FULL = Path("/dev/full")


def test_what_an_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["plait", "passes"])
    monkeypatch.setenv("COLUMNS", "20")  # texts are cut, with an ellipsis
    with pytest.raises(SystemExit) as end:
        main()
    sys.stdout.flush()
    assert end.value.code in (0, None) and b"?" in written.getvalue()


def test_a_reader_that_has_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["plait", "passes"])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code in (0, None)


@pytest.mark.parametrize("buffering", [-1, 1], ids=["at exit", "at once"])
@pytest.mark.parametrize("command", ["--help", "--version", "passes"])
@pytest.mark.skipif(not FULL.exists(), reason="needs a device without room")
def test_output_that_finds_no_room_is_one_line_and_an_exit_code(
    command: str,
    buffering: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with FULL.open("w", buffering=buffering) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["plait", command])
        with pytest.raises(SystemExit) as end:
            main()
    told = capsys.readouterr().err
    assert end.value.code == 1 and told.count("\n") == 1
    assert "the output cannot be written ([Errno 28] No space left on device)" in told


def test_a_reader_that_has_gone_before_the_end_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["plait", "--version"])
        os.close(reading)
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code in (0, None)
