"""`best` where activations may be recomputed or offloaded: which, chosen together with devices.

Plans are looked for first: one that keeps everything (which need not fit), one that only has to
make room for parameters, so that it shows what could be won, and one for outputs of a quarter of
their size. From these, choices of what to recompute or offload are made by several rules
(`choices`), then changed at random in blocks, and taken over where the simulated plan gets better.
The problem with the best choices is annealed like any other; what that finds is once more a plan to
choose from. An answer with copies is given only where the plan that keeps everything does not fit,
or is slower.

As in `best`, the work is counted, not timed, unless the clock ends it.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace

import numpy as np

from . import feasible
from .alternatives import Alternative, Rewritten, rewrite
from .best import Search, search, search_seconds
from .bounds import lower_bounds
from .choices import Allowed, Chooser
from .errors import InfeasibleError
from .exhaustive import exhaustive
from .fitting import Progress
from .found import Found
from .min_cut import min_cut
from .played import Choices, Played
from .problem import Ints, Problem
from .starts import depth_first, lean_order

_SEGMENTS = (8, 1, 16, 4, 2, 32)
_DEAR = (0.2, np.inf, 0.0)
"""Seconds of an op that a second on a link counts as, where both kinds of copies are allowed."""

_RELIEFS = 24
"""Times that the worst instants are looked at for one set of choices, at most."""

_NEARLY = 5.0
"""What an overrun by a whole device counts in a plan that nearly fits, in its own costs."""

_SHARES = {"roomy": 0.08, "slim": 0.08, "choose": 0.17, "anneal": 0.1, "insist": 0.05}
"""Of the budget; "anneal" comes twice, "insist" where nothing fits without copies. The search
without copies may take all that the others leave."""

_MUCH = 0.75
"""Copies come first where a step takes this part of the time, or less: if memory had only to hold
parameters for them to be looked for, and with them for them to be refined."""


@dataclass(frozen=True)
class Answer:
    """A plan: which problem it is of, and the alternatives that make that of the original."""

    found: Found
    rewritten: Rewritten
    alternatives: tuple[Alternative, ...] = ()


def best_with_alternatives(
    problem: Problem,
    allowed: Allowed,
    objective: str = "latency",
    budget: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
    began: float | None = None,
) -> Answer:
    """The best plan found in about ``budget`` seconds since ``began``, with or without copies.

    Its bounds hold for all choices of copies. Raises InfeasibleError where nothing that fits was
    found, with a proof if there is one: what proves that a problem cannot fit (parameters, or one
    op alone) proves it for copies, too.
    """
    began = time.perf_counter() if began is None else began
    feasible.refuse_hopeless(problem)
    return _Alternatives(problem, allowed, objective, seed, budget, progress, began).run()


class _Alternatives:
    def __init__(
        self, problem: Problem, allowed: Allowed, objective: str, seed: int, budget: float,
        progress: Progress | None, began: float,
    ) -> None:  # fmt: skip
        self.problem, self.allowed, self.objective, self.seed = problem, allowed, objective, seed
        self.budget, self.progress = budget, progress
        self.began, self.seconds = began, search_seconds(budget)
        self.deadline = began + self.seconds
        self.bounds = lower_bounds(problem.arrays, objective == "throughput", copies=True)
        self.rng = np.random.default_rng(seed)
        # About the seconds that one simulated choice takes on the machine this was written on.
        size = len(problem.ops) + len(problem.edges)
        self.plays = int(_SHARES["choose"] * budget / (1e-3 + 2e-6 * size))
        self.least = np.inf

    def run(self) -> Answer:
        # The very search that `best` makes of the whole budget: where the clock does not end it,
        # no answer is worse than without copies.
        plain = search(self.problem, self.objective, self.seed, self.seconds, self._shown(),
                       end=self.deadline)  # fmt: skip
        quick = plain.prepare()
        self.answers = [Answer(quick, rewrite(self.problem, ()))]
        with contextlib.suppress(InfeasibleError):  # a proof, but of plans without copies
            sure = exhaustive(self.problem, self.objective, self.budget)
            if sure is not None:
                self.answers.append(Answer(sure, rewrite(self.problem, ())))
        if not self._enough():
            roomy = self._attempt("roomy", _roomy(self.problem))
            much = not quick.fits or roomy.cost <= _MUCH * quick.cost
            played = self._played(quick, roomy) if much else None
            best = self._best().found
            sure = best.fits and not (quick.fits and best.cost > _MUCH * quick.cost)
            if not sure:
                quick = self._without_copies(plain)
            if not self._enough() and not (quick.fits and quick.cost <= roomy.cost):
                self._refine(played or self._played(quick, roomy))
            if sure:
                quick = self._without_copies(plain)
        best = self._best()
        if not quick.fits:  # it must not be given up sooner than without copies
            best = self._insist(best)
        return replace(best, found=replace(best.found, bounds=self.bounds))

    def _without_copies(self, plain: Search) -> Found:
        """The rest of the search for a plan that keeps everything."""
        found = plain.finish()
        self.answers.insert(0, Answer(found, rewrite(self.problem, ())))
        if found.fits:
            self.least = min(self.least, found.cost)
        return found

    def _best(self) -> Answer:
        """The fastest answer that fits, with few copies; else the last."""
        fitting = [x for x in self.answers if x.found.fits]
        rank = lambda x: (x.found.cost, len(x.alternatives))  # noqa: E731
        return min(fitting, key=rank, default=self.answers[-1])

    def _played(self, plain: Found, roomy: Found) -> Played:
        """Copies chosen for plans that leave memory out of account, or part of it."""
        played = self._chosen([self._chooser(*plan) for plan in self._plans(plain, roomy)])
        self.answers.append(_answer(self.problem, played))
        return played

    def _refine(self, played: Played) -> None:
        """The best plan so far annealed, and copies chosen for what comes out, twice."""
        for _ in range(2):
            best = self._best()
            found = self._anneal("anneal", best)
            if self._enough():
                return
            ops = found.sequence[found.sequence < len(self.problem.ops)]
            chooser = self._chooser(found.assign[: len(ops)], ops)
            choices = played.copies.choices if best.alternatives else {}
            played = chooser.grow(choices, frozenset(), _DEAR[0], _RELIEFS)
            played = self._improved(chooser, played, self.plays // 3)
            self.answers.append(_answer(self.problem, played))

    def _anneal(self, share: str, answer: Answer) -> Found:
        """One more search from an answer, for the same copies."""
        given = answer.found.assign, answer.found.sequence
        found = self._attempt(share, answer.rewritten.problem, given)
        self.answers.append(replace(answer, found=found))
        return found

    def _chooser(self, assign: Ints, sequence: Ints) -> Chooser:
        return Chooser(self.problem, assign, sequence, self.objective, self.allowed)

    def _attempt(
        self, share: str, problem: Problem, given: tuple[Ints, Ints] | None = None
    ) -> Found:
        """A search that takes its share of the budget and need not find anything that fits."""
        seconds = _SHARES[share] * self.budget
        options = problem, self.objective, self.seed
        if given is None:
            found = search(*options, seconds, self._shown(share)).attempt()
        else:
            end = min(time.perf_counter() + seconds, self.deadline)
            found = Search(*options, end, seconds, self._shown(share), given).attempt()
        if found.fits and share not in ("roomy", "slim"):
            self.least = min(self.least, found.cost)
        self._tell()
        return found

    def _shown(self, share: str = "") -> Progress | None:
        """The progress of a part as that of the whole."""
        if self.progress is None:
            return None

        def part(_: float, cost: float, __: float) -> None:
            self._tell(np.inf if share in ("roomy", "slim") else cost)

        return part

    def _tell(self, cost: float = np.inf) -> None:
        if self.progress is not None:
            used = min((time.perf_counter() - self.began) / self.budget, 1.0)
            self.progress(used, min(cost, self.least), self.bounds["best"])

    def _enough(self) -> bool:
        """Whether something fits, and nothing can be better or the time is over."""
        best = self._best().found
        return best.fits and (self._late() or best.cost <= self.bounds["best"] * (1 + 1e-9))

    def _plans(self, plain: Found, roomy: Found) -> list[tuple[Ints, Ints]]:
        """Plans to choose copies for, as devices and order."""
        found = self._attempt("slim", _slim(self.problem))
        slim = found.assign, found.sequence
        plans = [slim, self._lean(*slim), (roomy.assign, roomy.sequence)]
        if plain.fits:
            return plans
        contiguous = [self._lean(*x) for x in _contiguous(self.problem)]
        return [*contiguous, *plans, (plain.assign, plain.sequence)]

    def _lean(self, assign: Ints, sequence: Ints) -> tuple[Ints, Ints]:
        return assign, lean_order(self.problem.arrays, sequence)

    def _chosen(self, choosers: list[Chooser]) -> Played:
        """The best choices for any of the plans by any of the rules, then improved.

        What nearly fits may be much faster than what does, so it is improved, too.
        """
        tried = [(x.plain, x) for x in choosers]
        dears = _DEAR if self.allowed.recompute and self.allowed.host is not None else _DEAR[:1]
        plays = self.plays // 2
        for segments in _SEGMENTS if self.allowed.recompute else _SEGMENTS[:1]:
            for chooser in choosers:
                kept = chooser.checkpoints(segments) if segments > 1 else frozenset()
                for dear in dears:
                    fits = any(not played.over for played, _ in tried)
                    spent = sum(x.plays for x in choosers)
                    if self._late() or spent > (plays if fits else 3 * plays):
                        break
                    tried.append((chooser.grow({}, kept, dear, _RELIEFS), chooser))
        rules = (lambda x: x.rank, lambda x: (x.cost * (1 + _NEARLY * x.over), x.over, 0))
        finalists = {id(x[0]): x for x in (min(tried, key=lambda x: r(x[0])) for r in rules)}
        improved = [
            self._improved(chooser, played, plays // len(finalists))
            for played, chooser in finalists.values()
        ]
        return min(improved, key=lambda x: x.rank)

    def _improved(self, chooser: Chooser, played: Played, plays: int) -> Played:
        """Drops blocks of choices at random and chooses anew; keeps what is better."""
        limit = chooser.plays + plays
        while played.copies.choices and chooser.plays < limit and not self._late():
            ops = sorted(played.copies.choices, key=lambda u: chooser.place[u])
            length = min(int(self.rng.geometric(0.1)), len(ops))
            first = int(self.rng.integers(len(ops) - length + 1))
            dropped = frozenset(ops[first : first + length])
            rest: Choices = {u: c for u, c in played.copies.choices.items() if u not in dropped}
            kept = dropped if self.rng.random() < 0.5 else frozenset()
            dear = _DEAR[int(self.rng.integers(len(_DEAR)))] if self.allowed.recompute else 0.0
            played = min(played, chooser.grow(rest, kept, dear, 4), key=lambda x: x.rank)
        return played

    def _late(self) -> bool:
        return time.perf_counter() >= self.deadline

    def _insist(self, best: Answer) -> Answer:
        """What `best` does where nothing fits: with the copies if they do not, and without."""
        seconds = _SHARES["insist"] * self.budget
        end = time.perf_counter() + seconds
        failed = None
        if not best.found.fits:
            given = best.found.assign, best.found.sequence
            again = Search(best.rewritten.problem, self.objective, self.seed, end, seconds, None,
                           given)  # fmt: skip
            try:
                return replace(best, found=again.run())
            except InfeasibleError as error:
                failed = error
        try:
            found = search(self.problem, self.objective, self.seed, seconds, None).run()
        except InfeasibleError as error:
            if best.found.fits:
                return best
            raise (error if error.proven else failed or error) from None
        if best.found.fits and best.found.cost <= found.cost:
            return best
        return Answer(found, rewrite(self.problem, ()))


def _roomy(problem: Problem) -> Problem:
    """The same with room for parameters alone, as the static memory model counts it."""
    ops = tuple(replace(op, temp_bytes=0, output_bytes=0) for op in problem.ops)
    return replace(problem, memory_model="static", ops=ops)


def _slim(problem: Problem) -> Problem:
    """The same with outputs and temporaries of a quarter their size."""
    ops = tuple(
        replace(op, temp_bytes=op.temp_bytes / 4, output_bytes=op.output_bytes / 4)
        for op in problem.ops
    )
    return replace(problem, ops=ops)


def _contiguous(problem: Problem) -> list[tuple[Ints, Ints]]:
    """The cheapest split into one run a device, with its ops in depth-first order, if one fits."""
    try:
        listed = min_cut(_roomy(problem), balanced=True)
    except InfeasibleError:
        return []
    return [(listed.assign, np.argsort(depth_first(problem.arrays)))]


def _answer(problem: Problem, played: Played) -> Answer:
    alternatives = played.copies.alternatives(problem)
    found = Found(played.assign, played.sequence, played.cost, {}, "choices", 0, "moves",
                  not played.over)  # fmt: skip
    return Answer(found, rewrite(problem, alternatives), alternatives)
