"""Experts on one device each, annealed, or by Brainstorm's quadratic assignment.

Everything is annealed from several starts, but for what `expert_lines` solves exactly: within a
layer experts do not interact, so a step looks at all exchanges of two experts of one layer at once,
and takes one by the heat-bath rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp

from .errors import InfeasibleError
from .expert_lines import best_of_lines
from .experts import ExpertTraffic, Held, Limits, round_robin
from .problem import Floats, Ints

_ROUNDS = 4


@dataclass
class Slots:
    """The search's state. A layer has as many slots as devices have room for its experts; slots
    beyond its experts are empty, so that moving an expert is exchanging it with an empty slot.
    """

    traffic: ExpertTraffic
    limits: Limits
    weights: list[list[tuple[int, Floats]]]  # of each layer: neighbours, tokens [experts, theirs]
    stay: list[Floats]  # [slots, devices]: what staying there is worth, in tokens
    where: list[Ints]  # [slots] devices; experts come first
    load: list[Ints]  # [slots]
    worth: float  # tokens that an expert that stays is worth

    def gains(self, layer: int) -> Floats:
        """``[slots, devices]``: what each expert is worth on each device as things are."""
        gain = self.stay[layer].copy()
        for other, table in self.weights[layer]:
            place = self.where[other][: table.shape[1]]
            gain[: len(table)] += table @ _one_hot(place, gain.shape[1])
        return gain

    def value(self) -> float:
        """Tokens that stay, and what experts that stay are worth."""
        worth = sum(
            float(s[np.arange(len(w)), w].sum()) for s, w in zip(self.stay, self.where, strict=True)
        )
        return self.traffic.total - self.traffic.crossing(self.experts()) + worth

    def experts(self) -> list[Ints]:
        """Devices of the experts alone."""
        return [w[: len(x)].copy() for w, x in zip(self.where, self.traffic.loads, strict=True)]

    def put(self, experts: Sequence[Ints]) -> None:
        """Takes a placement that keeps capacities; empty slots fill what is left."""
        for layer, place in enumerate(experts):
            left = self.limits.capacity - np.bincount(place, minlength=len(self.limits.capacity))
            rest = np.repeat(np.arange(len(left)), left)
            self.where[layer] = np.concatenate([place, rest])

    def exchanges(self, layer: int, price: float) -> Floats:
        """``[slots, slots]``: what exchanging two is worth; a token of overload costs ``price``."""
        where, load, most = self.where[layer], self.load[layer], self.limits.load[layer]
        gain = self.gains(layer)
        there = gain[:, where]
        own = np.diagonal(there)
        worth = there + there.T - own[:, None] - own[None, :]
        on = np.bincount(where, load, gain.shape[1])[where]
        over = np.maximum(on[:, None] - load[:, None] + load[None, :] - most, 0.0)
        before = np.maximum(on - most, 0.0)
        more = over + over.T - before[:, None] - before[None, :]
        more[where[:, None] == where[None, :]] = 0.0
        return worth - price * more

    def exchange(self, layer: int, score: Floats, above: float) -> bool:
        """Exchanges slots with their best partners by ``score``, ``[slots, slots]``, where above.

        The best pairs first, and several as long as they concern different devices: such do not
        touch each other's loads, and within a layer nothing else is shared. Whether there were any.
        """
        where = self.where[layer]
        partner = score.argmax(1)
        best = score[np.arange(len(where)), partner]
        used: set[int] = set()
        for a in np.argsort(-best, kind="stable")[: 2 * len(self.limits.capacity)].tolist():
            if best[a] <= above:
                break
            b = int(partner[a])
            ends = {int(where[a]), int(where[b])}
            if len(ends) == 2 and not ends & used:
                where[a], where[b] = where[b], where[a]
                used |= ends
        return bool(used)

    def descend(self, steps: int) -> None:
        """Takes the best exchanges of each layer in turn while any help; overload goes first."""
        price = 4.0 * self.traffic.total + self.limits.capacity.sum() * self.worth + 1.0
        idle = 0
        layer = 0
        for _ in range(steps):
            if self.exchange(layer, self.exchanges(layer, price), 1e-9):
                idle = 0
                continue
            idle += 1
            layer = (layer + 1) % len(self.where)
            if idle == len(self.where):
                return

    def fits(self) -> bool:
        """Whether no device is overloaded."""
        devices = len(self.limits.capacity)
        return all(
            np.bincount(where, load, devices).max() <= most
            for where, load, most in zip(self.where, self.load, self.limits.load, strict=True)
        )


def each_once(
    traffic: ExpertTraffic,
    limits: Limits,
    before: list[Held] | None,
    move_cost: float,
    budget: float,
    rng: np.random.Generator,
) -> tuple[list[Ints], bool]:
    """The device of each expert, and whether that is the best possible."""
    state = slots_of(traffic, limits, before, move_cost)
    balanced = [_balanced(state, layer) for layer in range(len(traffic.loads))]
    solved = best_of_lines(traffic, limits, state.stay)
    if solved is not None:
        return solved, True
    return _anneal_from_starts(state, balanced, before, budget, rng), False


def worth_of_staying(traffic: ExpertTraffic, move_cost: float, devices: int) -> float:
    """Tokens that an expert is worth where it stays, or that a copy must save.

    Tokens are whole numbers: less than one for all together decides among equals only.
    """
    return move_cost + 0.5 / (devices * sum(len(x) for x in traffic.loads))


def unlimited(limits: Limits) -> Limits:
    return Limits(limits.capacity, np.full_like(limits.load, np.iinfo(np.int64).max))


def slots_of(
    traffic: ExpertTraffic, limits: Limits, before: list[Held] | None, move_cost: float
) -> Slots:
    slots, devices = int(limits.capacity.sum()), len(limits.capacity)
    weights: list[list[tuple[int, Floats]]] = [[] for _ in traffic.loads]
    for (a, b), table in traffic.pairs.items():
        flow = table.astype(float)  # counts far below 2**53: exact, and BLAS takes them as they are
        weights[a].append((b, flow))
        weights[b].append((a, np.ascontiguousarray(flow.T)))
    worth = worth_of_staying(traffic, move_cost, devices)
    stay = [np.zeros((slots, devices)) for _ in traffic.loads]
    for layer, old in enumerate(before or []):
        stay[layer][: len(old)][old] = worth
    load = [np.pad(x, (0, slots - len(x))) for x in traffic.loads]
    state = Slots(traffic, limits, weights, stay, [np.zeros(0, np.int64)] * len(load), load, worth)
    state.put([round_robin(len(x), limits.capacity) for x in traffic.loads])
    return state


def _balanced(state: Slots, layer: int) -> Ints:
    """Devices of a layer's experts within its limits; raises InfeasibleError where none are."""
    limits, load = state.limits, state.traffic.loads[layer]
    most = state.limits.load[layer]
    dealt = round_robin(len(load), limits.capacity)
    if np.bincount(dealt, load, len(limits.capacity)).max() <= most:
        return dealt
    place, on, room = np.zeros(len(load), np.int64), np.zeros(len(limits.capacity)), limits.capacity
    room = room.copy()
    for e in np.argsort(-load, kind="stable"):  # heaviest first, to the least loaded (LPT)
        d = int(np.where(room > 0, on, np.inf).argmin())
        place[e], on[d], room[d] = d, on[d] + load[e], room[d] - 1
    return place if on.max() <= most else _packed(state, layer)


