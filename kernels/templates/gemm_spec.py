"""The geometry of one matrix-product node, read once and shared by the GEMM template's parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx
import tvm.tirx as tir

from ..abi import Dim, contiguous_strides, product
from ..emit import Expr
from ..group import HALF, IO, Group, Unsupported

aten = torch.ops.aten
ANCHORS = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.bmm.default,
        aten.matmul.default,
        aten.baddbmm.default,
    }
)
_TRANSPARENT = frozenset(
    {aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default}
)
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


@dataclass(frozen=True)
class Strided:
    """An operand as a strided view of one of the group's inputs."""

    node: fx.Node
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]


@dataclass(frozen=True)
class GemmSpec:
    """``out[batch, m, n] = alpha * sum_k a[batch, m, k] * b[batch, k, n] + beta * bias``.

    ``batch`` are the sizes of the loops around the product and ``rows`` the sizes that ``m`` runs
    through in row-major order; the anchor's shape is ``batch + rows + (n,)``, without the last
    where ``has_column`` is false (the right factor is a vector). Strides have one entry per batch
    dimension, then (row, k) for ``a`` and (k, column) for ``b``. ``fused_bias`` is None or
    the node that the anchor itself adds.
    """

    anchor: fx.Node
    a: fx.Node
    b: fx.Node
    fused_bias: fx.Node | None
    alpha: float
    beta: float
    batch: tuple[Dim, ...]
    rows: tuple[Dim, ...]
    n: Dim
    k: Dim
    has_column: bool
    a_strides: tuple[Dim, ...]
    b_strides: tuple[Dim, ...]
    b_matrix_strides: tuple[Dim, ...]
    """How many matrices of a packed right factor a step of each batch dimension is."""
    b_const: bool
    """The right factor is a weight that is packed ahead."""
    b_transposed: bool
    """The packed weight's tensor is ``[.., N, K]``, not ``[.., K, N]``."""
    dtype: torch.dtype

    @property
    def m(self) -> Dim:
        """Rows of one product."""
        return product(self.rows)

    @property
    def batches(self) -> Dim:
        """Products in one call."""
        return product(self.batch)

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The anchor's shape."""
        return (*self.batch, *self.rows, *((self.n,) if self.has_column else ()))

    @property
    def flops(self) -> Dim:
        """Multiplications and additions of one call."""
        return 2 * self.batches * self.m * self.n * self.k


def parse(group: Group, io: IO) -> GemmSpec:
    """Reads the group's anchor.

    Raises `Unsupported` for an anchor, a dtype or an operand that the template does not cover.
    """
    anchor = group.anchor
    if anchor is None or anchor.target not in ANCHORS:
        raise Unsupported("PLT-GEM-005", f"{anchor} is not a matrix product")
    left, right, fused_bias, transposed = _operands(anchor)
    a, b = _strided(left, group, io), _strided(right, group, io)
    dtype = io[a.node].dtype
    if dtype not in (torch.float32, *HALF) or io[b.node].dtype != dtype:
        raise Unsupported("PLT-GEM-004", f"{dtype} times {io[b.node].dtype} is left to the library")
    has_row, has_column = len(a.shape) > 1, len(b.shape) > 1
    lead = a.shape[:-1]  # everything of ``a`` but k
    a_lead = list(a.strides[:-1])
    if not has_column:
        n, b_row_k, b_row_n, b_batch = 1, b.strides[-1], 0, ()
    elif transposed:
        n, b_row_k, b_row_n, b_batch = b.shape[-2], b.strides[-1], b.strides[-2], b.shape[:-2]
    else:
        n, b_row_k, b_row_n, b_batch = b.shape[-1], b.strides[-2], b.strides[-1], b.shape[:-2]
    # Broadcast the batch dimensions; with a right factor that has none, ``a`` gives all of them.
    a_batch = lead[:-1] if has_row else ()
    batch = _broadcast(a_batch, b_batch)
    a_batch_strides = _expand_strides(a_batch, a_lead[: len(a_batch)], batch)
    b_batch_strides = _expand_strides(b_batch, list(b.strides[: len(b_batch)]), batch)
    b_matrix_strides = _expand_strides(b_batch, contiguous_strides(tuple(b_batch)), batch)
    rows: tuple[Dim, ...] = (lead[-1],) if has_row else ()
    row_stride: Dim = a_lead[-1] if has_row else 0
    # Fold batch dimensions into the rows while one stride still walks through them.
    while batch and rows and b_batch_strides[-1] == 0:
        inner = product(rows)
        if not same(a_batch_strides[-1], row_stride * inner) and not same(inner, 1):
            break
        if same(inner, 1):
            row_stride = a_batch_strides[-1]
        rows, batch = (batch[-1], *rows), batch[:-1]
        a_batch_strides, b_batch_strides = a_batch_strides[:-1], b_batch_strides[:-1]
        b_matrix_strides = b_matrix_strides[:-1]
    swapped = _packable(b, right, group, io)
    return GemmSpec(
        anchor=anchor, a=a.node, b=b.node, fused_bias=fused_bias,
        alpha=_scalar(anchor.kwargs.get("alpha", 1)), beta=_scalar(anchor.kwargs.get("beta", 1)),
        batch=batch, rows=rows, n=n, k=a.shape[-1], has_column=has_column,
        a_strides=(*a_batch_strides, row_stride, a.strides[-1]),
        b_strides=(*b_batch_strides, b_row_k, b_row_n),
        b_matrix_strides=b_matrix_strides,
        b_const=has_column and swapped is not None,
        b_transposed=transposed != bool(swapped),
        dtype=dtype,
    )  # fmt: skip


