"""Routes of live calls: learned from the first ones, watched after, plans made anew where it pays.

A `Monitor` belongs to one compiled graph. Plans tell it which way their branches went; every
`WINDOW` calls a thread looks at what came in. Nothing that it does changes results: it replaces, in
one assignment, what runs the next call by another plan of the same graph.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ...passes.likely import Likely, grouped_key
from ...passes.remarks import Remark
from ...passes.route_odds import Key, Routes, label_of
from ...runtime import forked
from ...runtime.executor import Executor
from ...runtime.plan import BranchStep
from ..errors import summary
from ..measure.bets import Speculation, key_of, name_of
from .drift import LiveLoads, drift

WINDOW = 32
"""Calls between two looks at the routes; also how many are learned from at first."""
KEPT = 4 * WINDOW
"""Calls that are remembered."""
HELD = 0.25
"""The share of them, the last ones, that judges bets."""
PATIENCE = 10.0
"""A new plan must not take more than one such part of the time that calls have taken since the
last."""
PASS = "speculate-routes"

Note = tuple[str, tuple[int, ...], int]
"""Router, slots of each branch, all slots."""


class Monitor:
    """Watches the routes of one compiled graph.

    ``specialise(routes)`` compiles and judges bets on routes and puts the plan into service; it is
    called in a thread of this class, never twice at once. ``routes`` are those that the present
    plan is a bet on; None while there is none.
    """

    def __init__(self, specialise: Callable[[Routes], float], routes: Routes | None) -> None:
        self.routes = routes
        self.remarks: list[Remark] = []
        self.calls = 0
        self.windows = 0
        self.rebuilt = 0
        self._specialise = specialise
        self._local = threading.local()
        self._seen: deque[tuple[list[Note], float]] = deque(maxlen=KEPT)
        self._counter = itertools.count(1)
        self._unlock()
        forked.in_child(self._unlock)
        self._worker: threading.Thread | None = None
        self._spent = 0.0
        self._cost = 0.0
        self._engine: Executor | Speculation | None = None
        self._misses = 0
        self._said: set[Any] = set()

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    # -- told by plans ----------------------------------------------------------------------------

    def attach(self, engine: Executor | Speculation, cost: float) -> None:
        """Watches what runs from now on; making it took ``cost`` seconds."""
        self._engine, self._cost, self._spent, self._misses = engine, cost, 0.0, 0
        if isinstance(engine, Speculation):
            engine.monitor = self
            engine.likely.observe(self._record)
            engine.general.observe(self._record)
        else:
            engine.observe(self._record)

    def _record(self, step: BranchStep, choice: Any, slots: int) -> None:
        if step.kind == "cond":
            load, slots = ((1, 0) if choice else (0, 1)), 1
        else:
            load = tuple(b - a for a, b in itertools.pairwise(choice))
        self._notes().append((step.router, load, slots))

    def _notes(self) -> list[Note]:
        try:
            return self._local.notes
        except AttributeError:
            self._local.notes = []
            return self._local.notes

    def lost(self) -> None:
        """The likely plan ran in vain: what it told of this call means nothing."""
        self._notes().clear()

    def won(self, bet: Likely) -> None:
        """The call's routes were those of the likely plan."""
        notes = self._notes()
        for key, group in bet.assumed.items():
            branches, slots = bet.shapes[key]
            load = tuple(int(b in group) for b in range(branches))
            notes.append((name_of(key), load, slots))
        for key, grouping in bet.grouped.items():
            branches, share = bet.shapes[key]
            for number, (router, load, slots) in enumerate(notes):
                if router == name_of(grouped_key(key)):
                    load = grouping.branches(load, branches)
                    notes[number] = name_of(key), load, slots // grouping.slots * share

    def called(self, seconds: float) -> None:
        """A call that took so long is over."""
        self._seen.append((self._notes(), seconds))
        self._local.notes = []
        self.calls = count = next(self._counter)
        if count % WINDOW == 0:
            self._wake()

    # -- looking at it ----------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._lock:
            if self._worker is None or not self._worker.is_alive():
                # Not a daemon: code generation must not be cut off at exit.
                worker = threading.Thread(target=self._work, name="plait-routes")
                try:
                    worker.start()
                except RuntimeError as error:  # the process is ending, or may have no more
                    self._say("PLT-SPC-013", "missed", f"{error}; the present plan stays")
                    return
                self._worker = worker

    def wait(self) -> None:
        """Returns when nothing is being looked at or made."""
        worker = self._worker
        if worker is not None:
            worker.join()

    def _work(self) -> None:
        try:
            self.look()
        except Exception as error:
            if os.environ.get("PLAIT_DEBUG"):
                raise
            self._say("PLT-SPC-013", "missed", f"{summary(error)}; the present plan stays")

    def look(self) -> None:
        """Compares the last calls with what the plan bets on, and acts on it."""
        calls = list(self._seen)
        live = _loads([notes for notes, _ in calls])
        self.windows += 1
        if self.routes is None:
            self._make(live, f"learned from {len(calls)} calls")
            return
        recent = _loads([notes for notes, _ in calls[-WINDOW:]])
        moved = []
        for key, now in recent.items():
            known = [s for s in self.routes.get(key, (None, None)) if s is not None]
            found = drift(known, now)
            if found is not None:
                moved.append(key)
                share = f"{found.before:.2f} of the slots to {found.now:.2f}"
                text = f"router {label_of(key)!r}: branch {found.branch} went from {share}"
                if (key, found.branch) not in self._said:
                    self._said.add((key, found.branch))
                    self._say("PLT-SPC-011", "note", f"{text}, {found.errors:.0f} standard errors")
        if not moved:
            self._spent, self._misses = 0.0, self._lost_calls()
            return
        self._spent += sum(seconds for _, seconds in calls[-WINDOW:])
        loss = self._engine.loss if isinstance(self._engine, Speculation) else 0.0
        wasted = (self._lost_calls() - self._misses) * loss
        # To wait until as much was lost as a remedy costs is at most twice as dear as to know
        # the future (the ski-rental rule); what is not counted as lost is bounded by time.
        if wasted >= self._cost or self._spent >= PATIENCE * self._cost:
            window = _loads([notes for notes, _ in calls[-WINDOW:]])
            why = f"{wasted * 1e3:.1f} ms lost, {self._spent:.2f} s run since the routes changed"
            self._make(window, f"{why}; the last plan took {self._cost:.2f} s to make")

    def _lost_calls(self) -> int:
        return self._engine.misses if isinstance(self._engine, Speculation) else 0

    def _make(self, live: dict[Key, LiveLoads], why: str) -> None:
        routes: dict[Key, tuple[LiveLoads, LiveLoads | None]] = {}
        for key, loads in live.items():
            count = len(loads.slots)
            first = count - max(1, int(count * HELD)) if count > 1 else count
            held = loads.part(first, count)
            routes[key] = loads.part(0, first), held if held.slots else None
        begin = time.perf_counter()
        gained = self._specialise(routes)
        self._cost = time.perf_counter() - begin
        self.routes = routes
        self.rebuilt += 1
        self._said.clear()
        self._say(
            "PLT-SPC-012", "done", f"plans made anew in {self._cost:.2f} s: {why}", gained or None
        )

    def _say(self, remark: str, kind: Any, reason: str, gain: float | None = None) -> None:
        self.remarks.append(Remark(remark, kind, PASS, (), reason, "", gain))

    def visits(self) -> list[str]:
        """What was seen and done, as lines of text."""
        state = "learning" if self.routes is None else "watching"
        return [f"routes: {state}, {self.calls} calls, plans made anew {self.rebuilt} times"]


def _loads(calls: list[list[Note]]) -> dict[Key, LiveLoads]:
    found: dict[Key, tuple[list[tuple[int, ...]], list[int]]] = {}
    for notes in calls:
        for router, load, slots in notes:
            key = key_of(router)
            if key:
                loads, totals = found.setdefault(key, ([], []))
                loads.append(load)
                totals.append(slots)
    return {key: LiveLoads(tuple(a), tuple(b)) for key, (a, b) in found.items()}
