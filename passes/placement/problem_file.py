"""``placement-problem v1``: problems as JSON, plain or compressed, checked field by field."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import PlacementError
from .problem import MOST, Device, Edge, Link, Op, Problem

FORMAT = "placement-problem v1"


def read_problem(path: str | Path) -> Problem:
    """Reads ``PROBLEM.json`` or ``PROBLEM.json.gz``.

    Raises PlacementError naming the file and what is wrong in it.
    """
    path = Path(path)
    return problem_from_dict(read_json(path), str(path))


def read_json(path: Path) -> Any:
    """The JSON value in a plain or gzip file. Raises PlacementError where there is none."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return json.loads(data)
    except OSError as error:  # BadGzipFile too
        raise PlacementError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise PlacementError(f"{path} is cut short or damaged: {error}; make it again") from error
    except (ValueError, RecursionError) as error:
        raise PlacementError(f"{path} is no JSON, or cut short: {error}; make it again") from error


def problem_from_dict(data: Any, where: str = "problem") -> Problem:
    """A problem from parsed JSON. Raises PlacementError naming the op, device or field at fault."""
    try:
        return _problem(data)
    except PlacementError as error:
        error.args = (f"{where}: {error}",)
        raise


def problem_to_dict(problem: Problem) -> dict[str, Any]:
    """The problem as JSON values; `problem_from_dict` gives it back."""
    ops = []
    for op in problem.ops:
        time = list(op.time_s) if isinstance(op.time_s, tuple) else op.time_s
        item: dict[str, Any] = {
            "name": op.name, "time_s": time, "param_bytes": op.param_bytes,
            "temp_bytes": op.temp_bytes, "output_bytes": op.output_bytes,
        }  # fmt: skip
        if op.group is not None:
            item["group"] = op.group
        if op.keep:
            item["keep"] = True
        if not op.recompute:
            item["recompute"] = False
        ops.append(item)
    return {
        "format": FORMAT,
        "name": problem.name,
        "memory_model": problem.memory_model,
        "devices": [vars(device) for device in problem.devices],
        "default_link": vars(problem.default_link),
        "links": [{"src": a, "dst": b, **vars(x)} for (a, b), x in problem.links.items()],
        "ops": ops,
        "edges": [vars(edge) for edge in problem.edges],
    }


def _problem(data: Any) -> Problem:
    if not isinstance(data, Mapping):
        raise PlacementError(f"is a {type(data).__name__}, not an object")
    if data.get("format") != FORMAT:
        raise PlacementError(f"field 'format' must be {FORMAT!r}, is {data.get('format')!r}")
    devices = tuple(_device(x, i) for i, x in enumerate(_list(data, "devices")))
    if not devices:
        raise PlacementError("devices: the problem has none; name at least one")
    links = {}
    for i, item in enumerate(_list(data, "links", [])):
        what = f"links[{i}]"
        ends = _text(item, "src", what), _text(item, "dst", what)
        links[ends] = _link(item, what)
    ops = tuple(_op(x, i, len(devices)) for i, x in enumerate(_list(data, "ops")))
    edges = tuple(_edge(x, i) for i, x in enumerate(_list(data, "edges")))
    name = data.get("name", "")
    if not isinstance(name, str):
        raise PlacementError(f"field 'name' must be text, is {name!r}")
    model = data.get("memory_model", "dynamic")
    default = _link(data.get("default_link"), "default_link")
    return Problem(name, model, devices, default, links, ops, edges)


def _device(item: Any, index: int) -> Device:
    name = _text(item, "name", f"devices[{index}]")
    what = f"device {name!r}"
    return Device(
        name, _number(item, "memory_bytes", what), _number(item, "speed", what, 1, positive=True)
    )


def _op(item: Any, index: int, devices: int) -> Op:
    name = _text(item, "name", f"ops[{index}]")
    what = f"op {name!r}"
    time = item.get("time_s")
    if isinstance(time, list):
        if len(time) != devices:
            raise PlacementError(
                f"{what}: time_s has {len(time)} columns for {devices} devices; give one for each"
            )
        cells = {f"time_s[{k}]": x for k, x in enumerate(time)}
        time = tuple(None if x is None else _number(cells, k, what) for k, x in cells.items())
        if all(x is None for x in time):
            raise PlacementError(f"{what}: time_s allows it on no device; give one a time")
    else:
        time = _number(item, "time_s", what)
    group = item.get("group")
    if not (group is None or isinstance(group, str | int)) or isinstance(group, bool):
        raise PlacementError(f"{what}: group must be text, is {group!r}")
    flags = {"keep": item.get("keep", False), "recompute": item.get("recompute", True)}
    for field, value in flags.items():
        if not isinstance(value, bool):
            raise PlacementError(f"{what}: {field} must be true or false, is {value!r}")
    sizes = [_number(item, k, what, 0) for k in ("param_bytes", "temp_bytes", "output_bytes")]
    return Op(name, time, *sizes, group=None if group is None else str(group), **flags)


def _edge(item: Any, index: int) -> Edge:
    what = f"edges[{index}]"
    src, dst = _text(item, "src", what), _text(item, "dst", what)
    what = f"edge {src!r} -> {dst!r}"
    tensor = item.get("tensor", "")
    if not isinstance(tensor, str):
        raise PlacementError(f"{what}: tensor must be text, is {tensor!r}")
    return Edge(src, dst, _number(item, "bytes", what), tensor)


def _link(item: Any, what: str) -> Link:
    return Link(
        _number(item, "latency_s", what), _number(item, "bandwidth_Bps", what, positive=True)
    )


def _list(data: Mapping[str, Any], field: str, default: Any = None) -> list[Any]:
    value = data.get(field, default)
    if not isinstance(value, list):
        raise PlacementError(f"field {field!r} must be a list, is {value!r:.60}")
    return value


def _text(item: Any, field: str, what: str) -> str:
    if not isinstance(item, Mapping):
        raise PlacementError(f"{what} must be an object, is {item!r:.60}")
    value = item.get(field)
    if not isinstance(value, str) or not value:
        raise PlacementError(f"{what}: {field} must be a name, is {value!r:.60}")
    return value


def _number(
    item: Any, field: str, what: str, default: float | None = None, positive: bool = False
) -> float:
    """A finite number from ``item[field]``: not negative, and with ``positive`` not zero either."""
    if not isinstance(item, Mapping):
        raise PlacementError(f"{what} must be an object, is {item!r:.60}")
    value = item.get(field, default)
    if field in item or default is None:
        if value is None:
            raise PlacementError(f"{what}: {field} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlacementError(f"{what}: {field} must be a number, is {value!r:.60}")
        if not 0 <= value < MOST or (positive and value < 1 / MOST):
            least = "above zero" if positive else "zero or more"
            raise PlacementError(
                f"{what}: {field} must be finite and {least}, below {MOST:.0e}, is {value!r:.60}"
            )
    assert value is not None
    return value
