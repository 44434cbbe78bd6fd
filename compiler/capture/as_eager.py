"""Choices that transformers makes otherwise while a model is exported, made as in eager mode.

An exported program is taken for one that runs with other sizes and by other engines. So masks are
made even where nothing is hidden, or where the sizes tell that a causal attention needs none; some
models make them for other sizes than their attention's and work only because eager mode does not.
Triangular systems of linear attention become a program for each row of a chunk. Here sizes are
guarded and every operator runs: what eager mode chooses is right, shorter, and what results are
compared with. Of what depends on a mask's values, see `masks`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

QUESTION = "is_torchdynamo_exporting"
"""The library's name of the question whether a model is being exported."""
MODULES = (
    "masking_utils",
    *(
        f"models.{name}.modeling_{name}"
        for name in ("olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen4_exp")
    ),
)
"""Modules of transformers in which the answer shall be no. Others would answer that by operators
that only run compiled, such as an associative scan."""


@contextlib.contextmanager
def as_eager() -> Iterator[None]:
    """Within it, `MODULES` choose as in eager mode. Those that are not loaded stay so."""
    placed: list[tuple[dict[str, Any], Any]] = []
    try:
        for name in MODULES:
            names = vars(sys.modules.get(f"transformers.{name}", object))
            if QUESTION in names:
                placed.append((names, names[QUESTION]))
                names[QUESTION] = lambda: False
        yield
    finally:
        for names, original in placed:
            names[QUESTION] = original
