"""Operators that return their argument unchanged, for every input (part of `passes.normalize`).

"Unchanged" is exact: NaN stays NaN, -0 stays -0, and the dtype is the same. So ``x * 1``,
``x / 1``, ``x - 0`` and ``x + (-0.0)`` go, but ``x + 0.0`` stays for floating point, because
``-0.0 + 0.0`` is ``+0.0``; complex arithmetic stays, because ``(inf + 0j) * (1 + 0j)`` is not
``inf + 0j``.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.fx as fx

from .base import allow
from .ir import Aliases, Rewriter, argument, aten, is_call, is_random, same_shape, same_size

_RETURNS_ARGUMENT = {
    # Where shape, dtype and device stay the same, eager execution returns the argument or a view.
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
}
_COPIES = {
    # As above, but the result is, or may be, a copy.
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.detach_copy.default,
    aten.alias_copy.default,
    aten.expand_copy.default,
    aten.repeat.default,
    aten.constant_pad_nd.default,
    aten.cat.default,
}


def drop_identities(rewriter: Rewriter) -> list[str]:
    """Remove them. Returns the names of the nodes removed."""
    aliases = Aliases(rewriter.graph)
    done: list[str] = []
    for node in list(rewriter.graph.nodes):
        found = _identity(node)
        if found is None:
            continue
        source, copies = found
        if copies and node in aliases.escaping and not _same_steps(node, source):
            continue  # it is seen how a result lies in memory
        if copies and not aliases.may_replace(node, source):
            continue
        if allow("drop identity", [node]):
            done.append(node.name)
            rewriter.replace(node, source)
    return done


def _identity(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The argument that ``node`` returns, and whether it returns a copy of it."""
    if node.op != "call_function" or not node.args or is_random(node):
        return None
    if node.target is operator.getitem:
        producer = node.args[0]
        if is_call(producer, aten.native_dropout.default) and node.args[1] == 0:
            source = producer.args[0]  # type: ignore[union-attr]
            return (source, True) if not is_random(producer) else None  # type: ignore
        return None
    source: Any = node.args[0]
    if is_call(node, aten.cat.default) and isinstance(source, list | tuple) and len(source) == 1:
        source = source[0]
    if not isinstance(source, fx.Node):
        return None
    if not _same_kind(source.meta.get("val"), node.meta.get("val")):
        return None
    if is_call(node, aten.constant_pad_nd.default) and any(argument(node, 1, "pad")):
        return None  # padding one side and cropping the other keeps the shape
    if node.target in _COPIES:
        return source, True
    if node.target in _RETURNS_ARGUMENT:
        return source, _asks_for_copy(node)
    if is_call(node, aten.as_strided.default):
        return (source, False) if same_places(source.meta["val"], node.meta["val"]) else None
    if is_call(node, aten.permute.default):
        dims = argument(node, 1, "dims")
        return (source, False) if list(dims) == sorted(dims) and min(dims, default=0) >= 0 else None
    return (source, True) if _neutral(node, source) else None


def _same_kind(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    same = a.dtype == b.dtype and a.device == b.device and a.layout == b.layout
    return same and same_shape(a.shape, b.shape)


def same_places(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views of one memory have every element at the same place.

    The stride of a dimension of size one says nothing: the mean of an image in channels-last
    memory differs from what adaptive pooling returns in these strides alone.
    """
    if not same_shape(a.shape, b.shape):
        return False
    return same_shape([a.storage_offset(), *_steps(a)], [b.storage_offset(), *_steps(b)])


def _same_steps(node: fx.Node, source: fx.Node) -> bool:
    """Whether neighbours lie equally far apart in two tensors of one shape."""
    return same_shape(_steps(node.meta["val"]), _steps(source.meta["val"]))


def _steps(value: torch.Tensor) -> list[Any]:
    """The strides of the dimensions that are wider than 1."""
    return [value.stride(d) for d, size in enumerate(value.shape) if not same_size(size, 1)]


def _asks_for_copy(node: fx.Node) -> bool:
    """Whether a call of ``to`` may copy although dtype and device stay the same."""
    target = node.target
    names = [arg.name for arg in target._schema.arguments]  # type: ignore[union-attr]
    for name in ("copy", "memory_format"):
        if name in names and argument(node, names.index(name), name) not in (
            None,
            False,
            torch.preserve_format,
        ):
            return True
    return False


def _neutral(node: fx.Node, source: fx.Node) -> bool:
    """Whether the other operand of an arithmetic call is its exact neutral element."""
    dtype = source.meta["val"].dtype
    others = [arg for arg in node.args if arg is not source]
    if dtype.is_complex or len(node.args) != 2 or len(others) != 1 or node.kwargs:
        return False
    other = others[0]
    if not isinstance(other, int | float):
        return False
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return other == 1
    if is_call(node, aten.pow.Tensor_Scalar):
        return other == 1
    positive_zero = other == 0 and math.copysign(1.0, other) > 0
    if is_call(node, aten.sub.Tensor, aten.sub.Scalar):
        return positive_zero
    if is_call(node, aten.add.Tensor, aten.add.Scalar):
        return positive_zero if not dtype.is_floating_point else other == 0 and not positive_zero
    return False
