"""All that an instance runs in one launch, with the branches and the fetches of weights in it.

What Python runs between kernels ends one launch and begins another, for a `BranchStep` one for each
branch. That costs more than small branches do, or fetches where loads are cheap, and a branch that
is too small to share leaves all workers but one idle. Here fetches are steps of the launch
(`residency`), and so is what leads the workers through the tables of branches (`fork`), without any
barrier between them, so small ones run side by side. Branches may branch in turn.

Whatever is not that simple stops the launch (`driver.CHECKED`), and the call begins anew: when a
table of a branch was missing, which Python makes, in the same way, else step by step.
"""

from __future__ import annotations

import numpy as np

from .branching import FIRST, NOT_YET, Forks, Layout, has_gaps, refusal_of
from .fork import tally_function
from .host import Hosted
from .plan import BranchStep, FetchStep, KernelStep, LibraryStep, TensorRef
from .residency import Residency, Root, fetch_function
from .site import Site
from .workspace import Workspace

PATIENCE = 16
"""Calls that may stop before it counts how many of them do: see `Whole.run`."""
_FETCH_STOPPED = 1  # in the stop word
assert _FETCH_STOPPED < FIRST


class Whole:
    """One launch of an instance in one of its workspaces. ``residency`` is the tier's, where there
    is one.

    ``refused`` says why later calls are not tried, "" if they are.
    """

    def __init__(self, instance: Hosted, workspace: Workspace, residency: Residency | None) -> None:
        self.refused = ""
        self._instance, self._ext = instance, workspace.ext_address
        self._residency = residency
        self._stop = np.zeros(1, np.int64) if residency is None else residency.root[Root.STOP :]
        self._calls = self._stopped = 0
        self._sites: dict[str, Site] = {}
        self._forks = Forks(self._stop.ctypes.data)
        layout = Layout(instance, self._forks)
        for segment in instance.segments:
            if isinstance(segment, list):
                for step in segment:
                    layout.add(step)
                continue
            assert isinstance(segment, BranchStep | FetchStep)
            self._fetch(segment, layout)
            if isinstance(segment, BranchStep):
                layout.branch(segment)
        self.branches = layout.branches
        for branches in self.branches:
            words = {f"fork {branches.number}": branches.fork.ctypes.data}
            layout.native(f"tally {branches.number}", tally_function(), words=words)
        self.table = layout.table(workspace.addresses)

    def _fetch(self, step: BranchStep | FetchStep, layout: Layout) -> None:
        """Adds the fetch of what a step wants, if it wants any."""
        fetching = self._instance.executor.fetching
        site = None if fetching is None else fetching.sites.get(step.name)
        if site is None or self._residency is None:
            return
        self._sites[step.name] = site
        words = {
            "root of residency": self._residency.address,
            f"first unit of {step.name}": self._residency.first[site.number],
            f"units of {step.name}": len(site.units),
        }
        # As if it wrote the route: what reads it afterwards waits. It may drop what any step reads.
        name, route, also = f"fetch of {step.name}", (layout.route(step),), self._reads()
        layout.native(name, fetch_function(), route, 0, words, also, checked=True)

    def _reads(self) -> list[TensorRef]:
        """The weights on the slower tier that kernels read."""
        banks = self._instance.executor.banks
        steps = (s for s in self._instance.plan.steps if isinstance(s, KernelStep))
        found = {a.buffer: a for s in steps for a in s.args[: s.reads] if a.buffer in banks}
        return list(found.values())

    def fits(self) -> bool:
        """Whether the sites that it fetches for are still those of the executor."""
        fetching = self._instance.executor.fetching
        return fetching is None or all(fetching.sites[n] is s for n, s in self._sites.items())

    def run(self) -> bool:
        """Runs everything; False where it could not, and the call has to be made otherwise.

        Where numbers of rows keep changing, so that more than one call in four lacks tables, it
        gives up: making them takes longer than it saves.
        """
        self._calls += 1
        led = self._instance.routes() is not None
        first = True
        while True:
            if led:
                self._forks.follow()
            self._instance.executor.launch(self.table.address, self._ext)
            number = int(self._stop[0])
            if not number:
                self._report()
                return True
            if number == _FETCH_STOPPED:
                return False
            self._stopped += first
            first = False
            reason = self._forks[number].make()
            if reason and reason != NOT_YET:
                self.refused = reason
            elif self._stopped > PATIENCE + self._calls // 4:
                self.refused = "the numbers of their rows keep changing"
            if reason or self.refused:
                return False
            if self._residency is not None:
                self._residency.begin_anew()

    def _report(self) -> None:
        recorder = self._instance.executor.recorder
        if recorder is not None:
            for branches in self.branches:
                branches.report(recorder)


def refusal(instance: Hosted) -> str:
    """Why an instance is more than one launch; "" where one can have all that it has to do."""
    for step in instance.segments:
        if isinstance(step, LibraryStep):
            return f"{step.target} is called between"
        if isinstance(step, BranchStep):
            if has_gaps(instance, step):
                return f"{step.name} has operands with gaps"
            reason = refusal_of(instance.executor, step)
            if reason:
                return reason
    return ""
