"""A sqlite index that any number of processes share, and that mends itself.

`Index` runs transactions on a few fixed tables. A damaged file is set aside and replaced by a new
one with all rows that can still be read; where no file can be written, the tables live in memory.
Each such event becomes a `Note`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

_BUSY_SECONDS = 30.0
FILE = "kernels-v1.sqlite"  # other columns get another name, so that old and new share a cache
TABLES = {
    "entries": (
        "key", "role", "version", "object", "symbol", "record", "seconds", "effort", "checksum"
    ),
    "measurements": ("key", "config", "version", "seconds", "error", "note"),
    "progress": ("task", "version", "state"),
}  # fmt: skip
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT, role TEXT, version TEXT, object TEXT, symbol TEXT, record TEXT, seconds REAL,
    effort INTEGER, checksum TEXT, PRIMARY KEY (key, role, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS measurements (
    key TEXT, config TEXT, version TEXT, seconds REAL, error REAL, note TEXT,
    PRIMARY KEY (key, config, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS progress (
    task TEXT, version TEXT, state TEXT, PRIMARY KEY (task, version)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_by_object ON entries (object);
"""
AGAIN = "nothing to do: it is made again"
# sqlite's errors that say something of the surroundings and not of the file's contents.
_SURROUNDINGS = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
    }
)


@dataclass(frozen=True)
class Note:
    """Something the cache had to work around: a stable ID, what happened, what to do."""

    id: str
    reason: str
    hint: str = ""


class Index:
    """The tables in the file `FILE` of ``directory``; usable from any thread and any process.

    ``persistent`` turns False when the file cannot be used; the tables then live in memory, with
    the contents of a file that can be read but not written. ``notes`` tells what happened.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes: list[Note] = []
        self.persistent = True
        self.guard = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        _indices.add(self)
        try:
            (directory / "objects").mkdir(parents=True, exist_ok=True, mode=0o700)
            require_writable(directory)
        except OSError as error:
            self.go_to_memory(f"the kernel cache {directory} cannot be written ({error})")

    @property
    def path(self) -> Path:
        """The index file."""
        return self.directory / FILE

    def say(self, note_id: str, reason: str, hint: str) -> None:
        """Adds a note, once."""
        note = Note(note_id, reason, hint)
        if note not in self.notes:
            self.notes.append(note)

    def close(self) -> None:
        """Closes the file; the next use opens it again (tables in memory are lost)."""
        with self.guard:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows of a query."""
        return self._run(lambda c: c.execute(query, tuple(values)).fetchall())

    def rows(self, table: str, condition: str = "1", values: Sequence[Any] = ()) -> list[Any]:
        """The whole rows of a table that fulfil a condition. Malformed ones are told and left out,
        as if they had never been.
        """
        columns = ", ".join(TABLES[table])
        found = self.read(f"SELECT {columns} FROM {table} WHERE {condition}", values)
        sound = [row for row in found if _is_well_formed(table, row)]
        if len(sound) < len(found):
            reason = f"{len(found) - len(sound)} rows of {table} were damaged"
            self.say("PLT-CAC-004", reason, AGAIN)
        return sound

    def drop_malformed(self) -> int:
        """Removes all malformed rows; returns how many there were."""
        dropped = 0
        for table, columns in TABLES.items():
            for row in self.read(f"SELECT {', '.join(columns)} FROM {table}"):
                if not _is_well_formed(table, row):
                    same = " AND ".join(f"{column} IS ?" for column in columns)
                    self.execute([(f"DELETE FROM {table} WHERE {same}", row)])
                    dropped += 1
        return dropped

    def write(self, rows: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Inserts or replaces rows, given with their tables' names, in one transaction."""
        self.execute(
            [
                (f"INSERT OR REPLACE INTO {t} VALUES ({','.join('?' * len(row))})", row)
                for t, row in rows
            ]
        )

    def execute(self, statements: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Runs statements in one transaction."""

        def work(connection: sqlite3.Connection) -> list[Any]:
            with connection:  # commits, or rolls back on an error
                connection.execute("BEGIN IMMEDIATE")
                for query, values in statements:
                    connection.execute(query, values)
            return []

        if statements:
            self._run(work)

    def check(self) -> None:
        """Reads the whole file, and mends it when it is damaged."""

        def work(connection: sqlite3.Connection) -> list[Any]:
            _require_sound(connection)
            return []

        self._run(work)

    def go_to_memory(self, reason: str) -> None:
        """Goes on in memory, with the contents of a file that can only be read."""
        self.close()
        self.persistent = False
        self.say(
            "PLT-CAC-001",
            f"{reason}; kernels are kept in memory and compiled again by the next process",
            "set PLAIT_CACHE_DIR to a directory that can be written",
        )
        connection = self._connect()
        # OSError: a folder that nobody else may look into, say the home of another user.
        with contextlib.suppress(sqlite3.DatabaseError, OSError):
            if self.path.is_file():
                source = _open_immutable(self.path)
                with contextlib.closing(source):
                    _require_sound(source)
                    source.backup(connection)
        connection.executescript(_SCHEMA)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps other processes (and threads) from opening, mending and pruning meanwhile."""
        with self.guard:
            if not self.persistent:
                yield
                return
            lock = filelock.FileLock(
                self.directory / "kernels.lock", timeout=4 * _BUSY_SECONDS, is_singleton=True
            )
            try:
                lock.acquire()
            except (OSError, NotImplementedError, filelock.Timeout):
                # Rows and files change atomically without it; only a repair might be done twice.
                yield
                return
            try:
                yield
            finally:
                lock.release()

    # -- opening and mending ----------------------------------------------------------------------

    def _run(self, work: Callable[[sqlite3.Connection], list[Any]]) -> list[Any]:
        """Runs ``work(connection)``; mends the index and tries again when it is damaged."""
        with self.guard:
            for attempt in (1, 2):
                try:
                    return work(self._connect())
                except sqlite3.DatabaseError as error:
                    if not self.persistent:
                        raise
                    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
                    if code in _SURROUNDINGS or attempt == 2:
                        self.go_to_memory(f"the kernel index {self.path} cannot be used ({error})")
                    else:
                        self._mend(error)
            return work(self._connect())

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            with self.exclusive():
                self._connection = _open(str(self.path) if self.persistent else ":memory:")
        return self._connection

    def _mend(self, error: sqlite3.DatabaseError) -> None:
        """Sets a damaged file aside and starts a new one with every row that can still be read."""
        self.close()
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        saved: dict[str, list[Any]] = {}
        with self.exclusive():
            try:  # another process may have mended it while this one waited
                with contextlib.closing(_open(str(self.path))) as connection:
                    _require_sound(connection)
                    return
            except sqlite3.DatabaseError:
                pass
            try:
                os.replace(self.path, aside)
                for suffix in ("-wal", "-shm"):
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)
                saved = _salvage(aside)
                with contextlib.closing(_open(str(self.path))) as connection, connection:
                    for table, rows in saved.items():
                        marks = ",".join("?" * len(TABLES[table]))
                        connection.executemany(
                            f"INSERT OR REPLACE INTO {table} VALUES ({marks})", rows
                        )
            except (OSError, sqlite3.DatabaseError) as failure:
                self.go_to_memory(f"the damaged index {self.path} cannot be replaced ({failure})")
                return
        self.say(
            "PLT-CAC-002",
            f"the kernel index was damaged ({error}); {sum(map(len, saved.values()))} rows were"
            f" saved, the rest is made again; the damaged file is {aside}",
            "delete the damaged file, and check the disk if this happens again",
        )


_indices: weakref.WeakSet[Index] = weakref.WeakSet()
_abandoned: list[sqlite3.Connection] = []


def _begin_alone() -> None:
    """A forked child must not touch its parent's connections, not even to close them; nor will
    threads that it does not have let go of their locks.
    """
    for index in list(_indices):
        index.guard = threading.RLock()
        if index._connection is not None:
            _abandoned.append(index._connection)
            index._connection = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_alone)


