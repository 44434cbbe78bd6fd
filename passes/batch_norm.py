"""Batch normalisation by constants becomes cheaper arithmetic (part of `passes.normalize`).

With running mean m, variance v, weight g and bias b, inference computes ``x * s + t`` where
``s = g / sqrt(v + eps)`` and ``t = b - m * s``. Behind a convolution or a linear operator that
nobody else reads, s and t move into its weight and bias; elsewhere two pointwise operators remain.
s and t are computed in float64 and rounded once. 16-bit weights are never touched: rounding them
again would cost more accuracy than the normalisation in float32 that takes their place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from .base import allow
from .ir import Aliases, Rewriter, alias_root, argument, aten, is_call
from .remarks import Remark

KEEP = "keep"
"""Key of a graph module's ``meta``: what puts large folded weights of it, and of the graphs in it,
where weights lie (`Keep`)."""
Keep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From a folded weight and what it was made of to an equal tensor."""
AT_ONCE = 1 << 17
"""Elements of a weight that are scaled at a time."""
_INFERENCE: dict[Any, tuple[int, bool]] = {
    # operator -> (position of eps, whether it returns a tuple)
    aten.batch_norm.default: (7, False),
    aten.native_batch_norm.default: (7, True),
    aten._native_batch_norm_legit.default: (7, True),
    aten._native_batch_norm_legit_no_training.default: (6, True),
}
_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)


@dataclass(frozen=True)
class _Norm:
    """A batch normalisation found: its input, the node that is its result, and s, t in float64."""

    node: fx.Node
    source: fx.Node
    result: fx.Node
    scale: torch.Tensor
    shift: torch.Tensor


def fold_batch_norm(rewriter: Rewriter, keep: Keep | None = None) -> list[Remark]:
    """Rewrite every batch normalisation whose statistics are constants; ``keep`` puts large folded
    weights where they are to lie.
    """
    aliases = Aliases(rewriter.graph)
    remarks: list[Remark] = []

    def tell(remark_id: str, kind: Any, nodes: tuple[fx.Node, ...], reason: str, hint: str = ""):
        names = tuple(node.name for node in nodes)
        remarks.append(Remark(remark_id, kind, rewriter.pass_name, names, reason, hint))

    for node in list(rewriter.graph.nodes):
        if not _is_inference(node):
            continue
        norm = _match(rewriter, node, aliases)
        if norm is None:
            reason = "its statistics or weights are not finite constants"
            tell("PLT-NRM-003", "missed", (node,), reason, "compile the module that owns them")
            continue
        source = norm.source
        folded = _fold_into(rewriter, norm, aliases, keep)
        if folded:
            tell("PLT-NRM-001", "done", (node, source), f"folded into {source.target}")
        elif allow("batch norm to scale and shift", [node]):
            _scale_and_shift(rewriter, norm)
            tell("PLT-NRM-002", "done", (node,), "became a scale and a shift")
    return remarks


def _is_inference(node: fx.Node) -> bool:
    if not is_call(node, *_INFERENCE) or not node.users:
        return False
    if node.target is aten._native_batch_norm_legit_no_training.default:
        return True
    training = argument(node, 5, "training")
    return training is False


def _match(rewriter: Rewriter, node: fx.Node, aliases: Aliases) -> _Norm | None:
    eps_at, is_tuple = _INFERENCE[node.target]
    result = node
    if is_tuple:
        users = list(node.users)
        if len(users) != 1 or not is_call(users[0], operator.getitem) or users[0].args[1] != 0:
            return None
        result = users[0]
    names = ("weight", "bias", "running_mean", "running_var")
    values: dict[str, torch.Tensor | None] = {}
    for i, name in enumerate(names, start=1):
        arg = argument(node, i, name)
        if arg is None:
            values[name] = None
            continue
        value = constant(rewriter, arg, aliases)
        if value is None:
            return None
        values[name] = value
    mean, var = values["running_mean"], values["running_var"]
    if mean is None or var is None:
        return None
    weight, bias = values["weight"], values["bias"]
    eps = float(argument(node, eps_at, "eps", 1e-5))
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    if not _fits(scale, mean.dtype) or not _fits(shift, mean.dtype):
        return None
    source = argument(node, 0, "input")
    return _Norm(node, source, result, scale, shift)


