"""The geometry of one convolution node, read once and shared by all convolution templates.

Needs no TVM, so that a model whose kernels are all in the database is laid out without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..abi import Dim, TensorArg
from ..group import HALF, IO, Group, Unsupported

Expr = Any  # tvm.tirx.Expr
_COMMON = ("input", "weight", "bias", "stride", "padding", "dilation")
_NAMES: dict[Any, tuple[str, ...]] = {
    torch.ops.aten.conv1d.default: (*_COMMON, "groups"),
    torch.ops.aten.conv2d.default: (*_COMMON, "groups"),
    torch.ops.aten.conv1d.padding: (*_COMMON, "groups"),
    torch.ops.aten.conv2d.padding: (*_COMMON, "groups"),
    torch.ops.aten.convolution.default: (*_COMMON, "transposed", "output_padding", "groups"),
    torch.ops.aten._convolution.default: (*_COMMON, "transposed", "output_padding", "groups"),
}
CONVOLUTIONS = frozenset(_NAMES)
"""Operators that may be the anchor of a convolution group."""


@dataclass(frozen=True)
class ConvSpec:
    """A 1-d or 2-d convolution; a 1-d one is a 2-d one of height 1 (``rank`` tells them apart).

    ``n, h, w, oh, ow`` may be symbolic; everything else is a plain int. ``cg`` and ``og`` are the
    input and output channels of one group.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rank: int
    n: Dim
    h: Dim
    w: Dim
    oh: Dim
    ow: Dim
    c: int
    oc: int
    kh: int
    kw: int
    sh: int
    sw: int
    ph: int
    pw: int
    dh: int
    dw: int
    groups: int

    @property
    def cg(self) -> int:
        return self.c // self.groups

    @property
    def og(self) -> int:
        return self.oc // self.groups

    @property
    def flops(self) -> Dim:
        """Multiplications and additions of one call."""
        return 2 * self.n * self.oh * self.ow * self.oc * self.cg * self.kh * self.kw

    def out_index(self, n: Expr, channel: Expr, row: Expr, col: Expr) -> list[Expr]:
        """The logical index of an output element."""
        return [n, channel, row, col] if self.rank == 2 else [n, channel, col]

    def strides(self, arg: TensorArg) -> tuple[Dim, Dim, Dim, Dim]:
        """The strides (n, c, h, w) of an input or output of this convolution."""
        s = arg.strides
        return (s[0], s[1], s[2], s[3]) if self.rank == 2 else (s[0], s[1], 0, s[2])

    def needed(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows (before, after) and columns (before, after) that are read outside the input.

        "After" is exact for static sizes: a stride may leave part of the padding unread.
        """
        return (
            _reach(self.h, self.oh, self.kh, self.sh, self.ph, self.dh),
            _reach(self.w, self.ow, self.kw, self.sw, self.pw, self.dw),
        )


def _reach(
    size: Dim, out: Dim, kernel: int, stride: int, pad: int, dilation: int
) -> tuple[int, int]:
    if isinstance(size, int) and isinstance(out, int):
        last = (out - 1) * stride - pad + (kernel - 1) * dilation
        return pad, max(0, last - (size - 1))
    return pad, max(pad, (kernel - 1) * dilation - pad)


def parse(group: Group, io: IO) -> ConvSpec:
    """Reads the convolution a group is built around.

    Raises `Unsupported` for what no convolution template covers.
    """
    from .conv_common import check_epilogue

    node = group.anchor
    assert node is not None
    args = _arguments(node)
    check_epilogue(group)
    operands = [args["input"], args["weight"], *filter(None, [args.get("bias")])]
    dtype = node.meta["val"].dtype
    for operand in operands:
        if operand not in io:
            raise Unsupported("PLT-CNV-006", f"{operand} is computed inside the group")
        if io[operand].dtype not in (torch.float32, *HALF) or io[operand].dtype != dtype:
            raise Unsupported("PLT-CNV-008", f"{io[operand].dtype} is left to the library")
    if not io[args["weight"]].const:
        raise Unsupported("PLT-CNV-003", "weights computed at run time are not packed")
    out = io[group.outputs[0]]
    return _spec(args, io[args["input"]].shape, io[args["weight"]].shape, out.shape)


def parse_geometry(node: fx.Node) -> ConvSpec:
    """Reads a convolution node without knowing how its tensors lie in memory."""
    args = _arguments(node)
    tensors = (args["input"], args["weight"], node)
    shapes = (tuple(_dim(d) for d in t.meta["val"].shape) for t in tensors)
    return _spec(args, *shapes)


def required_halo(node: fx.Node) -> tuple[tuple[int, int], ...]:
    """Zeros wanted around the input of a convolution node, per dimension (before, after).

    With at least this halo no kernel checks bounds; with less, kernels are right but slower.
    """
    geometry = parse_geometry(node)
    rows, cols = geometry.needed()
    return ((0, 0), (0, 0), rows, cols) if geometry.rank == 2 else ((0, 0), (0, 0), cols)


def _arguments(node: fx.Node) -> dict[str, Any]:
    args = dict(zip(_NAMES[node.target], node.args, strict=False)) | dict(node.kwargs)
    if args.get("transposed", False):
        raise Unsupported("PLT-CNV-004", "transposed convolution has no template")
    return args


def _spec(
    args: dict[str, Any], x: tuple[Dim, ...], weight: tuple[Dim, ...], out: tuple[Dim, ...]
) -> ConvSpec:
    rank = len(weight) - 2
    if rank not in (1, 2) or len(x) != rank + 2:
        raise Unsupported("PLT-CNV-005", f"{len(x)}-d input, {len(weight)}-d weight")

    def pair(key: str, default: int) -> tuple[int, int]:
        value = args.get(key, default)
        value = [value] if isinstance(value, int) else list(value)
        if not all(isinstance(v, int) for v in value):
            raise Unsupported("PLT-CNV-001", f"{key} is not a constant")
        value = value * rank if len(value) == 1 else value
        return (value[0], value[1]) if rank == 2 else (default, value[0])

    taps = [_static(d, "weight shape") for d in weight]
    kh, kw = (taps[2], taps[3]) if rank == 2 else (1, taps[2])
    (sh, sw), (dh, dw) = pair("stride", 1), pair("dilation", 1)
    if isinstance(args.get("padding"), str):
        same = args["padding"] == "same"  # what is odd is added after, where the output ends
        ph, pw = ((dh * (kh - 1)) // 2, (dw * (kw - 1)) // 2) if same else (0, 0)
    else:
        ph, pw = pair("padding", 0)
    spec = ConvSpec(
        x=args["input"], weight=args["weight"], bias=args.get("bias"), rank=rank,
        n=x[0], c=_static(x[1], "channels"), h=x[2] if rank == 2 else 1, w=x[-1],
        oh=out[2] if rank == 2 else 1, ow=out[-1],
        oc=taps[0], kh=kh, kw=kw, sh=sh, sw=sw, ph=ph, pw=pw, dh=dh, dw=dw,
        groups=_static(args.get("groups", 1), "groups"),
    )  # fmt: skip
    if 0 in (spec.c, spec.oc, kh, kw):
        raise Unsupported("PLT-CNV-007", "a convolution without channels or taps")
    return spec


def _dim(value: Any) -> Dim:
    """A size out of ``meta`` as an int or a sympy expression."""
    return value if isinstance(value, int) else value.node.expr


def halo_of(arg: TensorArg, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The halo of an input as rows (before, after) and columns (before, after)."""
    return (arg.halo[2], arg.halo[3]) if rank == 2 else ((0, 0), arg.halo[2])


def _static(value: Any, what: str) -> int:
    if not isinstance(value, int):
        raise Unsupported("PLT-CNV-001", f"{what} {value} is not a constant")
    return value
