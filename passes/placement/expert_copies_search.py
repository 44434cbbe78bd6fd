"""Experts placed with copies: annealing over which devices hold which experts.

The cost is that of the flow model of `expert_copies`. Seen from one layer, with what comes from the
layer before and what the layer behind makes of it held fixed, experts matter to each other only by
load. So sweeps go through the layers: forwards for where tokens come from, backwards for what a
token on a device costs from there on (the derivative of all later crossings), then a few steps in
each layer. A step looks at many exchanges of two slots, at copies put into free slots or in place
of others, and at copies dropped, and takes one by the heat-bath rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .expert_copies import Choice, Model, chances, chosen
from .experts import Held, Limits
from .problem import Floats, Ints

_MOST = 96  # slots, and experts to copy, that one step looks at
_STEPS = 3  # in each layer of a sweep
_ROUNDS = 4


class Sums(NamedTuple):
    """Of an expert's copies, what its cost depends on: sums over the devices that hold it."""

    reach: Floats  # of p
    square: Floats  # of p squared
    paid: Floats  # of p times what follows
    follows: Floats  # of what follows
    held: Floats  # of what holding it costs
    count: Floats

    def plus(self, other: Sums, sign: float = 1.0) -> Sums:
        """The sums with others added, or taken away."""
        return Sums(*(a + sign * b for a, b in zip(self, other, strict=True)))

    def cost(self, pairs: Floats, k: Floats) -> tuple[Floats, Floats, Floats]:
        """Crossing tokens here and later, but for a constant; scale and rest of `Choice`."""
        reach = np.clip(self.reach, 1e-9, 1.0)
        decide, scale, rest = chances(reach, k)
        stays = decide * reach + (1 - decide) * self.square / reach
        later = scale * self.paid + rest * self.follows / np.maximum(self.count, 1)
        return self.held + later - pairs * stays, scale, rest


class _Change:
    """Changes of where single experts lie: ``gain`` is the cost that each adds, ``[changes]`` or
    ``[changes, devices]`` with a copy on each device of ``every``.
    """

    def __init__(
        self, state: Copying, layer: int, share: Floats, expert: Ints, sums: Sums, held: Held,
        before: Floats, every: Held | None,
    ) -> None:  # fmt: skip
        wide = (slice(None),) if every is None else (slice(None), None)
        n, k = state.model.pairs[layer][expert], state.model.tries[layer][expert]
        cost, self.scale, rest = sums.cost(n[wide], k[wide])
        self.gain = cost - before[expert][wide]
        self.rest = rest / np.maximum(sums.count, 1)
        self.come, self.share = state.come[layer][expert], share[expert]
        self.tokens, self.held, self.every = state.model.load[layer][expert], held, every

    def load(self, which: Ints, device: Ints | None = None) -> Floats:
        """Load ``[which, devices]`` that some of the changes add, each with its device."""
        at = which if device is None else (which, device)
        held = self.held[which]
        if device is not None and self.every is not None:
            held = held | self.every[device]
        each = held * (self.come[which] * self.scale[at][:, None] + self.rest[at][:, None])
        return (each - self.share[which]) * self.tokens[which][:, None]


def _first(score: Floats, exact: Callable[[Ints], Floats]) -> tuple[int, float]:
    """Where the largest exact score is, and that; ``score`` is never below the exact one.

    So only those are made exact whose score reaches the best exact one: a few, mostly.
    """
    count = 64
    while True:
        count = min(count, len(score))
        order = np.argpartition(-score, count - 1)[:count] if count < len(score) else (
            np.arange(len(score)))  # fmt: skip
        values = exact(order)
        k = int(values.argmax())
        best, value = int(order[k]), float(values[k])
        if count == len(score) or value >= float(score[order].min()):
            return best, value
        count *= 8