def _packed(state: Slots, layer: int) -> Ints:
    """The same by integer programming (HiGHS): the most loaded device as light as can be."""
    load, room = state.traffic.loads[layer], state.limits.capacity
    n, m = len(load), len(room)
    scale = 1.0 / max(float(load.sum()), 1.0)
    once = np.hstack([np.kron(np.eye(n), np.ones(m)), np.zeros((n, 1))])
    count = np.hstack([np.kron(np.ones(n), np.eye(m)), np.zeros((m, 1))])
    heavy = np.hstack([np.kron(load * scale, np.eye(m)), -np.ones((m, 1))])
    solved = milp(
        np.append(np.zeros(n * m), 1.0),
        integrality=np.append(np.ones(n * m), 0.0),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(count, 0, room),
            LinearConstraint(heavy, -np.inf, 0),
        ],
        options={"time_limit": 10.0},
    )
    limit = state.limits.load[layer]
    least = np.inf
    if solved.x is not None:
        place = solved.x[:-1].reshape(n, m).argmax(1)
        least = np.bincount(place, load, m).max()
        if least <= limit:
            return place
    mean = load.sum() / m
    proven = solved.status == 0
    what = "no placement has less than" if proven else "the best found has"
    raise InfeasibleError(
        f"layer {state.traffic.names[layer]!r}: a device may handle {limit / mean:.3f} times the "
        f"mean load, {what} {least / mean:.3f}; give a larger balance or capacity",
        {},
        proven,
    )


