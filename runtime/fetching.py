"""Weights of a slower tier come before a plan reads them: `FetchStep`s and `BranchStep`s at work.

Where the units that a route wants do not fit into the budget together, the steps that read them
run in *waves*: the route's offsets are narrowed to as many neighbouring branches as fit, so that
the kernel sees the others empty. Waves go from the first branch to the last. A kernel writes the
rows of its branches and zeros to those behind, which the waves after it overwrite; each branch's
rows are computed by one wave from the same operands as otherwise, so the results are the same bits.

The plans of a `BranchStep` run one after the other anyway: a wave of them are those that fit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .bank import Bank
from .plan import BranchStep, FetchStep, KernelStep, Plan, PlanError
from .site import Site
from .table import Address, Table, build_table
from .tier import Tier

_WINDOW = "window of a route"  # a buffer of the narrowed offsets; no name of a plan's has blanks


@dataclass(frozen=True)
class Wanted:
    """Weights of a slower tier that a plan needs: ``banks`` as long as it runs, and ``beside`` them
    at least so many bytes for what it fetches itself.
    """

    banks: tuple[Bank, ...] = ()
    beside: int = 0


class Fetching:
    """What the fetches of one executor share: ``sites`` by the name of the step that fetches.

    ``parts`` are what runs the plans that branch steps name. Raises PlanError where banks do not
    fit the plan.
    """

    def __init__(
        self, plan: Plan, tier: Tier, banks: Mapping[str, Bank], parts: Mapping[str, Any]
    ) -> None:
        self.tier, self.banks, self.parts = tier, banks, parts
        self.sites: dict[str, Site] = {}
        self._unmade: dict[str, set[int]] = {}  # of a step the branches that are not compiled yet
        self._used: list[Site] = []
        self._spent = _spent(plan)
        for step in plan.steps:
            if isinstance(step, BranchStep):
                found = [w for own in self._wanted(step) for w in own]
                if any(wanted is None or wanted.banks for wanted in found):
                    self._make_site(step)
                continue
            if not isinstance(step, FetchStep):
                continue
            branches = int(step.selector.shape[0]) - 1
            if any(n not in banks or banks[n].count != branches for n in step.banks):
                raise PlanError(f"weights that {step.name} fetches are missing: compile again")
            own = [banks[n] for n in step.banks]
            self.sites[step.name] = tier.site([[(b, u) for b in own] for u in range(branches)])
        self._used += self.sites.values()
        weakref.finalize(self, tier.leave, self._used)

    # -- branches ---------------------------------------------------------------------------------

    def _make_site(self, step: BranchStep) -> None:
        """A site whose unit b is all that the plans of branch b want to be resident."""
        found = self._wanted(step)
        units: list[list[tuple[Bank, int]]] = []
        within: list[int] = []
        for own in found:
            known = [wanted for wanted in own if wanted is not None]
            units.append([(b, 0) for b in dict.fromkeys(b for w in known for b in w.banks)])
            within.append(max((w.beside for w in known), default=0))
        self._unmade[step.name] = {b for b, own in enumerate(found) if None in own}
        self.sites[step.name] = self.tier.site(units, within)

    def _wanted(self, step: BranchStep) -> list[list[Wanted | None]]:
        """What the plans of each branch want; None where that is known once they are compiled."""
        return [[self.parts[name].wants(make=False) for name in names] for names in step.units]

    def run_branches(
        self, step: BranchStep, offsets: Sequence[int], run: Callable[[int, int], None]
    ) -> None:
        """Calls ``run(first, end)`` for ranges of branches that together are all of them, in order,
        while the weights of those of the range that have rows are resident. Raises BankError.

        ``offsets`` are as for kind "rows"; the side of a `torch.cond` that runs has one row.
        """
        if step.name not in self.sites:
            if step.name in self._spent:
                self.tier.used()  # what the branches fetch has room in its place
            run(0, len(step.plans))
            return
        counts = [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]
        unmade = self._unmade[step.name]
        made = [b for b in unmade if counts[b]] if unmade else []
        if made:
            for b in made:
                for name in step.units[b]:
                    self.parts[name].wants()
            old = self.sites[step.name]
            self._make_site(step)
            self._used[self._used.index(old)] = self.sites[step.name]
            self.tier.leave([old])
        site = self.sites[step.name]
        if self.tier.fetch(site, counts):
            run(0, len(counts))
            return
        with closing(self.tier.waves(site, counts)) as waves:
            for first, end in waves:
                run(first, end)

    # -- routed products --------------------------------------------------------------------------

    def fetch(
        self, instance: Any, workspace: Any, step: FetchStep, offsets: NDArray[np.int64]
    ) -> Callable[[int], None] | None:
        """Makes what the route wants resident.

        Returns None, or where it does not fit together, what runs a segment (by its number) of the
        instance instead of its launch.
        """
        site = self.sites[step.name]
        if self.tier.fetch(site, _counts(offsets)):
            return None
        kept = offsets.copy()  # the arena's memory may hold something else by then

        def run(number: int) -> None:
            for k, single in enumerate(instance.segments[number]):
                self._run_step(instance, workspace, (number, k), single, step, site, kept)

        return run

    def _run_step(
        self,
        instance: Any,
        workspace: Any,
        key: tuple[int, int],
        step: KernelStep,
        fetch: FetchStep,
        site: Site,
        offsets: NDArray[np.int64],
    ) -> None:
        single = workspace.singles.get(key)
        if single is None:
            single = workspace.singles[key] = _Single(instance, workspace, step, fetch)
        read = [a.buffer for a in step.args[: step.reads] if a.buffer in fetch.banks]
        launch, ext = instance.executor.launch, workspace.ext_address
        if not read:
            single.window.copy_(torch.from_numpy(offsets))
            launch(single.table.address, ext)
            return
        only = [self.banks[name] for name in read]
        for begin, end in self.tier.waves(site, _counts(offsets), only):
            np.clip(offsets, offsets[begin], offsets[end], out=single.window.numpy())
            launch(single.table.address, ext)


def fetching_of(
    plan: Plan, tier: Tier | None, banks: Mapping[str, Bank], parts: Mapping[str, Any]
) -> Fetching | None:
    """What brings the weights that a plan fetches; None where it fetches nothing.

    Raises PlanError where banks do not fit the plan, or there is no tier to fetch from.
    """
    if tier is None:
        if any(isinstance(step, FetchStep) for step in plan.steps):
            raise PlanError("weights of the plan are on a slower tier, but there is none")
        return None
    found = Fetching(plan, tier, banks, parts)
    return found if found.sites else None


def beside(plan: Plan, banks: Mapping[str, Bank], parts: Mapping[str, Any]) -> int:
    """Bytes of weights that a plan and its parts fetch at least, at any one time."""
    found = [0]
    for step in plan.steps:
        if isinstance(step, FetchStep):
            found += [banks[name].unit_bytes for name in step.banks]
        elif isinstance(step, BranchStep):
            for names in step.units:
                known = [w for n in names if (w := parts[n].wants(make=False)) is not None]
                own = dict.fromkeys(bank for wanted in known for bank in wanted.banks)
                inner = max((wanted.beside for wanted in known), default=0)
                found.append(sum(bank.nbytes for bank in own) + inner)
    return max(found)


@contextmanager
def resident(tier: Tier | None, banks: Sequence[Bank]) -> Iterator[None]:
    """Within it ``banks`` of one unit are resident, for who runs a plan that is a part of another.

    Raises BankError.
    """
    if tier is None or not banks:
        yield
        return
    site = tier.site([[(bank, 0) for bank in banks]])
    try:
        with tier.using():
            tier.fetch(site, [1])
            yield
    finally:
        tier.leave([site])


def _spent(plan: Plan) -> frozenset[str]:
    """Branch steps behind which nothing reads what was fetched before them."""
    found: set[str] = set()
    pending: list[str] = []
    fetched: frozenset[str] = frozenset()
    for step in plan.steps:
        if isinstance(step, FetchStep):
            found.update(pending)
            pending, fetched = [], frozenset(step.banks)
        elif isinstance(step, BranchStep):
            pending.append(step.name)
        elif isinstance(step, KernelStep) and any(a.buffer in fetched for a in step.args):
            pending = []
    return frozenset(found.union(pending))


def _counts(offsets: NDArray[np.int64]) -> list[int]:
    begin, *ends = offsets.tolist()
    counts = []
    for end in ends:
        counts.append(end - begin)
        begin = end
    return counts


class _Single:
    """A launch of one step, which reads a route's offsets from ``window``."""

    table: Table

    def __init__(self, instance: Any, workspace: Any, step: KernelStep, fetch: FetchStep) -> None:
        branches = int(fetch.selector.shape[0])
        self.window = torch.empty(branches, dtype=torch.int64)
        moved = replace(fetch.selector, buffer=_WINDOW, offset=0)
        args = tuple(moved if a == fetch.selector else a for a in step.args)
        addresses = {**workspace.addresses, _WINDOW: Address(self.window.data_ptr())}
        self.table = build_table(
            [replace(step, args=args)],
            [[]],  # nothing to be told apart in a launch of one step
            addresses,
            instance.executor.functions,
            instance.values,
            instance.workers,
        )
