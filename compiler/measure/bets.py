"""Judges the bets of `speculate-routes` by measurement.

A bet stays where its expected gain, ``p * gain - (1 - p) * loss``, is positive by more than
`MARGIN`: ``p`` comes from the held-out batches of the profile, gain and loss from timing the plans
themselves, on made-up inputs of the sizes at hand, while routers go where those batches went.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...passes.likely import Likely, grouped_key, name_group
from ...passes.remarks import Remark
from ...passes.route_odds import Key, Loads, Routes, fractions, label_of
from ...runtime.executor import Executor
from ...runtime.fetching import resident
from ...runtime.plan import BranchStep
from ...runtime.rehearsal import Rehearsal, Script
from ...runtime.trace import made_up
from ..lowering import least
from ..lowering.lowered import Lowered

MARGIN = 0.05
"""What a bet must gain at least, as a share of the time without it."""
BATCHES = 4
"""Held-out batches that a plan is timed on."""
TIMES = 2
"""How often a bet must win in being timed: what others do on the machine must not decide it."""
ROUNDS, SECONDS = 15, 0.3
"""Most rounds, and seconds after which no further round begins."""
PASS = "speculate-routes"
_FAILS = (RuntimeError, ValueError, IndexError)
"""What operators of the library raise where values are errors to them."""

Build = Callable[[Lowered], Executor]


def timed(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each call: the least over rounds in which they take turns, for what else the
    machine does only adds.
    """
    samples: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for call in calls:
            call()  # the first call pays for what is made once
        started = time.perf_counter()
        for _ in range(ROUNDS):
            for call, times in zip(calls, samples, strict=True):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
            if time.perf_counter() - started > SECONDS:
                break
    return list(map(min, samples))


