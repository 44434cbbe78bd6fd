"""The geometry of one pooling node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..abi import Dim, TensorArg
from ..emit import Expr
from ..group import IO, Group, Unsupported
from .conv_common import check_epilogue

_aten = torch.ops.aten
_MAX = ("input", "kernel", "stride", "padding", "dilation", "ceil_mode")
_AVG = ("input", "kernel", "stride", "padding", "ceil_mode", "include_pad", "divisor")
_ADAPTIVE = ("input", "output")
_NAMES: dict[Any, tuple[str, int, tuple[str, ...]]] = {
    _aten.max_pool1d.default: ("max", 1, _MAX),
    _aten.max_pool2d.default: ("max", 2, _MAX),
    _aten.max_pool2d_with_indices.default: ("max", 2, _MAX),
    _aten.avg_pool1d.default: ("avg", 1, _AVG),
    _aten.avg_pool2d.default: ("avg", 2, _AVG),
    _aten.adaptive_avg_pool1d.default: ("avg", 1, _ADAPTIVE),
    _aten.adaptive_avg_pool2d.default: ("avg", 2, _ADAPTIVE),
    _aten._adaptive_avg_pool2d.default: ("avg", 2, _ADAPTIVE),
    _aten.adaptive_max_pool2d.default: ("max", 2, _ADAPTIVE),
}
POOLS = frozenset(_NAMES)
"""Operators that may be the anchor of a pooling group."""

_KEYWORDS = {
    "self": "input",
    "kernel_size": "kernel",
    "count_include_pad": "include_pad",
    "divisor_override": "divisor",
    "output_size": "output",
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Axis:
    """Windows along one spatial dimension of ``size`` inputs and ``out`` outputs.

    An adaptive axis has windows ``[o * size // out, ceil((o + 1) * size / out))``; the other
    numbers are then meaningless.
    """

    size: Dim
    out: Dim
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    dilation: int = 1
    adaptive: bool = False

    def padded(self) -> bool:
        """Whether a window may reach outside the input."""
        if isinstance(self.size, int) and isinstance(self.out, int):
            last = (self.out - 1) * self.stride - self.pad + (self.kernel - 1) * self.dilation
            return self.pad > 0 or last >= self.size
        return True


@dataclass(frozen=True)
class PoolSpec:
    """A pooling node: ``kind`` is "max" or "avg"; 1-d pooling has one row.

    ``batch`` tells whether the tensors have a batch dimension, ``rank`` how many spatial ones.
    ``divisor`` replaces the number of elements; ``include_pad`` counts padding among them.
    """

    kind: str
    x: fx.Node
    rank: int
    batch: bool
    n: Dim
    c: int
    rows: Axis
    cols: Axis
    include_pad: bool
    divisor: int | None
    dtype: torch.dtype

    def out_index(self, n: Expr, channel: Expr, row: Expr, col: Expr) -> list[Expr]:
        """The logical index of an output element."""
        spatial = [row, col] if self.rank == 2 else [col]
        return [*([n] if self.batch else []), channel, *spatial]

    def strides(self, arg: TensorArg) -> tuple[Dim, Dim, Dim, Dim]:
        """The strides (n, c, h, w) of an input or output."""
        s = list(arg.strides)
        n = s.pop(0) if self.batch else 0
        return (n, s[0], s[1], s[2]) if self.rank == 2 else (n, s[0], 0, s[1])


def parse(group: Group, io: IO) -> PoolSpec:
    """Reads the pooling node of a group; raises `Unsupported` for what the template lacks."""
    node = group.anchor
    assert node is not None
    kind, rank, names = _NAMES[node.target]
    args: dict[str, Any] = dict(zip(names, node.args, strict=False))
    args |= {_KEYWORDS.get(k, k): v for k, v in node.kwargs.items()}
    check_epilogue(group)
    x = args["input"]
    if x not in io:
        raise Unsupported("PLT-POL-002", f"{x} is computed inside the group")
    xa, out = io[x], io[group.outputs[0]]
    if xa.dtype not in DTYPES:
        raise Unsupported("PLT-POL-004", f"{xa.dtype} is left to the library")
    batch = len(xa.shape) == rank + 2
    c = xa.shape[int(batch)]
    if not isinstance(c, int) or c == 0:
        raise Unsupported("PLT-POL-001", f"channels {c} are not a positive constant")
    sizes, outs = xa.shape[-rank:], out.shape[-rank:]

    def numbers(key: str, default: list[int]) -> list[int]:
        value = args.get(key)
        value = [value] if isinstance(value, int) else list(value or default)
        value = value * rank if len(value) == 1 else value
        if not all(isinstance(v, int) for v in value):
            raise Unsupported("PLT-POL-001", f"{key} is not a constant")
        return value

    if "output" in names:
        axes = [_adaptive(s, o) for s, o in zip(sizes, outs, strict=True)]
    else:
        kernel = numbers("kernel", [])
        parts = (
            kernel,
            numbers("stride", kernel),
            numbers("padding", [0]),
            numbers("dilation", [1]),
        )
        axes = [
            Axis(s, o, k, t, p, d) for s, o, k, t, p, d in zip(sizes, outs, *parts, strict=True)
        ]
    divisor = args.get("divisor")
    return PoolSpec(
        kind=kind, x=x, rank=rank, batch=batch, n=xa.shape[0] if batch else 1, c=c,
        rows=axes[0] if rank == 2 else Axis(1, 1), cols=axes[-1],
        include_pad=bool(args.get("include_pad", True)), divisor=divisor, dtype=xa.dtype,
    )  # fmt: skip


def _adaptive(size: Dim, out: Dim) -> Axis:
    if isinstance(size, int) and isinstance(out, int) and out and size % out == 0:
        return Axis(size, out, size // out, size // out)  # equal windows side by side
    return Axis(size, out, adaptive=True)
