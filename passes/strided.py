"""Views by strides become elements by number (part of `passes.normalize`).

``as_strided`` says where its elements lie in memory. What lies there is known in the graph that was
captured, where every tensor has eager execution's strides; later passes and storage give tensors
other places. So it is rewritten first, to what any layout computes:
``permute(x, order of its memory).reshape(-1)[offset + i * stride + j * stride + ...]``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from .base import allow
from .identities import same_places
from .ir import Rewriter, alias_root, alias_source, argument, aten, is_call, is_mutating, same_size

_SHARE_MEMORY = {
    operator.getitem,
    aten.alias.default,
    aten.as_strided.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
}
"""Views for every input: others copy where no strides express their result."""
_BY_STRIDES = (
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
)
"""Operators that find elements of their first argument by strides."""


def number_elements(rewriter: Rewriter) -> list[str]:
    """Rewrite views by strides of memory whose order is known. Returns the names of the nodes."""
    nodes = [n for n in rewriter.graph.nodes if is_call(n, aten.as_strided.default)]
    if not nodes or any(map(is_mutating, rewriter.graph.nodes)):
        return []
    found = [(node, _memory(node)) for node in nodes]  # before any of them changes
    done: list[str] = []
    for node, memory in found:
        if memory is not None and allow("elements by number", [node]):
            done.append(node.name)
            _rewrite(rewriter, node, *memory)
    return done


def seen_inputs(graph: fx.Graph) -> dict[int, bool]:
    """The numbers of the inputs whose place in memory a captured graph's views by strides see, and
    whether they are views of the input itself, not only of what is computed from it.
    """
    inputs = list(graph.find_nodes(op="placeholder"))
    found: set[fx.Node] = set()
    waiting = [n for n in graph.nodes if is_call(n, *_BY_STRIDES) and not _is_whole(n)]
    bare = {alias_root(n.args[0]) for n in waiting}  # type: ignore[arg-type]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return {k: node in bare for k, node in enumerate(inputs) if node in found}


def _is_whole(node: fx.Node) -> bool:
    """Whether a view by strides is its argument as it is."""
    if not is_call(node, aten.as_strided.default):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return same_places(source.meta["val"], node.meta["val"])


def _memory(node: fx.Node) -> tuple[fx.Node, list[int], Any] | None:
    """The node whose result fills the memory that is looked into, its dimensions from the
    outermost in memory, and the place of the first element; None where these are not known.
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    root, step = alias_root(source), source
    while step is not root:
        if step.target not in _SHARE_MEMORY:
            return None
        step = alias_source(step)
        assert step is not None
    view, whole = source.meta["val"], root.meta["val"]
    if root.op != "call_function" or not isinstance(whole, torch.Tensor):
        return None  # what lies around an argument or a weight is not known
    if whole.dtype != view.dtype or _is_whole(node):
        return None
    order = memory_order(whole) if same_size(whole.storage_offset(), 0) else None
    offset = argument(node, 3, "storage_offset")
    offset = view.storage_offset() if offset is None else offset
    known = order is not None and isinstance(offset, int | fx.Node)
    return (root, order, offset) if known else None  # type: ignore[return-value]


def memory_order(value: torch.Tensor) -> list[int] | None:
    """The dimensions of a tensor that fills its memory, from the outermost; None for others."""
    dims = list(range(value.dim()))
    orders = [dims, [*dims[:1], *dims[2:], *dims[1:2]]]
    if all(isinstance(stride, int) for stride in value.stride()):
        orders.append(sorted(dims, key=lambda d: (-value.stride(d), d)))
    else:
        orders.append(_by_steps(value))
    for order in orders:
        reach: Any = 1
        for d in reversed(order):
            if not same_size(value.shape[d], 1) and not same_size(value.stride(d), reach):
                break
            reach = reach * value.shape[d]
        else:
            return order
    return None


def _by_steps(value: torch.Tensor) -> list[int]:
    """The order in which each dimension steps over those within it, as far as there is one."""
    left, order = list(range(value.dim())), list[int]()
    reach: Any = 1
    while left:
        inner = next((d for d in reversed(left) if same_size(value.stride(d), reach)), left[-1])
        left.remove(inner)
        order.insert(0, inner)
        reach = reach * value.shape[inner]
    return order


def _rewrite(
    rewriter: Rewriter, node: fx.Node, root: fx.Node, order: list[int], offset: Any
) -> None:
    places = offset
    sizes, strides = argument(node, 1, "size"), argument(node, 2, "stride")
    kwargs = {"device": root.meta["val"].device}
    for d, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        shape = [-1 if k == d else 1 for k in range(len(sizes))]
        steps = rewriter.call(aten.arange.default, (size,), kwargs, like=node)
        steps = rewriter.call(aten.reshape.default, (steps, shape), like=node)
        steps = rewriter.call(aten.mul.Tensor, (steps, stride), like=node)
        places = rewriter.call(aten.add.Tensor, (steps, places), like=node)
    memory = rewriter.call(aten.permute.default, (root, order), like=node)
    memory = rewriter.call(aten.reshape.default, (memory, [-1]), like=node)
    if len(sizes):
        new = rewriter.call(aten.index.Tensor, (memory, [places]), like=node)
    else:
        new = rewriter.call(aten.select.int, (memory, 0, places), like=node)
    rewriter.replace(node, new)