def quadratic_assignment(state: Slots, budget: float, rng: np.random.Generator) -> list[Ints]:
    """Frank-Wolfe on layer-wise doubly stochastic matrices, rounded, then pairwise exchanges."""
    capacity = state.limits.capacity
    owner = np.repeat(np.arange(len(capacity)), capacity)
    slots = len(owner)
    sweeps = 0.6 * budget / (len(state.where) * (50e-6 + 1e-9 * slots**3))
    restarts = min(max(int(sweeps / 30), 1), 4)
    iterations = min(max(int(sweeps / restarts), 3), 30)
    steps = _steps(state, 0.4 * budget / restarts)

    def gains(soft: Sequence[Floats]) -> list[Floats]:
        made = []
        for layer in range(len(soft)):
            gain = np.zeros((slots, len(capacity)))
            for other, table in state.weights[layer]:
                gain[: len(table)] += table @ soft[other][: table.shape[1]]
            made.append(gain)
        return made

    def rounded(gain: Floats) -> Ints:
        return owner[linear_sum_assignment(-gain[:, owner])[1]]

    best: tuple[float, list[Ints]] | None = None
    for _ in range(restarts):
        # The barycentre alone treats all devices alike, and would stay there.
        soft = [np.tile(capacity / slots, (slots, 1)) for _ in state.where]
        soft = [
            0.5 * x + 0.5 * _one_hot(owner[rng.permutation(slots)], len(capacity)) for x in soft
        ]
        for _ in range(iterations):
            slope = gains(soft)
            corner = [_one_hot(rounded(g), len(capacity)) for g in slope]
            way = [c - x for c, x in zip(corner, soft, strict=True)]
            first = sum(float((g * w).sum()) for g, w in zip(slope, way, strict=True))
            second = 0.5 * sum(float((g * w).sum()) for g, w in zip(gains(way), way, strict=True))
            step = 1.0 if second >= 0 else min(1.0, -first / (2 * second))
            if first <= 1e-9 * max(state.traffic.total, 1) or step <= 0:
                break
            soft = [x + step * w for x, w in zip(soft, way, strict=True)]
        for layer, gain in enumerate(soft):
            state.where[layer] = rounded(gain)
        state.descend(steps)
        value = state.value()
        if best is None or value > best[0]:
            best = value, state.experts()
    assert best is not None
    return best[1]


def _anneal_from_starts(
    state: Slots,
    balanced: list[Ints],
    before: list[Held] | None,
    budget: float,
    rng: np.random.Generator,
) -> list[Ints]:
    """The best of several descents, annealed for the rest of the budget."""
    free = replace(state, limits=unlimited(state.limits), where=list(state.where))
    starts = [balanced, quadratic_assignment(free, 0.25 * budget, rng)]
    if before is not None and all(x.any(1).all() for x in before):
        starts.append([x.argmax(1) for x in before])
    best = -np.inf, balanced
    for start in starts:
        if all(_has_room(x, state.limits.capacity) for x in start):
            state.put(start)
            state.descend(_steps(state, 0.05 * budget))
            best = _better(state, best)
    flow = max(state.traffic.total, 1) / sum(len(x) for x in state.traffic.loads)
    for hot in np.geomspace(1.0, 0.05, _ROUNDS):
        state.put(best[1])
        _anneal(state, _steps(state, 0.5 * budget / _ROUNDS), flow * hot, flow * hot / 100, rng)
        state.descend(_steps(state, 0.1 * budget / _ROUNDS))
        best = _better(state, best)
    return best[1]


def _steps(state: Slots, seconds: float) -> int:
    """How many steps take so long on one core of the machine that this was written on."""
    slots = len(state.where[0])
    return max(int(seconds / (80e-6 + 40e-9 * slots * slots)), 2 * len(state.where))


def _has_room(place: Ints, capacity: Ints) -> bool:
    return bool((np.bincount(place, minlength=len(capacity)) <= capacity).all())


def _better(state: Slots, best: tuple[float, list[Ints]]) -> tuple[float, list[Ints]]:
    """The state where it fits and is worth more than the best, which else stays."""
    value = state.value() if state.fits() else -np.inf
    return (value, state.experts()) if value > best[0] else best


def _anneal(state: Slots, steps: int, hot: float, cold: float, rng: np.random.Generator) -> None:
    """Anneals; overload is cheap at first, for with tight limits few single exchanges keep them."""
    layers = rng.integers(len(state.where), size=steps)
    tokens = 2.0 * state.traffic.total / max(sum(int(x.sum()) for x in state.load), 1)
    for k, layer in enumerate(layers.tolist()):
        done = k / steps
        # The largest of worth / heat plus Gumbel noise is a draw by the heat-bath rule; doing
        # nothing is among the draws, for a slot may be exchanged with itself.
        score = state.exchanges(layer, 0.3 * tokens * 30**done)
        score += rng.gumbel(size=score.shape) * (hot * (cold / hot) ** done)
        state.exchange(layer, score, float(np.diagonal(score).max()))


def _one_hot(place: Ints, devices: int) -> Floats:
    return np.eye(devices)[place]
