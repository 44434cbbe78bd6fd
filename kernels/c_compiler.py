"""Finds the C compiler. Light: the placement planner builds its engine without torch or TVM."""

from __future__ import annotations

import functools
import os
import shlex
import shutil


@functools.cache
def c_compiler() -> tuple[str, ...] | None:
    """The C compiler as a command: ``$CC``, or the first of cc, gcc and clang; None without one."""
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # unbalanced quotes name no command
        chosen = []
    candidates = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    for command in candidates:
        if shutil.which(command[0]):
            return tuple(command)
    return None
