"""Whether a branch treats every cell alone: what comes of a cell depends on no other one.

A branch gets the cells that were sent to it, all of them and in order, and may do with them what it
likes: add them up, count them, turn them round. Such a branch must run on exactly its cells. Only
of one that treats each cell alone may the cells be divided between two runs, or strangers be among
them.

The proof follows the rows through the graph. Their number is a symbol s. A value that depends on
rows has one dimension of a size s * k, in which entry i belongs to row i // k; a value without such
a dimension depends on no row. Whatever is not known to keep this is taken to mix rows.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx

from ..kernels import ops
from .ir import attribute
from .outline_branches import is_bookkeeping


@dataclass(frozen=True)
class _Rows:
    """The dimension of a value that numbers rows (-1: of its parts), and the size of it.

    With a ``route`` entries are not in the order of rows, but of this route within the branch.
    """

    dim: int
    size: sympy.Expr
    route: fx.Node | None = None


class _Mixed(Exception):
    """A node that may mix rows, or looks at how many there are."""


def mixing(branch: fx.GraphModule) -> str | None:
    """The first node of a branch's graph that is not known to treat each row alone; None where all
    of them do.
    """
    first = branch.graph.find_nodes(op="placeholder")[0]
    size = first.meta["val"].shape[0]
    if not isinstance(size, torch.SymInt) or not isinstance(size.node.expr, sympy.Symbol):
        return first.name
    try:
        _Proof(branch, first, size.node.expr).run()
    except _Mixed as mixed:
        return mixed.args[0].name
    return None


class _Proof:
    def __init__(self, branch: fx.GraphModule, first: fx.Node, rows: sympy.Symbol) -> None:
        self.branch, self.first, self.rows = branch, first, rows
        self.of: dict[fx.Node, _Rows | None] = {first: _Rows(0, rows)}

    def run(self) -> None:
        for node in self.branch.graph.nodes:
            if node.op == "call_function" and not is_bookkeeping(node):
                self.of[node] = self._visit(node)
            elif node is not self.first and self._sized(node):
                raise _Mixed(node)
        (output,) = self.branch.graph.find_nodes(op="output")
        if [self.of.get(n) for n in output.all_input_nodes] != [_Rows(0, self.rows)]:
            raise _Mixed(output)

    # -- sizes ------------------------------------------------------------------------------------

    def _counts(self, value: Any) -> bool:
        """Whether a number depends on how many rows there are."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        numbers = (torch.SymInt, torch.SymFloat, torch.SymBool)
        return isinstance(value, numbers) and self.rows in value.node.expr.free_symbols

    def _sized(self, node: fx.Node) -> list[int]:
        """The dimensions of a value whose sizes depend on how many rows there are."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return []
        return [dim for dim, size in enumerate(value.shape) if self._counts(size)]

    def _placed(self, node: fx.Node, route: fx.Node | None = None, size: Any = None) -> _Rows:
        """Where the rows of a value are that depends on them: there is one dimension that can be
        it, of so many entries if ``size`` is given.
        """
        dims = self._sized(node)
        if len(dims) != 1:
            raise _Mixed(node)
        found = node.meta["val"].shape[dims[0]].node.expr
        share = found / self.rows
        if self.rows in share.free_symbols or not share.is_integer:
            raise _Mixed(node)
        if size is not None and found != size:
            raise _Mixed(node)
        return _Rows(dims[0], found, route)

    # -- operators --------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> _Rows | None:
        value, name = node.meta.get("val"), str(node.target)
        given = {n: at for n in node.all_input_nodes if (at := self.of.get(n)) is not None}
        if value is None:
            return None
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
            if given and ops.CATEGORY.get(name) != "symbolic":
                raise _Mixed(node)
            return None  # who reads it is asked
        if node.target is operator.getitem:
            return self._part(node)
        if name.startswith("plait"):
            return self._routed(node, name, given) if given else None
        self._look_at(node, name)
        if name in _FILLS:
            return self._placed(node) if self._sized(node) else None
        if not given:
            if self._sized(node) and name not in _SPREADS:
                raise _Mixed(node)
            return self._placed(node) if self._sized(node) else None
        routes = {at.route for at in given.values()}
        sizes = {at.size for at in given.values()}
        if len(routes) > 1 or len(sizes) > 1 or not self._keeps(node, name, given):
            raise _Mixed(node)
        route, size = routes.pop(), sizes.pop()
        if not isinstance(value, torch.Tensor):
            return _Rows(-1, size, route)
        return self._placed(node, route, None if name in _RESHAPES else size)

    def _look_at(self, node: fx.Node, name: str) -> None:
        """Refuses numbers that depend on the count of rows, except in shapes."""
        for arg in (*node.args, *node.kwargs.values()):
            if isinstance(arg, (list, tuple)):
                if name not in _SPREADS and name not in _RESHAPES and any(map(self._counts, arg)):
                    raise _Mixed(node)
            elif self._counts(arg) and name != "aten.native_group_norm.default":
                raise _Mixed(node)

    def _part(self, node: fx.Node) -> _Rows | None:
        """One of several results."""
        source: Any = node.args[0]
        at = self.of.get(source)
        if at is None or str(source.target) == "plait.route.default":
            return at
        return self._placed(node, at.route, at.size)

    def _keeps(self, node: fx.Node, name: str, given: dict[fx.Node, _Rows]) -> bool:
        """Whether an operator keeps rows apart and in order, if its result has the dimension."""
        kind = ops.CATEGORY.get(name)
        x, at = next(iter(given.items()))
        rank = x.meta["val"].dim()
        alike = {(a.dim - n.meta["val"].dim()) for n, a in given.items()}
        alone = len(given) == 1 and x is next(iter(node.all_input_nodes))
        if name in _RESHAPES:
            return alone and self._reshaped(node, x, at)
        if name in _ALONG:
            dims = self._along(node, name, rank)
            return len(alike) == 1 and dims is not None and at.dim not in dims
        if name in _IMAGES or kind in ("conv", "pool"):
            return alone and at.dim == 0 and rank > (3 if "pixel" in name else 1)
        if name in _PADS:
            pad = ops.argument(node, _PADS[name])
            return alone and at.dim < rank - len(pad) // 2
        if name in ("aten.batch_norm.default", "aten.native_batch_norm.default"):
            return alone and not node.args[5]
        if name in _SPREADS or name in _VIEWS or name in _NORMS:
            return alone
        if name == "aten.embedding.default":
            return list(given) == [ops.argument(node, "indices")]
        if name == "aten.one_hot.default":
            return self._sized(node) == [at.dim]
        if name in ("aten.index.Tensor", "aten._unsafe_index.Tensor"):
            indices: Any = node.args[1]
            if x is node.args[0]:
                return len(given) == 1 and (at.dim >= len(indices) or indices[at.dim] is None)
            return len(alike) == 1
        if kind == "attention":
            three = list(node.args[:3])
            whole = len(alike) == 1 and all(n in given for n in three) and at.dim < rank - 2
            return whole and rank == node.meta["val"].dim() and self._sized(node) == [at.dim]
        if kind == "pointwise" and name not in _POSITIONS:
            shown = node.meta["val"]
            return len(alike) == 1 and self._sized(node) == [shown.dim() + alike.pop()]
        return kind in ("gemm", "reduce")

    def _reshaped(self, node: fx.Node, x: fx.Node, at: _Rows) -> bool:
        """Whether what lies before the rows stays before them."""
        before, after = x.meta["val"], node.meta["val"]
        if before.dtype != after.dtype:
            return False
        dim = self._placed(node).dim
        counts = [math.prod(t.shape[:d]) for t, d in ((before, at.dim), (after, dim))]
        return all(isinstance(c, int) for c in counts) and counts[0] == counts[1]

    def _along(self, node: fx.Node, name: str, rank: int) -> set[int] | None:
        """The dimensions along which an operator works; None where it is all of them."""
        rank += name == "aten.stack.default"
        dims: set[int] = set()
        for argument in _ALONG[name].split():
            given = ops.argument(node, argument)
            if given is None or (isinstance(given, (list, tuple)) and not given):
                return None
            dims |= {
                int(d) % rank for d in (given if isinstance(given, (list, tuple)) else [given])
            }
        return dims if name != "aten.stack.default" else {d - 1 for d in dims if d}

    # -- routers within the branch ----------------------------------------------------------------

    def _routed(self, node: fx.Node, name: str, given: dict[fx.Node, _Rows]) -> _Rows:
        """Slots, in the order of their route, go to branches or experts and come back."""
        first = given.get(node.args[0] if name != "plait_branches" else node.args[1])  # type: ignore[arg-type]
        if first is None:
            raise _Mixed(node)
        if name == "plait.route.default" and first.route is None and first.dim == 0:
            return _Rows(-1, first.size, node)
        others = {at.route for n, at in given.items() if n not in node.args[:1]}
        if name == "plait.take.default" and first.route is None and first.dim == 0:
            return self._placed(node, self._only(node, others))
        if name == "plait.places.default" and first.dim == -1:
            return first
        if name == "plait_branches":
            graphs: Any = node.args[0]
            inner = [attribute(self.branch, str(graph.target)) for graph in graphs]
            operands: Any = node.args[3]
            if first.dim == 0 and not any(n in given for n in operands):
                if first.route is not None and not any(map(mixing, inner)):
                    return self._placed(node, first.route, first.size)
        if name == "plait.combine.default" and first.dim == 0 and first.route in others:
            weight = ops.argument(node, "weight")
            if others - {first.route} != (set() if weight is None else {None}):
                raise _Mixed(node)
            if weight is None or given.get(weight) == _Rows(0, self._placed(node).size):
                return self._placed(node)
        if name == "plait.routed_linear.default" and first.dim == 0:
            route = self._only(node, others)
            weights = (ops.argument(node, "weight"), ops.argument(node, "bias"))
            source = None if ops.argument(node, "share") else route
            if first.route is source and not any(w in given for w in weights):
                return self._placed(node, None if ops.argument(node, "scatter") else route)
        raise _Mixed(node)

    def _only(self, node: fx.Node, routes: set[fx.Node | None]) -> fx.Node:
        if len(routes) != 1 or (route := routes.pop()) is None:
            raise _Mixed(node)
        return route


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten.{n}" if "." in n else f"aten.{n}.default" for n in text.split())


_FILLS = _names("""
full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full new_empty empty_like
empty.memory_format
""")
"""Every entry is one number, whatever they are like."""
_POSITIONS = _names("arange arange.start arange.start_step eye linspace scalar_tensor glu")
_SPREADS = _FILLS | _names("expand expand_as expand_copy broadcast_to repeat tile")
"""Each row of the result is the same, where the source has no rows; their arguments are shapes."""
_RESHAPES = _names("view reshape _unsafe_view view_as reshape_as flatten.using_ints unflatten.int")
_VIEWS = _names("""
permute transpose.int t numpy_T squeeze squeeze.dim squeeze.dims unsqueeze movedim.int
movedim.intlist swapaxes alias detach dropout feature_dropout alpha_dropout
""")
"""They move dimensions, not what is along them."""
_NORMS = _names("layer_norm native_layer_norm rms_norm _fused_rms_norm")
"""What they normalise over has sizes that their weights or arguments name."""
_IMAGES = _names("""
group_norm native_group_norm instance_norm _native_batch_norm_legit_no_training pixel_shuffle
pixel_unshuffle channel_shuffle upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d
upsample_nearest2d.vec upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d
upsample_bicubic2d.vec
""")
"""Their first dimension numbers samples."""
_PADS = dict.fromkeys(_names("constant_pad_nd pad"), "pad") | dict.fromkeys(
    _names("reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"), "padding"
)
_ALONG = {
    name: arguments
    for names, arguments in (
        ("""softmax.int _softmax log_softmax.int _log_softmax _safe_softmax logsumexp cumsum topk
         sort sort.stable argsort argsort.stable cat concat stack slice.Tensor select.int
         split.Tensor split_with_sizes split.sizes chunk unsafe_chunk unsafe_split.Tensor unbind.int
         narrow gather take_along_dim scatter.value scatter.src scatter_add slice_scatter glu
         index_select repeat_interleave.self_int""", "dim"),
        ("flip roll", "dims"),
        ("unfold", "dimension"),
        ("diagonal", "dim1 dim2"),
    )
    for name in _names(names)
}  # fmt: skip
"""Operators that move, mix or pick along the dimensions that these arguments name."""
