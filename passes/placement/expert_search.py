"""`place_experts`: devices for experts, such that few tokens change devices between layers.

Layers that follow each other in a line and have few balanced placements each, such as 8 experts on
4 devices, are solved exactly, by dynamic programming over whole placements of a layer. Everything
else is annealed (`expert_slots`; `expert_copies_search` where experts may lie on several devices).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from .errors import InfeasibleError, PlacementError
from .expert_copies import Model
from .expert_copies_search import best_with_copies
from .expert_slots import (
    each_once,
    quadratic_assignment,
    slots_of,
    unlimited,
    worth_of_staying,
)
from .experts import (
    ExpertPlacement,
    ExpertTraffic,
    Held,
    Limits,
    least_crossing,
    limits_of,
    round_robin,
)
from .problem import Ints

ALGORITHMS = ("best", "round-robin", "quadratic-assignment")


def place_experts(
    traffic: ExpertTraffic,
    devices: Sequence[str],
    *,
    capacity: int | Sequence[int] | None = None,
    copies: int = 0,
    balance: float | None = None,
    previous: ExpertPlacement | None = None,
    move_cost: float = 0.0,
    algorithm: str = "best",
    budget: float = 5.0,
    seed: int = 0,
) -> ExpertPlacement:
    """The device of each expert, such that few tokens cross, each layer's load is balanced, and
    few experts move.

    ``capacity`` is the most experts of one layer on a device, one number for all or one for each
    (as even as can be). Each device has room for ``copies`` more, so that experts may lie on
    several; crossings and loads are then those of the model of `expert_copies`, and an expert moves
    to each device that did not hold it before. No device handles more than ``balance`` times the
    mean load of any layer; without one, `BALANCE`, or what round robin has where that is more. With
    ``previous`` an expert moves where that saves more than ``move_cost`` tokens. "best" minimises
    tokens plus moves; "quadratic-assignment" is Brainstorm's formulation (OSDI 2023), solved by the
    fast approximate method of Vogelstein et al. (2015), with equal numbers of experts and no regard
    to load; "round-robin" is that. ``budget`` is the work to do, in seconds of an ordinary core.

    Raises PlacementError for what has no meaning, InfeasibleError where loads cannot be balanced.
    """
    began = time.perf_counter()
    _check(devices, copies, move_cost, algorithm, budget, seed)
    limits = limits_of(traffic, len(devices), capacity, balance)
    before = _previous(traffic, devices, previous)
    rng = np.random.default_rng(seed)
    exact = False
    if algorithm == "best":
        held, exact = _best(traffic, limits, copies, before, move_cost, budget, rng)
    elif algorithm == "round-robin":
        held = _spread([round_robin(len(x), limits.capacity) for x in traffic.loads], len(devices))
    else:
        state = slots_of(traffic, unlimited(limits), before, 0.0)
        held = _spread(quadratic_assignment(state, budget, rng), len(devices))
    report = _report(traffic, limits, copies, before, held, devices)
    report |= {"algorithm": algorithm, "exact": exact, "seed": seed}
    report["seconds"] = time.perf_counter() - began
    named = zip(traffic.names, held, strict=True)
    experts = {name: tuple(_where(row, devices) for row in rows) for name, rows in named}
    return ExpertPlacement(tuple(devices), experts, report)


def _where(row: Held, devices: Sequence[str]) -> str | tuple[str, ...]:
    """The device of an expert, or all that hold a copy."""
    names = tuple(devices[d] for d in np.flatnonzero(row).tolist())
    return names[0] if len(names) == 1 else names


def _best(
    traffic: ExpertTraffic,
    limits: Limits,
    copies: int,
    before: list[Held] | None,
    move_cost: float,
    budget: float,
    rng: np.random.Generator,
) -> tuple[list[Held], bool]:
    """Which devices hold which experts, and whether that is proven to be the best."""
    devices = len(limits.capacity)
    if not copies:
        found, exact = each_once(traffic, limits, before, move_cost, budget, rng)
        return _spread(found, devices), exact
    model = Model(traffic)
    if model.back:
        late, early = (traffic.names[x] for x in model.back[0])
        raise PlacementError(
            f"pairs {late!r} -> {early!r} go against the order of layers, which copies follow; "
            "name layers in the order in which tokens pass them, or leave copies out"
        )
    # Good places for single experts are good starts, within the limits or not.
    starts: list[list[Held]] = []
    refused: InfeasibleError | None = None
    for allowed in (limits, unlimited(limits)):
        try:
            found, _ = each_once(traffic, allowed, before, move_cost, 0.15 * budget, rng)
            starts.append(_spread(found, devices))
        except InfeasibleError as error:
            refused = error
    room = limits.capacity + copies
    if before is not None and all(x.any(1).all() and (x.sum(0) <= room).all() for x in before):
        starts.append(before)
    worth = worth_of_staying(traffic, 0.0 if before is None else move_cost, devices)
    hold = [np.full((len(x), devices), worth) for x in traffic.loads]
    for layer, old in enumerate(before or []):
        hold[layer][old] = 0.0
    best = best_with_copies(model, limits, room, hold, starts, 0.7 * budget, rng)
    if best is None:
        raise InfeasibleError(
            f"found no placement with {copies} copies a device that keeps the limits; with none, "
            f"{refused}",
            {},
            False,
        )
    return best, False


def _check(
    devices: Sequence[str],
    copies: int,
    move_cost: float,
    algorithm: str,
    budget: float,
    seed: int,
) -> None:
    if not devices or len(set(devices)) < len(devices):
        raise PlacementError(f"devices must be at least one, of distinct names; are {devices!r}")
    if algorithm not in ALGORITHMS:
        raise PlacementError(
            f"algorithm {algorithm!r} is unknown; use one of {', '.join(ALGORITHMS)}"
        )
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 0:
        raise PlacementError(f"copies must be a number of experts, 0 or more; is {copies!r}")
    if copies and algorithm != "best":
        raise PlacementError(f"algorithm {algorithm!r} makes no copies; leave copies out")
    if not 0 <= move_cost < float("inf"):
        raise PlacementError(f"move_cost must be a number of tokens, is {move_cost!r}")
    if not 0 < budget < float("inf"):
        raise PlacementError(f"budget must be a positive number of seconds, is {budget!r}")
    if seed != int(seed) or not 0 <= seed < 2**32:
        raise PlacementError(f"seed must be an integer from 0 to 2**32 - 1, is {seed!r}")


def _previous(
    traffic: ExpertTraffic, devices: Sequence[str], previous: ExpertPlacement | None
) -> list[Held] | None:
    """Which of the devices there are held which experts before."""
    if previous is None:
        return None
    old = {name: k for k, name in enumerate(previous.devices)}
    found = []
    for held in previous.held(traffic):
        padded = np.append(held, np.zeros((len(held), 1), np.bool_), axis=1)
        found.append(padded[:, [old.get(name, -1) for name in devices]])
    return found


def _spread(where: Sequence[Ints], devices: int) -> list[Held]:
    """Experts on one device each."""
    return [np.eye(devices, dtype=np.bool_)[place] for place in where]


def _report(
    traffic: ExpertTraffic,
    limits: Limits,
    copies: int,
    before: list[Held] | None,
    held: list[Held],
    devices: Sequence[str],
) -> dict[str, object]:
    dealt = [round_robin(len(x), limits.capacity) for x in traffic.loads]
    count = len(devices)
    model = Model(traffic)
    flow = model.flow(held)
    report: dict[str, object] = {
        "tokens": traffic.total,
        "cross_tokens": round(flow.crossing),
        "round_robin_cross_tokens": traffic.crossing(dealt),
        "lower_bound_tokens": least_crossing(traffic, limits.capacity, copies),
        "imbalance": dict(zip(traffic.names, flow.imbalance(), strict=True)),
        "imbalance_limit": {
            name: float(most * count / load.sum()) if load.sum() else 1.0
            for name, most, load in zip(traffic.names, limits.load, traffic.loads, strict=True)
        },
    }
    if copies:
        report["copies"] = sum(int(x.sum()) - len(x) for x in held)
    if before is not None:
        pairs = zip(before, held, strict=True)
        report["moved"] = sum(int((now & ~old).sum()) for old, now in pairs)
        if all(x.any(1).all() for x in before):
            report["previous_cross_tokens"] = round(model.flow(before).crossing)
    return report
