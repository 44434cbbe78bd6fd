"""The command line where something from outside ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import plait
from plait.compiler.capture import export
from plait.compiler.cli import main
from plait.compiler.cli.ending import Terminated


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is an exception, also where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ended(monkeypatch: pytest.MonkeyPatch, command: Callable[[], None]) -> int:
    """The exit code of a command that does ``command``."""
    codes: list[int] = []

    def exit_at_once(code: int) -> None:
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", exit_at_once)
    monkeypatch.setattr(sys, "argv", ["plait", "cache", "path"])
    monkeypatch.setattr("plait.compiler.cli.cache.path", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert codes == [end.value.code]
    return codes[0]


def interrupt_within_a_class() -> None:
    """What Ctrl-C is while a module is imported, up to CPython 3.11."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise RuntimeError("Error calling __set_name__") from error


def terminate_within_a_class() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    except Terminated as error:
        raise RuntimeError("Error calling __set_name__") from error


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130, "plait: interrupted\n"),
        (interrupt_within_a_class, 130, "plait: interrupted\n"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "plait: terminated\n"),
        (terminate_within_a_class, 143, "plait: terminated\n"),
    ],
    ids=["Ctrl-C", "Ctrl-C in a class", "SIGTERM", "SIGTERM in a class"],
)
def test_signals_are_one_line_and_their_exit_code(
    command: Callable[[], None],
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert ended(monkeypatch, command) == code
    assert capsys.readouterr().err == told and signal.getsignal(signal.SIGTERM) == before


def test_a_terminated_command_ends_its_children_and_removes_what_it_was_writing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from plait.kernels.files import replacing

    def command() -> None:
        with replacing(tmp_path / "out") as scratch:
            scratch.write_text("half")
            script = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(9)"
            subprocess.run([sys.executable, "-S", "-c", script], check=False)

    assert ended(monkeypatch, command) == 143 and not list(tmp_path.iterdir())


def test_an_interrupted_capture_does_not_go_on_with_the_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        interrupt_within_a_class()

    model = plait.compile(torch.nn.Linear(2, 2).eval(), tune="off")
    with monkeypatch.context() as within, pytest.raises(KeyboardInterrupt), torch.no_grad():
        within.setattr(export.torch.export, "export", interrupted)
        model(torch.ones(1, 2))
    with torch.no_grad():
        model(torch.ones(1, 2))
    assert model.programs
