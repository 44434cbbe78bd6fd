"""A plan with copies, simulated without making the rewritten problem: arrays to arrays.

A search over what to recompute and offload plays thousands of rewritten problems. `with_copies`
makes their arrays directly, with the tensors in the order in which `alternatives.rewrite` has them,
which decides how links queue; so both are played alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .alternatives import Alternative
from .engine import DONE, Engine
from .problem import Arrays, Floats, Ints, Problem, rows


class Choice(NamedTuple):
    """For one op: the kind of its copy, and the readers that take it. Ops are numbers here."""

    kind: str
    late: frozenset[int]


Choices = Mapping[int, Choice]


@dataclass(frozen=True)
class Copies:
    """Copies, in the order of what they copy: ``after[k]`` is what the k-th waits for, or -1."""

    choices: Choices
    after: Sequence[int]
    host: str | None

    def alternatives(self, problem: Problem) -> tuple[Alternative, ...]:
        """The same in the problem's names."""
        names = [op.name for op in problem.ops]
        return tuple(
            Alternative(
                names[u], kind, tuple(names[v] for v in sorted(late)),
                names[after] if after >= 0 else None, self.host if kind == "offload" else None,
            )
            for (u, (kind, late)), after in zip(self.choices.items(), self.after, strict=True)
        )  # fmt: skip


class Held(NamedTuple):
    """Intervals in which memory is taken; ``owner`` is the op whose output it is, -1: none's."""

    start: Floats
    end: Floats
    size: Floats
    device: Ints
    owner: Ints


@dataclass(frozen=True)
class Played:
    """A plan with copies, as simulated. ``over`` sums overruns, in shares of their devices."""

    copies: Copies
    arrays: Arrays
    assign: Ints
    sequence: Ints
    start: Floats
    end: Floats
    peak: Floats
    held: Held
    over: float
    cost: float

    @property
    def rank(self) -> tuple[float, float, int]:
        """What plans are compared by: the smallest is the best."""
        return self.over, self.cost, len(self.copies.choices)

    def worst_instants(self) -> Iterator[tuple[int, float, float]]:
        """Devices that are over their memory: when most, in seconds, and by how many bytes."""
        held, excess = self.held, self.peak - self.arrays.cap
        for d in np.flatnonzero(excess > 0).tolist():
            mine = (held.device == d) & (held.size > 0)
            times = np.concatenate([held.start[mine], held.end[mine]])
            gains = np.repeat([1, 0], int(mine.sum()))  # what ends at an instant is freed first
            order = np.lexsort((gains, times))
            change = np.concatenate([held.size[mine], -held.size[mine]])[order]
            if len(change):
                yield d, float(times[order[np.argmax(np.cumsum(change))]]), float(excess[d])


