"""Passes as pipeline text: the form that `pipeline_text.parse_pipeline` reads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any

_BARE = re.compile(r'[^\s,{}\[\]="]+')
RESERVED = {"true", "false", "none"}


def print_pipeline(passes: Iterable[Any]) -> str:
    """Text that `parse_pipeline` reads as the same passes; default options are left out."""
    return ",".join(_print_pass(item) for item in passes)


def _print_pass(item: Any) -> str:
    options = []
    for f in dataclasses.fields(item):
        value = getattr(item, f.name)
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        if value != default or type(value) is not type(default):
            options.append(f"{f.name}={print_value(value)}")
    return item.name + (f"{{{','.join(options)}}}" if options else "")


def print_value(value: Any) -> str:
    """The value of an option as pipeline text."""
    if isinstance(value, tuple):
        return f"[{','.join(map(print_value, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = _BARE.fullmatch(value) and value not in RESERVED and not _looks_numeric(value)
        return value if plain else json.dumps(value)
    return repr(value)


def _looks_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
