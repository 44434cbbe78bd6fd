"""The likely graph that `speculate-routes` makes, and what it is a bet on."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from . import route_odds
from .route_odds import Grouping, Key, Routes, label_of
from .route_regions import Group

LIKELY = "likely"
"""Key of a graph module's ``meta``: its `Likely` graph."""


@dataclass(frozen=True)
class Likely:
    """The graph for the routes that are likely.

    It takes what the general graph takes and returns the same and, last, whether the routes of the
    call were those ``assumed`` (bool; all the results mean nothing where they were not). ``dense``
    are the routers whose branch runs on every cell, ``grouped`` those with groups for branches,
    which the graph knows by the name `grouped_key`. ``held`` tells for each held-out batch whether
    the bet was won, ``shapes`` how many branches a router has, and slots a cell of it.
    """

    graph: fx.GraphModule
    assumed: dict[Key, Group]
    dense: tuple[Key, ...]
    held: tuple[bool, ...]
    shapes: dict[Key, tuple[int, int]]
    grouped: dict[Key, Grouping]

    def groups(self) -> dict[Key, tuple[Group, ...]]:
        """The branches of each router that run together."""
        found = {key: (group,) for key, group in self.assumed.items() if len(group) > 1}
        joined = {k: tuple(g for g in v.groups if len(g) > 1) for k, v in self.grouped.items()}
        return {**found, **joined}

    @property
    def guarded(self) -> bool:
        """Whether there are routes for which the graph is wrong."""
        return bool(self.assumed or self.grouped)

    @property
    def odds(self) -> float:
        """The probability that a call wins."""
        return route_odds.odds(sum(self.held), len(self.held)) if self.guarded else 1.0

    def grounds(self, routes: Routes) -> list[str]:
        """How often the branches of its groups ran together, a line of text for each router."""
        texts = []
        for key, group in self.assumed.items():
            if len(group) > 1:
                counts = []
                for stats in routes[key]:
                    found = [] if stats is None else route_odds.outcomes(stats, self.shapes[key][1])
                    counts.append(f"{found.count(group)} of {len(found)}")
                text = f"router {label_of(key)!r}: all cells took the branches"
                text = f"{text} {name_group(group)} together"
                texts.append(f"{text} in {' fitted and '.join(counts)} held-out batches")
        for key, grouping in self.grouped.items():
            counts = []
            for stats in routes[key]:
                lost = 0 if stats is None else route_odds.broken(stats, grouping)
                counts.append(f"{lost} of {0 if stats is None else sum(stats.cells)}")
            names = ", ".join(map(name_group, grouping.groups))
            text = f"router {label_of(key)!r}: the branches {names} run together; at most"
            texts.append(f"{text} {' fitted and '.join(counts)} held-out cells went otherwise")
        return texts


def grouped_key(key: Key) -> Key:
    """The router of groups that takes the place of a router."""
    return f"{key[0]} (groups)", key[1]


def name_group(group: Group) -> str:
    """A group as text."""
    return "+".join(map(str, group))
