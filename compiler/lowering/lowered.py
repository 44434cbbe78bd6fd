"""What lowering needs, a source of kernels, and what it makes, a plan with what that runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.fx as fx

from ...kernels.abi import Pack, TensorArg
from ...kernels.group import Group
from ...passes.plan_memory import MemoryPlan
from ...passes.remarks import Remark
from ...runtime.bank import Bank
from ...runtime.plan import Plan
from .select import Choice, Selected
from .storage import Halo, Storage


class Kernels(Protocol):
    """Where kernels come from: `select.Kernels`, or `gpu.select.GpuKernels`."""

    @staticmethod
    def halo_of(node: fx.Node) -> Halo:
        """The zeros that a convolution node wants around its input."""
        ...

    def groups(self, module: fx.GraphModule) -> list[Group]:
        """The groups of a graph within the one that is lowered."""
        ...

    def select(self, group: Group, io: Mapping[fx.Node, TensorArg]) -> Choice | Remark:
        """The kernel for a group, or why there is none."""
        ...

    def finish(self) -> bool:
        """Builds what was selected; False if some group must be chosen anew."""
        ...

    def resolve(self, choice: Choice) -> Selected:
        """What was built for a choice."""
        ...

    @staticmethod
    def pack(tensor: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Reorders a constant as a kernel wants it."""
        ...


@dataclass(frozen=True)
class Absent:
    """A constant still to be made: weight ``target`` of the graph seen as ``shape``, ``strides``
    and ``offset`` (elements), reordered by ``pack`` unless that is None.
    """

    target: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    pack: Pack | None


@dataclass
class Lowered:
    """A plan and what it runs on.

    ``constants`` are prepared (packed) tensors by buffer name, ``banks`` those of them on a slower
    tier (of one unit where the plan calls them ``fetched``); ``stayed`` are bytes of weights that
    were meant to be there, but have no kernel.
    Constants in ``absent`` are on the meta device until `weights.absent.fill` makes them.
    """

    plan: Plan
    constants: dict[str, torch.Tensor]
    calls: dict[str, Callable[..., Any]]
    kernels: list[str]
    remarks: list[Remark]
    memory: MemoryPlan
    groups: list[Group] = field(default_factory=list)
    selected: dict[int, Selected] = field(default_factory=dict)
    storage: Storage | None = None
    parts: dict[str, Lowered] = field(default_factory=dict)
    deferred: dict[str, fx.GraphModule] = field(default_factory=dict)
    banks: dict[str, Bank] = field(default_factory=dict)
    stayed: int = 0
    absent: dict[str, Absent] = field(default_factory=dict)
