"""Which ATen operators a captured graph may hold: the decomposition table.

The base is torch's own core set. On top of that composites stay whole where a kernel for the whole
is better than kernels for the parts, and where the parts would not depend on the data alone (an
LSTM would unroll over time). What is left whole needs no converter to be right: without one it runs
as a library operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

KEEP = (
    # products
    "linear.default",
    "conv1d.default",
    "conv1d.padding",
    "conv2d.default",
    "conv2d.padding",
    "conv3d.default",
    "conv3d.padding",
    "conv_transpose1d.default",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    "scaled_dot_product_attention.default",
    "baddbmm.default",
    # norms
    "layer_norm.default",
    "rms_norm.default",
    "group_norm.default",
    "instance_norm.default",
    # activations
    "elu.default",
    "hardsigmoid.default",
    "hardswish.default",
    "leaky_relu.default",
    "mish.default",
    "silu.default",
    "softplus.default",
    # pooling and resampling
    "adaptive_max_pool1d.default",
    "avg_pool1d.default",
    "max_pool1d.default",
    "max_pool2d.default",
    "max_pool3d.default",
    "upsample_bicubic2d.vec",
    "upsample_bilinear2d.vec",
    "upsample_linear1d.vec",
    "upsample_nearest1d.vec",
    "upsample_nearest2d.vec",
    "upsample_nearest3d.vec",
    "upsample_trilinear3d.vec",
    # recurrences: decomposing unrolls them over time
    "gru.input",
    "lstm.input",
    "rnn_relu.input",
    "rnn_tanh.input",
    # torch's parts of it add up what lies behind the last label
    "multilabel_margin_loss.default",
    # torch's parts of it make NaN of what is no margin
    "multi_margin_loss.default",
    # their parts would check for errors by an operator with effects
    "inverse.default",
    "linalg_cholesky.default",
    "linalg_inv.default",
    "linalg_ldl_factor.default",
    "linalg_lu_factor.default",
    "linalg_matrix_power.default",
    "linalg_solve.default",
    "linalg_tensorinv.default",
    # its parts would check the labels over and over, even where they are known to be in range
    "one_hot.default",
    # torch's parts of it round otherwise before they become integers
    "linspace.default",
    "linspace.Scalar_Tensor",
    "linspace.Tensor_Scalar",
    "linspace.Tensor_Tensor",
    # data movement
    "im2col.default",
    "col2im.default",
    "reflection_pad1d.default",
    "reflection_pad2d.default",
    "replication_pad1d.default",
    "replication_pad2d.default",
    "roll.default",
)

IDENTITIES = ("alias.default", "detach.default", "lift_fresh.default", "lift_fresh_copy.default")
"""Operators that return their first argument unchanged in a graph without mutation."""

LAZY = {"_conj.default": "conj_physical.default", "_neg_view.default": "neg.default"}
"""Views that only note what is still to be computed, which kernels would not see, and what computes
it."""

CHECKS = ("_assert_tensor_metadata.default",)
"""Operators that only check what the guards of a captured graph already check."""


def aten(name: str) -> Any:
    """The overload ``name`` ("packet.overload") of the ATen namespace."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


WHOLE = frozenset(
    f"aten.{name}"
    for name in (
        *KEEP,
        "_adaptive_avg_pool2d.default", "adaptive_avg_pool2d.default", "add.Tensor",
        "avg_pool2d.default", "batch_norm.default", "cat.default", "clamp.default",
        "constant_pad_nd.default", "div.Tensor", "dropout.default", "flatten.using_ints",
        "gelu.default", "hardtanh.default", "mean.dim", "mul.Tensor", "permute.default",
        "relu.default", "reshape.default", "select.int", "sigmoid.default", "slice.Tensor",
        "softmax.int", "sub.Tensor", "tanh.default", "transpose.int", "unsqueeze.default",
        "view.default",
    )
)  # fmt: skip
"""Operators as export writes them that are as good as what decomposing would make of them."""


SIZED = ("aten.adaptive_avg_pool2d.default", "aten.flatten.using_ints")
"""Those of `WHOLE` whose parts say how they depend on sizes that are open."""


def trains(node: fx.Node) -> bool:
    """Whether an operator does what it does in training only."""
    name = str(node.target)
    if name == "aten.batch_norm.default":
        return bool(node.args[5])
    return name == "aten.dropout.default" and bool(node.args[2])


def updates(node: fx.Node) -> bool:
    """Whether an operator updates running statistics, though its schema says that it does not."""
    return (
        str(node.target) == "aten.instance_norm.default"
        and node.args[3] is not None
        and bool(node.args[5])
    )


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A fresh table for `torch.export.ExportedProgram.run_decompositions`."""
    table: dict[Any, Callable[..., Any]] = torch.export.default_decompositions()  # type: ignore[assignment]
    for name in KEEP:
        table.pop(aten(name), None)
    for name, computed in LAZY.items():
        table[aten(name)] = aten(computed)
    return table
