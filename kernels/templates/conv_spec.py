"""The geometry of one convolution node, read once and shared by all convolution templates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..abi import Dim, TensorArg
from ..emit import Expr
from ..group import IO, Group, Unsupported

CONVOLUTIONS = frozenset(
    {
        torch.ops.aten.conv1d.default,
        torch.ops.aten.conv2d.default,
        torch.ops.aten.convolution.default,
    }
)


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


def _reach(size: Dim, out: Dim, kernel: int, stride: int, pad: int, dilation: int) -> tuple[int, int]:
    if isinstance(size, int) and isinstance(out, int):
        last = (out - 1) * stride - pad + (kernel - 1) * dilation
        return pad, max(0, last - (size - 1))
    return pad, pad


def parse(node: fx.Node, io: IO, out: TensorArg) -> ConvSpec:
    """Reads a convolution node whose result lies in memory as ``out``.

    Raises `Unsupported` for what no convolution template covers.
    """
    args = _arguments(node)
    weight, bias = io[args["weight"]], args.get("bias")
    if not weight.const:
        raise Unsupported("conv.weight-not-constant", "weights computed at run time are not packed")
    for arg in (io[args["input"]], weight, out, *([io[bias]] if bias is not None else [])):
        if arg.dtype != torch.float32:
            raise Unsupported("conv.dtype", f"{arg.dtype} is left to the library")
    return _spec(args, io[args["input"]].shape, weight.shape, out.shape)


def parse_geometry(node: fx.Node) -> ConvSpec:
    """Reads a convolution node without knowing how its tensors lie in memory."""
    args = _arguments(node)
    shapes = (tuple(_dim(d) for d in v.meta["val"].shape) for v in (args["input"], args["weight"], node))
    return _spec(args, *shapes)


def _arguments(node: fx.Node) -> dict[str, Any]:
    args = dict(zip(_NAMES[node.target], node.args, strict=False)) | dict(node.kwargs)
    if args.get("transposed", False):
        raise Unsupported("conv.transposed", "transposed convolution has no template")
    if isinstance(args.get("padding", 0), str):
        raise Unsupported("conv.padding-mode", "named padding has to be resolved first")
    return args


def _spec(
    args: dict[str, Any], x: tuple[Dim, ...], weight: tuple[Dim, ...], out: tuple[Dim, ...]
) -> ConvSpec:
    rank = len(weight) - 2
    if rank not in (1, 2) or len(x) != rank + 2:
        raise Unsupported("conv.rank", f"{len(x)}-d input, {len(weight)}-d weight")

    def pair(key: str, default: int) -> tuple[int, int]:
        value = args.get(key, default)
        value = [value] if isinstance(value, int) else list(value)
        if not all(isinstance(v, int) for v in value):
            raise Unsupported("conv.symbolic-geometry", f"{key} is not a constant")
        value = value * rank if len(value) == 1 else value
        return (value[0], value[1]) if rank == 2 else (default, value[0])

    (sh, sw), (ph, pw), (dh, dw) = pair("stride", 1), pair("padding", 0), pair("dilation", 1)
    taps = [_static(d, "weight shape") for d in weight]
    kh, kw = (taps[2], taps[3]) if rank == 2 else (1, taps[2])
    spec = ConvSpec(
        x=args["input"], weight=args["weight"], bias=args.get("bias"), rank=rank,
        n=x[0], c=_static(x[1], "channels"), h=x[2] if rank == 2 else 1, w=x[-1],
        oh=out[2] if rank == 2 else 1, ow=out[-1],
        oc=taps[0], kh=kh, kw=kw, sh=sh, sw=sw, ph=ph, pw=pw, dh=dh, dw=dw,
        groups=_static(args.get("groups", 1), "groups"),
    )  # fmt: skip
    if 0 in (spec.c, spec.oc, kh, kw):
        raise Unsupported("conv.empty", "a convolution without channels or taps")
    return spec


def _dim(value: Any) -> Dim:
    """A size out of ``meta`` as an int or a sympy expression."""
    return value if isinstance(value, int) else value.node.expr


def out_arg(group: Group, io: IO) -> TensorArg:
    """The first output of the group; raises `Unsupported` unless all have the anchor's shape."""
    anchor = group.anchor
    assert anchor is not None
    shape = tuple(anchor.meta["val"].shape)
    for node in group.outputs:
        if tuple(node.meta["val"].shape) != shape:
            raise Unsupported("conv.epilogue-shape", f"{node.name} differs in shape from {anchor}")
    return io[group.outputs[0]]


def halo_of(arg: TensorArg, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The halo of an input as rows (before, after) and columns (before, after)."""
    return (arg.halo[2], arg.halo[3]) if rank == 2 else ((0, 0), arg.halo[2])


def _static(value: Any, what: str) -> int:
    if not isinstance(value, int):
        raise Unsupported("conv.symbolic-geometry", f"{what} {value} is not a constant")
    return value


_COMMON = ("input", "weight", "bias", "stride", "padding", "dilation")
_NAMES = {
    torch.ops.aten.conv1d.default: (*_COMMON, "groups"),
    torch.ops.aten.conv2d.default: (*_COMMON, "groups"),
    torch.ops.aten.convolution.default: (*_COMMON, "transposed", "output_padding", "groups"),
}
