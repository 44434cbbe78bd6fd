"""Experts of routed layers on devices: how tokens flow between them, what a placement costs.

A token that expert i of one layer and expert j of the next both handle crosses devices where i and
j are apart. Traffic is counts of such tokens, so it adds up over batches and a profile holds all of
it. With several experts a token each pair counts, as in Brainstorm (Cui et al., OSDI 2023).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InfeasibleError, PlacementError
from .placement import json_text, write_text
from .problem import Ints
from .problem_file import read_json

Held = npt.NDArray[np.bool_]
"""Which devices hold which experts of a layer: ``[experts, devices]``."""

FORMAT = "expert-placement v1"
BALANCE = 1.2
"""Load of a device over the mean up to which a layer counts as balanced by default."""


@dataclass(frozen=True)
class ExpertTraffic:
    """How many tokens experts handle, and how many pass from one to another.

    ``loads[l]`` is int64 ``[experts of layer l]``; ``pairs[a, b]`` int64 ``[experts of a, experts
    of b]``, tokens that both handle, for layers (positions in ``names``) that follow each other.
    Raises PlacementError where these do not fit together.
    """

    names: tuple[str, ...]
    loads: tuple[Ints, ...]
    pairs: Mapping[tuple[int, int], Ints]

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names) or len(self.names) != len(self.loads):
            raise PlacementError(f"layers {list(self.names)} need distinct names and loads each")
        for name, load in zip(self.names, self.loads, strict=True):
            if load.ndim != 1 or not len(load) or load.dtype.kind not in "iu" or load.min() < 0:
                raise PlacementError(f"layer {name!r}: loads must be counts, one for each expert")
        for (a, b), table in self.pairs.items():
            if a == b or not (0 <= a < len(self.names) and 0 <= b < len(self.names)):
                raise PlacementError(f"pairs {a, b}: there are {len(self.names)} layers")
            shape = (len(self.loads[a]), len(self.loads[b]))
            if table.shape != shape or table.dtype.kind not in "iu" or table.min() < 0:
                what = f"{self.names[a]!r} -> {self.names[b]!r}"
                raise PlacementError(f"pairs {what}: must be counts of shape {list(shape)}")

    @classmethod
    def from_routes(
        cls, routes: Mapping[str, npt.ArrayLike], experts: int | None = None
    ) -> ExpertTraffic:
        """The traffic of recorded routes: layers in order, each integers ``[tokens, k]``.

        Entries outside ``[0, experts)``, such as -1, name no expert. Without ``experts`` the
        largest index of all layers tells how many there are. Layers of as many tokens as the one
        before exchange them in order; others start afresh.
        """
        arrays = {name: _route(name, route) for name, route in routes.items()}
        if experts is None:
            experts = 1 + max((int(x.max(initial=-1)) for x in arrays.values()), default=-1)
        if not arrays or experts < 1:
            raise PlacementError("routes: none names an expert; record some first")
        loads: list[Ints] = []
        pairs: dict[tuple[int, int], Ints] = {}
        before: npt.NDArray[np.float64] | None = None
        for number, route in enumerate(arrays.values()):
            known = np.where((route >= 0) & (route < experts), route, experts)
            taken = np.zeros((len(route), experts + 1))  # float64: sums of ones are exact, fast
            np.put_along_axis(taken, known, 1.0, axis=1)
            taken = taken[:, :experts]
            loads.append(np.bincount(known.ravel(), minlength=experts + 1)[:experts])
            if before is not None and len(before) == len(taken):
                pairs[number - 1, number] = (before.T @ taken).astype(np.int64)
            before = taken
        return cls(tuple(arrays), tuple(loads), pairs)

    @property
    def total(self) -> int:
        """Tokens that pass from one expert to another, on one device or two."""
        return int(sum(int(table.sum()) for table in self.pairs.values()))

    def crossing(self, where: Sequence[npt.ArrayLike]) -> int:
        """Tokens that change devices, with ``where[l]`` the devices of layer l's experts."""
        place = [np.asarray(x) for x in where]
        return int(
            sum(
                int(table[place[a][:, None] != place[b][None, :]].sum())
                for (a, b), table in self.pairs.items()
            )
        )

    def imbalance(self, where: Sequence[npt.ArrayLike], devices: int) -> list[float]:
        """For each layer the largest load of a device over the mean; 1 where there is none."""
        found = []
        for load, place in zip(self.loads, where, strict=True):
            on = np.bincount(np.asarray(place), load, devices)
            found.append(float(on.max() * devices / on.sum()) if on.sum() else 1.0)
        return found


@dataclass(frozen=True)
class Limits:
    """What a placement must keep: experts of one layer on a device, and their load.

    ``capacity`` is int64 ``[devices]``; ``load`` int64 ``[layers]``, the most tokens of the layer
    that one device handles.
    """

    capacity: Ints
    load: Ints


