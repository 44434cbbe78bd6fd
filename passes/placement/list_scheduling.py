"""List scheduling under memory limits, as m-TOPO, m-ETF, m-SCT and HEFT share it.

Memory is counted as the published algorithms do, and the first op of a colocation group books the
parameters of the whole group. In the static model (training as in Baechi) outputs and temporaries
stay; in the dynamic one an output, and each received copy, lasts until all its consumers have been
placed. That is a guess, for ops are not placed in the order of time: `simulator` judges. Where it
fails, "balanced" booking shares out all that is ever made, as if nothing were freed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import InfeasibleError
from .problem import Arrays, Floats, Ints, Problem


@dataclass(frozen=True)
class Listed:
    """What a list scheduler decides: a device per op and the order in which it placed the ops."""

    assign: Ints  # [n]
    sequence: Ints  # [n]


def balanced_room(p: Arrays, need: Sequence[float]) -> Floats:
    """Capacities stretched alike until all that is ever made would fit at once, bytes.

    Booked against them, memory is shared out evenly although most of it is free again in time.
    """
    stretch = max(sum(need) / max(float(p.cap.sum()), 1.0), 1.0)
    return p.cap * stretch + max(need, default=0.0)


class Ledger:
    """Books memory on devices by colocation unit, and remembers what data arrives where, when."""

    def __init__(
        self,
        problem: Problem,
        contention: bool = False,
        limited: bool = True,
        balanced: bool = False,
    ) -> None:
        self.problem, self.p = problem, problem.arrays
        p = self.p
        self.n, self.m = p.time.shape
        self.contention = contention
        self.time: list[list[float]] = p.time.tolist()
        self.whole = p.static or balanced  # whether all of a group's bytes are booked at once
        need = p.param + p.out + p.temp if self.whole else p.param
        self.need = np.bincount(p.unit, weights=need, minlength=len(p.unit_ptr) - 1).tolist()
        room = balanced_room(p, self.need) if balanced else p.cap
        self.room = room.tolist() if limited else [float("inf")] * self.m
        self.out, self.temp, self.keep = p.out.tolist(), p.temp.tolist(), p.keep.tolist()
        self.live: list[dict[int, float]] = [
            {} for _ in range(self.n)
        ]  # bytes of outputs by device
        self.allowed = p.allowed.tolist()
        self.unit = p.unit.tolist()
        self.unit_device = [-1] * len(self.need)
        self.assign = [-1] * self.n
        self.end = [0.0] * self.n
        self.free = [0.0] * self.m
        self.link_free = [[0.0] * self.m for _ in range(self.m)]
        self.copies: dict[tuple[int, int], float] = {}
        self.lat, self.bw = p.lat.tolist(), p.bw.tolist()
        self.tensor_src, self.tensor_bytes = p.tensor_src.tolist(), p.tensor_bytes.tolist()
        tensors = p.pair_tensor[p.in_pair].tolist()
        self.inputs = [tensors[a:b] for a, b in zip(p.in_ptr[:-1], p.in_ptr[1:], strict=True)]
        first = p.tensor_ptr[p.out_ptr].tolist()
        dst = p.pair_dst.tolist()
        self.consumers = [dst[a:b] for a, b in zip(first[:-1], first[1:], strict=True)]
        self.missing = np.diff(p.in_ptr).tolist()
        self.unplaced = [len(set(row)) for row in self.consumers]

    def devices(self, op: int) -> list[int]:
        """Devices where an op may go now: its group's, or those with room for the whole group."""
        unit, extra = self.unit[op], self._extra(op)
        if self.unit_device[unit] >= 0:
            d = self.unit_device[unit]
            return [d] if extra <= self.room[d] else []
        allowed, need = self.allowed[unit], self.need[unit] + extra
        return [d for d in range(self.m) if allowed[d] and need <= self.room[d]]

    def able(self, op: int, device: int) -> bool:
        """Whether a device is one of `devices`, without asking after the others."""
        unit = self.unit[op]
        at = self.unit_device[unit]
        if at >= 0:
            return at == device and self._extra(op) <= self.room[device]
        return self.allowed[unit][device] and self.need[unit] + self._extra(op) <= self.room[device]

    def _extra(self, op: int) -> float:
        """Bytes that an op needs beside what its group has booked."""
        return 0.0 if self.whole else self.out[op] + self.temp[op]

    def sent(self, tensor: int, device: int) -> float:
        """When a tensor can be on a device, seconds."""
        source = self.tensor_src[tensor]
        here, done = self.assign[source], self.end[source]
        if here == device:
            return done
        if self.contention:
            if (tensor, device) in self.copies:
                return self.copies[tensor, device]
            done = max(done, self.link_free[here][device])
        return done + self.lat[here][device] + self.tensor_bytes[tensor] / self.bw[here][device]

    def arrival(self, op: int, device: int) -> float:
        """When all inputs of an op can be on a device, seconds."""
        return max([self.sent(t, device) for t in self.inputs[op]], default=0.0)

    def place(self, op: int, device: int, start: float) -> list[int]:
        """Books an op; returns the ops that this made ready."""
        unit = self.unit[op]
        if self.unit_device[unit] < 0:
            self.unit_device[unit] = device
            self.room[device] -= self.need[unit]
        if self.contention:
            for t in self.inputs[op]:
                source = self.assign[self.tensor_src[t]]
                if source != device and (t, device) not in self.copies:
                    self.copies[t, device] = self.link_free[source][device] = self.sent(t, device)
        if not self.whole:
            self._hold(op, device)
        self.assign[op] = device
        self.end[op] = start + self.time[op][device]
        self.free[device] = max(self.free[device], self.end[op])
        ready = []
        for v in self.consumers[op]:
            self.missing[v] -= 1
            if not self.missing[v]:
                ready.append(v)
        return ready

    def _hold(self, op: int, device: int) -> None:
        """Counts the output and the received copies of an op that is being placed."""
        self.live[op][device] = self.out[op]
        self.room[device] -= self.out[op]
        for t in self.inputs[op]:
            u = self.tensor_src[t]
            if self.assign[u] != device and (copy := self.tensor_bytes[t]):
                if device not in self.live[u]:
                    self.live[u][device] = copy
                    self.room[device] -= copy
        for u in {self.tensor_src[t] for t in self.inputs[op]}:
            self.unplaced[u] -= 1
            if not self.unplaced[u] and not self.keep[u]:
                for d, size in self.live[u].items():
                    self.room[d] += size
        if not self.unplaced[op] and not self.keep[op]:
            self.room[device] += self.out[op]

    def stuck(self, op: int, algorithm: str) -> InfeasibleError:
        """What to raise when an op has no device left."""
        unit = self.unit[op]
        need = self._extra(op) + (self.need[unit] if self.unit_device[unit] < 0 else 0.0)
        short = {
            device.name: need - room
            for device, room, ok in zip(
                self.problem.devices, self.room, self.allowed[self.unit[op]], strict=True
            )
            if ok
        }
        name, least = min(short.items(), key=lambda item: item[1])
        return InfeasibleError(
            f"{algorithm} found no room for op {self.problem.ops[op].name!r}: it needs "
            f"{need:.0f} bytes more, {name!r} is {least:.0f} bytes short; algorithm 'best' "
            "searches further",
            short,
            False,
        )


