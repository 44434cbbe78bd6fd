"""The error of the command line, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ...kernels.files import replacing


class CliError(Exception):
    """A fault of the call: what is wrong, and how to mend it."""

    def __init__(self, cause: str, mend: str = "") -> None:
        super().__init__(f"{cause}; {mend}" if mend else cause)


def check_output(path: Path | None) -> None:
    """Raises CliError if ``path`` cannot be written: before the work, so that none is lost."""
    if path is None:
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise CliError(f"folder {folder} does not exist", "make it first")
    if path.is_dir():
        raise CliError(f"{path} is a folder", "name a file in it")
    if path.exists() and not path.is_file():
        raise CliError(f"{path} is no regular file", "name another")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CliError(f"{path} cannot be written", "choose another place")


def check_apart(*paths: Path | None) -> None:
    """Raises CliError where two of the files read and written are one: one would be lost."""
    seen = set()
    for path in filter(None, paths):
        if path.resolve() in seen:
            raise CliError(f"{path} is named twice", "name another file")
        seen.add(path.resolve())


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: to a temporary one beside it, which takes its place."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """`write_text` for bytes."""
    with written(path) as scratch:
        scratch.write_bytes(data)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """`replacing`, whose errors are those of the command line."""
    try:
        with replacing(path) as scratch:
            yield scratch
    except OSError as error:
        raise CliError(f"{path} cannot be written ({error})", "choose another place") from error
