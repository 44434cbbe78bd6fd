"""What happens to an element of a matrix product before it reaches memory.

The other nodes of the group are evaluated at one element (or one vector of neighbours along the
columns) of the product, which the accumulators hold. A node may therefore read the product only
at the element that is being computed; views between the product and an output are followed
forwards, from the element's index in the product to its index in the output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import tvm.tirx as tir
import tvm_ffi
from tvm.script.ir_builder import tirx as T

from ..abi import Dim
from ..emit import Emitter, Expr, Ref
from ..group import Group, Unsupported
from ..ops import evaluate
from ..ops.common import convert_expr, convert_products
from ..ops.scope import sharing
from ..value import Context, Value
from .gemm_spec import GemmSpec, aten, dim_of, match_dims, same


@dataclass(frozen=True)
class _Coord:
    """One coordinate of an index: ``base + lane``.

    ``lane`` is the vector lane for the coordinate that runs along the vector, else None;
    ``aligned`` tells that ``base`` is a multiple of the vector's lanes.
    """

    base: Expr
    lane: Expr | None = None
    aligned: bool = False

    @property
    def expr(self) -> Expr:
        return self.base if self.lane is None else self.base + self.lane


class _Unaligned(Exception):
    """A view cuts vectors of this width apart."""


Index = tuple[_Coord, ...]


class Epilogue:
    """Evaluates a group's nodes on accumulators and stores its outputs.

    ``lanes`` is the widest vector that no view of the group cuts apart.
    Raises `Unsupported` for groups that read the product elsewhere than at the element computed.
    """

    def __init__(self, em: Emitter, spec: GemmSpec, group: Group, lanes: int) -> None:
        self.em, self.spec, self.group = em, spec, group
        self._refs: Mapping[fx.Node, Ref] = dict(zip(group.inputs, em.inputs, strict=True))
        self._rest = [n for n in group.nodes if n is not spec.anchor and self._follows(n)]
        self._shape = tuple(em.dim(d) for d in spec.shape)
        self.lanes = 1
        if spec.has_column:
            with contextlib.suppress(_Unaligned):
                zero = em.i64(0)
                lead = tuple(_Coord(zero) for _ in spec.shape[:-1])
                self._indices((*lead, _Coord(zero, zero, aligned=True)), lanes)
                self.lanes = lanes

    def _follows(self, node: fx.Node) -> bool:
        """Whether ``node`` is more than a part of the product's own operands."""
        nodes, anchor = self.group.nodes, self.spec.anchor
        if node in self.group.outputs or nodes.index(node) > nodes.index(anchor):
            return True
        return any(u in nodes and u is not anchor and self._follows(u) for u in node.users)

    def store(
        self, batch: Sequence[Expr], rows: Sequence[Expr], column: Expr, lanes: int,
        accumulator: Callable[[Expr], Expr],
    ) -> None:  # fmt: skip
        """Stores ``lanes`` neighbouring elements; ``accumulator(lane)`` is their fp32 sum."""
        em = self.em
        if lanes == 1:
            with T.serial(em.i64(0), em.i64(1)), sharing():
                self._element(batch, rows, _Coord(column), accumulator(em.i64(0)), 1)
        else:
            with T.vectorized(em.i64(lanes)) as j, sharing():
                self._element(batch, rows, _Coord(column, j, True), accumulator(j), lanes)

    def _element(
        self, batch: Sequence[Expr], rows: Sequence[Expr], column: _Coord, sum_: Expr, lanes: int
    ) -> None:
        spec = self.spec
        index = (*(_Coord(i) for i in (*batch, *rows)), *((column,) if spec.has_column else ()))
        indices = self._indices(index, lanes)
        env: dict[fx.Node, Value] = {n: Value.of(ref) for n, ref in self._refs.items()}
        context = Context(self.em, env)
        env[spec.anchor] = self._anchor(index, sum_, env)
        for node in self._rest:
            source = node.args[0] if node.args else None
            if node.target in _FORWARD and source in indices:
                env[node] = self._view(node, source, indices, env)  # type: ignore[arg-type]
            else:
                evaluate([node], context)
        values = [env[n].load([c.expr for c in indices[n]]) for n in self.group.outputs]
        for ref, value, node in zip(self.em.outputs, values, self.group.outputs, strict=True):
            ref.store(value, [c.expr for c in indices[node]])

    def _anchor(self, index: Index, sum_: Expr, env: Mapping[fx.Node, Value]) -> Value:
        spec, value = self.spec, sum_
        if spec.alpha != 1:
            value = value * self.em.f32(spec.alpha)
        if spec.fused_bias is not None and spec.beta != 0:
            bias = env[spec.fused_bias].broadcast(self._shape)
            term = convert_expr(bias.load([c.expr for c in index]), bias.dtype, torch.float32)
            value = value + (term if spec.beta == 1 else term * self.em.f32(spec.beta))
        value = convert_products(value, spec.dtype)
        return Value(self._shape, spec.dtype, _only_at(index, spec.shape, lambda: value))

    def _view(
        self, node: fx.Node, source: fx.Node, indices: Mapping[fx.Node, Index],
        env: Mapping[fx.Node, Value],
    ) -> Value:  # fmt: skip
        shape = tuple(dim_of(s) for s in node.meta["val"].shape)
        at = [c.expr for c in indices[source]]
        load = _only_at(indices[node], shape, lambda: env[source].load(at))
        return Value(tuple(self.em.dim(d) for d in shape), node.meta["val"].dtype, load)

    def _indices(self, index: Index, lanes: int) -> dict[fx.Node, Index]:
        """Where each node that follows the product has the element at ``index`` of the product."""
        found: dict[fx.Node, Index] = {self.spec.anchor: index}
        shapes = {self.spec.anchor: self.spec.shape}
        for node in self._rest:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            shape = tuple(dim_of(s) for s in value.shape)
            source = node.args[0] if node.args else None
            if node.target in _FORWARD and source in found:
                coords = _FORWARD[node.target](
                    self.em, found[source], shapes[source], shape, lanes, *node.args[1:]
                )
            else:
                coords = next(
                    (
                        found[n]
                        for n in node.all_input_nodes
                        if n in found and _equal(shapes[n], shape)
                    ),
                    None,
                )
            if coords is not None:
                found[node], shapes[node] = coords, shape
        for node in self.group.outputs:
            if node not in found:
                raise Unsupported(
                    "gemm.epilogue-shape", f"{node} is not element for element the product"
                )
        return found


