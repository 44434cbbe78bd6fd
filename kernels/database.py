"""Compiled kernels kept on disk: a sqlite index beside content-addressed libraries.

::

    <directory>/kernels-v1.sqlite  what won for which kernel, and what was measured
    <directory>/objects/ab/<sha256>.so
    <directory>/scratch/<version>/ records of searches that may go on
    <directory>/kernels.lock       held while the index is made, repaired or pruned

The directory is ``$PLAIT_CACHE_DIR``, or the user's cache directory. Any number of processes may
use it at once: rows change in transactions, libraries are renamed into place. Nothing in it is
precious: what is damaged is set aside, told in a `Note`, and made again (`kernels.index`). Where
the directory cannot be written, the same interface works in memory.

This module imports neither torch nor TVM.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import loader
from .files import ABANDONED_SECONDS, drop_abandoned
from .index import AGAIN, TABLES, Index, Note
from .loader import cache_directory

FAST, FRUGAL = "fast", "frugal"
_LOCAL = "process:"  # prefix of the "objects" that exist in this process only
_NOT_CODEGEN = frozenset({"database.py", "files.py", "index.py", "loader.py", "race.py", "tune.py"})


@functools.cache
def codegen_version() -> str:
    """A short hash of what decides the code that comes out: plait's generator, torch and TVM."""
    state = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.name not in _NOT_CODEGEN:
            state.update(path.relative_to(root).as_posix().encode())
            state.update(path.read_bytes())
    for package in ("torch", "apache-tvm", "apache-tvm-ffi"):
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = "none"
        state.update(f"{package}={installed}".encode())
    return state.hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """The kernel that won for ``key``.

    ``record`` is the caller's own JSON; ``role`` is "fast" (best alone) or "frugal" (least time
    times resources); ``seconds`` its measured time (None when nothing was raced); ``effort`` how
    many candidates were tried. ``object`` is filled in by `Database.store`.
    """

    key: str
    symbol: str
    record: dict[str, Any]
    role: str = FAST
    seconds: float | None = None
    effort: int = 0
    object: str = ""


@dataclass(frozen=True)
class Measured:
    """One candidate's outcome for ``key``; ``seconds`` None means that it failed, see ``note``."""

    key: str
    config: dict[str, Any]
    seconds: float | None
    error: float | None = None
    note: str = ""


@dataclass
class Report:
    """What `Database.verify` found and removed."""

    objects: int = 0
    entries: int = 0
    damaged: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    malformed: int = 0

    @property
    def ok(self) -> bool:
        """Whether everything that entries refer to was sound."""
        return not (self.damaged or self.dangling or self.malformed)


