"""GPU kernels of groups: defined, scheduled in several ways, compiled together.

Each group gets up to two variants: the one that a rule of DLight's schedules, fastest alone by
intent, and the plain one with a thread for each element, which needs little and whose number of
threads always agrees with that of other plain ones, so that they can share a launch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from ...kernels import cuda
from ...kernels.abi import Pack, TensorArg
from ...kernels.build import BuildError
from ...kernels.cuda import CudaBundle, DeviceKernel, Usage
from ...kernels.database import Database
from ...kernels.definition import Definition
from ...kernels.definitions import DEFINITIONS
from ...kernels.group import Group, Unsupported
from ...kernels.horizontal import candidate
from ...kernels.occupancy import SM90, Candidate, Gpu
from ...kernels.target import Target
from ...kernels.templates.conv_spec import required_halo
from ...passes.fuse_vertical import groups_of
from ...passes.groups import is_symbol
from ...passes.remarks import Remark
from ..lowering.select import Choice, Selected, describe, missed
from ..lowering.spec import Spec
from ..lowering.storage import Halo
from ..placed.graph import flops_of

PRODUCTS = ("gemm", "conv")
PLAIN = "_plain"
"""What the names of plain variants end with: these read and write single elements only."""


@dataclass
class Made:
    """A group's kernel: what it computes, and its variants, the one to take alone first, the plain
    one last.
    """

    name: str
    definition: Definition
    variants: list[DeviceKernel]


class GpuKernels:
    """The kernels of one compilation for a GPU (`lowered.Kernels`).

    Products of more than ``own_flops`` FLOPs are declined. ``made`` are the kernels by key,
    ``bundles`` what was compiled, ``usage`` what each device function takes; ``heavy`` names the
    products that turned out to be the library's.
    """

    def __init__(
        self, target: Target, store: Database, own_flops: int = 0, gpu: Gpu = SM90
    ) -> None:
        self.target, self.store, self.own_flops, self.gpu = target, store, own_flops, gpu
        self.made: dict[str, Made] = {}
        self.bundles: list[CudaBundle] = []
        self.usage: dict[str, Usage] = {}
        self.heavy: set[str] = set()
        self._declined: dict[str, Unsupported] = {}
        self._pending: dict[str, Made] = {}

    @staticmethod
    def halo_of(node: fx.Node) -> Halo:
        """The zeros that a convolution node wants around its input."""
        return required_halo(node)

    @staticmethod
    def pack(tensor: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Never called: no definition for GPUs packs a constant."""
        raise NotImplementedError(f"{pack.op} of {tuple(tensor.shape)} for a GPU")

    def groups(self, module: fx.GraphModule) -> list[Group]:
        """The groups of a graph, heavy operators of the library's apart."""
        return split_library(groups_of(module), self)

    def is_library(self, group: Group) -> bool:
        """Whether the library computes the heavy operator of a group."""
        if group.anchor is None or group.kind == "reduce":
            return False
        if group.anchor.name in self.heavy:
            return True
        if group.kind in PRODUCTS:
            return not self._is_small(group)
        return group.kind not in DEFINITIONS

    def _is_small(self, group: Group) -> bool:
        assert group.anchor is not None
        return flops_of(group.anchor) <= self.own_flops

    def select(self, group: Group, io: Mapping[fx.Node, TensorArg]) -> Choice | Remark:
        """The kernel for ``group``, or why there is none."""
        nodes = tuple(n.name for n in group.nodes)
        if group.kind in PRODUCTS and not self._is_small(group):
            return missed("PLT-GPU-003", nodes, f"the library computes this {group.kind}")
        key = Spec(group, io).hash(self.target.key(), "gpu")
        if key not in self._declined and key not in self.made and key not in self._pending:
            try:
                self._pending[key] = self._lower(key, group, io)
            except Unsupported as error:
                self._declined[key] = error
        if key in self._declined:
            why = self._declined[key]
            if group.kind != "reduce" and group.anchor is not None and len(group.nodes) > 1:
                self.heavy.add(group.anchor.name)
            return missed(why.remark, nodes, why.reason, why.hint)
        return Choice(key, {})

    def _lower(self, key: str, group: Group, io: Mapping[fx.Node, TensorArg]) -> Made:
        definition = cuda.lower(group, io, self.target)
        variants: list[DeviceKernel] = []
        for plain in (False, True):
            name = f"plait_{key[:16]}" + PLAIN * plain
            try:
                device = cuda.device_kernel(name, definition, self.target, plain=plain)
            except Exception as error:  # TVM raises many kinds
                if plain:  # nothing may be taken for granted of tensors that only rules can read
                    why = f"{type(error).__name__}: {error}".splitlines()[0]
                    raise Unsupported("PLT-KER-003", f"code generation failed: {why}") from error
                continue
            if not definition.bound:
                variants = [v for v in variants if not _same_launches(device, v)]
            variants.append(device)
        return Made(describe(group), definition, variants)

    def finish(self) -> bool:
        """Compiles what was selected; False if some group must be chosen anew."""
        pending, self._pending = self._pending, {}
        if not pending:
            return True
        devices = {d.kernel.name: d for made in pending.values() for d in made.variants}
        try:
            bundle = cuda.build(devices, self.target, store=self.store)
        except BuildError as error:
            if not cuda.available():
                raise
            for key in pending:
                self._declined[key] = Unsupported("PLT-KER-003", f"code generation failed: {error}")
            return False
        self.bundles.append(bundle)
        self.usage |= bundle.usage
        sound = True
        for key, made in pending.items():
            failed = bundle.failed
            made.variants = [d for d in made.variants if d.kernel.name not in failed]
            if made.variants and made.variants[-1].kernel.name.endswith(PLAIN):
                self.made[key] = made
            else:
                why = next(w for n, w in failed.items() if n.startswith(f"plait_{key[:16]}"))
                self._declined[key] = Unsupported("PLT-KER-003", f"code generation failed: {why}")
                sound = False
        return sound

    def resolve(self, choice: Choice) -> Selected:
        """What was built for a choice."""
        made = self.made[choice.key]
        definition = made.definition
        packs = (None,) * len(definition.inputs)
        return Selected(made.name, choice.key, 1, definition.flops, definition.bytes, (), packs, {})

    def seconds(self, made: Made, variant: DeviceKernel) -> float:
        """What a variant takes alone, by the model."""
        d, gpu = made.definition, self.gpu
        launches = variant.kernel.launches
        work = gpu.seconds(d.flops, d.bytes, gpu.share(max(math.prod(k.grid) for k in launches)))
        return max(work, gpu.least * len(launches)) + gpu.launch * (len(launches) - 1)

    def candidate(self, made: Made, variant: DeviceKernel) -> Candidate:
        """A variant as the occupancy model sees it: by its launch with the most threads."""
        return candidate(variant, self.usage, self.seconds(made, variant))


