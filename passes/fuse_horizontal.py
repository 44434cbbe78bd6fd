"""`fuse-horizontal`: independent GPU kernels in one launch.

before: a launch for each of several kernels that do not wait for each other
after:  one launch whose blocks are those of all of them, where the model says that it ends sooner

Kernels of one level of the graph (as far from its inputs, counted in steps) never depend on each
other, and one launch for them can close no cycle. Every kernel may come in several variants; the
ones that suit the launch as a whole are taken (`kernels.occupancy.choose`). Whether a fusion pays
is asked of the simulated plan as a whole (`gpu_tasks`), since a fused launch also makes its parts
wait for what only one of them needs. How a launch is made of parts: `kernels.horizontal`.

Ma et al., "Rammer: Enabling Holistic Deep Learning Compiler Optimizations with rTasks", OSDI 2020.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.fx as fx

from ..kernels.group import Unsupported
from ..kernels.occupancy import Candidate, Gpu, choose
from .base import Pass, PassResult, allow, copy_graph
from .gpu_tasks import GpuTask, seconds
from .remarks import Kind, Remark

FUSE = "fuse-horizontal"
"""Key of a graph module's ``meta``: the `FuseHorizontal` that says how to fuse."""


@dataclass(frozen=True)
class Node:
    """A task that may share a launch, with its variants; none where it is the library's."""

    task: GpuTask
    variants: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Fusion:
    """Tasks that share one launch, the variant of each, and the seconds that the plan gains."""

    tasks: tuple[int, ...]
    picks: tuple[int, ...]
    seconds: float
    gain: float


