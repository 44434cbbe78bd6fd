"""Lowering for a GPU: a graph cut into groups becomes a Plan of launches on streams.

groups -> heavy operators to the library -> storage, kernels (as on the CPU, `lower`)
       -> fuse-horizontal -> streams -> plan-memory, aware of what may run at once

What is decided by the model of `passes.gpu_tasks` needs no GPU, so plans can be made, and their
kernels compiled, where there is none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from ...kernels import cuda
from ...kernels.build import BuildError
from ...kernels.cuda import DeviceKernel
from ...kernels.cuda_loader import GpuKernel
from ...kernels.group import Unsupported
from ...kernels.horizontal import Part, candidate, fuse
from ...kernels.occupancy import Candidate
from ...kernels.regions import Place
from ...kernels.routing import WAITING
from ...kernels.routing_rows import branches
from ...passes.base import copy_graph
from ...passes.cellwise import mixing
from ...passes.fuse_horizontal import FUSE, FuseHorizontal, Fusion, Node, done, merged
from ...passes.gpu_tasks import GpuBounds, GpuTask, bounds, seconds
from ...passes.ir import attribute, branches_of, is_pure, is_random
from ...passes.outline_branches import is_bookkeeping
from ...passes.plan_memory import describe, plan_memory
from ...passes.remarks import Remark
from ...passes.resize import at_rows
from ...passes.route_regions import draws, may_fail
from ...passes.speculate_routes import DEFERRED
from ...passes.streams import STREAMS, Streams, StreamsPass, assign, lifetimes
from ...runtime.gpu_device import ALIGNMENT
from ...runtime.plan import (
    BranchStep,
    Buffer,
    FetchStep,
    KernelStep,
    Lane,
    LibraryStep,
    Plan,
    Step,
    TensorRef,
    touched,
)
from ...runtime.spans import ITEMSIZE
from ..lowering.lower import lower
from ..lowering.lowered import Lowered
from ..placed.graph import flops_of
from .order import dependencies, on_streams
from .paged import fetched
from .select import GpuKernels, Made

_TILE = 4096  # elements of a product that one block of the library's makes, by assumption
_ELEMENTS = 1024  # elements that one block of its other operators reads or makes, whichever is more


@dataclass(frozen=True)
class Launchable:
    """A compiled kernel: its launches, the image they are in, and where among a step's arguments
    the kernel's tensors and temporaries are.
    """

    kernel: GpuKernel
    image: int
    order: tuple[int, ...]


@dataclass(frozen=True)
class StepInfo:
    """What is known of a step before it runs; ``parts`` name the kernels that share its launch."""

    task: GpuTask
    variant: Candidate | None = None
    launches: int = 0
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowBranch:
    """A branch of a router, which gets at most ``most`` rows: its graph, and what lowers that for a
    number of rows; ``refusal`` says why strangers may not be among the rows, "" if they may.
    """

    module: fx.GraphModule
    most: int
    refusal: str
    lower: Callable[[int], GpuLowered]


@dataclass
class GpuLowered:
    """A plan for a GPU, its kernels and what the model says of it.

    ``kernels`` are by hash, their images and CUDA C in ``images`` and ``sources``; ``seconds`` is
    the predicted time. ``graphable`` tells whether it may become a CUDA graph. ``parts`` are the
    sides of `torch.cond`s, ``rows`` the branches of routers, by their names in the plan. ``banks``
    are constants that the plan fetches from host memory, by name the attribute of the graph that
    each is; ``stayed`` are bytes that could not.
    """

    plan: Plan
    constants: dict[str, torch.Tensor]
    calls: dict[str, Callable[..., Any]]
    kernels: dict[str, Launchable]
    images: list[bytes]
    sources: list[str]
    steps: list[StepInfo]
    seconds: float
    bounds: GpuBounds
    fused: int
    graphable: bool
    remarks: list[Remark] = field(default_factory=list)
    parts: dict[str, GpuLowered] = field(default_factory=dict)
    rows: dict[str, RowBranch] = field(default_factory=dict)
    banks: dict[str, str] = field(default_factory=dict)
    stayed: int = 0


def lower_gpu(
    graph_module: fx.GraphModule, kernels: GpuKernels, symbols: Mapping[str, Any], *, fused: bool
) -> GpuLowered:
    """Lowers a graph for the GPU of ``kernels``; kernels share launches only where ``fused``.

    Raises NotImplementedError for sizes known only at run time, BuildError without nvcc.
    """
    if symbols:
        names = ", ".join(symbols)
        raise NotImplementedError(f"GPU kernels need sizes that are known, not {names}")
    while True:
        graph = _own(graph_module)
        known = len(kernels.heavy)
        lowered = lower(graph, kernels.groups(graph), kernels, {})
        if len(kernels.heavy) == known:
            break  # else what follows a declined product becomes a kernel of its own
    paged = fetched(lowered, graph)
    lowered.plan = replace(lowered.plan, steps=paged.steps)
    result = _Planner(graph, lowered, kernels, fused).run()
    told = [r for r in lowered.remarks if r.pass_name != "plan-memory"]
    result.remarks[:0] = [*told, *paged.remarks]
    result.banks, result.stayed = paged.banks, paged.stayed
    return result


def _own(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy, for lowering to change, with the graphs in it. Branches of routers are left for when
    it is known how many rows they get.
    """
    graph = copy_graph(graph_module)
    for name, inner in branches_of(graph):
        setattr(graph, name, _own(inner))
    for node in graph.graph.find_nodes(op="call_function", target=branches):
        node.meta[DEFERRED] = tuple(range(len(node.args[0])))  # type: ignore[arg-type]
    return graph


