"""Experts with copies: which copy handles a token, and the loads and crossings that follow.

An expert may lie on several devices. **The rule.** Each expert of a token is handled once: on the
device of the first of the token's experts of the layer before, the strongest first, whose device
holds a copy; where none does, and in the first layer, the copies take tokens in turn (the token's
number modulo their count). So a token stays where it is as long as it can, and whoever runs the
experts needs no tables: the placement says it all. `replay` plays the rule on recorded routes.

**The model.** Counts of pairs do not tell single tokens, so `flow` assumes that the tokens of an
expert go on alike from each of its copies, and that a token's experts of one layer lie
independently of each other. With ``s_i(c)`` the share of expert i's tokens that device c handles,
expert j's tokens come from device c with ``p_j(c) = sum_i n_ij s_i(c) / sum_i n_ij``. Of a token's
k experts before, each is on one of j's devices P with ``R = sum of p_j over P``. Then

- ``s_j(c) = p_j(c) (1 - (1 - R)^k) / R + (1 - R)^k / |P|`` for c in P: the first that is on one of
  them decides; all are elsewhere with (1 - R)^k;
- a pair of i and j does not cross, where i was handled at c in P, with ``w + (1 - w) p_j(c) / R``:
  i itself decides with ``w = (1 - (1 - R)^k) / (k R)``, else another expert does.

Without copies this is exact, whatever the routes. With them it is exact in the first layers, and
else an estimate, mostly one that is too high: tokens of one kind keep to the same devices, which
pairs of experts do not tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import PlacementError
from .experts import ExpertTraffic, Held
from .problem import Floats, Ints

_SMALL = 1e-9  # chances below which formulas take their limits


@dataclass(frozen=True)
class Flow:
    """What follows of a placement: ``shares[l]`` is float64 ``[experts, devices]``, of each
    expert's tokens those that a device handles; ``loads[l]`` ``[devices]``, tokens of the layer;
    ``crossing`` tokens that change devices.
    """

    shares: list[Floats]
    loads: list[Floats]
    crossing: float

    def imbalance(self) -> list[float]:
        """For each layer the largest load of a device over the mean; 1 where there is none."""
        return [float(x.max() * len(x) / x.sum()) if x.sum() else 1.0 for x in self.loads]


@dataclass(frozen=True)
class Choice:
    """How the tokens of a layer's experts find copies; all are ``[experts]`` but ``share``."""

    reach: Floats  # R: the chance that an expert before is on a device with a copy
    square: Floats  # sum of squares of p over the copies
    decide: Floats  # w: the chance that the expert of a pair decides
    scale: Floats  # (1 - (1 - R)^k) / R
    rest: Floats  # (1 - R)^k
    share: Floats  # s [experts, devices]

    @property
    def stays(self) -> Floats:
        """The chance that a pair does not cross."""
        return self.decide * self.reach + (1 - self.decide) * self.square / self.reach


def chances(reach: Floats, k: Floats) -> tuple[Floats, Floats, Floats]:
    """``(w, scale, rest)`` of `Choice` for chances ``reach`` in (0, 1] and ``k`` tries."""
    rest = np.power(1.0 - np.minimum(reach, 1.0), k)
    scale = (1.0 - rest) / reach
    return scale / k, scale, rest


def chosen(held: Held, come: Floats, k: Floats) -> Choice:
    """How tokens that come from devices by ``come`` ``[experts, devices]`` find copies."""
    there = come * held
    reach = np.clip(there.sum(1), _SMALL, 1.0)
    decide, scale, rest = chances(reach, k)
    share = there * scale[:, None] + held * (rest / held.sum(1))[:, None]
    return Choice(reach, (there**2).sum(1), decide, scale, rest, share)


