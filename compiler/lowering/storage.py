"""Decides where every tensor of a graph lives: layout, halo, in-place concatenation, views.

A `Place` is a strided window of the buffer of some *root* node. Convolution networks get NHWC
strides; a value read by a padded convolution gets a zero halo, so no kernel tests bounds; the
inputs of a concatenation are windows of its output, so it costs nothing; views are windows of what
they view.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from ...kernels import routing_rows
from ...kernels.abi import TensorArg, contiguous_strides
from ...kernels.group import Group
from ...passes.strided import memory_order
from .. import sizes
from .orders import (
    Halo,
    Int,
    Order,
    are_known,
    channels_last,
    fake,
    followed,
    natural,
    spread,
    torchs_order,
)

aten = torch.ops.aten
FEW = 8
"""Channels below which their layout matters little."""

CONVOLUTIONS = {
    aten.conv2d.default, aten.conv1d.default, aten.convolution.default, aten.conv2d.padding,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A window of ``root``'s buffer; ``offset`` in elements from the first of the buffer."""

    root: str
    dtype: torch.dtype
    shape: tuple[Int, ...]
    strides: tuple[Int, ...]
    offset: Int = 0
    halo: Halo = ()

    def arg(self, const: bool = False) -> TensorArg:
        """How a kernel sees this place."""
        return TensorArg(
            self.dtype,
            tuple(sizes.dim(d) for d in self.shape),
            tuple(sizes.dim(s) for s in self.strides),
            self.halo,
            const,
        )


@dataclass
class Root:
    """A buffer to be: ``elements`` counts its halo and gaps; ``kind`` is a Plan buffer kind."""

    name: str
    kind: str
    dtype: torch.dtype
    elements: Int
    node: fx.Node | None = None


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def runs_parts(node: fx.Node) -> bool:
    """Whether a node runs graphs of its own, which become plans."""
    if node.target is torch.ops.higher_order.cond:
        values = node.meta.get("val")
        known = isinstance(values, (tuple, list)) and all(
            isinstance(v, torch.Tensor) and all(map(sizes.is_backed, v.shape)) for v in values
        )
        return known and isinstance(node.args[0], fx.Node)
    return node.target is routing_rows.branches


def split_concats(
    graph_module: fx.GraphModule, groups: Sequence[Group], library: Callable[[Group], bool]
) -> list[Group]:
    """Gives every in-place concatenation inputs of its own, by copies where they are shared.

    The graph changes by added ``clone`` nodes, each a group of its own.
    """
    owner = {n: g for g in groups for n in g.nodes}
    outputs = {a for n in graph_module.graph.nodes if n.op == "output" for a in n.all_input_nodes}
    taken: set[fx.Node] = set()
    before: dict[fx.Node, list[Group]] = {}
    for group in reversed(groups):
        if group.kind != "concat":
            continue
        cat = group.outputs[0]
        tensors = list(cat.args[0])  # type: ignore[arg-type]
        for k, x in enumerate(tensors):
            g = owner.get(x)  # type: ignore[arg-type]
            own = g is not None and g.kind not in ("view", "library") and not library(g)
            if own and g and x in g.outputs and x not in taken and x not in outputs:
                taken.add(x)
                continue
            with graph_module.graph.inserting_before(cat):
                copy = graph_module.graph.call_function(aten.clone.default, (x,))
            copy.meta = dict(x.meta)
            tensors[k] = copy
            taken.add(copy)
            before.setdefault(cat, []).append(Group("pointwise", (copy,), (x,), (copy,)))
        cat.args = (tensors, *cat.args[1:])
    result = []
    for group in groups:
        if group.kind == "concat":
            cat = group.outputs[0]
            result.extend(before.get(cat, []))
            group = replace(group, inputs=tuple(cat.all_input_nodes))
        result.append(group)
    return result