def upward_ranks(problem: Problem) -> Floats:
    """HEFT's upward ranks: longest path to the end with mean times and mean transfers, seconds."""
    p = problem.arrays
    m = len(problem.devices)
    allowed = np.isfinite(p.time)
    mean = (np.where(allowed, p.time, 0).sum(1) / np.maximum(allowed.sum(1), 1)).tolist()
    other = ~np.eye(m, dtype=bool)
    lat = float(p.lat[other].mean()) if m > 1 else 0.0
    per_byte = float((1 / p.bw[other]).mean()) if m > 1 else 0.0
    cost = (lat + p.tensor_bytes * per_byte)[p.pair_tensor].tolist()
    first, dst = p.tensor_ptr[p.out_ptr].tolist(), p.pair_dst.tolist()
    rank = [0.0] * len(mean)
    for u in reversed(p.topo.tolist()):
        best = 0.0
        for q in range(first[u], first[u + 1]):
            best = max(best, cost[q] + rank[dst[q]])
        rank[u] = mean[u] + best
    return np.array(rank)


def earliest_first(
    ledger: Ledger,
    name: str,
    rank: Sequence[float],
    start_of: Callable[[int, int, bool], float],
    placed: Callable[[int, int], None] = lambda op, d: None,
    patience: float = math.inf,
) -> Listed:
    """Places the pair of a ready op and a device with room that can start first, again and again.

    ``start_of(op, device, again)`` is when a pair could start; it is asked ``again`` when the
    pair's turn has come, since the device or a link may have been taken meanwhile. Smaller
    ``rank`` decides between equals. ``placed`` is told before the ops that became ready are
    offered. Raises InfeasibleError, of the algorithm ``name``, for an op without room anywhere, and
    where more than ``patience`` pairs had to wait again: of thousands of ready ops, each does so
    whenever a device is taken.
    """
    waited = 0
    heap: list[tuple[float, float, int, int]] = []
    offered = [0] * ledger.n  # entries of each op in the heap

    def offer(op: int) -> None:
        able = ledger.devices(op)
        if not able:
            raise ledger.stuck(op, name)
        offered[op] += len(able)
        for d in able:
            heapq.heappush(heap, (start_of(op, d, False), rank[op], op, d))

    for op in range(ledger.n):
        if not ledger.missing[op]:
            offer(op)
    sequence = []
    while heap:
        start, _, op, d = heapq.heappop(heap)
        offered[op] -= 1
        if ledger.assign[op] >= 0:
            continue
        if not ledger.able(op, d):
            if not offered[op]:
                offer(op)  # its group went elsewhere meanwhile, or nothing is left: then it raises
            continue
        now = start_of(op, d, True)
        if now > start:
            heapq.heappush(heap, (now, rank[op], op, d))
            offered[op] += 1
            waited += 1
            if waited > patience:
                raise InfeasibleError(f"{name} was given up after {waited} waits", {}, False)
            continue
        sequence.append(op)
        ready = ledger.place(op, d, now)
        placed(op, d)
        for v in ready:
            offer(v)
    return Listed(np.array(ledger.assign, np.int64), np.array(sequence, np.int64))