class Model:
    """The model for one `ExpertTraffic`; tables are float64, exact for counts."""

    def __init__(self, traffic: ExpertTraffic) -> None:
        self.traffic = traffic
        self.load = [x.astype(float) for x in traffic.loads]
        self.into: list[list[tuple[int, Floats]]] = [[] for _ in self.load]
        self.out: list[list[tuple[int, Floats]]] = [[] for _ in self.load]
        self.back: list[tuple[int, int]] = []  # pairs of layers against their order
        for (a, b), table in traffic.pairs.items():
            if a < b:
                self.into[b].append((a, np.ascontiguousarray(table.T.astype(float))))
                self.out[a].append((b, table.astype(float)))
            else:
                self.back.append((a, b))
        self.pairs = [
            sum((table.sum(1) for _, table in into), np.zeros(len(load)))
            for into, load in zip(self.into, self.load, strict=True)
        ]
        """[experts] pairs of each expert with those of the layer before."""
        self.tries = [
            np.maximum(n / np.maximum(load, 1.0), 1.0)
            for n, load in zip(self.pairs, self.load, strict=True)
        ]
        """[experts] k, experts before each of an expert's tokens."""

    def come(self, layer: int, shares: Sequence[Floats], devices: int) -> Floats:
        """p: whence an expert's tokens come, ``[experts, devices]``; 0 in a first layer."""
        found = np.zeros((len(self.load[layer]), devices))
        for a, table in self.into[layer]:
            found += table @ shares[a]
        return found / np.maximum(self.pairs[layer], 1.0)[:, None]

    def flow(self, held: Sequence[Held]) -> Flow:
        """What follows of a placement; every expert is on some device.

        A pair of layers against their order counts as if copies were chosen without regard to it.
        """
        shares: list[Floats] = []
        crossing = 0.0
        for layer, where in enumerate(held):
            come = self.come(layer, shares, where.shape[1])
            choice = chosen(where, come, self.tries[layer])
            shares.append(choice.share)
            crossing += float((self.pairs[layer] * (1.0 - choice.stays)).sum())
        for a, b in self.back:
            table = self.traffic.pairs[a, b]
            crossing += float((table * (1.0 - shares[a] @ shares[b].T)).sum())
        loads = [load @ share for load, share in zip(self.load, shares, strict=True)]
        return Flow(shares, loads, crossing)


def replay(routes: Mapping[str, npt.ArrayLike], held: Sequence[Held]) -> list[Ints]:
    """Where the rule has each expert of each token handled: int64 ``[tokens, k]``, -1 for none.

    ``routes`` are as `ExpertTraffic.from_routes` takes them, the strongest expert of a token first.
    Raises PlacementError where they are not of the placement's layers.
    """
    if len(routes) != len(held):
        raise PlacementError(f"routes of {len(routes)} layers, a placement of {len(held)}")
    played: list[Ints] = []
    for route, where in zip(routes.values(), held, strict=True):
        index = np.asarray(route)
        index = index[:, None] if index.ndim == 1 else index
        known = (index >= 0) & (index < len(where))
        expert = np.where(known, index, 0)
        number = np.arange(len(index))[:, None]
        copies = np.argsort(~where, axis=1, kind="stable")  # those that hold it come first
        device = copies[expert, number % where.sum(1)[expert]].astype(np.int64)
        if played and len(played[-1]) == len(index):
            for before in reversed(played[-1].T):  # the strongest has the last word
                here = before[:, None]
                device = np.where((here >= 0) & where[expert, here], here, device)
        played.append(np.where(known, device, -1))
    return played


def crossings(played: Sequence[Ints]) -> int:
    """Pairs of experts of following layers that handle one token on different devices."""
    total = 0
    for before, after in zip(played, played[1:], strict=False):
        if len(before) == len(after):
            apart = before[:, :, None] != after[:, None, :]
            known = (before >= 0)[:, :, None] & (after >= 0)[:, None, :]
            total += int((apart & known).sum())
    return total


def loads_of(played: Sequence[Ints], devices: int) -> list[Ints]:
    """Tokens of each layer that each device handles, int64 ``[devices]``."""
    return [np.bincount(x[x >= 0], minlength=devices) for x in played]
