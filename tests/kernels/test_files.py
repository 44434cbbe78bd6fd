"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from plait.kernels.files import replacing, scratch_folder


def test_the_new_content_takes_the_place_of_the_old_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old" and scratch.suffix == ".json"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as scratch:
        scratch.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_folders_and_devices_are_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(OSError, match="not a regular file"), replacing(path):
            pass
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "a"):
        pass
    assert list(tmp_path.iterdir()) == [pipe]


WRITER = """
import sys, time
from pathlib import Path
from plait.kernels.files import replacing, scratch_folder
with replacing(Path(sys.argv[1])), scratch_folder("plait-build-"):
    print("writing", flush=True)
    time.sleep(600)
"""


def test_only_what_killed_processes_were_writing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "a[1].json"
    others = [tmp_path / x for x in (".a[1].notes.json", ".b.plait-1.json", "plait-build-mine.txt")]
    for other in others:
        other.touch()
        os.utime(other, (0, 0))
    others.append(tmp_path / ".a[1].plait-0a1b2c3d.json")
    others[-1].symlink_to(others[0])
    os.utime(others[-1], (0, 0), follow_symlinks=False)

    def write() -> None:
        with replacing(path) as temporary, scratch_folder("plait-build-") as folder:
            assert temporary.is_file() and folder.is_dir()

    command = [sys.executable, "-c", WRITER, str(path)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        left = [x for x in tmp_path.iterdir() if x not in others]
        assert len(left) == 2
        for x in left:
            os.utime(x, (0, 0))  # as if it had begun long ago
        write()
        assert set(tmp_path.iterdir()) == {*left, *others, path}
        process.send_signal(signal.SIGKILL)
    (folder,) = filter(Path.is_dir, left)
    os.utime(folder)  # as if it had just begun
    write()
    assert set(tmp_path.iterdir()) == {folder, *others, path}
    os.utime(folder, (0, 0))
    write()
    assert set(tmp_path.iterdir()) == {*others, path}
