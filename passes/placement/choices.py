"""Which activations to recompute or offload, given where ops run and in which order.

Everything is decided by simulation: the problem with copies is played on the plan at hand, and
where a device is over its memory, outputs that lie there unused at the worst instant are freed,
those first that cost the least time a byte. Later readers get a copy, made as late as is free: a
recomputed op waits for whatever its device runs before the first reader; an offloaded output comes
back just in time if the link is free.

To recompute one output only may need others that are gone by then, and those yet others; long
chains of them come back all at once. So this is tried with *checkpoints*, too: devices' ops are
divided into segments where the fewest bytes cross, and what crosses is not recomputed (Chen et al.,
"Training deep nets with sublinear memory cost", 2016).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .played import Choice, Choices, Copies, Played, play
from .problem import Ints, Problem

_CONE = 64  # ops that recomputing one may need, at most


@dataclass(frozen=True)
class Allowed:
    """What may be done with activations: run ops again, or send outputs to the ``host`` device."""

    recompute: bool
    host: str | None


class Chooser:
    """Chooses copies for one plan of a problem: devices by op, and ops in order of priority."""

    def __init__(
        self, problem: Problem, assign: Ints, sequence: Ints, objective: str, allowed: Allowed
    ) -> None:
        self.problem, self.p, self.allowed = problem, problem.arrays, allowed
        self.throughput = objective == "throughput"
        self.host = 0 if allowed.host is None else problem.device_index[allowed.host]
        p = self.p
        n = len(sequence)
        self.plays = 0  # simulations so far
        none = Copies({}, (), allowed.host)
        self.plain = play(p, none, assign, sequence, self.host, self.throughput)
        self.begin, self.end = self.plain.start.tolist(), self.plain.end.tolist()
        # As the ops started, so that sources come first, whatever order was asked for.
        self.assign, self.sequence = assign, self.plain.sequence
        self.place = np.argsort(self.sequence)
        self.place_of: list[int] = self.place.tolist()
        self.sources = [p.tensor_src[p.pair_tensor[p.in_pair[a:b]]].tolist()
                        for a, b in zip(p.in_ptr, p.in_ptr[1:], strict=False)]  # fmt: skip
        first = p.tensor_ptr[p.out_ptr]
        self.readers = [p.pair_dst[a:b].tolist() for a, b in zip(first, first[1:], strict=False)]
        self.lines: list[list[int]] = [[] for _ in p.cap]  # ops of each device, in order
        for i in self.sequence.tolist():
            self.lines[assign[i]].append(i)
        self.before = np.full(n, -1, np.int64)
        for line in self.lines:
            self.before[line[1:]] = line[:-1]

    def play(self, choices: Choices) -> Played:
        """The plan with these choices, simulated; copies that nothing reads are left out."""
        self.plays += 1
        first = self._first_readers(choices)
        choices = {u: choices[u] for u in first}
        copies = Copies(choices, self._after(choices, first), self.allowed.host)
        devices = [self._device(u, choices[u], first[u]) for u in choices]
        assign = np.concatenate([self.assign, devices]).astype(np.int64)
        n = len(self.sequence)
        # Right before the first reader; copies of one place as what they copy.
        place = np.fromiter((first[u] for u in choices), np.int64, len(choices))
        later = np.concatenate([np.full(n, n), self.place[list(choices)]]).astype(np.int64)
        ops = np.concatenate([self.sequence, np.arange(n, n + len(choices))])
        keys = np.concatenate([np.arange(n), place])
        sequence = ops[np.lexsort((later, keys))]
        return play(self.p, copies, assign, sequence, self.host, self.throughput)

    def _first_readers(self, choices: Choices) -> dict[int, int]:
        """For each op whose copy is read: the place of the first op that needs the copy."""
        first: dict[int, int] = {}
        place = self.place_of
        for u in sorted(choices, key=lambda u: -place[u]):
            places = [place[v] for v in choices[u].late]
            places += [
                first[v] for v in self.readers[u] if v in first and choices[v].kind == "recompute"
            ]
            if places:
                first[u] = min(places)
        return dict(sorted(first.items()))

    def _device(self, u: int, choice: Choice, first: int) -> int:
        """Where a copy goes: to its reader, unless it is bound to what it copies."""
        if choice.kind == "offload":
            return self.host
        there = int(self.assign[self.sequence[first]])
        op = self.problem.ops[u]
        free = op.group is None and not op.param_bytes and np.isfinite(self.p.time[u, there])
        return there if free else int(self.assign[u])

    def _after(self, choices: Choices, first: Mapping[int, int]) -> list[int]:
        """What each copy waits for: an op, or -1."""
        due = self._due(choices, first)
        found = []
        for u, choice in choices.items():
            v = int(self.sequence[first[u]])
            if choice.kind == "offload":
                after = self._last_before(v, due[u])
            else:
                able = [w for w in self.sources[v]
                        if w not in choices or v not in choices[w].late]  # fmt: skip
                able.append(int(self.before[v]))
                after = max((w for w in able if w >= 0), default=-1,
                            key=lambda w: (self.end[w], w))  # fmt: skip
            waits = after >= 0 and self.place_of[after] > self.place_of[u]
            found.append(after if waits else -1)
        return found

    def _due(self, choices: Choices, first: Mapping[int, int]) -> dict[int, float]:
        """When each offloaded output is to be asked for, so that links finish just in time."""
        due: dict[int, float] = {}
        begun: dict[int, float] = {}
        for u in sorted(choices, key=lambda u: -first[u]):
            if choices[u].kind == "offload":
                v = int(self.sequence[first[u]])
                d = int(self.assign[v])
                _, back, ask = self._seconds(u, d)
                begun[d] = min(self.begin[v], begun.get(d, np.inf)) - back
                due[u] = begun[d] - ask
        return due

    def _seconds(self, u: int, there: int) -> tuple[float, float, float]:
        """Transfers of op u's output to the host and to device ``there``, and of a message."""
        p, host = self.p, self.host
        size = float(p.tensor_bytes[p.out_ptr[u] : p.out_ptr[u + 1]].sum())
        here = int(self.assign[u])
        away = p.lat[here, host] + size / p.bw[here, host] if here != host else 0.0
        back = p.lat[host, there] + size / p.bw[host, there] if there != host else 0.0
        return float(away), float(back), float(p.lat[there, host])

    def _last_before(self, v: int, when: float) -> int:
        """The last op of v's device that has ended at ``when``, before v; -1: none."""
        line = self.lines[self.assign[v]]
        k = bisect.bisect_right(line, when, key=self.end.__getitem__)
        k = min(k, bisect.bisect_left(line, self.place_of[v], key=self.place_of.__getitem__))
        return line[k - 1] if k else -1

    def grow(self, choices: Choices, kept: frozenset[int], dear: float, steps: int) -> Played:
        """Adds choices until everything fits, or nothing more helps; the best on the way.

        Ops in ``kept`` are not recomputed; a second on a link counts as ``dear`` seconds of an op,
        and nothing is offloaded where that is infinite.
        """
        played = best = self.play(choices)
        for _ in range(steps):
            if not played.over:
                break
            more = dict(played.copies.choices)
            for device, instant, excess in played.worst_instants():
                self._relieve(played, more, device, instant, excess, kept, dear)
            if len(more) == len(played.copies.choices):
                break
            played = self.play(more)
            best = min(best, played, key=lambda x: x.rank)
        return best

    def _relieve(
        self, played: Played, choices: dict[int, Choice], device: int, instant: float,
        excess: float, kept: frozenset[int], dear: float,
    ) -> None:  # fmt: skip
        """Adds to ``choices`` what frees ``excess`` bytes of a device at an instant, if it can."""
        held = played.held
        n = len(self.sequence)
        there = (held.start <= instant) & (held.end > instant) & (held.owner >= 0)
        alive = set(held.owner[there].tolist())
        mine = there & (held.device == device) & (held.owner < n) & (held.size > 0)
        sizes: dict[int, float] = {}
        for u, size in zip(held.owner[mine].tolist(), held.size[mine].tolist(), strict=True):
            sizes[u] = sizes.get(u, 0.0) + size
        offers: list[tuple[float, int, float, str, set[int]]] = []
        for u, size in sizes.items():
            if u in choices or self.p.keep[u] or played.end[u] > instant:
                continue
            if self._busy(played, u, device, instant):
                continue
            cone = self._cone(u, alive, choices, kept) if self.allowed.recompute else None
            if cone is not None:
                seconds, ops, extra = cone
                if size > extra:
                    offers.append((seconds / (size - extra), u, size - extra, "recompute", ops))
            if self.allowed.host is not None and device != self.host and dear < np.inf:
                seconds = self._offloading(played, u, device, instant, dear)
                offers.append((seconds / size, u, size, "offload", {u}))
        freed: set[int] = set()
        for _, u, gain, kind, ops in sorted(offers, key=lambda x: x[:4]):
            if excess <= 0:
                break
            if u in freed or u in choices:
                continue
            freed.add(u)
            for w in ops:
                if w not in choices:
                    late = (v for v in self.readers[w] if played.start[v] > instant)
                    choices[w] = Choice(kind, frozenset(late))
            excess -= gain

    def _busy(self, played: Played, u: int, device: int, instant: float) -> bool:
        """Whether an output is needed on the device right at an instant, or never after it."""
        p = played.arrays
        readers = p.pair_dst[p.tensor_ptr[p.out_ptr[u]] : p.tensor_ptr[p.out_ptr[u + 1]]]
        begin, end = played.start[readers], played.end[readers]
        now = (begin <= instant) & (end > instant) & (played.assign[readers] == device)
        return bool(now.any()) or not (begin > instant).any()

    def _cone(
        self, u: int, alive: set[int], choices: Choices, kept: frozenset[int]
    ) -> tuple[float, set[int], float] | None:
        """What recomputing u takes: seconds, ops to recompute, bytes to keep longer. None: barred.

        Inputs that are gone are recomputed, too, or kept where that cannot be.
        """
        ops, p = self.problem.ops, self.p
        if u in kept or not ops[u].recompute:
            return None
        inside, waiting, extra = {u}, [u], 0.0
        while waiting:
            for w in self.sources[waiting.pop()]:
                if w in inside or w in alive or w in choices or p.keep[w]:
                    continue
                if w in kept or not ops[w].recompute or len(inside) >= _CONE:
                    extra += float(p.out[w])
                else:
                    inside.add(w)
                    waiting.append(w)
        seconds = sum(float(p.time[w, self.assign[w]]) for w in inside)
        return seconds, inside, extra

    def _offloading(
        self, played: Played, u: int, device: int, instant: float, dear: float
    ) -> float:
        """What offloading costs, seconds: its links' time at a discount, and what must wait."""
        away, back, ask = self._seconds(u, device)
        need = min((float(played.start[v]) for v in self.readers[u] if played.start[v] > instant),
                   default=np.inf)  # fmt: skip
        wait = max(away + back + ask - (need - float(played.end[u])), 0.0)
        return dear * (away + back) + wait

    def checkpoints(self, segments: int) -> frozenset[int]:
        """Outputs to keep: those that cross the borders of so many segments of each full device."""
        kept: set[int] = set()
        played, place = self.plain, self.place
        held = played.held
        for device, instant, _ in played.worst_instants():
            mine = (held.device == device) & (held.start <= instant) & (held.end > instant)
            live = np.unique(held.owner[mine & (held.owner >= 0)])
            live = live[np.argsort(place[live])]
            along = np.cumsum(self.p.out[live])
            if not len(live) or not along[-1]:
                continue
            done = np.flatnonzero(played.end[: len(place)] <= instant)
            early = [[place[v] for v in self.readers[w] if played.start[v] <= instant]
                     for w in done]  # fmt: skip
            until = np.array([max(x, default=-1) for x in early], np.int64)
            crossing = np.zeros(len(place) + 1)
            spans = until > place[done]
            np.add.at(crossing, place[done[spans]], self.p.out[done[spans]])
            np.add.at(crossing, until[spans], -self.p.out[done[spans]])
            crossing = np.cumsum(crossing)
            for k in range(1, segments):
                share = along / along[-1] * segments
                near = place[live[(share >= k - 0.5) & (share <= k + 0.5)]]
                if len(near):
                    border = int(near[np.argmin(crossing[near])])
                    kept.update(done[(place[done] <= border) & (until > border)].tolist())
        return frozenset(kept)
