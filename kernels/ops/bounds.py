"""Values that are errors in torch: indices out of range, integer divisors of zero.

Kernels raise nothing. So an operator becomes a kernel only where its indices are proven to be
within range, or are an input of the graph, which `index_checks` lists to be looked at before each
call. The library, which raises torch's own error, computes everything else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from .table import argument, category, check

Limits = tuple[Any, Any]
"""Smallest and largest value; ints or sympy expressions."""

_MOVES = frozenset(
    f"aten.{name}"
    for name in """view.default reshape.default _unsafe_view.default permute.default clone.default
    transpose.int t.default expand.default squeeze.default squeeze.dim squeeze.dims detach.default
    unsqueeze.default slice.Tensor select.int flip.default contiguous.default alias.default
    repeat.default roll.default unfold.default diagonal.default index.Tensor index_select.default
    gather.default split.Tensor split_with_sizes.default chunk.default unbind.int expand_as.default
    broadcast_to.default flatten.using_ints view_as.default narrow.default movedim.int
    """.split()
)
"""Operators whose results hold values of their first argument only."""
_CASTS = frozenset({"aten._to_copy.default", "aten.to.dtype", "aten.type_as.default"})
_ALIKE = frozenset(f"aten.{n}.default" for n in ("clone", "detach", "contiguous", "alias"))
"""Those of them that leave every element in its place."""
_POSITIONS = frozenset({"aten.topk.default", "aten.sort.default", "aten.sort.stable"})
_POSITIONS |= {"aten.max.dim", "aten.min.dim"}
_SCATTERS = ("aten.scatter.value", "aten.scatter.src", "aten.scatter_add.default")


@dataclass(frozen=True)
class IndexCheck:
    """Values of placeholder number ``input`` must be at least ``low`` and below ``end``.

    Limits are sizes: ints or sympy expressions. ``part`` tells which values, where not all are
    indices: selections (dimension, place) and slices (dimension, start, end, step), in this order.
    """

    input: int
    low: Any
    end: Any
    part: tuple[tuple[int, ...], ...] = ()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What of the placeholder's value is looked at."""
        for dim, *place in self.part:
            taken = torch.ops.aten.select.int if len(place) == 1 else torch.ops.aten.slice.Tensor
            tensor = taken(tensor, dim, *place)
        return tensor


def index_checks(graph: fx.Graph) -> list[IndexCheck]:
    """What must hold of the inputs of ``graph`` so that its kernels read within range."""
    inputs = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    found: dict[IndexCheck, None] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for index, extent, wraps in _reads(node):
            origin = _origin(index)
            if origin is not None and category(node) != "library":
                low = -extent if wraps else 0
                found[IndexCheck(inputs[origin], low, extent, _part(index))] = None
    return list(found)


def reads_by_index(node: fx.Node) -> bool:
    """Whether an operator reads or divides by what its integer operands say."""
    return next(_reads(node), None) is not None or str(node.target) in _DIVISIONS


def _reads(node: fx.Node) -> Iterator[tuple[fx.Node, Any, bool]]:
    """(index, size of the dimension it points into, whether it may be negative) of a node."""
    name = str(node.target)
    if name == "aten.embedding.default":
        yield argument(node, "indices"), _size(argument(node, "weight"), 0), False
    elif name == "aten.one_hot.default":
        yield argument(node, "self"), _expression(argument(node, "num_classes")), False
    elif name in ("aten.index_select.default", "aten.gather.default", *_SCATTERS):
        yield argument(node, "index"), _size(argument(node, "self"), argument(node, "dim")), False
    elif name == "aten.take_along_dim.default" and argument(node, "dim") is not None:
        extent = _size(argument(node, "self"), argument(node, "dim"))
        yield argument(node, "indices"), extent, False
    elif name == "aten.index.Tensor":
        for d, index in enumerate(argument(node, "indices")):
            if index is not None:
                yield index, _size(argument(node, "self"), d), True


@check(*"embedding one_hot index_select gather take_along_dim index.Tensor".split())
@check(*"scatter.value scatter.src scatter_add".split())
def _check_index(node: fx.Node) -> str | None:
    for index, extent, wraps in _reads(node):
        if extent == 0:
            return "there is nothing to read from"
        if _origin(index) is None and not _within(limits(index), extent, wraps):
            return "computed indices, which the library checks"
    return None


_DIVIDE = """floor_divide floor_divide.Scalar remainder.Tensor remainder.Scalar fmod.Tensor
fmod.Scalar div.Tensor_mode div.Scalar_mode""".split()
_DIVISIONS = frozenset(f"aten.{n}" if "." in n else f"aten.{n}.default" for n in _DIVIDE)


@check(*_DIVIDE)
def _check_division(node: fx.Node) -> str | None:
    if node.meta["val"].dtype.is_floating_point:
        return None
    divisor = argument(node, "other")
    if isinstance(divisor, fx.Node):
        found = limits(divisor)
        if found is None or not (_proven(found[0] - 1) or _proven(-1 - found[1])):
            return "division of integers by what may be zero"
    elif divisor == 0:
        return "division of integers by zero"
    return None


@check("max", "min")
def _check_extreme(node: fx.Node) -> str | None:
    source: Any = node.args[0]
    return "there are no elements" if 0 in source.meta["val"].shape else None