def constant(rewriter: Rewriter, node: Any, aliases: Aliases) -> torch.Tensor | None:
    """The value of a constant, if it is floating point and never written to."""
    if not isinstance(node, fx.Node) or aliases.is_mutated(node):
        return None
    value = rewriter.value(node)
    if value is None or value.is_meta or not value.is_floating_point():
        return None
    return value


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a float64 tensor is finite after rounding to ``dtype``."""
    return bool(torch.isfinite(tensor.to(dtype)).all())


def _fold_into(rewriter: Rewriter, norm: _Norm, aliases: Aliases, keep: Keep | None) -> bool:
    """Move scale and shift into the operator before, if it is of the right kind."""
    source = norm.source
    if source.op != "call_function" or list(source.users) != [norm.node]:
        return False
    weight_at = 1
    if is_call(source, *_CONVOLUTIONS):
        if source.target is aten.convolution.default and argument(source, 6, "transposed"):
            return False
        if source.meta["val"].dim() != source.args[0].meta["val"].dim():  # type: ignore[union-attr]
            return False
        if norm.result.meta["val"].dim() != argument(source, 1, "weight").meta["val"].dim():
            return False  # an unbatched convolution: channels are not dimension 1
    elif not is_call(source, aten.linear.default) or source.meta["val"].dim() != 2:
        return False
    weight_node = argument(source, weight_at, "weight")
    bias_node = argument(source, 2, "bias")
    weight = constant(rewriter, weight_node, aliases)
    bias = None if bias_node is None else constant(rewriter, bias_node, aliases)
    if weight is None or (bias_node is not None and bias is None) or weight.dtype.itemsize < 4:
        return False
    column = norm.scale.reshape(-1, *[1] * (weight.dim() - 1))
    new_weight = _scaled(weight, column)
    new_bias = norm.shift if bias is None else norm.shift + bias.double() * norm.scale
    new_bias = new_bias.to(weight.dtype)
    if new_weight is None or not new_bias.isfinite().all():
        return False
    if not allow("fold batch norm", [norm.node, source]):
        return False
    like = source
    stem = alias_root(weight_node).name
    args = list(source.args) + [None] * (3 - len(source.args))
    kwargs = {k: v for k, v in source.kwargs.items() if k not in ("weight", "bias")}
    if keep is not None:
        new_weight = keep(new_weight, weight)
    args[1] = rewriter.constant(new_weight, stem, like)
    args[2] = rewriter.constant(new_bias, f"{stem}_shift", like)
    new = rewriter.call(source.target, tuple(args), kwargs, like=like)  # type: ignore[arg-type]
    rewriter.replace(norm.result, new)
    if norm.result is not norm.node:
        rewriter.graph.erase_node(norm.node)
    rewriter.graph.erase_node(source)
    return True


def _scaled(weight: torch.Tensor, column: torch.Tensor) -> torch.Tensor | None:
    """``weight * column``, computed in float64, in the dtype and dense strides of ``weight``; None
    if that is not finite. Some rows at a time: float64 copies of large weights take memory.
    """
    scaled = torch.empty_like(weight)
    rows = max(1, AT_ONCE // max(1, weight[:1].numel()))
    parts = (t.split(rows) for t in (scaled, weight, column))
    for into, part, factor in zip(*parts, strict=True):
        into.copy_(part * factor)
        if not into.isfinite().all():
            return None
    return scaled


def _scale_and_shift(rewriter: Rewriter, norm: _Norm) -> None:
    """``x * s + t``, in float32 where x has 16 bits."""
    value = norm.source.meta["val"]
    wide = value.dtype if value.dtype.itemsize >= 4 else torch.float32
    shape = [-1, *[1] * (value.dim() - 2)]
    stem = norm.node.name

    def column(tensor: torch.Tensor, name: str) -> fx.Node:
        return rewriter.constant(tensor.to(wide).reshape(shape), f"{stem}_{name}", norm.node)

    x = norm.source
    if wide != value.dtype:
        x = rewriter.call(aten._to_copy.default, (x,), {"dtype": wide}, like=norm.node)
    x = rewriter.call(aten.mul.Tensor, (x, column(norm.scale, "scale")), like=norm.node)
    x = rewriter.call(aten.add.Tensor, (x, column(norm.shift, "shift")), like=norm.node)
    if wide != value.dtype:
        x = rewriter.call(aten._to_copy.default, (x,), {"dtype": value.dtype}, like=norm.node)
    rewriter.replace(norm.result, x)
    if norm.result is not norm.node:
        rewriter.graph.erase_node(norm.node)