class Database:
    """Winners, measurements and libraries; usable from any thread and any process at once.

    ``version`` defaults to `codegen_version`: rows of another version are invisible.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, version: str = "") -> None:
        self.directory = Path(directory) if directory is not None else cache_directory()
        self.version = version or codegen_version()
        self.index = Index(self.directory)
        self._memory_objects: dict[str, bytes] = {}
        self._libraries: dict[str, loader.Library] = {}
        self._local: dict[tuple[str, str], Entry] = {}
        self._swept = False

    @property
    def notes(self) -> list[Note]:
        """What had to be worked around so far, each event once."""
        return self.index.notes

    @property
    def persistent(self) -> bool:
        """Whether what is stored outlives this process."""
        return self.index.persistent

    # -- winners ------------------------------------------------------------------------------

    def lookup(self, key: str, role: str = FAST) -> Entry | None:
        """The winner for ``key`` whose library is at hand and sound, or None."""
        return self.lookup_many([key], role).get(key)

    def lookup_many(self, keys: Sequence[str], role: str = FAST) -> dict[str, Entry]:
        """The winners for those of ``keys`` that have one with a sound library."""
        found = {k: e for k in keys if (e := self._local.get((k, role))) is not None}
        missing = [k for k in keys if k not in found]
        for start in range(0, len(missing), 500):
            part = missing[start : start + 500]
            marks = ",".join("?" * len(part))
            condition = f"role = ? AND version = ? AND key IN ({marks})"
            rows = self.index.rows("entries", condition, (role, self.version, *part))
            for key, _, _, name, symbol, record, seconds, effort, checksum in rows:
                if checksum != _checksum(key, role, name, symbol, record):
                    self.index.say("PLT-CAC-004", f"the cached kernel {key} was damaged", AGAIN)
                    continue
                entry = Entry(key, symbol, json.loads(record), role, seconds, effort, name)
                if self._is_sound(entry):
                    found[key] = entry
        return found

    def store(
        self,
        entries: Iterable[Entry],
        data: bytes | None,
        library: loader.Library | None = None,
        measured: Iterable[Measured] = (),
    ) -> list[Entry]:
        """Records winners that live in the library ``data``; returns them with ``object`` set.

        Older winners under the same key and role are replaced. Without ``data`` the kernels exist
        in this process only (``library`` holds them) and so do their entries.
        """
        entries = list(entries)
        if data is None:
            if library is None:
                raise ValueError("store() needs the library's bytes, or the library itself")
            name = f"{_LOCAL}{id(library)}"
            self._libraries[name] = library
            entries = [replace(e, object=name) for e in entries]
            self._local.update({(e.key, e.role): e for e in entries})
            self.record_measurements(measured)
            return entries
        name = self.put_bundle(data)
        if library is not None:
            self._libraries.setdefault(name, library)
        entries = [replace(e, object=name) for e in entries]
        for entry in entries:
            self._local.pop((entry.key, entry.role), None)
        rows = [("entries", self._row(e)) for e in entries]
        self.index.write(rows + self._measurement_rows(measured))
        return entries

    def address(self, entry: Entry) -> int:
        """The address of an entry's kernel. Raises `loader.LoadError` when it cannot be loaded."""
        return self.library(entry.object).address(entry.symbol)

    def library(self, name: str) -> loader.Library:
        """The loaded library of an entry's ``object``. Raises `loader.LoadError`."""
        with self.index.guard:
            if name not in self._libraries:
                if name in self._memory_objects:
                    self._libraries[name] = loader.load_bytes(self._memory_objects[name], name)
                else:
                    path = self._object_path(name)
                    self._libraries[name] = loader.load(path, name)
                    with contextlib.suppress(OSError):
                        os.utime(path)  # least recently used goes first in `prune`
            return self._libraries[name]

    def _row(self, e: Entry) -> tuple[Any, ...]:
        record = json.dumps(e.record)
        checksum = _checksum(e.key, e.role, e.object, e.symbol, record)
        return (
            *(e.key, e.role, self.version, e.object, e.symbol, record, e.seconds, e.effort),
            checksum,
        )

    def _is_sound(self, entry: Entry) -> bool:
        try:
            self.address(entry)
            return True
        except loader.LoadError as error:
            self.index.say("PLT-CAC-003", f"a cached kernel library is unusable: {error}", AGAIN)
            self._drop_object(entry.object)
            return False

    # -- measurements and tuning progress -------------------------------------------------------

    def record_measurements(self, measured: Iterable[Measured]) -> None:
        """Keeps candidates' outcomes; a later one of the same config replaces an earlier."""
        self.index.write(self._measurement_rows(measured))

    def measurements(self, key: str) -> list[Measured]:
        """Everything measured for ``key``, the fastest first, failures last."""
        rows = self.index.rows("measurements", "key = ? AND version = ?", (key, self.version))
        found = [Measured(k, json.loads(c), s, e, n) for k, c, _, s, e, n in rows]
        return sorted(found, key=lambda m: math.inf if m.seconds is None else m.seconds)

    def _measurement_rows(self, measured: Iterable[Measured]) -> list[tuple[str, tuple[Any, ...]]]:
        return [
            (
                "measurements",
                (
                    m.key,
                    json.dumps(m.config, sort_keys=True),
                    self.version,
                    m.seconds,
                    m.error,
                    m.note,
                ),
            )
            for m in measured
        ]

    def progress(self, task: str) -> dict[str, Any] | None:
        """The state that `set_progress` kept for a long-running task, or None."""
        rows = self.index.rows("progress", "task = ? AND version = ?", (task, self.version))
        return json.loads(rows[0][-1]) if rows else None

    def unlinked(self, why: str) -> None:
        """Notes that kernels live in this process only, since the C compiler failed on them."""
        self.index.say("PLT-CAC-005", why, "CC=... names another C compiler")

    def set_progress(self, task: str, state: dict[str, Any]) -> None:
        """Keeps where a long-running task is, so that an interrupted one can go on."""
        self.set_progresses({task: state})

    def set_progresses(self, states: Mapping[str, dict[str, Any]]) -> None:
        """`set_progress` of several tasks at once."""
        self.index.write(
            [("progress", (task, self.version, json.dumps(s))) for task, s in states.items()]
        )

    def scratch(self, name: str) -> Path | None:
        """A directory for a task's working files, which `clear` removes; None without a disk."""
        if not self.persistent:
            return None
        path = self.directory / "scratch" / self.version / name
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            self.index.go_to_memory(f"the kernel cache {self.directory} is unusable ({error})")
            return None
        return path

    # -- libraries ------------------------------------------------------------------------------

    def put_bundle(self, data: bytes) -> str:
        """Keeps a library under its content hash, which is returned."""
        name = loader.digest(data)
        if not self._swept:
            self._swept = True
            self._drop_abandoned()
        if self.persistent:
            try:
                path = self._object_path(name)
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                # An existing file is replaced all the same: it might be damaged.
                _write_atomically(path, data)
                return name
            except OSError as error:
                self.index.go_to_memory(f"the kernel cache {self.directory} is unusable ({error})")
        self._memory_objects[name] = data
        return name

    def get_bundle(self, name: str) -> bytes | None:
        """The library with content hash ``name``; None when it is missing or damaged."""
        data = self._memory_objects.get(name)
        if data is None:
            try:
                data = self._object_path(name).read_bytes()
            except OSError:
                return None
            if loader.digest(data) != name:
                self.index.say("PLT-CAC-003", f"the kernel library {name[:12]} is damaged", AGAIN)
                self._drop_object(name)
                return None
        return data

    def _object_path(self, name: str) -> Path:
        return self.directory / "objects" / name[:2] / f"{name}.so"

    def _drop_object(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._object_path(name).unlink(missing_ok=True)
        self._memory_objects.pop(name, None)
        self.index.execute([("DELETE FROM entries WHERE object = ?", (name,))])

    def _objects(self) -> dict[str, Path]:
        try:
            return {p.stem: p for p in (self.directory / "objects").glob("*/*.so")}
        except OSError:  # a folder that may not be looked into
            return {}

    # -- upkeep ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counts and sizes, and where the cache is; plain JSON."""
        entries, measured = (
            self.index.read(f"SELECT COUNT(*) FROM {t} WHERE version = ?", (self.version,))[0][0]
            for t in ("entries", "measurements")
        )
        stale = self.index.read("SELECT COUNT(*) FROM entries WHERE version != ?", (self.version,))
        sizes = [_size(p) for p in self._objects().values()] if self.persistent else []
        sizes += [len(d) for d in self._memory_objects.values()]
        return {
            "directory": str(self.directory),
            "persistent": self.persistent,
            "version": self.version,
            "kernels": entries + len(self._local),
            "measurements": measured,
            "stale_kernels": stale[0][0],
            "libraries": len(sizes),
            "bytes": sum(sizes),
        }

    def verify(self) -> Report:
        """Reads everything, removes what is damaged or leads nowhere, and reports it."""
        report = Report()
        with self.index.exclusive():
            self.index.check()
            report.malformed = self.index.drop_malformed()
            self._drop_abandoned()
            objects = self._objects()
            for name, path in objects.items():
                try:
                    sound = loader.digest(path.read_bytes()) == name
                except OSError:
                    continue  # removed by another process in the meantime
                report.objects += 1
                if not sound:
                    report.damaged.append(name)
                    self._drop_object(name)
            referred = {r[0] for r in self.index.read("SELECT DISTINCT object FROM entries", ())}
            report.entries = self.index.read("SELECT COUNT(*) FROM entries", ())[0][0]
            for name in referred - objects.keys() - self._memory_objects.keys():
                report.dangling.append(name)
                self._drop_object(name)
            report.orphans = sorted(objects.keys() - referred - set(report.damaged))
        return report

    def prune(self, max_bytes: int) -> int:
        """Shrinks the libraries to ``max_bytes``; returns the bytes freed.

        First go kernels of other versions and libraries nothing refers to, then the least recently
        loaded. Raises ValueError for a negative size.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        freed = 0
        with self.index.exclusive():
            self.index.execute(
                [(f"DELETE FROM {t} WHERE version != ?", (self.version,)) for t in TABLES]
            )
            self._drop_abandoned()
            for path in (self.directory / "scratch").glob("*"):
                if path.name != self.version:
                    shutil.rmtree(path, ignore_errors=True)
            referred = {r[0] for r in self.index.read("SELECT DISTINCT object FROM entries", ())}
            kept: list[tuple[float, int, str]] = []
            for name, path in self._objects().items():
                try:
                    status = path.stat()
                except OSError:
                    continue
                age = time.time() - status.st_mtime
                if name not in referred and age > ABANDONED_SECONDS:  # else of a transaction yet
                    self._drop_object(name)
                    freed += status.st_size
                else:
                    kept.append((status.st_mtime, status.st_size, name))
            total = sum(size for _, size, _ in kept)
            for _, size, name in sorted(kept):
                if total <= max_bytes:
                    break
                self._drop_object(name)
                total -= size
                freed += size
        return freed

    def _drop_abandoned(self) -> None:
        """Removes what processes were writing that were killed meanwhile."""
        if self.persistent:
            drop_abandoned(self.directory, "**/.writing-*")

    def clear(self) -> None:
        """Forgets everything, on disk and in this process. Loaded kernels stay usable."""
        with self.index.exclusive():
            self.index.execute([(f"DELETE FROM {t}", ()) for t in TABLES])
            for path in self._objects().values() if self.persistent else ():
                with contextlib.suppress(OSError):
                    path.unlink()
            if self.persistent:
                shutil.rmtree(self.directory / "scratch", ignore_errors=True)
            self._memory_objects.clear()
            self._local.clear()

    def close(self) -> None:
        """Closes the index; the next use opens it again (a database in memory is lost)."""
        self.index.close()


def _checksum(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that other processes see whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