@check("max.dim", "min.dim")
def _check_extreme_along(node: fx.Node) -> str | None:
    return "rows have no elements" if _size(node.args[0], node.args[1]) == 0 else None


def limits(node: Any) -> Limits | None:
    """Limits that the integers in ``node``'s value provably keep, or None."""
    if not isinstance(node, fx.Node):
        number = isinstance(node, int)
        return (int(node), int(node)) if number else None
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return value.node.expr, value.node.expr
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return 0, 1
    if node.op == "get_attr":
        return _constant_limits(node)
    name = str(node.target)
    args: Any = node.args
    if node.op != "call_function":
        return None
    if name in _MOVES or (name in _CASTS and _keeps_values(node)):
        return limits(args[0])
    if name.startswith("aten.arange"):
        return _arange_limits(node)
    if name in ("aten.argmax.default", "aten.argmin.default"):
        source, dim = args[0].meta["val"], argument(node, "dim")
        end = _expression(source.numel()) if dim is None else _size(args[0], dim)
        return 0, end - 1
    if "getitem" in name and isinstance(args[0], fx.Node):
        producer: Any = args[0]
        if str(producer.target) in _POSITIONS and args[1] == 1:
            dim = argument(producer, "dim")
            return 0, _size(producer.args[0], -1 if dim is None else dim) - 1
        if str(producer.target) in _POSITIONS:
            return limits(producer.args[0])
        return limits(producer) if str(producer.target) in _MOVES else None
    if name in ("aten.full.default", "aten.scalar_tensor.default"):
        return limits(args[1] if name == "aten.full.default" else args[0])
    if name in ("aten.zeros.default", "aten.zeros_like.default"):
        return 0, 0
    if name.startswith("aten.remainder") and (divisor := limits(args[1])):
        same = divisor[0] == divisor[1] and _proven(divisor[0] - 1)
        return (0, divisor[1] - 1) if same else None
    return None


def _keeps_values(node: fx.Node) -> bool:
    source: Any = node.args[0]
    kinds = (source.meta["val"].dtype, node.meta["val"].dtype)
    return not any(k.is_floating_point or k.is_complex for k in kinds) and (
        kinds[1] in (torch.int64, kinds[0])
    )


def _constant_limits(node: fx.Node) -> Limits | None:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    if not isinstance(value, torch.Tensor) or value.is_meta or value.is_floating_point():
        return None
    if value.numel() == 0:
        return 0, 0
    if value.is_complex() or value.dtype == torch.bool:
        return None
    low, high = torch.aminmax(value.detach())
    return int(low), int(high)


def _arange_limits(node: fx.Node) -> Limits | None:
    value = node.meta["val"]
    if value.dtype.is_floating_point:
        return None
    start = limits(argument(node, "start")) if argument(node, "start") is not None else (0, 0)
    step = argument(node, "step")
    if start is None or start[0] != start[1] or not isinstance(step, int | None) or step == 0:
        return None
    reach = start[0] + (_expression(value.shape[0]) - 1) * (1 if step is None else step)
    return (reach, start[0]) if step is not None and step < 0 else (start[0], reach)


def _origin(node: fx.Node) -> fx.Node | None:
    """The placeholder whose values, all or some of them, ``node`` has."""
    name = str(node.target)
    while node.op == "call_function" and (
        name in _MOVES or (name in _CASTS and _keeps_values(node)) or "getitem" in name
    ):
        source: Any = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        node, name = source, str(source.target)
    value = node.meta.get("val")
    integral = isinstance(value, torch.Tensor) and not value.is_floating_point()
    # Where an outer graph computes the values, nobody looks at them before the call.
    return node if node.op == "placeholder" and integral and not node.meta.get("inner") else None


def _part(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    """What ``node`` has of its `_origin`, as far as selections and slices of constants tell."""
    found: list[tuple[int, ...]] = []
    while node.op != "placeholder":
        name = str(node.target)
        if name == "aten.select.int":
            place = (argument(node, "dim"), argument(node, "index"))
        elif name == "aten.slice.Tensor":
            start, end = argument(node, "start"), argument(node, "end")
            start, end = 0 if start is None else start, sys.maxsize if end is None else end
            place = (argument(node, "dim"), start, end, argument(node, "step"))
        else:
            place = ()
        if place and all(type(x) is int for x in place):
            found.append(place)
        elif name not in _ALIKE and name not in _CASTS:
            found.clear()  # what was taken afterwards had another shape
        source: Any = node.args[0]
        node = source
    return tuple(reversed(found))


def _size(node: Any, dim: int) -> Any:
    shape = node.meta["val"].shape
    return _expression(shape[dim]) if len(shape) else 1


def _expression(size: Any) -> Any:
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _within(found: Limits | None, extent: Any, wraps: bool) -> bool:
    if found is None:
        return False
    return _proven(found[0] + (extent if wraps else 0)) and _proven(extent - 1 - found[1])


def _proven(difference: Any) -> bool:
    """Whether an int is, or an expression must be, zero or more. Symbols are positive integers."""
    if isinstance(difference, int):
        return difference >= 0
    return difference.is_nonnegative is True
