"""Docs: tables name every option with its default, and every environment variable."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plait

ROOT = Path(plait.__file__).parent


@pytest.mark.parametrize(
    ("function", "page", "head"),
    [
        (plait.compile, "README.md", "option"),
        (plait.PlacementOptions, "docs/placement.md", "`PlacementOptions`"),
    ],
)
def test_every_option_is_there_with_its_default(
    function: Callable[..., Any], page: str, head: str
) -> None:
    text = (ROOT / page).read_text("utf-8")
    start = text.index(f"| {head} | default |")
    rows = text[start : text.index("\n\n", start)].splitlines()[2:]
    shown: dict[str, str] = {}
    for row in rows:
        names, defaults = (re.findall(r"`([^`]*)`", cell) for cell in row.split("|")[1:3])
        shown |= zip(names, defaults, strict=True)
    options = inspect.signature(function).parameters.values()
    expected = {
        x.name: repr(x.default).replace("'", '"')
        for x in options
        if x.name not in ("model", "self")
    }
    assert shown == expected


def test_every_environment_variable_is_there() -> None:
    read: set[str] = set()
    for layer in ("bench", "compiler", "kernels", "passes", "runtime"):
        for path in (ROOT / layer).rglob("*.py"):
            read |= set(re.findall(r"\bPLAIT_[A-Z_]+\b", path.read_text("utf-8")))
    told = re.findall(r"^\| `(PLAIT_[A-Z_]+)` \|", (ROOT / "docs/cli.md").read_text("utf-8"), re.M)
    assert read and read == set(told)
