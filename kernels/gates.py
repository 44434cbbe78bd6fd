"""A routed product in a group with what is elementwise after it, and the gate that may be part."""

from __future__ import annotations

import torch.fx as fx

from .group import Group, Unsupported
from .ops import category, column_halves


def gate_of(group: Group, node: fx.Node) -> tuple[tuple[fx.Node, ...], bool]:
    """The two operands of a gate on the columns of the product ``node`` (none where there is no
    gate), and whether they alternate.

    Raises `Unsupported` where anything else follows than operators on one element of the result.
    """
    slices = [n for n in group.nodes if category(n) == "view" and n.args[0] is node]
    found = column_halves(node, slices) if slices else None
    halves: tuple[fx.Node, ...] = found[0] if found else ()
    (result,) = group.outputs
    shapes = (tuple(result.meta["val"].shape), ())
    rest = [n for n in group.nodes if n is not node and n not in halves]
    if bool(slices) != bool(halves) or any(
        category(n) != "pointwise" or tuple(n.meta["val"].shape) not in shapes for n in rest
    ):
        raise Unsupported("PLT-EXP-005", "not elementwise over the product")
    return halves, bool(found and found[1])
