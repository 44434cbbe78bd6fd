"""The command line's output where it cannot be written as it is."""

from __future__ import annotations

import io
import os
import sys

import pytest

from plait.compiler.cli import main


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