class Copying:
    """The search's state: ``held[l]`` are the devices of each expert of a layer."""

    def __init__(
        self, model: Model, load: Ints, room: Ints, hold: list[Floats], rng: np.random.Generator
    ) -> None:
        self.model, self.most, self.room, self.hold, self.rng = model, load, room, hold, rng
        self.devices = len(room)
        self.held: list[Held] = []
        self.come: list[Floats] = []
        self.follows: list[Floats] = []
        self.choice: list[Choice] = []
        self.cost = self.over = np.inf

    def put(self, held: Sequence[Held]) -> None:
        """Takes a placement."""
        self.held = [x.copy() for x in held]
        self.refresh()

    def refresh(self) -> None:
        """Plays the model forwards, for cost and overload, and backwards."""
        model, shares = self.model, []
        self.come, self.choice = [], []
        self.cost = self.over = 0.0
        for layer, held in enumerate(self.held):
            self.come.append(model.come(layer, shares, self.devices))
            choice = chosen(held, self.come[-1], model.tries[layer])
            self.choice.append(choice)
            shares.append(choice.share)
            self.cost += float((model.pairs[layer] * (1.0 - choice.stays)).sum())
            self.cost += float(self.hold[layer][held].sum())
            on = model.load[layer] @ choice.share
            self.over += float(np.maximum(on - self.most[layer], 0.0).sum())
        self.follows = [np.zeros_like(x) for x in self.come]
        slope = [np.zeros_like(x) for x in self.come]  # of the cost, by come
        for layer in reversed(range(len(self.held))):
            for b, table in model.out[layer]:
                self.follows[layer] += table @ (slope[b] / np.maximum(model.pairs[b], 1.0)[:, None])
            slope[layer] = self._slope(layer)

    def _slope(self, layer: int) -> Floats:
        """What a share of an expert's tokens costs, by the device that it comes from."""
        choice, held, come = self.choice[layer], self.held[layer], self.come[layer]
        n, k, follows = self.model.pairs[layer], self.model.tries[layer], self.follows[layer]
        reach, decide = choice.reach, choice.decide
        last = k * np.power(1.0 - reach, k - 1)  # less chance that all are elsewhere
        scale_slope = (last - choice.scale) / reach
        decide_slope = scale_slope / k
        spread = choice.square / reach
        stays = decide + decide_slope * (reach - spread) - (1 - decide) * spread / reach
        paid = (come * follows * held).sum(1)
        mean = (follows * held).sum(1) / held.sum(1)
        alike = scale_slope * paid - last * mean - n * stays
        own = choice.scale[:, None] * follows - (2 * n * (1 - decide) / reach)[:, None] * come
        return held * (alike[:, None] + own)

    def _sums(self, layer: int) -> Sums:
        """Sums' terms, ``[experts, devices]``."""
        p, follows = self.come[layer], self.follows[layer]
        return Sums(p, p * p, p * follows, follows, self.hold[layer], np.ones_like(p))

    def fill(self, layer: int) -> None:
        """Copies into free slots, the best first, as long as they help and fit."""
        model, held = self.model, self.held[layer]
        term = self._sums(layer)
        n, k = model.pairs[layer][:, None], model.tries[layer][:, None]
        while True:
            base = Sums(*((x * held).sum(1, keepdims=True) for x in term))
            gain = base.cost(n, k)[0] - base.plus(term).cost(n, k)[0]
            free = self.room - held.sum(0)
            gain[held | (free <= 0)[None, :]] = 0.0
            share = chosen(held, self.come[layer], model.tries[layer]).share
            on = model.load[layer] @ share
            used: set[int] = set()
            for pair in np.argsort(-gain, axis=None)[: 4 * self.devices].tolist():
                e, d = divmod(pair, self.devices)
                if gain[e, d] <= 1e-9:
                    break
                if e in used or free[d] <= 0:
                    continue
                held[e, d] = True
                now = chosen(held[[e]], self.come[layer][[e]], model.tries[layer][[e]]).share[0]
                after = on + model.load[layer][e] * (now - share[e])
                if (after > np.maximum(on, self.most[layer])).any():
                    held[e, d] = False
                    continue
                on, used = after, used | {e}
                free[d] -= 1
            if not used:
                return

    def step(self, layer: int, price: float, heat: float) -> None:
        """One exchange, copy or drop in a layer; a token of overload costs ``price``."""
        model, held, rng = self.model, self.held[layer], self.rng
        load, most, m = model.load[layer], float(self.most[layer]), self.devices
        share = chosen(held, self.come[layer], model.tries[layer]).share
        on = load @ share
        term = self._sums(layer)
        n, k = model.pairs[layer], model.tries[layer]
        base = Sums(*((x * held).sum(1) for x in term))
        before = base.cost(n, k)[0]

        expert, device = np.nonzero(held)
        some = _some(np.arange(len(expert)), rng)
        expert, device = expert[some], device[some]
        slots = len(expert)
        gone = Sums(*(x[expert, device] for x in term))
        left = Sums(*(x[expert] for x in base)).plus(gone, -1.0)
        copied = _some(np.arange(len(load)), rng)
        every = np.eye(m, dtype=bool)
        # Each slot's expert to each device instead, [slots, devices]; without that copy; with one
        # more, [copied, devices].
        without = held[expert]
        without[np.arange(slots), device] = False
        moved = Sums(*(a[:, None] + b[expert] for a, b in zip(left, term, strict=True)))
        move = _Change(self, layer, share, expert, moved, without, before, every)
        move.gain[held[expert]] = np.inf
        drop = _Change(self, layer, share, expert, left, without, before, None)
        drop.gain[left.count < 0.5] = np.inf
        more = Sums(*(a[copied][:, None] + b[copied] for a, b in zip(base, term, strict=True)))
        add = _Change(self, layer, share, copied, more, held[copied], before, every)
        add.gain[held[copied]] = np.inf
        # Free slots: nothing goes from them, nothing is lost.
        free = np.flatnonzero(held.sum(0) < self.room)
        at = np.append(device, free)
        same = np.append(expert, np.full(len(free), -1))
        swap = move.gain[:, at]
        swap[:, :slots] += move.gain[:, device].T
        swap[(device[:, None] == at[None, :]) | (expert[:, None] == same[None, :])] = np.inf
        put = np.append(drop.gain, np.zeros(len(free)))[:, None] + add.gain[:, at].T
        put[same[:, None] == copied[None, :]] = np.inf  # [all slots, copied]
        score = -np.concatenate([[0.0], swap.ravel(), put.ravel(), drop.gain])
        if heat:
            score += rng.gumbel(size=len(score)) * heat
        swaps, puts = 1 + swap.size, 1 + swap.size + put.size

        def loads(picked: Ints) -> Floats:
            """What changes `on`, ``[picked, devices]``."""
            change = np.zeros((len(picked), m))
            which = (picked > 0) & (picked < swaps)
            a, b = np.divmod(picked[which] - 1, len(at))
            change[which] = move.load(a, at[b])
            back = np.flatnonzero(which)[b < slots]
            change[back] += move.load(b[b < slots], device[a[b < slots]])
            which = (picked >= swaps) & (picked < puts)
            a, j = np.divmod(picked[which] - swaps, len(copied))
            change[which] = add.load(j, at[a])
            less = np.flatnonzero(which)[a < slots]
            change[less] += drop.load(a[a < slots])
            which = picked >= puts
            change[which] = drop.load(picked[which] - puts)
            return change

        def exact(picked: Ints) -> Floats:
            return score[picked] - price * np.maximum(on + loads(picked) - most, 0.0).sum(1)

        best, value = _first(score, exact)
        if value <= float(exact(np.zeros(1, np.int64))[0]) + 1e-9:
            return
        if best < swaps:
            a, b = divmod(best - 1, len(at))
            held[expert[a], device[a]], held[expert[a], at[b]] = False, True
            if b < slots:
                held[expert[b], device[b]], held[expert[b], device[a]] = False, True
            return
        a = best - puts
        if best < puts:
            a, j = divmod(best - swaps, len(copied))
            held[copied[j], at[a]] = True
        if a < slots:
            held[expert[a], device[a]] = False

    def sweep(self, price: float, heat: float, fill: bool) -> None:
        """A few steps in each layer, in order, with what comes from before made anew."""
        shares: list[Floats] = []
        for layer in range(len(self.held)):
            self.come[layer] = self.model.come(layer, shares, self.devices)
            if fill:
                self.fill(layer)
            for _ in range(_STEPS):
                self.step(layer, price, heat)
            tries = self.model.tries[layer]
            shares.append(chosen(self.held[layer], self.come[layer], tries).share)
        self.refresh()