def require_writable(directory: Path) -> None:
    """Raises OSError unless files can be made in ``directory``."""
    with tempfile.TemporaryFile(dir=directory):
        pass


def _open(name: str) -> sqlite3.Connection:
    """Opens (and makes, if need be) the index. Raises sqlite3.DatabaseError when it is damaged."""
    connection = sqlite3.connect(
        name, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        # Where shared memory does not work (network file systems), sqlite keeps its old journal.
        connection.execute("PRAGMA journal_mode=WAL").fetchone()
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(_SCHEMA)
        for table, columns in TABLES.items():
            found = tuple(r[1] for r in connection.execute(f"PRAGMA table_info({table})"))
            if found != columns:
                raise sqlite3.DatabaseError(f"table {table} has the columns {found}")
    except BaseException:
        connection.close()
        raise
    return connection


def _open_immutable(path: Path) -> sqlite3.Connection:
    """Opens a file that nobody writes: even a mere reader of a live one writes beside it."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def _require_sound(connection: sqlite3.Connection) -> None:
    result = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if result != "ok":
        raise sqlite3.DatabaseError(result)


def _salvage(path: Path) -> dict[str, list[Any]]:
    """The well-formed rows that can be read from a damaged index, by table."""
    saved: dict[str, list[Any]] = {}
    for table, columns in TABLES.items():
        rows: list[Any] = saved.setdefault(table, [])
        with contextlib.suppress(sqlite3.DatabaseError, UnicodeDecodeError):
            with contextlib.closing(_open_immutable(path)) as source:
                for row in source.execute(f"SELECT {','.join(columns)} FROM {table}"):
                    if _is_well_formed(table, row):
                        rows.append(row)
    return saved


def _is_well_formed(table: str, row: Sequence[Any]) -> bool:
    values = dict(zip(TABLES[table], row, strict=True))
    numbers = ("seconds", "error", "effort")
    texts = [v for c, v in values.items() if c not in numbers]
    if not all(isinstance(v, str) for v in texts):
        return False
    try:
        for column in ("record", "config", "state"):
            if column in values and not isinstance(json.loads(values[column]), dict):
                return False
    except ValueError:
        return False
    return all(v is None or isinstance(v, int | float) for c, v in values.items() if c in numbers)
