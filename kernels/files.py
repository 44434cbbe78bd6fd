"""Files that are written whole or not at all, and what killed processes leave of them."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ABANDONED_SECONDS = 3600.0
"""What is younger may be of a process that is about to lock it, or of one that knows no locks."""
_RANDOM = "[a-z0-9_]" * 8  # what `tempfile` puts into names


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside ``path`` with its ending, to be written inside the ``with`` block, after
    which it takes the place of ``path``. Where the block raises, ``path`` stays as it was.
    What killed processes left of writing ``path`` is removed.

    Raises OSError where that cannot be, for one where ``path`` is a folder or a device, which
    renaming would replace by a file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    prefix = f".{path.stem}.plait-"
    drop_abandoned(path.parent, f"{glob.escape(prefix)}{_RANDOM}{glob.escape(path.suffix)}")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with _locked(temporary):
            yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a crash could leave the new name without the content
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder for temporary files, removed behind the ``with`` block. What killed processes left
    under the same prefix is removed before. Raises OSError.
    """
    drop_abandoned(Path(tempfile.gettempdir()), f"{glob.escape(prefix)}{_RANDOM}")
    with tempfile.TemporaryDirectory(prefix=prefix) as name, _locked(Path(name)):
        yield Path(name)


def drop_abandoned(folder: Path, pattern: str) -> None:
    """Removes the user's own files and folders in ``folder`` with names like ``pattern`` that are
    old and that no living process has locked.
    """
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for path in list(folder.glob(pattern)):
            with contextlib.suppress(OSError):  # BlockingIOError: locked
                status = path.lstat()
                if time.time() - status.st_mtime < ABANDONED_SECONDS:
                    continue
                if status.st_uid != os.getuid() or path.is_symlink():
                    continue
                with _locked(path, alone=True):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _locked(path: Path, alone: bool = False) -> Iterator[None]:
    """While it is open, others see that ``path`` is in use. With ``alone``, raises OSError where
    they use it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError:  # some file systems have no locks: there the age alone tells
            if alone:
                raise
        yield
    finally:
        os.close(handle)
