"""Profiles as files: versioned JSON, checked entry by entry when read.

::

    {"format": "plait-profile", "version": 1, "model": class name, "fingerprint": hexadecimal,
     "fitted": statistics, "heldout": statistics}

Statistics are ``{"batches": n, "routers": [...], "pairs": [...]}`` with the fields of
`stats.RouterStats`, and pairs as ``{"first", "second", "together"}``, where first and second
are positions in the list of routers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...kernels.files import replacing
from ..errors import FileError
from .stats import Counts, Key, RouterStats, Statistics, Table

FORMAT = "plait-profile"
VERSION = 1
_MEND = "profile the model again"
_LIMIT = 1 << 62  # counts are exact integers far below this


def write(path: Path, model: str, fingerprint: str, fitted: Statistics, held: Statistics) -> None:
    """Writes a profile beside its place, then renames it, so that no reader sees half of one.

    Raises FileError when it cannot; what was there before is then unchanged.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "fingerprint": fingerprint,
        "fitted": _to_json(fitted),
        "heldout": _to_json(held),
    }
    try:
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(document), "utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError("PLT-PRF-003", f"cannot write {path}: {reason}", "use another") from error


def read(path: Path) -> tuple[str, str, Statistics, Statistics]:
    """Model name, fingerprint, fitted and held-out statistics of the profile at ``path``.

    Raises FileError when it cannot be read, is no profile, is cut short, is of another version, or
    holds counts that no run can give.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError("PLT-PRF-004", f"cannot read {path}: {reason}", "check the path") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        reason = f"{path} is not JSON, or cut short: {reason}"
        raise FileError("PLT-PRF-004", reason, _MEND) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FileError("PLT-PRF-004", f"{path} is not a profile", "plait profile writes one")
    version = document.get("version")
    if type(version) is not int or version != VERSION:  # JSON's true is Python's 1
        reason = f"{path} has version {version!r}, this is for {VERSION}"
        raise FileError("PLT-PRF-005", reason, _MEND)
    try:
        model, mark = (_text(document, name, "") for name in ("model", "fingerprint"))
        parts = [_statistics(_item(document, n, ""), n) for n in ("fitted", "heldout")]
        _agree(*parts)
    except _Wrong as error:
        raise FileError("PLT-PRF-006", f"{path} is damaged: {error}", _MEND) from None
    return model, mark, parts[0], parts[1]


class _Wrong(Exception):
    """What is wrong in a document, and where."""


def _to_json(statistics: Statistics) -> dict[str, Any]:
    place = {r.key: i for i, r in enumerate(statistics.routers)}
    return {
        "batches": statistics.batches,
        "routers": [
            {
                "name": r.name,
                "call": r.call,
                "branches": r.branches,
                "cells": r.cells,
                "slots": r.slots,
                "loads": r.loads,
                "together": r.together,
            }
            for r in statistics.routers
        ],
        "pairs": [
            {"first": place[a], "second": place[b], "together": table}
            for (a, b), table in statistics.pairs.items()
        ],
    }


def _statistics(value: Any, where: str) -> Statistics:
    batches = _count(_item(value, "batches", where), f"{where}.batches")
    routers: list[RouterStats] = []
    for i, entry in enumerate(_list(_item(value, "routers", where), f"{where}.routers")):
        router = _router(entry, f"{where}.routers[{i}]", batches)
        if any(r.key == router.key for r in routers):
            raise _Wrong(f"{where}.routers[{i}] is there twice")
        routers.append(router)
    pairs: dict[tuple[Key, Key], Table] = {}
    for i, entry in enumerate(_list(_item(value, "pairs", where), f"{where}.pairs")):
        at = f"{where}.pairs[{i}]"
        ends = []
        for name in ("first", "second"):
            number = _count(_item(entry, name, at), f"{at}.{name}")
            if number >= len(routers):
                raise _Wrong(f"{at}.{name} is {number}, but there are {len(routers)} routers")
            ends.append(routers[number])
        first, second = ends
        if (first.key, second.key) in pairs:
            raise _Wrong(f"{at} is there twice")
        at = f"{at}.together"
        table = _table(_item(entry, "together", at), at, first.branches, second.branches)
        for a, row in enumerate(table):
            for b, x in enumerate(row):
                if x > min(first.together[a][a], second.together[b][b]):
                    raise _Wrong(f"{at}[{a}][{b}] is more than went to one of the two")
        pairs[first.key, second.key] = table
    return Statistics(batches, tuple(routers), pairs)


def _router(value: Any, where: str, batches: int) -> RouterStats:
    name = _text(value, "name", where)
    call = _count(_item(value, "call", where), f"{where}.call")
    n = _count(_item(value, "branches", where), f"{where}.branches")
    cells = _counts(_item(value, "cells", where), f"{where}.cells")
    if len(cells) > batches:
        raise _Wrong(f"{where}.cells has {len(cells)} entries for {batches} batches")
    slots = _counts(_item(value, "slots", where), f"{where}.slots", len(cells))
    loads = _table(_item(value, "loads", where), f"{where}.loads", len(cells), n)
    for i, load in enumerate(loads):
        if sum(load) > slots[i]:
            raise _Wrong(f"{where}.loads[{i}] adds up to {sum(load)}, more than {slots[i]} slots")
    at = f"{where}.together"
    together = _table(_item(value, "together", where), at, n, n)
    total = [sum(column) for column in zip(*loads, strict=True)] or [0] * n
    for a in range(n):
        if together[a][a] > min(total[a], sum(cells)) or (total[a] and not together[a][a]):
            raise _Wrong(f"{at}[{a}][{a}] is {together[a][a]} for a load of {total[a]}")
        for b in range(a):
            if together[a][b] != together[b][a]:
                raise _Wrong(f"{at}[{a}][{b}] and [{b}][{a}] differ")
            if together[a][b] > min(together[a][a], together[b][b]):
                raise _Wrong(f"{at}[{a}][{b}] is more than went to one of the two")
    return RouterStats(name, call, n, cells, slots, loads, together)


def _agree(fitted: Statistics, held: Statistics) -> None:
    branches = {r.key: r.branches for r in fitted}
    for router in held:
        if branches.get(router.key, router.branches) != router.branches:
            raise _Wrong(f"router {router.label} has another number of branches in heldout")


def _item(value: Any, name: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is {_kind(value)}, not an object")
    if name not in value:
        raise _Wrong(f"{where + '.' if where else ''}{name} is missing")
    return value[name]


def _text(value: Any, name: str, where: str) -> str:
    text = _item(value, name, where)
    if not isinstance(text, str):
        raise _Wrong(f"{where + '.' if where else ''}{name} is {_kind(text)}, not text")
    return text


def _list(value: Any, where: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise _Wrong(f"{where} is {_kind(value)}, not a list")
    if length is not None and len(value) != length:
        raise _Wrong(f"{where} has {len(value)} entries, not {length}")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int:
        raise _Wrong(f"{where} is {_kind(value)}, not a whole number")
    if not 0 <= value < _LIMIT:
        raise _Wrong(f"{where} is {'negative' if value < 0 else 'too large'}")
    return value


def _counts(value: Any, where: str, length: int | None = None) -> Counts:
    entries = _list(value, where, length)
    return tuple(_count(x, f"{where}[{i}]") for i, x in enumerate(entries))


def _table(value: Any, where: str, rows: int, columns: int) -> Table:
    entries = _list(value, where, rows)
    return tuple(_counts(row, f"{where}[{i}]", columns) for i, row in enumerate(entries))


def _kind(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return names.get(type(value), "nothing" if value is None else "a number")
