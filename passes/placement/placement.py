"""``placement v1``: a device for each op, the order on each device, and what is known of both."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...kernels.files import replacing
from .alternatives import Alternative, alternative_from_dict
from .errors import PlacementError
from .problem import Problem
from .problem_file import read_json


@dataclass(frozen=True)
class Placement:
    """Where and in which order ops run.

    In ``mode`` "priority" an idle device starts its ready op that comes first in ``order``; in
    "strict" it runs exactly ``order``. ``report`` tells makespan (seconds), peak bytes per device,
    lower bound, gap, algorithm, seconds and seed. With ``alternatives`` it is a placement of the
    problem that `alternatives.rewrite` makes of them: ops and their copies.
    """

    assign: Mapping[str, str]
    order: Mapping[str, list[str]] | None = None
    mode: str = "priority"
    report: Mapping[str, Any] = field(default_factory=dict)
    alternatives: tuple[Alternative, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The placement as JSON values."""
        order = {} if self.order is None else {"order": dict(self.order)}
        taken = [item.to_dict() for item in self.alternatives]
        return {
            "format": "placement v1",
            "assign": dict(self.assign),
            **order,
            **({"alternatives": taken} if taken else {}),
            "mode": self.mode,
            "report": dict(self.report),
        }

    def write(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises PlacementError where it cannot."""
        write_text(Path(path), json_text(self.to_dict()))


def read_placement(path: str | Path) -> Placement:
    """Reads a placement. Raises PlacementError naming the file and the field at fault."""
    path = Path(path)
    data = read_json(path)
    if not isinstance(data, Mapping) or not isinstance(data.get("assign"), Mapping):
        raise PlacementError(f"{path}: field 'assign' must map ops to devices")
    order = data.get("order")
    if order is not None and not (
        isinstance(order, Mapping) and all(isinstance(ops, list) for ops in order.values())
    ):
        raise PlacementError(f"{path}: field 'order' must map devices to lists of ops")
    mode = data.get("mode", "priority")
    if mode not in ("priority", "strict"):
        raise PlacementError(f"{path}: mode {mode!r} is unknown; write 'priority' or 'strict'")
    report = data.get("report", {})
    taken = data.get("alternatives", [])
    if not isinstance(taken, list):
        raise PlacementError(f"{path}: field 'alternatives' must be a list, is {taken!r:.60}")
    try:
        alternatives = tuple(map(alternative_from_dict, taken))
    except PlacementError as error:
        raise PlacementError(f"{path}: {error}") from None
    report = report if isinstance(report, Mapping) else {}
    return Placement(data["assign"], order, mode, report, alternatives)


def check(problem: Problem, placement: Placement) -> None:
    """Raises PlacementError where a placement is none of the problem: what, and where."""
    ops, devices = problem.op_index, problem.device_index
    missing = [name for name in ops if name not in placement.assign]
    if missing:
        raise PlacementError(f"op {missing[0]!r} is not placed ({len(missing)} in all)")
    p = problem.arrays
    groups: dict[str, str] = {}
    for name, device in placement.assign.items():
        if name not in ops:
            raise PlacementError(f"assign: there is no op {name!r}")
        if device not in devices:
            raise PlacementError(f"assign: op {name!r} is on unknown device {device!r}")
        op = problem.ops[ops[name]]
        if p.time[ops[name], devices[device]] == float("inf"):
            raise PlacementError(f"assign: op {name!r} is not allowed on {device!r}")
        if op.group is not None and groups.setdefault(op.group, device) != device:
            raise PlacementError(f"assign: group {op.group!r} is split")
    seen: set[str] = set()
    for device, names in (placement.order or {}).items():
        if device not in devices:
            raise PlacementError(f"order: there is no device {device!r}")
        for name in names:
            if name in seen or placement.assign.get(name) != device:
                raise PlacementError(f"order: op {name!r} is twice there or not on {device!r}")
            seen.add(name)
    if placement.mode == "strict" and len(seen) < len(ops):
        lost = next(name for name in ops if name not in seen)
        raise PlacementError(f"order: op {lost!r} is missing, which a strict order may not")


def json_text(value: Any) -> str:
    """What files of plans hold: indented, to be read by people too."""
    return json.dumps(value, indent=1) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes beside the place, then renames. Raises PlacementError where it cannot."""
    with written(path) as scratch:
        scratch.write_text(text, "utf-8")


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """`replacing`, whose errors are PlacementErrors."""
    try:
        with replacing(path) as scratch:
            yield scratch
    except OSError as error:
        raise PlacementError(f"cannot write {path}: {error.strerror or error}") from error