def best_with_copies(
    model: Model,
    limits: Limits,
    room: Ints,
    hold: list[Floats],
    starts: Sequence[Sequence[Held]],
    budget: float,
    rng: np.random.Generator,
) -> list[Held] | None:
    """Devices of each layer's experts, the cheapest found within loads and ``room``; None: none.

    ``room`` is ``[devices]`` experts and copies of a layer; ``hold[l]`` ``[experts, devices]`` what
    it costs that an expert lies there, tokens. Never worse than a start that keeps the limits.
    """
    state = Copying(model, limits.load, room, hold, rng)
    total = max(float(sum(x.sum() for x in model.pairs)), 1.0)
    dear = 4.0 * total + sum(float(x.sum()) for x in hold)
    best: tuple[float, float, list[Held]] = np.inf, np.inf, []

    def note() -> None:
        nonlocal best
        over = state.over if state.over > 1e-6 * total else 0.0
        if (over, state.cost) < best[:2]:
            best = over, state.cost, [x.copy() for x in state.held]

    sweeps = int(budget / _seconds(state))
    for start in starts:
        state.put(start)
        note()
        for _ in range(max(sweeps // 20, 1)):
            state.sweep(dear, 0.0, True)
            note()
    flow = total / sum(len(x) for x in model.load)
    tokens = 2.0 * total / max(sum(float(x.sum()) for x in model.load), 1.0)
    count = int(0.8 * sweeps) // _ROUNDS - 1
    heats = np.geomspace(1.0, 0.05, _ROUNDS).tolist() if count > 0 else []
    for number, hot in enumerate([*heats, *heats]):
        if number >= _ROUNDS and best[0] == 0.0:
            break  # the second time is for those that fit nowhere yet
        state.put(best[2])
        for k in range(count):
            done = k / count
            state.sweep(0.3 * tokens * 30**done, flow * hot * 0.01**done, False)
            note()
        state.sweep(dear, 0.0, True)
        note()
    return best[2] if best[0] == 0.0 else None


def _seconds(state: Copying) -> float:
    """About how long a sweep takes on one core of the machine that this was written on."""
    m, seconds = state.devices, 0.0
    slots = min(int(state.room.sum()), _MOST)
    for load in state.model.load:
        looked = slots * (slots + min(len(load), _MOST))
        seconds += _STEPS * (750e-6 + 27e-9 * looked) + 2e-9 * len(load) ** 2 * m
    return seconds


def _some(items: Ints, rng: np.random.Generator) -> Ints:
    return items if len(items) <= _MOST else rng.choice(items, _MOST, replace=False)
