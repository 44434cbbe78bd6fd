"""All that an instance runs in one launch, with the branches and the fetches of weights in it.

What Python runs between kernels ends one launch and begins another, for a `BranchStep` one for each
branch. That costs more than small branches do, or fetches where loads are cheap, and a branch that
is too small to share leaves all workers but one idle. Here fetches are steps of the launch
(`residency`), and so is what leads the workers through the tables of branches (`fork`), without any
barrier between them, so small ones run side by side.

Whatever is not that simple stops the launch (`driver.CHECKED`), and the call begins anew: when a
table of a branch was missing, which Python makes, in the same way, else step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from . import driver
from .branching import NOT_YET, Branches
from .fork import fork_function, tally_function
from .host import Hosted
from .plan import BranchStep, FetchStep, KernelStep, LibraryStep, TensorRef
from .residency import Residency, Root, fetch_function
from .site import Site
from .spans import Span
from .table import build_table
from .workspace import Workspace

PATIENCE = 16
"""Calls that may stop before it counts how many of them do: see `Whole.run`."""
_FETCH, _TALLY = "fetch", "tally"  # as kernels; hashes are longer
_ROOT = "root of residency"
_FETCH_STOPPED = 1  # in the stop word; above it are numbers of forks


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
        self.branches: list[Branches] = []
        self._sites: dict[str, Site] = {}
        steps: list[KernelStep] = []
        spans: list[list[Span]] = []
        functions, values = dict(instance.executor.functions), dict(instance.values)
        jumps: dict[str, np.ndarray] = {}
        checked = {_FETCH}

        def add(step: KernelStep, also: Sequence[TensorRef] = ()) -> None:
            steps.append(step)
            spans.append([instance.span(a) for a in (*step.args, *also)])

        for segment in instance.segments:
            if isinstance(segment, list):
                for step in segment:
                    add(step)
                continue
            assert isinstance(segment, BranchStep | FetchStep)
            fetch = self._fetch(segment, values)
            if fetch is not None:
                functions[_FETCH] = fetch_function()
                add(fetch, self._reads())  # it may drop what any step reads
            if isinstance(segment, BranchStep):
                fork = self._fork(segment, values)
                functions[fork.kernel] = fork_function(len(fork.args) - 1)
                checked.add(fork.kernel)
                jumps[segment.name] = self.branches[-1].jumps
                add(fork)
        for number in range(1, len(self.branches) + 1):
            functions[_TALLY] = tally_function()
            add(KernelStep(f"tally {number}", _TALLY, (), 0, (f"fork {number}",)))
        self.table = build_table(
            steps,
            spans,
            workspace.addresses,
            functions,
            values,
            instance.workers,
            placed=instance.workers == instance.plan.workers,
            checked=checked,
            stop=self._stop.ctypes.data,
            forks=jumps,
        )

    def _reads(self) -> list[TensorRef]:
        """The weights on the slower tier that kernels read."""
        banks = self._instance.executor.banks
        steps = (s for s in self._instance.plan.steps if isinstance(s, KernelStep))
        found = {a.buffer: a for s in steps for a in s.args[: s.reads] if a.buffer in banks}
        return list(found.values())

    def _fetch(self, step: BranchStep | FetchStep, values: dict[str, int]) -> KernelStep | None:
        fetching = self._instance.executor.fetching
        site = None if fetching is None else fetching.sites.get(step.name)
        if site is None or self._residency is None:
            return None
        self._sites[step.name] = site
        name = f"fetch of {step.name}"
        first, count = f"first unit of {step.name}", f"units of {step.name}"
        values |= {_ROOT: self._residency.address, first: self._residency.first[site.number]}
        values[count] = len(site.units)
        # As if it wrote the route: what reads it afterwards waits.
        return KernelStep(name, _FETCH, (step.selector,), 0, (_ROOT, first, count))

    def _fork(self, step: BranchStep, values: dict[str, int]) -> KernelStep:
        number = len(self.branches) + 1
        stop = self._stop.ctypes.data
        self.branches.append(Branches(self._instance, step, _FETCH_STOPPED + number, stop))
        symbol, operands = f"fork {number}", (*step.refs, *step.results)
        values[symbol] = self.branches[-1].fork.ctypes.data
        kernel, reads = f"fork of {len(operands)}", len(step.refs) + 1
        return KernelStep(step.name, kernel, (step.selector, *operands), reads, (symbol,))

    def fits(self) -> bool:
        """Whether the sites that it fetches for are still those of the executor."""
        fetching = self._instance.executor.fetching
        return fetching is None or all(fetching.sites[n] is s for n, s in self._sites.items())

    def run(self, routes: Mapping[str, Sequence[int]] | None = None) -> bool:
        """Runs everything; False where it could not, and the call has to be made otherwise.

        ``routes`` are offsets to be followed instead of those that the data tells, by step.

        Where numbers of rows keep changing, so that more than one call in four lacks tables, it
        gives up: making them takes longer than it saves.
        """
        self._calls += 1
        if routes is not None:
            for branches in self.branches:
                branches.follow(routes.get(branches.step.name))
        first = True
        while True:
            self._instance.executor.launch(self.table.address, self._ext)
            number = int(self._stop[0])
            if not number:
                self._report()
                return True
            if number == _FETCH_STOPPED:
                return False
            self._stopped += first
            first = False
            reason = self.branches[number - _FETCH_STOPPED - 1].make()
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
    if not instance.direct:
        return "a result is a part of another, or of an input"
    for step in instance.segments:
        if isinstance(step, LibraryStep):
            return f"{step.target} is called between"
        if isinstance(step, BranchStep):
            reason = _refusal(instance, step)
            if reason:
                return reason
    return ""


def _refusal(instance: Hosted, step: BranchStep) -> str:
    refs: tuple[TensorRef, ...] = (step.selector, *step.refs, *step.results)
    if step.kind != "rows":
        return f"{step.name} is a torch.cond: it has two sides, not rows"
    if len(refs) + 1 > driver.ARG_CLASSES[-1]:
        return f"{step.name} has {len(refs)} operands"
    if not all(_is_dense(*instance.geometry(ref)) for ref in refs):
        return f"{step.name} has operands with gaps"
    for name in step.every_plan:
        part = instance.executor.parts[name].made()
        if part and any(not isinstance(s, KernelStep) for s in part.plan.steps):
            return f"{name} is not kernels alone"
    return ""


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
