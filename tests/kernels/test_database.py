"""The kernel cache: shared by processes, and never a reason to fail."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from plait.kernels import build as build_module
from plait.kernels import database as database_module
from plait.kernels import index as index_module
from plait.kernels import loader
from plait.kernels.database import FRUGAL, Database, Entry, Measured


@pytest.fixture(scope="session")
def compile_c(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Compiles C source to a library: what the database keeps need not come from TVM."""
    compiler = build_module.c_compiler()
    if compiler is None:
        pytest.skip("no C compiler")

    def compile_source(source: str) -> bytes:
        path = tmp_path_factory.mktemp("c") / "k.so"
        command = [*compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=source.encode(), check=True)
        return path.read_bytes()

    return compile_source


@pytest.fixture(scope="session")
def library(compile_c: Callable[[str], bytes]) -> bytes:
    return compile_c("void f(long lo, long hi, long *out) { *out = hi; }\nvoid g(void) {}\n")


def entry(key: str = "k", symbol: str = "f", **kwargs) -> Entry:
    return Entry(key, symbol, {"tasks": 3, "config": {"ri": 6}}, **kwargs)


def call(database: Database, found: Entry) -> int:
    import ctypes

    out = ctypes.c_int64()
    loader.function(database.address(found), 1)(0, 42, ctypes.addressof(out))
    return out.value


def test_what_was_stored_is_found_and_runs_in_another_process(tmp_path: Path, library) -> None:
    Database(tmp_path).store([entry(seconds=1e-3, effort=5), entry("k2", "g")], library)
    again = Database(tmp_path)
    found = again.lookup("k")
    assert found is not None and found.record == {"tasks": 3, "config": {"ri": 6}}
    assert (found.seconds, found.effort, found.role) == (1e-3, 5, "fast")
    assert call(again, found) == 42
    assert set(again.lookup_many(["k", "k2", "none"])) == {"k", "k2"}
    assert again.lookup("none") is None and again.lookup("k", FRUGAL) is None
    assert again.notes == [] and again.persistent


