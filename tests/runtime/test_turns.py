"""Turns: so many compute at a time, and no turn is lost."""

from __future__ import annotations

import os
import select
import threading
import time

import pytest

from plait.runtime import turns
from plait.runtime.turns import Turns, offered


def test_so_many_at_a_time() -> None:
    take, give = offered(2)
    assert not os.get_blocking(take), "another may be faster, and the end of who offered be missed"
    with Turns(take, give), Turns(take, give):
        assert not select.select([take], [], [], 0)[0]
    inside = most = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        mine = Turns(take, give)
        for k in range(50):
            try:
                with mine:
                    with lock:
                        inside += 1
                        most = max(most, inside)
                    time.sleep(0)
                    with lock:
                        inside -= 1
                    if k % 10 == 0:
                        raise ValueError  # gives the turn back, too
            except ValueError:
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300.0)
        assert not thread.is_alive()
    assert most <= 2
    assert os.read(take, 10) == b".."
    os.close(take)
    os.close(give)


def test_the_end_of_who_offered_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LOOK", 0.01)
    take, give = offered(1)
    mine = Turns(take, give)
    with mine:
        monkeypatch.setattr(os, "getppid", lambda: -1)
        with pytest.raises(RuntimeError, match="has ended"), mine:
            pass
    os.close(take)
    os.close(give)
