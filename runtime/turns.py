"""Cores that processes take in turn, where there are more processes than cores.

A process that computes beside more of its kind than there are cores is stopped in the midst of its
work, again and again: caches are filled anew, and a message that others wait for is late by a slice
of time. So a process takes a turn before it computes, and gives it back when it has sent what it
made. Turns are bytes in a pipe that all have inherited; who has waited longest gets the next.
"""

from __future__ import annotations

import os
import select

_LOOK = 1.0
"""Seconds between looks for whether the process that made the turns still lives."""


class Turns:
    """A share in turns that were `offered`. Used in a `with` statement, which waits for one.

    Raises RuntimeError where the process that offered the turns has ended: some may be lost then.
    """

    def __init__(self, take: int, give: int) -> None:
        self._take, self._give = take, give
        self._parent = os.getppid()

    def __enter__(self) -> None:
        while True:
            if select.select([self._take], [], [], _LOOK)[0]:
                try:
                    os.read(self._take, 1)
                    return
                except BlockingIOError:  # another was faster
                    continue
            if os.getppid() != self._parent:
                raise RuntimeError("the process that started this one has ended")

    def __exit__(self, *_: object) -> None:
        os.write(self._give, b".")


def offered(count: int) -> tuple[int, int]:
    """Descriptors of a pipe with ``count`` turns, to be inherited, and closed by the caller."""
    take, give = os.pipe()
    os.set_blocking(take, False)
    os.write(give, b"." * count)
    return take, give