class Speculation:
    """Runs the plan for the likely routes first, and the general one where they were not taken.

    Implements what a program calls of an `Executor`. ``gain`` and ``loss`` are the seconds that a
    hit saves and a miss costs, as measured; ``hits`` and ``misses`` count calls.
    """

    def __init__(
        self, likely: Executor, general: Executor, bet: Likely, gain: float, loss: float
    ) -> None:
        self.likely, self.general, self.bet = likely, general, bet
        self.gain, self.loss = gain, loss
        self.hits = self.misses = 0
        self.monitor: Any = None

    def run(
        self, tensors: Sequence[torch.Tensor], into: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """See `Executor.run`."""
        try:
            *results, won = self.likely.run(tensors)
            hit = bool(won)
        except _FAILS:
            # A library operator met values that only the likely routes exclude; where it is the
            # caller's error, the general plan raises it again.
            hit, results = False, []
        if hit:
            self.hits += 1
            if self.monitor is not None:
                self.monitor.won(self.bet)
            return results if into is None else [into.copy_(results[0])]
        self.misses += 1
        if self.monitor is not None:
            self.monitor.lost()
        return self.general.run(tensors, into)

    def apart(self) -> list[str]:
        """See `Executor.apart`."""
        return [*self.likely.apart(), *self.general.apart()]

    def visits(self) -> list[str]:
        """Hits and misses and what they cost, then how often each branch ran, as lines of text."""
        text = (
            f"likely routes: {self.hits} hits (each saves {_us(self.gain)}), {self.misses} misses "
            f"(each costs {_us(self.loss)}), odds {self.bet.odds:.2f}"
        )
        groups = [
            f"  {label_of(key)}: branches {', '.join(map(name_group, groups))} as one"
            for key, groups in self.bet.groups().items()
        ]
        general = [f"  {line}" for line in self.general.visits()]
        return [
            text,
            *groups,
            *(f"  {line}" for line in self.likely.visits()),
            "general plan:",
            *general,
        ]


@dataclass(frozen=True)
class Sample:
    """What plans are timed on: inputs, and the routes of some batches."""

    tensors: list[torch.Tensor]
    routes: Routes

    def script(self, batch: int, bet: Likely) -> Script:
        """The routes of a held-out batch, by router; of those with groups for branches, too."""
        script: dict[str, Sequence[float] | None] = {}
        for key, (_, held) in self.routes.items():
            if held is None or batch >= len(held.cells):
                continue
            load, slots = held.loads[batch], held.slots[batch]
            script[name_of(key)] = fractions(load, slots)
            grouping = bet.grouped.get(key)
            if grouping is not None:
                cells = slots // bet.shapes[key][1]
                found = fractions(grouping.loads(load), cells * grouping.slots)
                script[name_of(grouped_key(key))] = found
        return script


def name_of(key: Key) -> str:
    """A router as plans call it."""
    return f"{key[0]}#{key[1]}"


def key_of(router: str) -> Key | None:
    """The router that plans call so; None for one that no profile can know."""
    name, _, call = router.rpartition("#")
    return (name, int(call)) if call else None


def refused(bet: Likely, why: str) -> Remark:
    """The remark of a bet on likely routes that is not made."""
    return Remark("PLT-SPC-009", "missed", PASS, _routers(bet), f"{_describe(bet)}: {why}")


def judge_likely(
    bet: Likely, general: Executor, likely: Executor, sample: Sample, remarks: list[Remark]
) -> Executor | Speculation | None:
    """What runs instead of ``general``: nothing new (None), the two, or the likely plan alone where
    it needs no guard. Remarks say which and why.
    """
    batches = [b for b, won in enumerate(bet.held) if won] if bet.guarded else []
    if not bet.guarded:
        counts = [len(held.cells) for _, held in sample.routes.values() if held is not None]
        batches = list(range(max(counts, default=0)))
    nodes = _routers(bet)
    what = _describe(bet)
    if not batches:
        why = f"the bet is lost in each of {len(bet.held)} held-out batches"
        remarks.append(refused(bet, why))
        return None
    slow, fast = Rehearsal(general, {}), Rehearsal(likely, {})
    odds, expected = bet.odds, math.inf
    trial = [lambda: slow.run(sample.tensors), lambda: fast.run(sample.tensors)]
    gain = loss = time_general = time_likely = 0.0
    for _ in range(TIMES):
        usual, quick = [], []
        for batch in _some(batches):
            script = sample.script(batch, bet)
            slow.play(script)
            fast.play(script)
            try:
                a, b = timed(trial)
            except _FAILS as error:
                text = str(error).strip().splitlines() or [""]
                remarks.append(refused(bet, f"made-up inputs do not run: {text[0][:200]}"))
                return None
            usual.append(a)
            quick.append(b)
        found = odds * (_mean(usual) - _mean(quick)) - (1 - odds) * _mean(quick)
        if found < expected:
            expected, time_general, time_likely = found, _mean(usual), _mean(quick)
            gain, loss = time_general - time_likely, time_likely
        if expected <= MARGIN * time_general:
            break
    figures = (
        f"{what}: {_us(time_likely)} instead of {_us(time_general)}; odds {odds:.2f}, a miss "
        f"costs {_us(loss if bet.guarded else 0.0)}: expected {expected * 1e6:+.1f} us a call"
    )
    if expected <= MARGIN * time_general:
        remarks.append(Remark("PLT-SPC-009", "missed", PASS, nodes, figures))
        return None
    remarks.append(Remark("PLT-SPC-005", "done", PASS, nodes, figures, "", expected))
    return Speculation(likely, general, bet, gain, loss) if bet.guarded else likely


def judge_capacities(
    lowered: Lowered,
    build: Build,
    routes: Routes,
    values: Mapping[str, int],
    room: float = math.inf,
) -> list[Remark]:
    """Takes the plans for a number of rows that do not pay out of ``lowered``, which it changes.

    ``room`` are the bytes of weights on a slower tier that may be resident.
    """
    remarks: list[Remark] = []
    keys = {name_of(key): pair for key, pair in routes.items()}
    for number, step in enumerate(lowered.plan.steps):
        if not isinstance(step, BranchStep):
            continue
        sized = []
        for b, (rows, name) in enumerate(step.sized):
            held = keys.get(step.router, (None, None))[1]
            if not name or held is None:
                sized.append((0, ""))
                continue
            wanted = least.of_branch(lowered, step.units[b])
            if wanted > room:
                reason = (
                    f"{wanted / 2**20:.2f} MiB of weights for {rows} rows of branch {b} are more"
                )
                text = f"{_called(step)}: {reason} than the budget allows"
                remarks.append(Remark("PLT-SPC-009", "missed", PASS, (step.name,), text))
            kept = wanted <= room and _judge_capacity(
                lowered, step, b, build, held, values, remarks
            )
            sized.append((rows, name) if kept else (0, ""))
            if not kept:
                del lowered.parts[name], lowered.plan.parts[name]
        if not any(rows for rows, _ in sized):
            sized = []
        lowered.plan.steps[number] = replace(step, sized=tuple(sized))
    for part in lowered.parts.values():
        remarks += judge_capacities(part, build, routes, values, room - least.held(part))
    return remarks


def _judge_capacity(
    lowered: Lowered,
    step: BranchStep,
    b: int,
    build: Build,
    held: Loads,
    values: Mapping[str, int],
    remarks: list[Remark],
) -> bool:
    rows, name = step.sized[b]
    general, special = build(lowered.parts[step.plans[b]]), build(lowered.parts[name])
    counts = [load[b] for load in held.loads]
    fits = [n >= rows for n in counts]
    what = f"{_called(step)}, {rows} rows of branch {b}"
    bound = {s: d for s, (i, d) in general.plan.symbols.items() if i == 0}
    chosen = _some([n for n in counts if n]) if any(fits) else []
    sizes = sorted({*chosen, *(n - rows for n in chosen if n > rows)})

    calls: list[Callable[[], object]] = []
    for executor, count in [*((general, n) for n in sizes), (special, rows)]:
        tensors = made_up(general.plan, {**values, **dict.fromkeys(bound, count)})
        calls.append(lambda e=executor, t=tensors: e.run(t))
    if not chosen:
        reason = f"{what}: never as many in {len(counts)} held-out batches"
        remarks.append(Remark("PLT-SPC-009", "missed", PASS, (step.name,), reason))
        return False
    before, after, fast = 0.0, -math.inf, 0.0
    usual: dict[int, float] = {}
    banks = tuple(dict.fromkeys((*general.wants().banks, *special.wants().banks)))
    for _ in range(TIMES):
        with resident(general.tier, banks):
            *times, special_time = timed(calls)
        now = dict(zip(sizes, times, strict=True))
        costs = [
            now[n] if n < rows else special_time + (now[n - rows] if n > rows else 0.0)
            for n in chosen
        ]
        without = _mean([now[n] for n in chosen])
        if without - _mean(costs) < before - after:
            before, after, fast, usual = without, _mean(costs), special_time, now
        if before - after <= MARGIN * before:
            break
    spills = [usual[n - rows] for n in chosen if n > rows]
    spill = f", a spill costs {_us(_mean(spills))}" if spills else ""
    figures = (
        f"{what}: {_us(fast)}{spill}; expected {_us(after)} instead of "
        f"{_us(before)} over {len(counts)} held-out batches, {sum(fits)} of them with as many"
    )
    nodes = (step.name,)
    if before - after <= MARGIN * before:
        remarks.append(Remark("PLT-SPC-009", "missed", PASS, nodes, figures))
        return False
    remarks.append(Remark("PLT-SPC-008", "done", PASS, nodes, figures, "", before - after))
    return True


def _describe(bet: Likely) -> str:
    texts = []
    if bet.assumed:
        texts.append(f"{len(bet.assumed)} routers with likely routes")
        groups = [group for group in bet.assumed.values() if len(group) > 1]
        if groups:
            texts[0] += f" (groups: {', '.join(map(name_group, groups))})"
    if bet.grouped:
        texts.append(f"{len(bet.grouped)} routers with groups for branches")
    if bet.dense:
        texts.append(f"{len(bet.dense)} routers run on all cells")
    return " and ".join(texts)


def _routers(bet: Likely) -> tuple[str, ...]:
    return tuple(map(label_of, (*bet.assumed, *bet.dense, *bet.grouped)))


def _called(step: BranchStep) -> str:
    """A step's router as remarks call it."""
    key = key_of(step.router)
    return f"router {label_of(key)!r}" if key else "a router"


def _some(items: Sequence[int]) -> list[int]:
    """At most `BATCHES` of ``items``, spread over them in order of size."""
    items = sorted(items)
    if len(items) <= BATCHES:
        return items
    return [items[round(k * (len(items) - 1) / (BATCHES - 1))] for k in range(BATCHES)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
