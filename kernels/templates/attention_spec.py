"""Attention as its template sees it: operands, sizes, mask, and where each lies in memory."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir
from tvm.script.ir_builder import tirx as T

from ..abi import Dim, TensorArg, product
from ..emit import Emitter, Expr, Ref
from ..group import IO, Group, Unsupported
from ..ops import argument, category
from ..ops.common import convert_expr, dims_of, i64, unravel
from .half_factors import Wide
from .vectors import ramp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionSpec:
    """``softmax(q @ k^T * scale + mask) @ v`` over leading dimensions ``lead``.

    q is [lead, queries, depth], k [lead, keys, depth], v [lead, keys, width], each with leading
    dimensions that broadcast; with ``grouped`` heads, several query heads share one of k and v.
    ``causal`` lets query i see keys 0 to i, whatever the number of keys. ``tip`` is the node whose
    value has the anchor's result (a part of its tuple, or the anchor itself).
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    tip: fx.Node
    lead: tuple[Dim, ...]
    queries: Dim
    keys: Dim
    depth: int
    width: int
    causal: bool
    grouped: bool
    scale: float

    @property
    def flops(self) -> Dim:
        """Multiplications and additions of both products."""
        area = product([*self.lead, self.queries, self.keys])
        return area * (2 * (self.depth + self.width))


def parse(group: Group, io: IO) -> AttentionSpec:
    """Reads the anchor's arguments. Raises `Unsupported` for what the template does not cover."""
    anchor = group.anchor or next((n for n in group.nodes if category(n) == "attention"), None)
    if anchor is None or not isinstance(anchor.target, torch._ops.OpOverload):
        raise Unsupported("PLT-ATT-001", "the group has no attention operator")
    q, k, v = anchor.args[:3]
    mask = argument(anchor, "attn_mask")
    if argument(anchor, "dropout_p"):
        raise Unsupported("PLT-ATT-002", f"{anchor} drops weights at random", "call eval() first")
    if argument(anchor, "dropout_mask") is not None:
        raise Unsupported("PLT-ATT-002", f"{anchor} drops weights by a mask")
    for node in (q, k, v):
        if not isinstance(node, fx.Node) or node not in io:
            raise Unsupported("PLT-ATT-003", f"an operand of {anchor} is not in memory")
        if io[node].dtype not in DTYPES or node.meta["val"].dim() < 2:
            raise Unsupported("PLT-ATT-004", f"{node} is {io[node].dtype} of rank < 2 or not float")
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    if mask is not None and mask not in io:
        raise Unsupported("PLT-ATT-003", f"the mask of {anchor} is not in memory")
    depth, width = dims_of(q)[-1], dims_of(v)[-1]
    if not isinstance(depth, int) or not isinstance(width, int) or not depth or not width:
        raise Unsupported("PLT-ATT-005", "the size of a head is 0, or known only at run time")
    tip = _tip(anchor, group)
    *lead, queries, _ = dims_of(tip)
    scale = argument(anchor, "scale")
    if isinstance(scale, fx.Node):
        raise Unsupported("PLT-ATT-006", "a scale known only at run time")
    return AttentionSpec(
        q=q,
        k=k,
        v=v,
        mask=mask,
        tip=tip,
        lead=tuple(lead),
        queries=queries,
        keys=dims_of(k)[-2],
        depth=depth,
        width=width,
        causal=bool(argument(anchor, "is_causal")),
        grouped=bool(argument(anchor, "enable_gqa", False)),
        scale=1.0 / math.sqrt(depth) if scale is None else float(scale),
    )


def _tip(anchor: fx.Node, group: Group) -> fx.Node:
    """The node of the attention's result; its log-sums are not computed."""
    if isinstance(anchor.meta["val"], torch.Tensor):
        return anchor
    tip = None
    for user in anchor.users:
        if user.target is operator.getitem and user.args[1] == 0:
            tip = user
        elif user.users or user in group.outputs:
            raise Unsupported("PLT-ATT-007", f"{user} needs more than the result of {anchor}")
    if tip is None:
        raise Unsupported("PLT-ATT-007", f"the result of {anchor} is not used")
    return tip


