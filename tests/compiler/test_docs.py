"""Docs: tables of options name every option, with its default."""

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