@dataclass(frozen=True)
class ExpertPlacement:
    """The device of each expert: ``experts[layer][e]`` is a name in ``devices``, or the names of
    all devices that hold a copy of it, if several do (`expert_copies` tells which handles a token).

    ``report`` tells how many tokens cross, of how many, at round robin, at least; the imbalance of
    each layer; what moved.
    """

    devices: tuple[str, ...]
    experts: Mapping[str, tuple[str | tuple[str, ...], ...]]
    report: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The placement as JSON values."""
        return {
            "format": FORMAT,
            "devices": list(self.devices),
            "experts": {
                name: [x if isinstance(x, str) else list(x) for x in where]
                for name, where in self.experts.items()
            },
            "report": dict(self.report),
        }

    def write(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises PlacementError where it cannot."""
        write_text(Path(path), json_text(self.to_dict()))

    def held(self, traffic: ExpertTraffic) -> list[Held]:
        """Which devices hold each layer's experts. Raises PlacementError at a mismatch."""
        number = {name: k for k, name in enumerate(self.devices)}
        found = []
        for name, load in zip(traffic.names, traffic.loads, strict=True):
            where = self.experts.get(name, ())
            if len(where) != len(load):
                raise PlacementError(
                    f"layer {name!r} has {len(load)} experts, the placement places {len(where)}"
                )
            held = np.zeros((len(where), len(number)), np.bool_)
            for expert, names in enumerate(where):
                for device in (names,) if isinstance(names, str) else names:
                    held[expert, number[device]] = True
            found.append(held)
        return found

    def indices(self, traffic: ExpertTraffic) -> list[Ints]:
        """Positions in ``devices`` of each layer's experts, where each is on one device.

        Raises PlacementError where experts have copies, and at a mismatch.
        """
        held = self.held(traffic)
        if any((x.sum(1) != 1).any() for x in held):
            raise PlacementError("experts lie on several devices each; ask for held() instead")
        return [x.argmax(1) for x in held]


def read_expert_placement(path: str | Path) -> ExpertPlacement:
    """Reads what `ExpertPlacement.write` wrote. Raises PlacementError naming what is wrong."""
    data = read_json(Path(path))
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise PlacementError(f"{path}: field 'format' must be {FORMAT!r}")
    devices, experts = data.get("devices"), data.get("experts")
    if not _names(devices) or len(set(devices)) < len(devices):
        raise PlacementError(f"{path}: field 'devices' must be a list of distinct names")
    if not isinstance(experts, Mapping):
        raise PlacementError(f"{path}: field 'experts' must map layers to lists of devices")
    for name, where in experts.items():
        sets = (
            [[x] if isinstance(x, str) else x for x in where] if isinstance(where, list) else None
        )
        if sets is None or not all(_names(x) and x for x in sets):
            raise PlacementError(
                f"{path}: layer {name!r} must list a device, or a list of devices, for each expert"
            )
        for device in itertools.chain(*sets):
            if device not in devices:
                raise PlacementError(f"{path}: layer {name!r}: there is no device {device!r}")
    report = data.get("report", {})
    return ExpertPlacement(
        tuple(devices),
        {
            name: tuple(x if isinstance(x, str) else tuple(x) for x in where)
            for name, where in experts.items()
        },
        report if isinstance(report, Mapping) else {},
    )


def limits_of(
    traffic: ExpertTraffic,
    devices: int,
    capacity: int | Sequence[int] | None,
    balance: float | None,
) -> Limits:
    """The limits in numbers.

    ``capacity`` experts of a layer on each device (as even as can be); ``balance`` times the mean
    load of the layer on each (`BALANCE`, or what round robin has where that is more). Raises
    PlacementError for values without meaning, InfeasibleError where there is too little room.
    """
    most = max(len(load) for load in traffic.loads)
    given = -(-most // devices) if capacity is None else capacity
    room = np.array([given] * devices if isinstance(given, int) else list(given))
    if room.shape != (devices,) or room.dtype.kind != "i" or room.min() < 0:
        raise PlacementError(
            f"capacity must be a count of experts, or one for each of {devices} devices; is "
            f"{capacity!r}"
        )
    if room.sum() < most:
        short = int(most - room.sum())
        raise InfeasibleError(
            f"capacity is {room.sum()} experts of a layer in all, {short} too few", {}, True
        )
    if balance is not None and not 1.0 <= balance < float("inf"):
        raise PlacementError(f"balance must be 1 or more, times the mean load; is {balance!r}")
    load = []
    for counts in traffic.loads:
        limit = np.floor((balance or BALANCE) * counts.sum() / devices * (1 + 1e-12))
        if balance is None:
            dealt = np.bincount(round_robin(len(counts), room), counts, devices)
            limit = max(limit, dealt.max())
        load.append(int(limit))
    return Limits(room.astype(np.int64), np.array(load, np.int64))


def round_robin(experts: int, capacity: Ints) -> Ints:
    """Expert e on device e modulo their number, passing over devices that are full."""
    deal = [d for turn in range(int(capacity.max())) for d in np.flatnonzero(capacity > turn)]
    return np.array(deal[:experts], np.int64)


def least_crossing(traffic: ExpertTraffic, capacity: Ints, copies: int = 0) -> int:
    """A lower bound on the tokens that cross, whatever the placement and its loads.

    An expert shares its device with no more than the largest capacity of each neighbouring layer,
    so of each row or column of a table no more than that many entries, the largest, can stay. An
    expert with copies can follow all that leads to it, so with them only rows count: from each of
    its devices an expert's tokens go on alike.
    """
    room = int(capacity.max()) + copies
    crossing = 0
    for table in traffic.pairs.values():
        staying = [np.sort(table, axis=1)[:, -room:].sum() if room else 0]
        if not copies:
            staying.append(np.sort(table, axis=0)[-room:].sum() if room else 0)
        crossing += int(table.sum() - min(staying))
    return crossing


def _route(name: str, route: npt.ArrayLike) -> Ints:
    array = np.asarray(route)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise PlacementError(f"routes of {name!r} must be integers [tokens, k]")
    return array.astype(np.int64)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)
