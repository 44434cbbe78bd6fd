"""A group: the FX nodes that become one kernel, and the protocol of kernel templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from .abi import TensorArg, names_in

HALF = (torch.bfloat16, torch.float16)
"""Types of 16 bits; kernels compute with them in float32."""
IO = Mapping[fx.Node, TensorArg]
"""How every input and output node of a group lies in memory."""


@dataclass(frozen=True)
class Group:
    """FX nodes lowered together, in topological order.

    ``inputs`` are the nodes outside the group whose tensors it reads (symbol-valued nodes are not
    listed: sizes come from ``meta["val"]``), ``outputs`` the nodes inside it that are read outside.
    ``anchor`` is the heavy operator of a gemm, conv, pool or attention group.
    """

    kind: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    anchor: fx.Node | None = None


class Unsupported(Exception):
    """A template declines a group: a stable remark ID, the reason, and a hint for the user."""

    def __init__(self, remark: str, reason: str, hint: str = "") -> None:
        super().__init__(f"{remark}: {reason}")
        self.remark, self.reason, self.hint = remark, reason, hint


def symbols_of(group: Group, args: Sequence[TensorArg]) -> tuple[str, ...]:
    """Names of all shape symbols that the code of a group's kernel may mention, sorted."""
    dims: list[Any] = [d for a in args for d in (*a.shape, *a.strides)]

    def collect(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for part in value:
                collect(part)
        elif isinstance(value, torch.Tensor):
            collect(list(value.shape))
        elif isinstance(value, torch.SymInt):
            dims.append(value.node.expr)
        elif isinstance(value, fx.Node):
            collect(value.meta.get("val"))

    for node in group.nodes:
        collect(node.meta.get("val"))
        collect([*node.args, *node.kwargs.values()])
    return names_in(dims)