def test_fast_and_frugal_winners_are_kept_apart(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    database.store([entry(), entry(symbol="g", role=FRUGAL)], library)
    fast, frugal = database.lookup("k"), database.lookup("k", FRUGAL)
    assert fast and frugal and (fast.symbol, frugal.symbol) == ("f", "g")
    database.store([entry(symbol="g")], library)
    assert (found := database.lookup("k")) and found.symbol == "g"


def test_many_keys_are_looked_up_at_once(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    database.store([entry(f"k{i}") for i in range(1200)], library)
    assert len(database.lookup_many([f"k{i}" for i in range(1300)])) == 1200


def test_measurements_are_kept_with_their_failures(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    slow, fast = Measured("k", {"r": 1}, 2.0, 1e-7), Measured("k", {"r": 2}, 1.0, 1e-7)
    wrong = Measured("k", {"r": 3}, None, 0.5, "wrong result")
    database.store([entry()], library, measured=[slow, wrong])
    database.record_measurements([fast])
    assert Database(tmp_path).measurements("k") == [fast, slow, wrong]
    for config in ({"r": 1, "c": 2}, {"c": 2, "r": 1}):
        database.record_measurements([Measured("other", config, 1.0)])
    assert len(database.measurements("other")) == 1


def test_progress_survives_and_is_replaced(tmp_path: Path) -> None:
    database = Database(tmp_path)
    assert database.progress("tune") is None
    database.set_progress("tune", {"done": ["a"]})
    database.set_progress("tune", {"done": ["a", "b"]})
    assert Database(tmp_path).progress("tune") == {"done": ["a", "b"]}


def test_another_version_sees_nothing_and_prune_removes_the_old(tmp_path: Path, library) -> None:
    old = Database(tmp_path, version="1")
    old.store([entry()], library)
    old.record_measurements([Measured("k", {}, 1.0)])
    new = Database(tmp_path, version="2")
    assert new.lookup("k") is None and new.measurements("k") == []
    assert new.stats()["stale_kernels"] == 1
    assert old.lookup("k") is not None
    path = next((tmp_path / "objects").glob("*/*.so"))
    os.utime(path, (0, 0))
    folders = [database.scratch("search") for database in (old, new)]
    assert new.prune(1 << 30) == len(library)
    assert [folder is not None and folder.exists() for folder in folders] == [False, True]
    assert new.stats()["stale_kernels"] == 0 and not path.exists()


def test_the_version_covers_sources_torch_and_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    version = database_module.codegen_version()
    assert len(version) == 16
    database_module.codegen_version.cache_clear()
    assert database_module.codegen_version() == version
    database_module.codegen_version.cache_clear()
    monkeypatch.setattr(database_module.importlib.metadata, "version", lambda name: "other")
    assert database_module.codegen_version() != version
    database_module.codegen_version.cache_clear()
    read = Path.read_bytes
    edited = lambda p: read(p) + (b"#" if p.name == "emit.py" else b"")  # noqa: E731
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_bytes", edited)
    assert database_module.codegen_version() != version
    database_module.codegen_version.cache_clear()


def test_a_damaged_library_is_dropped_with_its_entries(tmp_path: Path, library) -> None:
    stored = Database(tmp_path).store([entry(), entry("k2", "g")], library)
    path = next((tmp_path / "objects").glob("*/*.so"))
    path.write_bytes(library[: len(library) // 2])
    database = Database(tmp_path)
    assert database.lookup("k") is None and not path.exists()
    assert [n.id for n in database.notes] == ["PLT-CAC-003"]
    assert database.lookup("k2") is None
    database.store([entry()], library)
    assert (found := database.lookup("k")) and call(database, found) == 42
    path.unlink()  # this process has it mapped
    path.write_bytes(b"rubbish")
    assert Database(tmp_path).get_bundle(stored[0].object) is None


def test_a_missing_library_is_a_miss(tmp_path: Path, library) -> None:
    Database(tmp_path).store([entry()], library)
    next((tmp_path / "objects").glob("*/*.so")).unlink()
    database = Database(tmp_path)
    assert database.lookup("k") is None and database.stats()["kernels"] == 0


def test_an_altered_row_is_a_miss(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    database.store([entry()], library)
    database.index.execute([("UPDATE entries SET record = ?", ('{"tasks": 4}',))])
    assert database.lookup("k") is None
    assert [n.id for n in database.notes] == ["PLT-CAC-004"]


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("entries", "record = x'ff00'"),
        ("entries", "effort = 'z'"),
        ("measurements", "config = '{x'"),
        ("measurements", "seconds = 'abc'"),
        ("progress", "state = '[1'"),
        ("progress", "state = '[1]'"),
    ],
)
def test_malformed_rows_are_as_if_they_had_never_been(
    tmp_path: Path, library, table: str, change: str
) -> None:
    database = Database(tmp_path)
    database.store([entry()], library, measured=[Measured("k", {"ri": 6}, 1.0)])
    database.set_progress("task", {"done": 3})
    database.index.execute([(f"UPDATE {table} SET {change}", ())])
    found = {
        "entries": database.lookup("k") is not None,
        "measurements": bool(database.measurements("k")),
        "progress": database.progress("task") is not None,
    }
    assert found == {name: name != table for name in found}
    assert [n.id for n in database.notes] == ["PLT-CAC-004"]
    report = database.verify()
    assert report.malformed == 1 and not report.ok and database.verify().ok
    database.set_progress("task", {"done": 4})
    assert database.progress("task") == {"done": 4}


@pytest.mark.parametrize("damage", ["text", "empty page", "truncated", "foreign tables"])
def test_a_damaged_index_is_set_aside_and_rebuilt(tmp_path: Path, library, damage: str) -> None:
    first = Database(tmp_path)
    first.store([entry(f"k{i}") for i in range(400)], library)
    first.close()
    path = first.index.path
    content = path.read_bytes()
    if damage == "text":
        path.write_bytes(b"this is not a database, but it is long enough to be read" * 100)
    elif damage == "empty page":
        path.write_bytes(content[:8192] + bytes(8192) + content[16384:])
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE entries (x)")
        connection.close()
    database = Database(tmp_path)
    database.verify()
    database.store([entry("new")], library)
    assert database.persistent and [n.id for n in database.notes] == ["PLT-CAC-002"]
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
    again = Database(tmp_path)
    assert again.lookup("new") is not None and again.verify().ok and again.notes == []


def test_rows_that_can_be_read_outlive_a_damaged_index(tmp_path: Path, library) -> None:
    first = Database(tmp_path)
    first.store([entry(f"k{i:03}") for i in range(400)], library)
    first.set_progress("tune", {"done": 1})
    first.close()
    content = bytearray(first.index.path.read_bytes())
    pages = len(content) // 4096
    for page in range(2, pages):  # the first page that belongs to the entries' leaves
        if b"k200" in content[page * 4096 : (page + 1) * 4096]:
            content[page * 4096 : (page + 1) * 4096] = bytes(4096)
            break
    first.index.path.write_bytes(content)
    database = Database(tmp_path)
    assert not database.verify().dangling
    assert [n.id for n in database.notes] == ["PLT-CAC-002"]
    assert 0 < len(database.lookup_many([f"k{i:03}" for i in range(400)])) < 400
    assert database.progress("tune") == {"done": 1}


@pytest.mark.parametrize("name", ["file/cache", "x" * 300], ids=["in the way", "nor asked for"])
def test_a_directory_that_cannot_be_made_means_memory(tmp_path: Path, library, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    database = Database(tmp_path / name)
    assert not database.persistent and [n.id for n in database.notes] == ["PLT-CAC-001"]
    assert "PLAIT_CACHE_DIR" in database.notes[0].hint
    (stored,) = database.store([entry()], library)
    assert (found := database.lookup("k")) and call(database, found) == 42
    assert database.get_bundle(stored.object) == library
    assert database.stats()["bytes"] == len(library) and database.verify().ok
    database.clear()
    assert database.lookup("k") is None and database.stats()["bytes"] == 0


def test_a_read_only_directory_still_serves_what_it_holds(
    tmp_path: Path, library, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Database(tmp_path)
    writer.store([entry()], library)
    writer.close()

    def refuse(directory: Path) -> None:
        raise PermissionError(13, "Permission denied", str(directory))

    monkeypatch.setattr(index_module, "require_writable", refuse)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    database = Database(tmp_path)
    assert not database.persistent
    assert (found := database.lookup("k")) and call(database, found) == 42
    database.store([entry("new")], library + b"\0")
    assert database.lookup("new") is not None
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_directory_that_turns_read_only_in_use_means_memory(
    tmp_path: Path, library, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path)
    database.store([entry()], library)

    def refuse(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(database_module, "_write_atomically", refuse)
    database.store([entry("new")], library)
    assert not database.persistent and database.lookup("new") is not None
    assert database.lookup("k") is not None


def test_a_locked_index_means_memory(
    tmp_path: Path, library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_BUSY_SECONDS", 0.1)
    database = Database(tmp_path)
    database.store([entry()], library)
    other = sqlite3.connect(database.index.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    database.store([entry("new")], library)
    other.close()
    assert not database.persistent and "locked" in database.notes[0].reason
    assert database.lookup("new") is not None


def test_kernels_of_this_process_only_are_not_written(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    loaded = loader.load_bytes(library)
    database.store([entry()], None, loaded)
    assert (found := database.lookup("k")) and call(database, found) == 42
    assert Database(tmp_path).lookup("k") is None
    (kept,) = database.store([entry()], library)
    assert database.lookup("k") == kept == Database(tmp_path).lookup("k")
    database.store([entry("here")], None, loaded)
    database.clear()
    assert database.lookup("here") is None
    with pytest.raises(ValueError, match="needs the library's bytes"):
        database.store([entry()], None)


def test_verify_reports_and_mends(tmp_path: Path, compile_c, library) -> None:
    database = Database(tmp_path)
    (good,) = database.store([entry()], library)
    (bad,) = database.store([entry("bad")], compile_c("void f(void) { }\n"))
    (gone,) = database.store([entry("gone")], compile_c("int f(void) { return 1; }\n"))
    orphan = database.put_bundle(compile_c("int f(void) { return 2; }\n"))
    assert database.verify().ok
    paths = {p.stem: p for p in (tmp_path / "objects").glob("*/*.so")}
    paths[bad.object].write_bytes(b"x")
    paths[gone.object].unlink()
    report = database.verify()
    assert not report.ok and report.objects == 3
    assert (report.damaged, report.dangling) == ([bad.object], [gone.object])
    assert report.orphans == [orphan]
    assert database.verify().ok and database.lookup("k") is not None


def test_prune_drops_the_least_recently_used(tmp_path: Path, compile_c) -> None:
    database = Database(tmp_path)
    bundles = [compile_c(f"int f(void) {{ return {i}; }}\n") for i in range(4)]
    names = [database.store([entry(f"k{i}")], d)[0].object for i, d in enumerate(bundles)]
    paths = {p.stem: p for p in (tmp_path / "objects").glob("*/*.so")}
    now = time.time()
    for age, name in enumerate(names):
        os.utime(paths[name], (now - 100 - age, now - 100 - age))
    assert (found := Database(tmp_path).lookup("k3")) and found.object == names[3]  # a use
    freed = database.prune(len(bundles[3]) + len(bundles[0]))
    assert freed == len(bundles[1]) + len(bundles[2])
    assert set(Database(tmp_path).lookup_many(["k0", "k1", "k2", "k3"])) == {"k0", "k3"}
    begun = database.put_bundle(compile_c("int f(void) { return 4; }\n"))
    assert database.prune(1 << 30) == 0, "its rows may be of a transaction yet"
    os.utime(tmp_path / "objects" / begun[:2] / f"{begun}.so", (0, 0))
    assert database.prune(1 << 30) == len(bundles[0])
    with pytest.raises(ValueError, match="negative"):
        database.prune(-1)


def test_what_killed_processes_were_writing_is_removed(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    database.store([entry()], library)
    folder = next((tmp_path / "objects").iterdir())
    old, new, half = folder / ".writing-1", folder / ".writing-2", tmp_path / ".writing-3"
    half.mkdir()
    for path in (old, new, half / "driver.so"):
        path.touch()
    for path in (old, half):
        os.utime(path, (0, 0))
    assert database.verify().ok
    assert new.exists() and not old.exists() and not half.exists()
    os.utime(new, (0, 0))
    Database(tmp_path).store([entry()], library)
    assert not new.exists()


def test_clear_forgets_everything(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    database.store([entry()], library)
    database.set_progress("t", {})
    database.clear()
    assert database.lookup("k") is None and database.progress("t") is None
    assert database.stats()["bytes"] == 0 and not list(tmp_path.rglob("*.so"))


def test_threads_share_one_database(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(10):
                database.store([entry(f"k{number}.{i}")], library)
                assert database.lookup(f"k{number}.{i}") is not None
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and database.stats()["kernels"] == 40


_WORKER = """
import importlib.util, sys, types, os
sys.path.insert(0, sys.argv[1])
from plait.kernels.database import Database, Entry
directory, number, library = sys.argv[2], sys.argv[3], open(sys.argv[4], "rb").read()
for i in range(25):
    database = Database(directory)
    database.store([Entry(f"{number}.{i}", "f", {"n": i})], library + number.encode() * (i % 3))
    assert database.lookup(f"{number}.{i}").record == {"n": i}
    if number == "0" and i % 10 == 5:
        database.verify()
        database.prune(1 << 30)
    assert not database.notes, database.notes
    database.close()
"""


def test_processes_share_one_directory(tmp_path: Path, library) -> None:
    source = tmp_path / "library.so"
    source.write_bytes(library)
    root = Path(database_module.__file__).parents[1]
    parent = tmp_path / "path"
    parent.mkdir()
    (parent / "plait").symlink_to(root)
    command = [sys.executable, "-c", _WORKER, str(parent), str(tmp_path / "cache")]
    workers = [
        subprocess.Popen([*command, str(n), str(source)], stderr=subprocess.PIPE) for n in range(3)
    ]
    for worker in workers:
        _, error = worker.communicate(timeout=900)
        assert worker.returncode == 0, error.decode()
    database = Database(tmp_path / "cache")
    assert database.stats()["kernels"] == 75 and database.verify().ok
    assert not list((tmp_path / "cache" / "objects").rglob(".writing-*"))


def test_a_forked_child_uses_its_own_connection(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    database.store([entry()], library)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            database.store([entry("child")], library)
            status = 0 if database.lookup("k") is not None else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert database.lookup("child") is not None and database.lookup("k") is not None


def test_the_environment_chooses_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path / "here"))
    assert Database().directory == tmp_path / "here"
    monkeypatch.delenv("PLAIT_CACHE_DIR")
    assert "plait" in str(database_module.cache_directory())


def test_stats_are_plain_json(tmp_path: Path, library) -> None:
    database = Database(tmp_path)
    database.store([entry()], library)
    stats = json.loads(json.dumps(database.stats()))
    assert (stats["kernels"], stats["libraries"], stats["bytes"]) == (1, 1, len(library))
