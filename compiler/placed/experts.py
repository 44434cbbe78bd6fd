"""`plait.place_experts`: devices for the experts of a model that routes, from how it routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...passes.placement import expert_search
from ...passes.placement.devices import MOST_DEVICES
from ...passes.placement.expert_copies import Model
from ...passes.placement.experts import (
    ExpertPlacement,
    ExpertTraffic,
    limits_of,
    read_expert_placement,
    round_robin,
)
from ..errors import InputError, OptionError
from ..routing.profile import Profile
from ..routing.stats import Statistics


def place_experts(
    profile: Profile | ExpertTraffic | Mapping[str, npt.ArrayLike] | str | Path,
    *,
    devices: int | Sequence[str],
    capacity: int | Sequence[int] | None = None,
    copies: int = 0,
    balance: float | None = None,
    previous: ExpertPlacement | str | Path | None = None,
    move_cost: float = 0.0,
    layers: Sequence[str] | None = None,
    algorithm: str = "best",
    budget: float = 5.0,
    seed: int = 0,
) -> ExpertPlacement:
    """The device of each expert, so that few tokens change devices between layers.

    ``profile`` is what `plait.profile` returns, its file, or recorded routes: for each layer, in
    order, integers ``[tokens, k]``. ``layers`` are patterns (`fnmatch`) of the routers to place,
    all without. ``devices`` is their number or their names.

    Each device gets at most ``capacity`` experts of a layer (as even as can be), and handles at
    most ``balance`` times the layer's mean load: without one 1.2, or what round robin has where
    that is more. With ``copies`` it has room for so many more of each layer: experts that are
    needed everywhere lie on several devices, and a token is handled where it is if it can be
    (`passes/placement/expert_copies.py`: the rule, and what its counts assume). With ``previous``
    (a placement or its file) an expert moves only where that saves more than ``move_cost`` tokens:
    the bytes of an expert over the bytes of a token, over how often the profile's traffic will come
    until the next placement. ``algorithm`` is "best", "round-robin" or "quadratic-assignment";
    ``budget`` about the seconds that "best" may take.

    A profile's fitted batches decide; ``report["heldout"]`` tells what its held-out ones say.

    Raises PlacementError (a ValueError) for what has no meaning, InfeasibleError where no placement
    keeps the limits, InputError where nothing routes, FileError for an unreadable profile.
    """
    if isinstance(profile, str | Path):
        profile = Profile.load(profile)
    held = None
    if isinstance(profile, Profile):
        traffic = traffic_of(profile.fitted, layers)
        held = traffic_of(profile.heldout, layers) if profile.heldout.batches else None
    elif layers is not None:
        raise OptionError("PLT-PLC-005", "layers= chooses a profile's routers", "leave it out")
    elif isinstance(profile, ExpertTraffic):
        traffic = profile
    elif isinstance(profile, Mapping):
        traffic = ExpertTraffic.from_routes(profile)
    else:
        kind = type(profile).__name__
        raise InputError("PLT-PLC-005", f"a {kind} is no profile", "plait.profile makes one")
    if isinstance(previous, str | Path):
        previous = read_expert_placement(previous)
    options: dict[str, Any] = {"capacity": capacity, "copies": copies, "balance": balance,
                               "previous": previous, "move_cost": move_cost,
                               "algorithm": algorithm, "budget": budget, "seed": seed}  # fmt: skip
    names = _device_names(devices)
    placed = expert_search.place_experts(traffic, names, **options)
    if held is None or held.names != traffic.names:
        return placed
    count = len(names)
    flow = Model(held).flow(placed.held(traffic))
    room = limits_of(traffic, count, capacity, balance).capacity
    dealt = [round_robin(len(x), room) for x in traffic.loads]
    seen = {
        "tokens": held.total,
        "cross_tokens": round(flow.crossing),
        "round_robin_cross_tokens": held.crossing(dealt),
        "imbalance": dict(zip(held.names, flow.imbalance(), strict=True)),
    }
    return replace(placed, report={**placed.report, "heldout": seen})


def traffic_of(statistics: Statistics, layers: Sequence[str] | None = None) -> ExpertTraffic:
    """A profile's loads and co-activation as traffic, of the routers that match ``layers``.

    Raises InputError where there are none.
    """
    if isinstance(layers, str):
        raise OptionError("PLT-PLC-005", "layers is text", "give a list of patterns")
    chosen = [
        router
        for router in statistics
        if router.branches and (layers is None or any(fnmatchcase(router.label, x) for x in layers))
    ]
    if not chosen:
        known = ", ".join(r.label for r in statistics) or "none"
        reason = f"no router matches {list(layers)}" if layers else "the profile has no routers"
        raise InputError("PLT-PLC-005", reason, f"routers: {known}")
    number = {router.key: k for k, router in enumerate(chosen)}
    pairs = {
        (number[a], number[b]): np.array(table, np.int64)
        for (a, b), table in statistics.pairs.items()
        if a in number and b in number and a != b
    }
    loads = tuple(np.array(router.load, np.int64) for router in chosen)
    return ExpertTraffic(tuple(router.label for router in chosen), loads, pairs)


def _device_names(devices: int | Sequence[str]) -> list[str]:
    if isinstance(devices, bool) or isinstance(devices, str):
        raise OptionError("PLT-PLC-005", f"devices={devices!r}", "give their number or a list")
    if isinstance(devices, int):
        if devices > MOST_DEVICES:
            reason = f"devices={devices} are more than {MOST_DEVICES}"
            raise OptionError("PLT-PLC-005", reason, "give fewer")
        return [f"device:{k}" for k in range(devices)]
    return list(devices)