class Storage:
    """Places for all tensors of a graph.

    ``library(group)`` says which groups run as library operators (their results are tensors of
    torch's own, with torch's strides). ``halo_of(node)`` is what a convolution or pooling node
    wants around its input, per dimension.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        groups: Sequence[Group],
        library: Callable[[Group], bool],
        halo_of: Callable[[fx.Node], Halo],
    ) -> None:
        self.graph_module, self.groups, self.library = graph_module, list(groups), library
        self.owner = {n: g for g in self.groups for n in g.nodes}
        self.places: dict[fx.Node, Place | tuple[Place | None, ...]] = {}
        self.roots: dict[str, Root] = {}
        self.materialised: set[fx.Node] = set()  # views that need a copy after all
        self.inputs: list[fx.Node] = []
        (self.output,) = (n for n in graph_module.graph.nodes if n.op == "output")
        self._returned = set(self.output.all_input_nodes)
        self._shown = {self._base(x) for x in self._returned}
        self._orders = self._find_orders()
        self._member: dict[fx.Node, fx.Node] = {}
        for group in self.groups:
            if group.kind == "concat":
                for x in group.outputs[0].args[0]:  # type: ignore[union-attr]
                    self._member[x] = group.outputs[0]
        self._halo = self._find_halos(halo_of)
        self._assign()
        self.strided = self._find_strided()
        self.copies = self._settle_outputs()

    # -- decisions ------------------------------------------------------------------------

    def _find_orders(self) -> dict[fx.Node, Order]:
        """Orders of values that are not contiguous.

        Of images, which are of rank 3 or 4: channels are last in what convolutions and poolings
        produce and in what is computed for them to read; what follows a value keeps the order of
        its memory, through permutations too. Of others: what is computed from turned tensors alone
        stays turned.
        """
        found: dict[fx.Node, Order] = {}
        spatial = [g for g in self.groups if g.kind in ("conv", "pool") and not self.library(g)]
        read = {g.anchor.all_input_nodes[0] for g in spatial if g.anchor is not None}
        for group in self.groups:
            if self.library(group):
                continue
            for node in group.nodes:
                if not is_tensor(node) or any(map(runs_parts, node.users)):
                    continue  # plans of their own take their inputs contiguous
                rank = fake(node).dim()
                order = None
                if rank not in (3, 4):
                    pass
                elif group.kind in ("conv", "pool"):
                    if rank == 4 or group.kind == "conv":
                        order = channels_last(rank)
                elif node in read and rank == 4 and group.kind in ("pointwise", "concat"):
                    order = channels_last(rank)
                elif group.kind in ("pointwise", "concat", "view", "reduce", "rows"):
                    order = followed(node, found)
                if order is None and group.kind == "pointwise":
                    order = self._turned(node, group, found)
                if order is not None and order != tuple(range(rank)):
                    found[node] = order
        return found

    def _turned(self, node: fx.Node, group: Group, orders: Mapping[fx.Node, Order]) -> Order | None:
        """The order that torch gives ``node``, if that of all that is read of its size is the same
        and has another innermost dimension than the last: a kernel that turns it would read or
        write every element in a cache line of its own.
        """
        order = torchs_order(fake(node))
        if not order or order[-1] == natural(fake(node))[-1]:
            return None
        if not all(are_known(fake(x).shape) for x in group.inputs):
            return None
        whole = [x for x in group.inputs if fake(x).numel() == fake(node).numel()]
        for x in whole:
            if fake(x).shape != fake(node).shape or torchs_order(fake(x)) != order:
                return None
            base = self._base(x)
            torchs = torchs_order(fake(base))
            if torchs is None or orders.get(base, natural(fake(base))) != torchs:
                return None  # it does not lie as torch would have it
        return order if whole else None

    def _base(self, node: fx.Node) -> fx.Node:
        """What a view shows; any other node itself."""
        while (owner := self.owner.get(node)) is not None and owner.kind == "view":
            node = node.all_input_nodes[0]
        return node

    def _is_only_shown(self, node: fx.Node) -> bool:
        """Whether nothing reads ``node`` but results, and views that are results."""
        readers = [self.owner.get(user) for user in node.users if user is not self.output]
        return all(owner is not None and owner.kind == "view" for owner in readers) and all(
            user is self.output or self._is_only_shown(user) for user in node.users
        )

    def _find_halos(self, halo_of: Callable[[fx.Node], Halo]) -> dict[fx.Node, Halo]:
        halos: dict[fx.Node, Halo] = {}
        for group in self.groups:
            if group.kind != "conv" or group.anchor is None or self.library(group):
                continue
            x = group.anchor.args[0]
            assert isinstance(x, fx.Node)
            root = x
            while root in self._member:
                root = self._member[root]
            owner = self.owner.get(root)
            if owner is None or owner.kind == "view" or self.library(owner):
                continue
            order = self._orders.get(root)
            if order != channels_last(len(fake(root).shape)) or root in self._returned:
                continue
            if not all(isinstance(d, int) for d in fake(root).shape[1:]):
                continue
            wanted = halo_of(group.anchor)
            if not any(map(any, wanted)):
                continue
            have = halos.get(root, ((0, 0),) * len(wanted))
            halos[root] = tuple(
                (max(a, c), max(b, d)) for (a, b), (c, d) in zip(have, wanted, strict=True)
            )
        return halos

    def _find_strided(self) -> list[Group]:
        """Convolutions that would read channels which are not neighbours, and lose by it.

        Several taps want zeros around the image, and narrow groups vectors of channels; the caller
        of this class copies the image for them and starts again. A few channels, as of a picture,
        and single taps are as quick where they lie.
        """
        found = []
        for group in self.groups:
            if group.kind != "conv" or group.anchor is None or self.library(group):
                continue
            x, weight = group.anchor.args[:2]
            place = self.places.get(x)  # type: ignore[arg-type]
            if not isinstance(place, Place) or len(place.shape) != 4 or place.strides[1] == 1:
                continue
            channels, shape = place.shape[1], fake(weight).shape  # type: ignore[arg-type]
            if not isinstance(channels, int):
                continue
            each = channels // shape[1]  # groups
            narrow = each > 1 and shape[0] // each < FEW
            if channels >= FEW and (narrow or any(k > 1 for k in shape[2:])):
                found.append(group)
        return found

    def _settle_outputs(self) -> list[fx.Node]:
        """Makes buffers that the caller keeps fresh for each call; returns values to copy first.

        A result that is a window of memory which the workspace keeps (a buffer with a halo) must be
        copied out, and so must a view of what lies in another order than torch would have it, whose
        strides the caller would see; the caller of this class adds the copies and starts again.
        """
        copies = []
        for node in self._returned:
            place = self.places.get(node)
            if not isinstance(place, Place):
                continue
            root = self.roots[place.root]
            if root.kind in ("arena", "output") and not self._lies_as_torchs(node, place):
                copies.append(node)
            elif root.kind == "arena":
                root.kind = "output"
            elif root.kind == "static":
                copies.append(node)
        return copies

    def _lies_as_torchs(self, node: fx.Node, place: Place) -> bool:
        """Whether a result has the strides of torch's, or is no view."""
        if self.roots[place.root].node is node:
            return True
        triples = zip(place.shape, place.strides, fake(node).stride(), strict=True)
        return all(size == 1 or sizes.dim(a) == sizes.dim(b) for size, a, b in triples)

    # -- assignment -----------------------------------------------------------------------

    def _assign(self) -> None:
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder":
                self.inputs.append(node)
                if is_tensor(node):
                    self._own(node, "input")
            elif node.op == "get_attr" and is_tensor(node):
                self._own(node, "const")
        for node in self.graph_module.graph.nodes:
            if node.op == "call_function" and node not in self.places:
                self._place(node)

    def _place(self, node: fx.Node) -> None:
        group = self.owner.get(node)
        value = node.meta.get("val")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            parent = self.places.get(node.args[0])
            if isinstance(parent, tuple):
                picked = parent[node.args[1]]  # type: ignore[index]
                if picked is not None:
                    self.places[node] = picked
                return
        if group is None or value is None:
            return
        if self.library(group):
            self._place_library(node, value)
        elif group.kind == "view" and self._place_view(node):
            return
        elif node in group.outputs and is_tensor(node):
            if group.kind == "view":
                self.materialised.add(node)
            self._place_result(node)

    def _place_library(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if node in self._member or runs_parts(node):
                self._place_result(node)
            else:
                self._own(node, "library", fake(node).stride())
        elif isinstance(value, (tuple, list)):
            parts: list[Place | None] = []
            for k, v in enumerate(value):
                if isinstance(v, torch.Tensor):
                    name = f"{node.name}.{k}"
                    kind, strides = "library", tuple(v.stride())
                    if runs_parts(node):
                        kind, strides = "arena", contiguous_strides(tuple(v.shape))
                    self.roots[name] = Root(name, kind, v.dtype, v.numel(), node)
                    parts.append(Place(name, v.dtype, tuple(v.shape), strides))
                else:
                    parts.append(None)
            self.places[node] = tuple(parts)

    def _place_view(self, node: fx.Node) -> bool:
        base = next((a for a in node.all_input_nodes if is_tensor(a)), None)
        if base is None:
            return False
        place = self.places.get(base)
        if not isinstance(place, Place):
            return False
        result = view_of(node, base, place)
        if result is None:
            return False
        self.places[node] = result
        return True

    def _place_result(self, node: fx.Node) -> None:
        if node in self.places:
            return
        cat = self._member.get(node)
        if cat is None:
            kind = "output" if node in self._returned else "arena"
            free = node not in self._orders or self._is_only_shown(node)
            free = free and node in self._shown and node not in self._halo
            self._own(node, kind, self._torchs(node) if free else None)
            return
        if cat not in self.places:
            self._place_result(cat)
        whole = self.places[cat]
        assert isinstance(whole, Place)
        given: Any = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
        axis = int(given) % fake(cat).dim()
        start: Int = 0
        for x in cat.args[0]:  # type: ignore[union-attr]
            if x is node:
                break
            start = start + fake(x).shape[axis]  # type: ignore[arg-type]
        shape = tuple(fake(node).shape)
        self.places[node] = replace(
            whole, shape=shape, offset=whole.offset + start * whole.strides[axis]
        )

    def _torchs(self, node: fx.Node) -> Sequence[Int]:
        """The strides that torch gives a result, unless they leave gaps."""
        value = fake(node)
        dense = memory_order(value) is not None
        return value.stride() if dense else contiguous_strides(tuple(value.shape))

    def _own(self, node: fx.Node, kind: str, strides: Sequence[Int] | None = None) -> None:
        value = fake(node)
        shape = tuple(value.shape)
        halo: Halo = ((0, 0),) * len(shape)
        offset: Int = 0
        if kind == "const":
            strides = value.stride()
        if kind == "output" and strides is None:
            strides = self._torchs(node)
        elif strides is None and node in self._orders:
            halo = self._halo.get(node, halo)
            strides, offset, elements = spread(shape, halo, self._orders[node])
            if any(map(any, halo)):
                kind = "static"
            self.roots[node.name] = Root(node.name, kind, value.dtype, elements, node)
            self.places[node] = Place(node.name, value.dtype, shape, strides, offset, halo)
            return
        elif strides is None:
            strides = contiguous_strides(shape)  # type: ignore[arg-type]
        elements = 1
        for d, s in zip(shape, strides, strict=True):
            elements = elements + (d - 1) * s if not isinstance(d, int) or d else 0
            if isinstance(elements, int) and elements == 0:
                break
        self.roots[node.name] = Root(node.name, kind, value.dtype, elements, node)
        self.places[node] = Place(node.name, value.dtype, shape, tuple(strides), 0, halo)


def view_of(node: fx.Node, base: fx.Node, place: Place) -> Place | tuple[Place | None, ...] | None:
    """The place of a view of ``place``, or None when no strides express it."""
    mode = getattr(fake(base), "fake_mode", None)

    def value(a: Any) -> Any:
        return a.meta["val"] if isinstance(a, fx.Node) else a

    with mode or torch.device("meta"):
        stand_in = torch.empty_strided(place.shape, place.strides, dtype=place.dtype, device="cpu")
        args = fx.map_arg(node.args, lambda a: stand_in if a is base else value(a))
        kwargs = fx.map_arg(node.kwargs, lambda a: stand_in if a is base else value(a))
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):  # torch: view size is not compatible
            return None
    storage = stand_in.untyped_storage()._cdata
    several = isinstance(result, (tuple, list))
    places = []
    for r in result if several else (result,):
        if r.untyped_storage()._cdata != storage or r.dtype != place.dtype:
            return None
        places.append(
            Place(
                place.root,
                r.dtype,
                tuple(r.shape),
                tuple(r.stride()),
                place.offset + r.storage_offset(),
                _kept_halo(place, r),
            )
        )
    return tuple(places) if several else places[0]


def _kept_halo(place: Place, view: torch.Tensor) -> Halo:
    """A view keeps its halo only if it shows the whole of the same dimensions."""
    if not any(map(any, place.halo)):
        return ((0, 0),) * view.dim()  # sizes that depend on data must not be compared
    same = tuple(view.shape) == tuple(place.shape) and tuple(view.stride()) == tuple(place.strides)
    return place.halo if same else ((0, 0),) * view.dim()


def buffer_bytes(root: Root) -> int | str:
    """Size of a root's buffer in bytes, for the Plan."""
    return sizes.text(root.elements * root.dtype.itemsize)
