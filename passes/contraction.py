"""Merging nodes of an acyclic graph into groups without making a cycle.

Two groups may become one exactly if no path leads from one to the other through a third. Both
directions of reachability are kept as bit sets (Python integers), exact under merging, so the
question costs one ``&`` of two words per 64 nodes. A merge along an edge updates only what one of
its ends reached and the other did not, which for chains is nothing. Memory is ``n * n / 4`` bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class Contraction:
    """Groups of the nodes ``0 .. n-1`` of a DAG; initially each node is a group of its own.

    ``predecessors[i]`` lists the direct predecessors of node i, all smaller than i: nodes are
    numbered in a topological order. A group is called by any of its nodes; `find` says which
    node stands for it.

    Raises:
        ValueError: a predecessor is not smaller than its node.
    """

    def __init__(self, predecessors: Sequence[Iterable[int]]) -> None:
        n = len(predecessors)
        self._parent = list(range(n))
        self._mask = [1 << i for i in range(n)]
        self._above = [0] * n  # what a group depends on, as a set of nodes outside it
        self._below = [0] * n  # what depends on it
        for i, before in enumerate(predecessors):
            for p in before:
                if not 0 <= p < i:
                    raise ValueError(f"node {i} has predecessor {p}: not a topological order")
                self._above[i] |= self._above[p] | 1 << p
        successors: list[set[int]] = [set() for _ in range(n)]
        for i, before in enumerate(predecessors):
            for p in before:
                successors[p].add(i)
        for i in reversed(range(n)):
            for s in successors[i]:
                self._below[i] |= self._below[s] | 1 << s

    def find(self, node: int) -> int:
        """The node that stands for the group of ``node``."""
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def depends(self, node: int, on: int) -> bool:
        """Whether the group of ``node`` needs a result, however indirectly, of the other's."""
        return bool(self._above[self.find(node)] & self._mask[self.find(on)])

    def can_merge(self, *nodes: int) -> bool:
        """Whether the groups of these nodes may become one without a cycle."""
        _, above, below = self._union({self.find(node) for node in nodes})
        return not above & below

    def _union(self, groups: set[int]) -> tuple[int, int, int]:
        mask = above = below = 0
        for group in groups:
            mask |= self._mask[group]
            above |= self._above[group]
            below |= self._below[group]
        return mask, above & ~mask, below & ~mask

    def merge(self, *nodes: int) -> int:
        """Make one group of the groups of these nodes and return the node that stands for it.

        Raises:
            ValueError: `can_merge` is False.
        """
        first = self.find(nodes[0])
        groups = {self.find(node) for node in nodes}
        if len(groups) == 1:
            return first
        mask, above, below = self._union(groups)
        if above & below:
            raise ValueError(f"merging the groups of {sorted(groups)} would make a cycle")
        # Whoever did not know all of them now also reaches what the others reached.
        for group in self._groups(below & ~self._common(self._below, groups)):
            self._above[group] |= above | mask
        for group in self._groups(above & ~self._common(self._above, groups)):
            self._below[group] |= below | mask
        for group in groups:
            self._parent[group] = first
            self._mask[group] = self._above[group] = self._below[group] = 0
        self._mask[first], self._above[first], self._below[first] = mask, above, below
        return first

    @staticmethod
    def _common(sets: list[int], groups: set[int]) -> int:
        common = -1
        for group in groups:
            common &= sets[group]
        return common

    def _groups(self, nodes: int) -> Iterator[int]:
        """The groups that have a node in the bit set ``nodes``."""
        while nodes:
            group = self.find((nodes & -nodes).bit_length() - 1)
            yield group
            nodes &= ~self._mask[group]