class _Planner:
    def __init__(
        self,
        graph_module: fx.GraphModule,
        lowered: Lowered,
        kernels: GpuKernels,
        fused: bool,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.graph_module, self.lowered, self.kernels = graph_module, lowered, kernels
        self.plan, self.gpu, self.is_fused = lowered.plan, kernels.gpu, fused
        self.asked = graph_module.meta if asked is None else asked
        fuse_pass = self.asked.get(FUSE)
        self.how = fuse_pass if fused and fuse_pass is not None else FuseHorizontal(most=1)
        self.streams_pass = self.asked.get(STREAMS) or StreamsPass(most=1)
        self.by_name = {n.name: n for n in graph_module.graph.nodes}
        self.remarks: list[Remark] = []
        self.parts: dict[str, GpuLowered] = {}
        self.rows: dict[str, RowBranch] = {}
        self.found: dict[str, Launchable] = {}
        self.images = [b.image for b in kernels.bundles]
        self.sources = [b.source for b in kernels.bundles]
        self.usage = dict(kernels.usage)
        self.picked: dict[int, list[tuple[Made, DeviceKernel]]] = {}

    def run(self) -> GpuLowered:
        for name, part in self.lowered.parts.items():
            module = attribute(self.graph_module, name)
            planner = _Planner(module, part, self.kernels, self.is_fused, self.asked)
            self.parts[name] = planner.run()
            self.remarks += self.parts[name].remarks
        nodes = self._nodes()
        fusions, refused = self.how.fusions(nodes, self.gpu)
        self.remarks += refused
        fusions, devices = self._build(nodes, fusions)
        self.remarks += [done(f, nodes) for f in fusions]
        tasks, members = merged(nodes, fusions)
        steps, infos = [], []
        owner = {f.tasks: k for k, f in enumerate(fusions)}
        for node, group in zip(tasks, members, strict=True):
            number = owner.get(tuple(group))
            step, info = (
                self._alone(group[0], node.task)
                if number is None
                else self._fused(fusions[number], devices[number], node.task)
            )
            steps.append(step)
            infos.append(info)
        return self._finish(steps, infos)

    # -- tasks --------------------------------------------------------------------------------

    def _nodes(self) -> list[Node]:
        nodes = []
        for number, (step, after) in enumerate(
            zip(self.plan.steps, dependencies(self.plan.steps, self._impure()), strict=True)
        ):
            if isinstance(step, KernelStep):
                made = self.kernels.made[step.kernel]
                options = [(made, v) for v in _variants(step, made)]
                self.picked[number] = options
                candidates = tuple(self.kernels.candidate(m, v) for m, v in options)
                first = candidates[0]
                share = self.gpu.share(first.blocks)
                task = GpuTask(step.name, first.seconds, share, made.definition.bytes, after)
                nodes.append(Node(task, candidates))
            elif isinstance(step, BranchStep):
                nodes.append(Node(replace(self._branches(step), after=after)))
            elif isinstance(step, FetchStep):
                nodes.append(Node(GpuTask(step.name, self.gpu.least, 1.0, 0, after)))
            else:
                assert isinstance(step, LibraryStep)
                nodes.append(Node(replace(self._library(step), after=after)))
        return nodes

    def _branches(self, step: BranchStep) -> GpuTask:
        """A step that chooses among plans, by the model as slow as the slowest that is known.

        Raises NotImplementedError where what it reads or writes has sizes that only data tell.
        """
        refs = [r for r in touched(step) if r is not None]
        if any(not r.dtype for r in refs):
            reason = f"branches of {step.name} have sizes that only data tell"
            raise NotImplementedError(f"{reason}, which are not launched on a GPU")
        for name in step.plans:
            if name in self.lowered.deferred:
                module = self.lowered.deferred[name]
                self.rows[name] = self._row_branch(name, module, int(step.refs[0].shape[0]))
        took = [self.parts[name].seconds for name in step.plans if name in self.parts]
        nbytes = sum(_elements(r) * ITEMSIZE[r.dtype] for r in refs)
        return GpuTask(step.name, self.gpu.least + max(took, default=0.0), 1.0, nbytes)

    def _row_branch(self, name: str, module: fx.GraphModule, most: int) -> RowBranch:
        def at(rows: int) -> GpuLowered:
            sized = at_rows(module, rows, is_bookkeeping)
            sized.meta |= {key: self.asked[key] for key in (FUSE, STREAMS) if key in self.asked}
            return lower_gpu(sized, self.kernels, {}, fused=self.is_fused)

        refusal = ""
        if (mixed := mixing(module)) is not None:
            refusal = f"{mixed} may look at more than one cell"
        elif draws(module):
            refusal = "random numbers are drawn"
        elif may_fail(module):
            refusal = "an operator may fail on what is no cell"
        if refusal:
            what = f"{refusal}, so the operators of {name} run on exactly its cells"
            self.remarks.append(Remark("PLT-GPU-008", "missed", "lower", (name,), what))
        return RowBranch(module, most, refusal, at)

    def _impure(self) -> set[str]:
        calls = (n for n in self.by_name.values() if n.op == "call_function")
        return {n.name for n in calls if not is_pure(n)}

    def _library(self, step: LibraryStep) -> GpuTask:
        """A library call, as if it were as good as the roofline of the blocks it can fill."""
        node, gpu = self.by_name[step.name], self.gpu
        made = sum(_elements(r) for r in step.results if r is not None)
        refs = [r for r in touched(step) if r is not None]
        nbytes = sum(_elements(r) * ITEMSIZE.get(r.dtype, 0) for r in refs)
        known = made and isinstance(node.meta.get("val"), torch.Tensor)
        flops = flops_of(node) if known else 0.0
        is_product = flops > 2 * made
        blocks = made / _TILE if is_product else max(map(_elements, refs), default=0) / _ELEMENTS
        share = gpu.share(math.ceil(blocks))
        return GpuTask(step.name, max(gpu.least, gpu.seconds(flops, nbytes, share)), share, nbytes)

    # -- kernels ------------------------------------------------------------------------------

    def _build(
        self, nodes: Sequence[Node], fusions: Sequence[Fusion]
    ) -> tuple[list[Fusion], list[DeviceKernel]]:
        """Compiles fused launches; leaves out what may not or does not become one."""
        made: list[tuple[Fusion, DeviceKernel]] = []
        for fusion in fusions:
            parts = [
                self._part(k, pick) for k, pick in zip(fusion.tasks, fusion.picks, strict=True)
            ]
            names = tuple(nodes[k].task.name for k in fusion.tasks)
            spelled = "|".join(p.name for p in parts)
            name = f"plait_{hashlib.sha256(spelled.encode()).hexdigest()[:16]}_fused"
            try:
                made.append((fusion, fuse(name, parts, self.gpu)))
            except Unsupported as error:
                self._missed(error.remark, names, error.reason, error.hint)
        if not made:
            return [], []
        devices = {device.kernel.name: device for _, device in made}
        failed: dict[str, str] = {}
        try:
            bundle = cuda.build(devices, self.kernels.target, store=self.kernels.store)
            failed = bundle.failed
            self.images.append(bundle.image)
            self.sources.append(bundle.source)
            self.usage |= bundle.usage
        except BuildError as error:
            failed = dict.fromkeys(devices, str(error))
        kept = []
        for fusion, device in made:
            if device.kernel.name in failed:
                names = tuple(nodes[k].task.name for k in fusion.tasks)
                why = f"code generation failed: {failed[device.kernel.name]}"
                self._missed("PLT-KER-003", names, why, "")
            else:
                kept.append((fusion, device))
        return [f for f, _ in kept], [d for _, d in kept]

    def _missed(self, remark: str, names: tuple[str, ...], reason: str, hint: str) -> None:
        self.remarks.append(Remark(remark, "missed", FuseHorizontal.name, names, reason, hint))

    def _part(self, number: int, pick: int) -> Part:
        made, variant = self.picked[number][pick]
        step = self.plan.steps[number]
        assert isinstance(step, KernelStep)
        places = [Place(r.buffer, int(r.offset) * ITEMSIZE[r.dtype]) for r in step.args]
        took = self.kernels.seconds(made, variant)
        return Part.of(variant, made.definition, places, took, self.gpu)

    def _alone(self, number: int, task: GpuTask) -> tuple[Step, StepInfo]:
        step = self.plan.steps[number]
        if not isinstance(step, KernelStep):
            return step, StepInfo(task)
        made, variant = self.picked[number][0]
        kernel = variant.kernel
        args, reads = self._with_temporaries(step.name, step.args, kernel), step.reads
        hashed = f"{step.kernel}:{kernel.name}"
        self.found[hashed] = self._launchable(kernel, range(len(args)))
        chosen = self.kernels.candidate(made, variant)
        info = StepInfo(task, chosen, len(kernel.launches))
        return replace(step, kernel=hashed, args=args, reads=reads), info

    def _fused(self, fusion: Fusion, device: DeviceKernel, task: GpuTask) -> tuple[Step, StepInfo]:
        """The step of a fused launch: first what all parts read, then what they write."""
        parts = [self.plan.steps[k] for k in fusion.tasks]
        read: list[TensorRef] = []
        written: list[TensorRef] = []
        slots: list[tuple[bool, int]] = []  # of each tensor of the kernel: written? and where
        for step in parts:
            assert isinstance(step, KernelStep)
            for position, ref in enumerate(step.args):
                side = written if position >= step.reads else read
                slots.append((side is written, len(side)))
                side.append(ref)
        name = "+".join(s.name for s in parts)
        args = self._with_temporaries(name, (*read, *written), device.kernel)
        tensors = len(read) + len(written)
        order = [at + len(read) * is_written for is_written, at in slots]
        order += range(tensors, len(args))
        self.found[device.kernel.name] = self._launchable(device.kernel, order)
        kernels = [s for s in parts if isinstance(s, KernelStep)]
        step = KernelStep(
            name=name,
            kernel=device.kernel.name,
            args=args,
            reads=len(read),
            flops=sum(int(s.flops) for s in kernels),
            bytes=sum(int(s.bytes) for s in kernels),
            group=kernels[0].group,
        )
        chosen = candidate(device, self.usage, fusion.seconds)
        info = StepInfo(task, chosen, len(device.kernel.launches), tuple(s.name for s in parts))
        return step, info

    def _launchable(self, kernel: GpuKernel, order: Sequence[int]) -> Launchable:
        function = kernel.launches[0].function
        image = next(k for k, source in enumerate(self.sources) if f" {function}(" in source)
        return Launchable(kernel, image, tuple(order))

    def _with_temporaries(
        self, name: str, args: Sequence[TensorRef], kernel: GpuKernel
    ) -> tuple[TensorRef, ...]:
        found = list(args)
        for nbytes in kernel.temporaries:
            number = len(self.plan.buffers)
            buffer = f"temporary{number}:{name}"
            self.plan.buffers[buffer] = Buffer(buffer, "arena", nbytes)
            found.append(TensorRef(buffer, "uint8", (nbytes,), (1,)))
        return tuple(found)

    # -- streams and memory -------------------------------------------------------------------

    def _finish(self, steps: list[Step], infos: list[StepInfo]) -> GpuLowered:
        streams = assign(
            [i.task.after for i in infos], [i.task.seconds for i in infos], self.streams_pass.most
        )
        ordered = on_streams([i.task for i in infos], streams)
        took, limits = seconds(ordered, self.gpu), bounds([i.task for i in infos], self.gpu)
        buffers = self._memory(steps, streams)
        plan = replace(
            self.plan,
            steps=steps,
            buffers=buffers[0],
            arena_bytes=buffers[1],
            lanes=[Lane(s, w) for s, w in zip(streams.of, streams.waits, strict=True)],
            urgent=tuple(s for s, urgent in enumerate(streams.critical) if urgent),
            parts={name: part.plan for name, part in self.parts.items()},
        )
        count = max(streams.of, default=-1) + 1
        self.remarks.append(
            Remark(
                "PLT-GPU-005",
                "done",
                StreamsPass.name,
                (),
                f"{len(steps)} steps on {count} streams with {streams.events} events between them,"
                f" {took * 1e6:.1f} us by the model; none can take less than"
                f" {limits.best * 1e6:.1f} us",
            )  # fmt: skip
        )
        graphable = self._graphable(steps)
        fused = sum(bool(i.parts) for i in infos) + sum(p.fused for p in self.parts.values())
        return GpuLowered(
            plan, self.lowered.constants, self.lowered.calls, self.found, self.images,
            self.sources, infos, took, limits, fused, graphable, self.remarks,
            self.parts, self.rows,
        )  # fmt: skip

    def _memory(self, steps: Sequence[Step], streams: Streams) -> tuple[dict[str, Buffer], int]:
        users: dict[str, list[int]] = {}
        for number, step in enumerate(steps):
            for ref in touched(step):
                if ref is not None and self.plan.buffers[ref.buffer].kind == "arena":
                    users.setdefault(ref.buffer, []).append(number)
        sizes = {name: int(self.plan.buffers[name].nbytes) for name in users}
        lives = lifetimes(sizes, users, streams)
        memory = plan_memory(lives)
        if lives:
            self.remarks.append(describe(lives, memory))
        buffers = {n: b for n, b in self.plan.buffers.items() if b.kind != "arena" or n in users}
        for name, offset in memory.offsets.items():
            buffers[name] = replace(buffers[name], offset=offset)
        return buffers, int(memory.total)

    def _graphable(self, steps: Sequence[Step]) -> bool:
        """Whether the same launches serve every call; says why not."""
        for step in steps:
            if not isinstance(step, LibraryStep):
                continue
            node = self.by_name[step.name]
            reason = ""
            if any(r is not None and not r.dtype for r in touched(step)):
                reason = f"{step.target} depends on sizes that only data tell"
            elif step.target in WAITING:
                reason = f"{step.target} waits for the GPU to count the rows of each branch"
            elif is_random(node):
                reason = f"{step.target} draws random numbers"
            if reason:
                what = "so every call launches the plan's steps one by one"
                self.remarks.append(
                    Remark("PLT-GPU-004", "missed", "lower", (step.name,), f"{reason}, {what}")
                )
                return False
        return True


def _variants(step: KernelStep, made: Made) -> list[DeviceKernel]:
    """The variants that a step may use: only the plain one reads no vectors, which are aligned."""
    before = made.variants[0].kernel.offsets  # how far memory begins before element 0
    starts = [int(r.offset) * ITEMSIZE[r.dtype] for r in step.args]
    if not any((start - b) % ALIGNMENT for start, b in zip(starts, before, strict=True)):
        return made.variants
    return made.variants[-1:]


def _elements(ref: TensorRef) -> int:
    return math.prod(int(d) for d in ref.shape) if ref.dtype else 0
