"""Operators that all branches of a router begin with run once, before the cells are scattered.

before: rows = take(cells, order);  branch b: f_b(op(rows))
after:  rows = take(op(cells), order);  branch b: f_b(rows)

Legal where ``op`` treats every cell alone and cannot fail, profitable where it makes cells no
larger: it becomes part of the kernel that moves the cells, which then moves as many bytes or fewer,
and each branch has a kernel less, or one that reads less.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from .base import copy_graph
from .ir import attribute, fake_mode_of, fake_result
from .outline_branches import is_bookkeeping
from .route_regions import Region

_SLICES = frozenset({"aten.slice.Tensor", "aten.select.int"})
_ALONE = frozenset(
    f"aten.{name}"
    for name in """relu.default gelu.default silu.default tanh.default sigmoid.default neg.default
    abs.default exp.default leaky_relu.default hardswish.default add.Tensor sub.Tensor mul.Tensor
    div.Tensor add.Scalar sub.Scalar mul.Scalar div.Scalar clamp.default _to_copy.default""".split()
)
"""Operators on one tensor and numbers that treat every element alone."""


def hoist(module: fx.GraphModule, region: Region) -> list[str]:
    """Moves what all branches of ``region`` begin with before its scatter, in ``module`` and its
    branches, which are replaced. Returns the operators' names, in order.
    """
    moved: list[str] = []
    while region.cells is not None and (heads := _common_heads(module, region)):
        take: Any = region.node.args[1]
        node = heads[0]
        with module.graph.inserting_before(take):
            args = tuple(take.args[0] if isinstance(a, fx.Node) else a for a in node.args)
            first = module.graph.call_function(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
            first.meta["val"] = fake_result(first, fake_mode_of(module.graph))
        take.update_arg(0, first)
        take.meta["val"] = fake_result(take, fake_mode_of(module.graph))
        for graph in region.graphs:
            inner = copy_graph(attribute(module, str(graph.target)))
            _drop_head(inner)
            setattr(module, str(graph.target), inner)
        moved.append(str(node.target))
    return moved


def _common_heads(module: fx.GraphModule, region: Region) -> list[fx.Node]:
    """The first operator of every branch where they are the same; else nothing."""
    heads = [_head(attribute(module, str(graph.target))) for graph in region.graphs]
    found = [h for h in heads if h is not None]
    if len(found) < len(heads) or len({_text(h) for h in found}) != 1:
        return []
    return found


def _head(branch: fx.GraphModule) -> fx.Node | None:
    """The only operator that reads a branch's rows, if it may be moved."""
    rows = branch.graph.find_nodes(op="placeholder")[0]
    readers = [u for u in rows.users if not is_bookkeeping(u)]
    if len(readers) != 1 or len(rows.users) != 1 or readers[0].all_input_nodes != [rows]:
        return None
    node, name = readers[0], str(readers[0].target)
    before, after = rows.meta["val"], node.meta.get("val")
    if node.args.count(rows) != 1 or node.args[0] is not rows:
        return None
    if not isinstance(after, torch.Tensor) or _cell_bytes(after) > _cell_bytes(before):
        return None
    if name in _SLICES:
        dim = node.args[1] if len(node.args) > 1 else 0
        return node if isinstance(dim, int) and dim % before.dim() else None
    floating = before.is_floating_point() and after.is_floating_point()
    return node if name in _ALONE and floating else None


def _drop_head(branch: fx.GraphModule) -> None:
    rows = branch.graph.find_nodes(op="placeholder")[0]
    (node,) = rows.users
    rows.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(rows)
    branch.graph.erase_node(node)
    branch.recompile()


def _text(node: fx.Node) -> str:
    """An operator with its numbers: equal where branches begin alike."""
    numbers = ["rows" if isinstance(a, fx.Node) else a for a in node.args]
    return f"{node.target} {numbers} {sorted(node.kwargs.items(), key=str)}"


def _cell_bytes(tensor: torch.Tensor) -> Any:
    """Bytes of one row; as large as can be where a size is not a number."""
    count = tensor.element_size()
    for size in tensor.shape[1:]:
        if not isinstance(size, int):
            return 1 << 62
        count *= size
    return count