def _operands(anchor: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool]:
    """(left, right, bias, whether the right factor is ``[N, K]``)."""
    args = list(anchor.args)
    names = {"input": 0, "self": 0, "weight": 1, "mat2": 1, "other": 1, "bias": 2}
    if anchor.target in (aten.addmm.default, aten.baddbmm.default):
        names = {"self": 0, "mat1": 1, "batch1": 1, "mat2": 2, "batch2": 2}
    for name, value in anchor.kwargs.items():
        if name in names:
            args += [None] * (names[name] + 1 - len(args))
            args[names[name]] = value
    if anchor.target in (aten.addmm.default, aten.baddbmm.default):
        return args[1], args[2], args[0], False  # type: ignore[return-value]
    bias = args[2] if len(args) > 2 else None
    return args[0], args[1], bias, anchor.target is aten.linear.default  # type: ignore[return-value]


def _packable(b: Strided, right: fx.Node, group: Group, io: IO) -> bool | None:
    """How the right factor can be packed ahead: None, or whether its views swap the last two dims.

    It must be a static weight that nothing else in the group reads.
    """
    rank = len(io[b.node].shape)
    sizes = io[b.node].shape
    if not io[b.node].const or rank < 2 or not all(isinstance(d, int) for d in sizes):
        return None
    view = Strided(b.node, sizes, tuple(range(rank)))  # strides stand for the dimensions
    for node in reversed(_chain(right, b.node)):
        if sum(list(_flat_args(n)).count(node) for n in group.nodes) != 1:
            return None
        if node is not b.node and node.target not in _TRANSPARENT:
            if node.target not in _PERMUTING:
                return None
            view = Strided(b.node, sizes, _READ[node.target](view, *node.args[1:]))
    order = list(view.strides)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if order == swapped:
        return True
    return False if order == sorted(order) else None


def _chain(node: fx.Node, root: fx.Node) -> list[fx.Node]:
    """The nodes from ``node`` back to ``root``, following first arguments."""
    chain = [node]
    while chain[-1] is not root:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


