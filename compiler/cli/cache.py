"""``plait cache``: the kernel database on disk."""

from __future__ import annotations

import sys

from rich.prompt import Confirm
from rich.table import Table

from ...kernels.database import Database, cache_directory
from .console import Console
from .error import CliError


def path() -> None:
    """Prints the directory."""
    print(cache_directory())


def info() -> None:
    """Prints counts and sizes."""
    table = Table(show_header=False, box=None)
    for name, value in Database().stats().items():
        shown = f"{value / 2**20:.1f} MiB" if name == "bytes" else str(value)
        table.add_row(name.replace("_", " "), shown)
    Console().print(table, highlight=False)


def verify() -> None:
    """Checks every entry and says what was removed. Exits with 1 where something was damaged."""
    database = Database()
    report = database.verify()
    for note in database.notes:
        print(f"{note.id}: {note.reason}; {note.hint}")
    print(f"{report.objects} libraries and {report.entries} kernels checked")
    if report.malformed:
        print(f"damaged rows, removed: {report.malformed}")
    for title, names in (
        ("damaged, removed", report.damaged),
        ("entry without library, removed", report.dangling),
        ("unused", report.orphans),
    ):
        for name in names:
            print(f"{title}: {name}")
    if not report.ok:
        sys.exit(1)


def prune(size: int) -> None:
    """Leaves at most ``size`` MiB of libraries, and none of another version of plait."""
    freed = _database().prune(size << 20)
    print(f"removed {freed / 2**20:.1f} MiB from {cache_directory()}")


def clear(yes: bool) -> None:
    """Empties the database, after a question where someone can answer it."""
    where = cache_directory()
    if not yes:
        if not sys.stdin.isatty():
            raise CliError("nobody can be asked whether to clear the cache", "add --yes")
        if not Confirm.ask(f"Remove all kernels in {where}?", default=False):
            return
    database = _database()
    before = database.stats()
    database.clear()
    size = before["bytes"] / 2**20
    print(f"removed {before['libraries']} libraries, {size:.1f} MiB, from {where}")


def _database() -> Database:
    """The database, to be changed. Raises CliError where it cannot be."""
    database = Database()
    if not database.persistent:
        where = cache_directory()
        raise CliError(f"{where} cannot be written", "change its permissions, or remove it")
    return database