@dataclass(frozen=True)
class FuseHorizontal(Pass):
    """Puts independent GPU kernels into one launch. Does nothing on the CPU.

    Attributes:
        most: kernels in one launch at most; 1 fuses nothing.
        least_gain: microseconds that a fusion must save in prediction.
        own_flops: matrix products and convolutions of at most so many FLOPs become kernels of ours,
            which can share launches; the library computes larger ones.

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "fuse-horizontal"
    most: int = 16
    least_gain: float = 0.1
    own_flops: int = 1_000_000

    def __post_init__(self) -> None:
        if self.most < 1 or self.own_flops < 0:
            raise ValueError(f"most is {self.most}, own_flops {self.own_flops}: use 1, 0 or more")

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        result = copy_graph(graph_module)
        result.meta[FUSE] = self
        return PassResult(result)

    def fusions(self, nodes: Sequence[Node], gpu: Gpu) -> tuple[list[Fusion], list[Remark]]:
        """Which tasks should share launches, and why the others should not.

        No task is in two fusions. Those of one level are tried all together first; where that does
        not pay, without the ones that take longest.
        """
        found: list[Fusion] = []
        remarks: list[Remark] = []
        best = seconds([n.task for n in nodes], gpu)
        for level in _levels(nodes):
            rest = [k for k in level if nodes[k].variants]
            while len(rest) > 1:
                trial = self._try(nodes, found, rest, best, gpu)
                if trial is None:
                    break
                fusion, tried = trial
                names = tuple(nodes[k].task.name for k in fusion.tasks)
                if fusion.gain < self.least_gain * 1e-6:
                    reason = f"one launch of {len(names)} kernels would not end sooner ({tried})"
                    remarks.append(_remark("PLT-HFU-008", "missed", names, reason, fusion.gain))
                    break
                if allow("fuse-horizontal " + " ".join(names)):
                    found.append(fusion)
                    best -= fusion.gain
                rest = [k for k in rest if k not in fusion.tasks]
        return found, remarks

    def _try(
        self, nodes: Sequence[Node], found: list[Fusion], rest: list[int], best: float, gpu: Gpu
    ) -> tuple[Fusion, str] | None:
        """The best fusion of some of ``rest``, and its prediction as text; None for lack of two
        kernels with equally many threads.
        """
        tried: list[tuple[float, int, Fusion]] = []
        for threads in sorted({c.threads for k in rest for c in nodes[k].variants}):
            fitting = [k for k in rest if any(c.threads == threads for c in nodes[k].variants)]
            fitting.sort(key=lambda k: (min(c.seconds for c in nodes[k].variants), k))
            fitting = fitting[: self.most]
            while len(fitting) > 1:
                fusion = self._fusion(nodes, sorted(fitting), gpu)
                if fusion is not None:
                    total = seconds([n.task for n in merged(nodes, [*found, fusion])[0]], gpu)
                    tried.append((best - total, len(fitting), replace(fusion, gain=best - total)))
                    if best - total >= self.least_gain * 1e-6:
                        break
                fitting.pop()  # the longest one
        if not tried:
            return None
        gain, _, fusion = max(tried, key=lambda t: t[:2])
        return fusion, f"{(best - gain) * 1e6:.2f} us instead of {best * 1e6:.2f}"

    @staticmethod
    def _fusion(nodes: Sequence[Node], tasks: Sequence[int], gpu: Gpu) -> Fusion | None:
        try:
            choice = choose([nodes[k].variants for k in tasks], gpu)
        except Unsupported:
            return None
        return Fusion(tuple(tasks), choice.picks, choice.seconds, 0.0)


def merged(nodes: Sequence[Node], fusions: Sequence[Fusion]) -> tuple[list[Node], list[list[int]]]:
    """The tasks with every fusion one of them, in an order in which none comes too early; beside
    it, which of ``nodes`` each consists of.
    """
    members = [list(f.tasks) for f in fusions]
    inside = {k for tasks in members for k in tasks}
    members += [[k] for k in range(len(nodes)) if k not in inside]
    owner = {k: m for m, tasks in enumerate(members) for k in tasks}
    needs = [{owner[j] for k in tasks for j in nodes[k].task.after} for tasks in members]
    readers: list[list[int]] = [[] for _ in members]
    for m, before in enumerate(needs):
        for j in before:
            readers[j].append(m)
    left = [len(before) for before in needs]
    heap = [(max(members[m]), m) for m, count in enumerate(left) if not count]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        _, m = heapq.heappop(heap)
        order.append(m)
        for reader in readers[m]:
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(heap, (max(members[reader]), reader))
    place = {m: k for k, m in enumerate(order)}
    found = []
    for m in order:
        after = tuple(sorted(place[j] for j in needs[m]))
        tasks = [nodes[k].task for k in members[m]]
        if m < len(fusions):
            name = "+".join(t.name for t in tasks)
            share = min(1.0, sum(t.share for t in tasks))
            nbytes = sum(t.nbytes for t in tasks)
            made = GpuTask(name, fusions[m].seconds, share, nbytes, after)
            found.append(Node(made))
        else:
            found.append(replace(nodes[members[m][0]], task=replace(tasks[0], after=after)))
    return found, [members[m] for m in order]


def done(fusion: Fusion, nodes: Sequence[Node]) -> Remark:
    """The remark of a fusion that was made."""
    names = tuple(nodes[k].task.name for k in fusion.tasks)
    reason = f"{len(names)} kernels share one launch"
    return _remark("PLT-HFU-007", "done", names, reason, fusion.gain)


def _remark(remark: str, kind: Kind, names: tuple[str, ...], reason: str, gain: float) -> Remark:
    return Remark(remark, kind, FuseHorizontal.name, names, reason, "", gain)


def _levels(nodes: Sequence[Node]) -> list[list[int]]:
    """Tasks by the length of the longest chain before them."""
    level: list[int] = []
    for node in nodes:
        level.append(max((level[k] + 1 for k in node.task.after), default=0))
    found: list[list[int]] = [[] for _ in range(max(level, default=-1) + 1)]
    for k, number in enumerate(level):
        found[number].append(k)
    return found