def _flat_args(node: fx.Node) -> Iterable[Any]:
    found: list[Any] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _scalar(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise Unsupported("PLT-GEM-003", f"scale {value} is not a constant")
    return value


# -- sizes and strides --------------------------------------------------------------------------


def same(a: Dim, b: Dim) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    return a == b or sympy.expand(a - b) == 0


def dim_of(size: Any) -> Dim:
    """A torch size as a plain int or a sympy expression."""
    return size if isinstance(size, int) else size.node.expr


def unravel(flat: Expr, sizes: Sequence[Expr | int]) -> list[Expr]:
    """The row-major index whose position is ``flat``."""
    index: list[Expr] = []
    for size in reversed(sizes[1:]):
        index.append(tir.truncmod(flat, size))
        flat = tir.truncdiv(flat, size)
    return [flat, *reversed(index)] if sizes else []


def _broadcast(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    return tuple(y if same(x, 1) else x for x, y in zip(a, b, strict=True))


def _expand_strides(
    sizes: Sequence[Dim], strides: Sequence[Dim], shape: Sequence[Dim]
) -> tuple[Dim, ...]:
    """Strides that read a tensor of ``sizes`` as the broadcast ``shape``."""
    pad = len(shape) - len(sizes)
    own = [0 if same(d, 1) else s for d, s in zip(sizes, strides, strict=True)]
    return (0,) * pad + tuple(own)


def _strided(node: fx.Node, group: Group, io: IO) -> Strided:
    """Follows view nodes of the group back to an input; raises `Unsupported` for other nodes."""
    if node in io and node in group.inputs:
        return Strided(node, io[node].shape, io[node].strides)
    if node not in group.nodes or not node.args or not isinstance(node.args[0], fx.Node):
        raise Unsupported("PLT-GEM-001", f"{node} is no input of the group")
    target, args = node.target, node.args[1:]
    if target not in _READ and target not in _TRANSPARENT | _VIEWS:
        raise Unsupported("PLT-GEM-001", f"{node} ({target}) is computed, not read")
    source = _strided(node.args[0], group, io)
    if target in _TRANSPARENT:
        return source
    shape = tuple(dim_of(s) for s in node.meta["val"].shape)
    if target in _VIEWS:
        strides = view_strides(source.shape, source.strides, shape)
        if strides is None:
            raise Unsupported("PLT-GEM-001", f"{node} cannot be read through strides")
        return Strided(source.node, shape, strides)
    return Strided(source.node, shape, _READ[target](source, *args))


def _permuted(source: Strided, order: Sequence[int]) -> tuple[Dim, ...]:
    return tuple(source.strides[d] for d in order)


def _transposed(source: Strided, d0: int, d1: int) -> tuple[Dim, ...]:
    strides = list(source.strides)
    strides[d0], strides[d1] = strides[d1], strides[d0]
    return tuple(strides)


def _expanded(source: Strided, sizes: Sequence[Any]) -> tuple[Dim, ...]:
    pad = (1,) * (len(sizes) - len(source.shape)) + source.shape
    strides = (0,) * (len(sizes) - len(source.shape)) + source.strides
    kept = [
        (isinstance(n, int) and n == -1) or same(d, _size(n))
        for d, n in zip(pad, sizes, strict=True)
    ]
    return tuple(s if keep else 0 for s, keep in zip(strides, kept, strict=True))


def _size(size: Any) -> Dim:
    """A size argument: an int, a SymInt or the node of one."""
    return dim_of(size.meta["val"] if isinstance(size, fx.Node) else size)


def _unsqueezed(source: Strided, dim: int) -> tuple[Dim, ...]:
    dim %= len(source.shape) + 1
    return (*source.strides[:dim], 0, *source.strides[dim:])


_READ: dict[Any, Any] = {
    aten.t.default: lambda s: tuple(reversed(s.strides)),
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.expand.default: _expanded,
    aten.unsqueeze.default: _unsqueezed,
}
_PERMUTING = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})


def view_strides(
    shape: Sequence[Dim], strides: Sequence[Dim], new: Sequence[Dim]
) -> tuple[Dim, ...] | None:
    """Strides that read a strided tensor as ``new``, or None where only a copy could."""
    out: list[Dim] = []
    runs = match_dims(shape, new)
    if runs is None:
        return None
    for old_dims, new_dims in runs:
        real = [d for d in old_dims if not same(shape[d], 1)]
        for outer, inner in zip(real, real[1:], strict=False):
            if not same(strides[outer], strides[inner] * shape[inner]):
                return None
        step: Dim = strides[real[-1]] if real else 0
        split: list[Dim] = []
        for d in reversed(new_dims):
            split.append(step)
            step = step * new[d]
        out += reversed(split)
    return tuple(out)


def match_dims(old: Sequence[Dim], new: Sequence[Dim]) -> list[tuple[list[int], list[int]]] | None:
    """Splits two shapes of one element count into the smallest runs of equal products.

    None where the sizes are symbols that do not tell how the runs match, or are zero.
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = list(range(i, min(i + 1, len(old)))), list(range(j, min(j + 1, len(new))))
        i, j = i + len(left), j + len(right)
        while not same(product(old[d] for d in left), product(new[d] for d in right)):
            a, b = product(old[d] for d in left), product(new[d] for d in right)
            grow_left = j >= len(new) or (i < len(old) and _divides(a, b))
            if grow_left and i < len(old):
                left.append(i)
                i += 1
            elif j < len(new):
                right.append(j)
                j += 1
            else:
                return None
        runs.append((left, right))
    return runs


def _divides(a: Dim, b: Dim) -> bool:
    """Whether ``a`` divides ``b`` for every value of their symbols."""
    if same(a, 0) or same(b, 0):
        return False
    return sympy.cancel(sympy.sympify(b) / a).is_integer is True
