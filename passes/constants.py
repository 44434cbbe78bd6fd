"""What depends on constants alone is computed once, ahead of time (part of `passes.normalize`)."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor

from .base import allow
from .ir import (
    Aliases,
    Rewriter,
    alias_source,
    argument,
    aten,
    is_call,
    is_pure,
    same_shape,
    shape_of,
)
from .remarks import Remark

_FILL = aten.full.default
"""Kernels write such a value as an immediate: cheaper than reading it from memory."""
_BETWEEN = 16
"""How many times larger than what is stored a result may be that only constants are computed from:
such as what a network makes of all relative positions, of which attention gets a few numbers."""
_NEVER = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)


def fold_constants(rewriter: Rewriter, limit: int) -> tuple[list[str], list[Remark]]:
    """Replace computations on constants by their results.

    A result is stored if it has at most ``limit`` elements, or no more than the constants that it
    is computed from, or if it is a view of such, which costs nothing. Of several results those
    count that are read. Up to `_BETWEEN` times ``limit`` is computed where smaller results come of
    it, and not stored. Results that the caller would get to see are computed anew for each call,
    because the caller may write to them.

    Returns the names of the nodes replaced, and remarks on what was too large.
    """
    aliases = Aliases(rewriter.graph)
    constants: dict[fx.Node, int] = {}  # node -> elements of the attributes it depends on
    large: dict[fx.Node, Remark] = {}
    for node in rewriter.graph.nodes:
        weight = _weight(rewriter, node, constants, aliases)
        if weight is None:
            continue
        size, source = sum(v.numel() for v in _read(node)), alias_source(node)
        small = source not in large if source is not None else size <= max(limit, weight)
        if node.op != "get_attr" and not small:
            reason = f"{size} elements from {weight}, over the limit of {limit}"
            hint = "raise max_constant of normalize"
            large[node] = Remark(
                "PLT-NRM-005", "missed", rewriter.pass_name, (node.name,), reason, hint
            )
        if node not in large or size <= _BETWEEN * limit:
            constants[node] = weight
    remarks: list[Remark] = []
    for node, remark in reversed(large.items()):
        read_by_constants = node.users and all(user in constants for user in node.users)
        if node in constants and read_by_constants and node not in aliases.escaping:
            continue
        constants.pop(node, None)
        if node.target is not _FILL and alias_source(node) is None:
            remarks.append(remark)
    remarks.reverse()
    memo: dict[fx.Node, Any] = {}
    done: list[str] = []
    for node in list(constants):
        value = node.meta["val"]
        if node.op == "get_attr" or not isinstance(value, torch.Tensor):
            continue
        if node in aliases.escaping or not _wanted(node, constants):
            continue
        result = _evaluate(rewriter, node, memo)
        if not isinstance(result, torch.Tensor) or not allow("fold constant", [node]):
            continue
        done.append(node.name)
        rewriter.replace(node, rewriter.constant(result, node.name, node))
    return done, remarks


def drop_masks(rewriter: Rewriter) -> list[str]:
    """``attention(q, k, v, mask)`` → ``attention(q, k, v)`` where a constant mask is all True.

    Returns the names of the nodes changed.
    """
    aliases = Aliases(rewriter.graph)
    done: list[str] = []
    for node in list(rewriter.graph.nodes):
        if not is_call(node, aten.scaled_dot_product_attention.default):
            continue
        mask = argument(node, 3, "attn_mask")
        if not isinstance(mask, fx.Node) or aliases.is_mutated(mask):
            continue
        value = rewriter.value(mask)
        if value is None or value.dtype != torch.bool or isinstance(value, FakeTensor):
            continue
        if value.is_meta or not bool(value.all()):
            continue
        kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
        args = (*node.args[:3], None, *node.args[4:])
        new = rewriter.call(node.target, args, kwargs, like=node)  # type: ignore[arg-type]
        same = same_shape(shape_of(new), shape_of(node))
        if same and allow("drop mask", [node]):
            done.append(node.name)
            rewriter.replace(node, new)
        else:
            rewriter.graph.erase_node(new)
    return done


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _read(node: fx.Node) -> list[torch.Tensor]:
    """The results of a node that are read: of a tuple, the parts that somebody takes."""
    value = node.meta["val"]
    if not isinstance(value, list | tuple) or any(
        user.target is not operator.getitem for user in node.users
    ):
        return _tensors(value)
    return _tensors([value[k] for k in {user.args[1] for user in node.users}])  # type: ignore


def _weight(
    rewriter: Rewriter, node: fx.Node, constants: dict[fx.Node, int], aliases: Aliases
) -> int | None:
    """Elements of the constants behind a constant node; None for a node that is no constant."""
    if aliases.is_mutated(node):
        return None
    if node.op == "get_attr":
        value = rewriter.value(node)
        ok = value is not None and not isinstance(value, FakeTensor) and not value.is_meta
        return value.numel() if ok and value is not None else None
    if node.op != "call_function" or not is_pure(node) or node.target in _NEVER:
        return None
    if isinstance(node.target, OpOverload) and torch.Tag.data_dependent_output in node.target.tags:
        return None
    if not all(arg in constants for arg in node.all_input_nodes):
        return None
    tensors = _tensors(node.meta.get("val"))
    if not tensors or not all(type(s) is int for tensor in tensors for s in tensor.shape):
        return None
    return sum(constants[arg] for arg in node.all_input_nodes)


def _wanted(node: fx.Node, constants: dict[fx.Node, int]) -> bool:
    """Whether somebody reads the node who is not folded himself, nor better off without."""
    readers = [user for user in node.users if user not in constants]
    if node.target is not _FILL:
        return bool(readers)
    tags = [getattr(user.target, "tags", ()) for user in readers]
    return any(torch.Tag.pointwise not in tag for tag in tags)


def _evaluate(rewriter: Rewriter, node: fx.Node, memo: dict[fx.Node, Any]) -> Any:
    """The value of a constant node; None if computing it fails (it will fail at run time too)."""
    stack = [node]
    while stack:
        top = stack[-1]
        if top in memo:
            stack.pop()
            continue
        missing = [arg for arg in top.all_input_nodes if arg not in memo]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if top.op == "get_attr":
            memo[top] = rewriter.value(top)
            continue
        args, kwargs = fx.map_arg((top.args, dict(top.kwargs)), memo.__getitem__)
        try:
            with torch.no_grad():
                memo[top] = top.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError, TypeError, IndexError):
            memo[top] = None
    return memo[node]
