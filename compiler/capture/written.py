"""Writing to views without writing: what is written goes into what they are views of.

Tensors that share memory are views, made by chains of operators, of one that was made in it. A view
that was written has another value. Each operator of its chain has one that puts such a part back
into the whole, and other views are made again of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_leaves

from ...passes.ir import is_mutating

aten = torch.ops.aten

Call = Callable[..., Any]
"""Makes the call of an operator on nodes and numbers, in the new graph."""

PLAIN = frozenset(
    "copy fill zero index_put index_fill index_add index_copy scatter scatter_add".split()
)
"""Operators that compute what those with an underscore write, besides pointwise ones."""


def chain(written: fx.Node, whole: fx.Node) -> list[fx.Node] | None:
    """Nodes from ``written`` up to ``whole``, which is not one of them, each made of the next one;
    None where one of them puts nothing back.
    """
    found: list[fx.Node] = []
    node = written
    while node is not whole:
        known = node.op == "call_function" and (_is_whole(node) or node.target in _BACK)
        if not known or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        found.append(node)
        node = node.args[0]
    return found


def put_back(links: Sequence[fx.Node], env: Mapping[fx.Node, Any], part: Any, call: Call) -> Any:
    """The whole at the end of a `chain`, with ``part`` as the first link's new value. ``env`` has
    what stands for the links and the whole now.
    """
    for link in links:
        if not _is_whole(link):
            part = _BACK[link.target](part, *fx.map_arg(link.args, env.__getitem__), call=call)
    return part


def writes_windows(node: fx.Node) -> bool:
    """Whether a call writes to windows of a tensor (``Tensor.unfold``), other than such as cover it
    once: torch would put zeros between them, and add up what is in several.
    """
    if not is_mutating(node):
        return False
    view: Any = node.args[0] if node.args else None
    while isinstance(view, fx.Node) and view.op == "call_function":
        base: Any = view.args[0] if view.args else None
        if view.target is aten.unfold.default:
            _, axis, size, step = view.args
            shape = base.meta["val"].shape
            extent = shape[axis] if shape else 1
            if not (size == step and isinstance(extent, int) and extent % step == 0):
                return True
        if not _shares_memory(view, base):
            return False
        view = base
    return False


def _shares_memory(view: fx.Node, base: Any) -> bool:
    """Whether a node is made in the memory of what may be several tensors."""
    found = tree_leaves(base.meta.get("val")) if isinstance(base, fx.Node) else []
    places = {x.untyped_storage()._cdata for x in found if isinstance(x, torch.Tensor)}
    shown = tree_leaves(view.meta.get("val"))
    return any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in places for x in shown)


def laid_out(found: fx.Node, like: torch.Tensor, call: Call) -> fx.Node:
    """A copy of ``found`` with the strides of ``like``, if its elements fill memory."""
    order = sorted(range(like.dim()), key=lambda d: (like.stride(d), -d), reverse=True)
    turned = call(aten.permute.default, found, order)
    copy = call(aten.clone.default, turned, memory_format=torch.contiguous_format)
    return call(aten.permute.default, copy, [order.index(d) for d in range(like.dim())])


def _is_whole(node: fx.Node) -> bool:
    """Whether it is all that its first argument is."""
    return is_mutating(node) or node.target in (aten.detach.default, aten.alias.default)


def _select(part: Any, whole: Any, *where: Any, call: Call) -> Any:
    return call(aten.select_scatter.default, whole, part, *where)


def _slice(part: Any, whole: Any, *where: Any, call: Call) -> Any:
    return call(aten.slice_scatter.default, whole, part, *where)


def _transpose(part: Any, whole: Any, a: int, b: int, *, call: Call) -> Any:
    return call(aten.transpose.int, part, a, b)


def _matrix(part: Any, whole: Any, *, call: Call) -> Any:
    return call(aten.transpose.int, part, -2, -1)


def _permute(part: Any, whole: Any, order: Sequence[int], *, call: Call) -> Any:
    places = [d % len(order) for d in order]
    return call(aten.permute.default, part, [places.index(d) for d in range(len(order))])


def _shape(part: Any, whole: Any, *_: Any, call: Call) -> Any:
    sizes = [
        size if type(size) is int else call(aten.sym_size.int, whole, d)
        for d, size in enumerate(whole.meta["val"].shape)
    ]
    return call(aten.reshape.default, part, sizes)


_BACK: dict[Any, Callable[..., Any]] = {
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.transpose.int: _transpose,
    aten.mT.default: _matrix,
    aten.permute.default: _permute,
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten.flatten.using_ints,
            aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default,
            aten.squeeze.dim, aten.squeeze.dims,
        ),
        _shape,
    ),
}  # fmt: skip