def with_copies(p: Arrays, copies: Copies, host: int) -> Arrays:
    """Arrays of the problem that `alternatives.rewrite` makes of the same copies.

    Colocation is left out: units are single ops, and ``topo`` is not sorted.
    """
    n, m = p.time.shape
    ops = np.fromiter(copies.choices, np.int64, len(copies.choices))
    sent = np.array([x.kind == "offload" for x in copies.choices.values()], bool)
    copy = np.full(n, -1, np.int64)
    copy[ops] = n + np.arange(len(ops))
    tensor, reader = p.pair_tensor, p.pair_dst
    source = p.tensor_src[tensor]
    late = np.zeros(len(reader), bool)
    for u, choice in copies.choices.items():
        low, high = p.tensor_ptr[p.out_ptr[u]], p.tensor_ptr[p.out_ptr[u + 1]]
        late[low:high] = [v in choice.late for v in reader[low:high].tolist()]
    again = np.zeros(n, bool)  # recomputed: the copy reads what the op reads
    again[ops[~sent]] = True
    reread = again[reader]
    hosted = np.zeros(n, bool)
    hosted[ops[sent]] = True
    # Tensors with readers at a host's copy: those that the host sends on.
    moved = late | (reread & (copy[source] >= 0))
    away = np.unique(tensor[moved & hosted[source]])
    after = np.array(copies.after, np.int64)
    waits = np.flatnonzero(after >= 0)
    pairs, last = len(reader), len(p.tensor_src)
    src = np.concatenate([
        np.where(late, copy[source], source),
        np.where(copy[source] >= 0, copy[source], source)[reread],
        p.tensor_src[away], after[waits],
    ])  # fmt: skip
    which = np.concatenate([tensor, tensor[reread], away, np.full(len(waits), last)])
    place = np.concatenate([
        2 * np.arange(pairs), 2 * np.flatnonzero(reread) + 1, np.full(len(away), 2 * pairs), waits
    ])  # fmt: skip
    dst = np.concatenate([reader, copy[reader[reread]], copy[p.tensor_src[away]], n + waits])
    order = np.lexsort((place, which, src))
    src, which, dst = src[order], which[order], dst[order]
    new = np.ones(len(src), bool)
    new[1:] = (src[1:] != src[:-1]) | (which[1:] != which[:-1])
    number = np.cumsum(new) - 1
    tensor_src = src[new]
    count = n + len(ops)
    out_ptr = np.searchsorted(tensor_src, np.arange(count + 1))
    in_ptr, in_pair = rows(dst, count)
    out = p.out[ops]
    held = np.bincount(p.tensor_src[away], p.tensor_bytes[away], n)[ops]
    time = p.time[ops]
    time[sent] = np.inf
    time[sent, host] = 0.0
    join, alone = np.concatenate, np.arange(count)
    return p._replace(
        time=join([p.time, time]),
        param=join([p.param, np.zeros(len(ops))]),
        temp=join([p.temp, np.where(sent, 0.0, p.temp[ops])]),
        out=join([p.out, np.where(sent, held, out)]),
        keep=join([p.keep, np.zeros(len(ops), bool)]),
        tensor_src=tensor_src,
        tensor_bytes=np.append(p.tensor_bytes, 0.0)[which[new]],
        tensor_ptr=np.append(np.flatnonzero(new), len(src)),
        pair_dst=dst, pair_tensor=number, out_ptr=out_ptr, in_ptr=in_ptr, in_pair=in_pair,
        topo=alone, unit=alone, unit_ptr=np.arange(count + 1), unit_op=alone,
        allowed=np.ones((count, m), bool),
    )  # fmt: skip


def play(
    p: Arrays, copies: Copies, assign: Ints, sequence: Ints, host: int, throughput: bool
) -> Played:
    """One step of a plan with copies: ``assign`` and ``sequence`` are of ops and copies."""
    p = with_copies(p, copies, host)
    engine = Engine(p, np.zeros((0, len(p.unit_ptr) - 1)), (np.zeros(1, int), np.zeros(0, int)))
    rank = np.empty(len(sequence))
    rank[sequence] = -np.arange(len(sequence), dtype=float)
    devices = assign.astype(np.int32)
    code, cost = engine.simulate(devices, rank)
    assert code == DONE, "the copies make a cycle"
    if throughput:
        cost = engine.pipeline_load(devices)
    w = engine.work
    over = np.maximum(w.top - p.cap, 0.0) / np.maximum(p.cap, 1.0)
    return Played(
        copies, p, assign, w.sequence.astype(np.int64), w.start.copy(), w.end.copy(),
        w.top.copy(), _held(p, assign, engine), float(over.sum()), float(cost),
    )  # fmt: skip


def _held(p: Arrays, assign: Ints, engine: Engine) -> Held:
    """All intervals in which outputs, received copies and temporaries take memory."""
    w = engine.work
    sent = int(w.counts[1])
    tensor, link = w.transfer_tensor[:sent], w.transfer_link[:sent]
    src, dst = p.tensor_src[p.pair_tensor], p.pair_dst
    last = w.end.copy()
    local = assign[src] == assign[dst]
    np.maximum.at(last, src[local], w.end[dst[local]])
    np.maximum.at(last, p.tensor_src[tensor], w.transfer_end[:sent])
    last[p.keep] = w.end.max(initial=0.0)
    until = np.zeros(sent)
    np.maximum.at(until, w.pair_transfer[~local], w.end[dst[~local]])
    ops = np.arange(len(assign))
    join = np.concatenate
    return Held(
        join([w.start, w.start, w.transfer_start[:sent]]),
        join([last, w.end, until]),
        join([p.out, p.temp, p.tensor_bytes[tensor]]),
        join([assign, assign, link % len(p.cap)]),
        join([ops, np.full(len(ops), -1), p.tensor_src[tensor]]),
    )