def _equal(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def _only_at(
    index: Index, shape: Sequence[Dim], load: Callable[[], Expr]
) -> Callable[[Sequence[Expr]], Expr]:
    """A load that declines every index but one (coordinates of size 1 do not matter)."""

    def checked(asked: Sequence[Expr]) -> Expr:
        for want, have, size in zip(index, asked, shape, strict=True):
            if not same(size, 1) and not tvm_ffi.structural_equal(want.expr, have):
                raise Unsupported(
                    "gemm.epilogue-index", "the product is read at other elements than its own"
                )
        return load()

    return checked


# -- views, forwards --------------------------------------------------------------------------


def _reshape(
    em: Emitter, index: Index, old: Sequence[Dim], new: Sequence[Dim], lanes: int, *_: Any
) -> Index | None:
    runs = match_dims(old, new)
    if runs is None:
        return None
    out: list[_Coord] = []
    for left, right in runs:
        coord = _join(em, [index[d] for d in left], [old[d] for d in left], lanes)
        out += _split(em, coord, [new[d] for d in right], lanes)
    return tuple(out)


def _join(em: Emitter, coords: Sequence[_Coord], sizes: Sequence[Dim], lanes: int) -> _Coord:
    """The position in a run of dimensions."""
    if not coords:
        return _Coord(em.i64(0))
    total = coords[0]
    for coord, size in zip(coords[1:], sizes[1:], strict=True):
        if total.lane is not None and not same(size, 1):
            raise _Unaligned
        keeps = isinstance(size, int) and size % lanes == 0
        if same(size, 1):
            continue
        base = total.base * em.dim(size) + coord.base
        total = _Coord(base, coord.lane, coord.aligned and keeps)
    return total


def _split(em: Emitter, coord: _Coord, sizes: Sequence[Dim], lanes: int) -> list[_Coord]:
    """The index in a run of dimensions of a position."""
    real = [d for d in sizes if not same(d, 1)]
    if len(real) > 1 and coord.lane is not None:
        if not (coord.aligned and isinstance(real[-1], int) and real[-1] % lanes == 0):
            raise _Unaligned
    out: list[_Coord] = []
    rest, lane = coord.base, coord.lane
    for size in reversed(sizes):
        if same(size, 1):
            out.append(_Coord(em.i64(0)))
        elif len(real) == 1:
            out.append(_Coord(rest, lane, coord.aligned))
        else:
            extent = em.dim(size)
            out.append(_Coord(tir.truncmod(rest, extent), lane, lane is not None))
            rest, lane = tir.truncdiv(rest, extent), None
            real.pop()
    return list(reversed(out))


def _permute(
    em: Emitter, index: Index, old: Any, new: Any, lanes: int, order: Sequence[int]
) -> Index:
    return tuple(index[d] for d in order)


def _transpose(
    em: Emitter, index: Index, old: Any, new: Any, lanes: int, d0: int = 0, d1: int = -1
) -> Index:
    swapped = list(index)
    if swapped:
        swapped[d0], swapped[d1] = swapped[d1], swapped[d0]
    return tuple(swapped)


_FORWARD: dict[Any, Any] = {
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda em, index, old, new, lanes: tuple(reversed(index)),
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.unsqueeze.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.flatten.using_ints,
            aten.unflatten.int,
        ),
        _reshape,
    ),
}
