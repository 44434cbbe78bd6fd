"""Experts placed exactly: dynamic programming over the placements of whole layers.

Layers interact only with those before and behind them. Where they form lines, and each has few
placements that keep its limits, the best is found as Viterbi's algorithm finds a path: states are a
layer's placements, transitions cost the tokens that cross.
"""

from __future__ import annotations

import numpy as np

from .experts import ExpertTraffic, Limits
from .problem import Floats, Ints

MOST = 3000
"""Placements of a layer up to which every one is looked at."""

_ROWS = 512  # transitions from this many placements at a time


def best_of_lines(traffic: ExpertTraffic, limits: Limits, stay: list[Floats]) -> list[Ints] | None:
    """Devices of each layer's experts, int64 ``[experts]``: tokens that stay plus ``stay`` at most.

    ``stay[l]`` is ``[experts or more, devices]``. None where layers form no lines, or have too many
    placements.
    """
    lines = _lines(traffic)
    if lines is None:
        return None
    choices = []
    for load, most in zip(traffic.loads, limits.load.tolist(), strict=True):
        listed = placements(load, limits.capacity, most)
        if listed is None or not len(listed):
            return None
        choices.append(listed)
    devices = len(limits.capacity)
    found: list[Ints] = [np.zeros(0, np.int64)] * len(choices)
    for line in lines:
        value = _worth(stay[line[0]], choices[line[0]])
        back: list[Ints] = []
        for a, b in zip(line, line[1:], strict=False):
            best, source = _step(value, choices[a], choices[b], _between(traffic, a, b), devices)
            value = best + _worth(stay[b], choices[b])
            back.append(source)
        at = int(value.argmax())
        for layer, source in zip(reversed(line), [*reversed(back), None], strict=True):
            found[layer] = choices[layer][at].astype(np.int64)
            at = at if source is None else int(source[at])
    return found


def placements(load: Ints, capacity: Ints, most: int) -> Ints | None:
    """All placements ``[n, experts]`` within capacity and load, in order; None beyond `MOST`."""
    devices = len(capacity)
    # All placements of the first experts, extended by one expert at a time.
    places = np.zeros((1, 0), np.int64)
    counts, loads = np.zeros((1, devices), np.int64), np.zeros((1, devices), np.int64)
    order = np.argsort(-load, kind="stable")  # heavy ones first leave fewer to extend
    for e in order:
        row, device = np.nonzero((counts + 1 <= capacity[None, :]) & (loads + load[e] <= most))
        if len(row) > 20 * MOST:
            return None
        places = np.hstack([places[row], device[:, None]])
        counts, loads = counts[row], loads[row]
        counts[np.arange(len(row)), device] += 1
        loads[np.arange(len(row)), device] += load[e]
    if len(places) > MOST:
        return None
    listed = np.empty_like(places)
    listed[:, order] = places
    return listed[np.lexsort(listed.T[::-1])]


def _lines(traffic: ExpertTraffic) -> list[list[int]] | None:
    """Layers in lines of neighbours; None where they branch or form a ring."""
    near: list[list[int]] = [[] for _ in traffic.names]
    for a, b in traffic.pairs:
        if b not in near[a]:
            near[a].append(b)
            near[b].append(a)
    if any(len(x) > 2 for x in near):
        return None
    lines: list[list[int]] = []
    seen: set[int] = set()
    for end in range(len(near)):
        if end in seen or len(near[end]) == 2:
            continue
        line = [end]
        while further := [x for x in near[line[-1]] if x not in line[-2:]]:
            line.append(further[0])
        lines.append(line)
        seen.update(line)
    return lines if len(seen) == len(near) else None


def _between(traffic: ExpertTraffic, a: int, b: int) -> Ints:
    """Tokens between two layers, ``[experts of a, experts of b]``, whichever runs first."""
    table = np.zeros((len(traffic.loads[a]), len(traffic.loads[b])), np.int64)
    if (a, b) in traffic.pairs:
        table = table + traffic.pairs[a, b]
    if (b, a) in traffic.pairs:
        table = table + traffic.pairs[b, a].T
    return table


def _worth(stay: Floats, listed: Ints) -> Floats:
    return stay[np.arange(listed.shape[1])[None, :], listed].sum(1)


def _step(
    value: Floats, first: Ints, second: Ints, table: Ints, devices: int
) -> tuple[Floats, Ints]:
    """Best value of each placement of the second layer, and the one of the first it comes from."""
    hot = np.eye(devices)
    a = hot[first].transpose(0, 2, 1).reshape(len(first), -1)  # [n, devices * experts]
    b = (table @ hot[second]).transpose(0, 2, 1).reshape(len(second), -1)
    best = np.empty(len(second))
    source = np.empty(len(second), np.int64)
    for start in range(0, len(second), _ROWS):
        total = value[None, :] + b[start : start + _ROWS] @ a.T
        source[start : start + _ROWS] = total.argmax(1)
        best[start : start + _ROWS] = total.max(1)
    return best, source
