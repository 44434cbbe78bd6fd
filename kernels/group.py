"""A group: the FX nodes that become one kernel, and the protocol of kernel templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx as fx

from .abi import TensorArg

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
