"""What a process made by `os.fork` does with models that its parent compiled."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from plait import compile
from plait.compiler.capture.export import EXCLUSIVE
from plait.compiler.lowering import select


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def in_child(check: Callable[[], None], seconds: float = 300.0) -> int:
    """The exit status of a child that runs ``check``; -1 where it did not end in time."""
    process = os.fork()
    if process == 0:
        try:
            check()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, 9)
    os.waitpid(process, 0)
    return -1


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


def test_launches_of_the_parent_run_on_one_thread() -> None:
    eager = model()
    compiled, x = compile(eager, tune="off"), torch.randn(128, 64)
    expected = compiled(x)
    table = compiled.programs[0].executable.executor.instance([x.shape], 2)._workspace().tables[0]
    assert table is not None and table.workers == 2

    def check() -> None:
        assert torch.equal(compiled(x), expected)
        assert "PLT-RUN-001" in [r.id for r in compiled.remarks]

    assert in_child(check) == 0
    assert torch.equal(compiled(x), expected)
    assert "PLT-RUN-001" not in [r.id for r in compiled.remarks]


def test_what_other_threads_hold_does_not_stop_the_child() -> None:
    compiled = compile(model(), tune="off")
    compiled(torch.randn(1, 64))
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with compiled._dispatcher._lock, select.database().index.guard:
            held.set()
            go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    x = torch.randn(2, 64)
    expected = model()(x)

    def check() -> None:
        torch.set_num_threads(1)  # torch's own operators wait for the parent's threads
        torch.testing.assert_close(compiled(x), expected)
        assert len(compiled.programs) == 2

    try:
        assert in_child(check) == 0
    finally:
        go.set()
        thread.join()


def test_a_fork_waits_for_the_end_of_a_capture() -> None:
    """Meanwhile torch is patched, which the child would never undo."""
    captured, held = threading.Event(), threading.Event()

    def capture() -> None:
        with EXCLUSIVE:
            held.set()
            time.sleep(0.2)
            captured.set()

    thread = threading.Thread(target=capture)
    thread.start()
    held.wait()

    def check() -> None:
        assert captured.is_set() and EXCLUSIVE.acquire(timeout=1)

    assert in_child(check) == 0
    thread.join()