def _same_launches(a: DeviceKernel, b: DeviceKernel) -> bool:
    """Whether two variants of one definition are launched alike: the rules declined it."""
    mine, other = ([(k.grid, k.block) for k in d.kernel.launches] for d in (a, b))
    return mine == other


def split_library(groups: Sequence[Group], kernels: GpuKernels) -> list[Group]:
    """Groups around a heavy operator of the library's, cut into that operator and what follows it
    elementwise, which is a kernel of its own.
    """
    found: list[Group] = []
    for group in groups:
        if group.kind == "library" or not kernels.is_library(group):
            found.append(group)
            continue
        held = {n for n in group.nodes if n is group.anchor or _is_part(n, group.anchor)}
        found.append(_part(group.kind, [n for n in group.nodes if n in held], group.anchor))
        rest = [n for n in group.nodes if n not in held]
        if rest:
            found.append(_part("pointwise", rest, None))
    return found


def _is_part(node: fx.Node, anchor: fx.Node | None) -> bool:
    return node.target is operator.getitem and node.args[0] is anchor


def _part(kind: str, nodes: Sequence[fx.Node], anchor: fx.Node | None) -> Group:
    inside = set(nodes)
    read = dict.fromkeys(a for n in nodes for a in n.all_input_nodes)
    inputs = tuple(a for a in read if a not in inside and not is_symbol(a))
    outputs = tuple(n for n in nodes if any(u not in inside for u in n.users))
    return Group(kind, tuple(nodes), inputs, outputs, anchor)