class Operand:
    """A tensor of the attention, addressed by (leading index, row, column)."""

    def __init__(self, em: Emitter, spec: AttentionSpec, ref: Ref) -> None:
        self.em, self.ref, self.spec = em, ref, spec
        arg: TensorArg = ref.arg
        self.dtype = arg.dtype
        self.rows_broadcast = arg.shape[-2] == 1
        self.columns_broadcast = arg.shape[-1] == 1
        self.row_stride, self.column_stride = ref.strides[-2], ref.strides[-1]
        self.plain = arg.dtype == torch.float32 and arg.strides[-1] == 1
        steps = [arg.strides[-2]]
        # Rows a multiple of 4 KiB apart compete for the same few lines of the first cache.
        self.scattered = any(isinstance(s, int) and s and s * 4 % 4096 == 0 for s in steps)

    def base(self, lead: Sequence[Expr]) -> Expr:
        """The offset of row 0, column 0 for a leading index of the result."""
        arg = self.ref.arg
        total: Expr = i64(0)
        own = len(arg.shape) - 2
        spec_lead = self.spec.lead
        for back in range(1, own + 1):
            have, want = arg.shape[own - back], spec_lead[len(spec_lead) - back]
            index = lead[len(lead) - back]
            if have == 1:
                continue
            if have != want and self.spec.grouped and back == 1:
                index = tir.floordiv(index * self.em.dim(have), self.em.dim(want))
            total = total + index * self.ref.strides[own - back]
        return total

    def load(self, base: Expr, row: Expr, column: Expr) -> Expr:
        """An element as it is stored."""
        offset = base
        if not self.rows_broadcast:
            offset = offset + row * self.row_stride
        if not self.columns_broadcast:
            offset = offset + column * self.column_stride
        return self.ref.load_flat(offset)

    def wide(self, base: Expr, row: Expr, column: Expr) -> Expr:
        """An element as float32."""
        return convert_expr(self.load(base, row, column), self.dtype, torch.float32)


class Mask(Operand):
    """What is added to scores, or where they are seen, by (leading index, query, key)."""

    def __init__(self, em: Emitter, spec: AttentionSpec, ref: Ref) -> None:
        super().__init__(em, spec, ref)
        apart = not (self.rows_broadcast or self.columns_broadcast) and ref.arg.strides[-1] == 1
        self._wide = Wide(ref) if apart else None

    @property
    def has_rows(self) -> bool:
        """Whether each query has a row of neighbours of its own, for `addends`."""
        return self._wide is not None

    def addend(self, base: Expr, row: Expr, column: Expr) -> Expr:
        """An element as what is added to a score."""
        seen = self.load(base, row, column)
        if self.dtype != torch.bool:
            return convert_expr(seen, self.dtype, torch.float32)
        zero, hidden = tir.FloatImm("float32", 0.0), tir.FloatImm("float32", -math.inf)
        return tir.Select(seen, zero, hidden)

    def addends(self, offset: Expr, lanes: int) -> Expr:
        """`addend` of a vector of neighbours."""
        assert self._wide is not None
        if self.dtype != torch.bool:
            return self._wide.vector(offset, lanes)
        zero, hidden = tir.FloatImm("float32", 0.0), tir.FloatImm("float32", -math.inf)
        seen = self.ref.buffer[ramp(offset, lanes)] != tir.Broadcast(tir.IntImm("int8", 0), lanes)
        return tir.Select(seen, tir.Broadcast(zero, lanes), tir.Broadcast(hidden, lanes))


def task_index(em: Emitter, spec: AttentionSpec, task: Expr, blocks: Dim) -> list[Expr]:
    """(leading index..., block) of a task."""
    return unravel(task, [*(em.dim(d) for d in spec.lead), em.dim(blocks)])


@contextlib.contextmanager
def lane_loop(width: int) -> Iterator[Expr]:
    """A loop over the lanes of a vector, which TVM refuses to call one for a single lane."""
    with T.vectorized(i64(0), i64(width)) if width > 1 else T.serial(i64(0), i64(1)) as j:
        yield j


def vector_starts(size: int, lanes: int) -> tuple[int, list[int]]:
    """(width, first elements) of vectors that cover ``size`` elements; the last may overlap."""
    width = lanes
    while width > size:
        width //= 2
    starts = list(range(0, size - width + 1, width))
    if starts[-1] + width < size:
        starts.append(size - width)
    return width, starts


def result_nodes(group: Group, spec: AttentionSpec) -> list[Any]:
    """The nodes of the epilogue: all but the attention itself."""
    return [n for n in group.nodes if n is not spec.tip and category(n) != "attention"]
