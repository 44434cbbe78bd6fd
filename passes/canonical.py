"""One spelling for each operation (part of `passes.normalize`).

===============================================  =================================================
before                                           after
===============================================  =================================================
``relu_(t)``, t read by nobody else              ``relu(t)``
``split/chunk/unbind(x, ...)[i]``                ``slice(x, dim, lo, hi)`` or ``select(x, dim, i)``
``view``, ``_unsafe_view``, ``flatten``, ...     ``reshape``
``t``, ``transpose``, ``movedim``, ``mT``, ...   ``permute``
``reshape(reshape(x))``, ``permute(permute(x))`` one of it
``zeros``, ``ones_like``, ``new_full``, ...       ``full``
``adaptive_avg_pool2d(x, 1)``, ...               ``mean(x, (-2, -1), keepdim=True)``
``_assert_tensor_metadata``, ``_assert(True)``   nothing
===============================================  =================================================

``reshape`` is defined for every layout of its input, which ``view`` is not; after this rewrite
copies that only served ``view`` may be dropped.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch._ops import OpOverload

from .base import allow
from .ir import (
    Rewriter,
    alias_source,
    argument,
    aten,
    is_call,
    is_mutating,
    mutated_arguments,
    same_shape,
    same_size,
    shape_of,
)

_INT_MAX = 2**63 - 1
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_copy.default,
)
_TRANSPOSES = (
    aten.t.default,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.movedim.int,
)
_SPLITS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)
_FILLS: dict[Any, float | None] = {
    # operator -> the value it fills with; None where that is an argument
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.full_like.default: None,
    aten.new_full.default: None,
    aten.scalar_tensor.default: None,
}

_POOLS = {  # operator -> how many dimensions it averages over
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten._adaptive_avg_pool3d.default: 3,
}


def canonicalise(rewriter: Rewriter) -> list[str]:
    """Apply the table above once, everywhere. Returns the names of the nodes rewritten."""
    done: list[str] = []
    for node in list(rewriter.graph.nodes):
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        name = node.name
        if any(rule(rewriter, node) for rule in _RULES):
            done.append(name)
    return done


def _functional(rewriter: Rewriter, node: fx.Node) -> bool:
    """An in-place call on a temporary that nobody else reads becomes an ordinary call."""
    target = node.target
    if not is_mutating(node) or not isinstance(target, OpOverload):
        return False
    written = mutated_arguments(node)
    first = node.args[0] if node.args else None
    if written != [first] or first is None or list(written[0].users) != [node]:
        return False
    if written[0].op != "call_function" or alias_source(written[0]) is not None:
        return False
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if not name.endswith("_") or name.endswith("copy_") or packet is None:
        return False
    plain = getattr(packet, target._overloadname, None)
    if plain is None or plain._schema.is_mutable or torch.Tag.pointwise not in plain.tags:
        return False
    if not allow("make functional", [node]):
        return False
    new = rewriter.call(plain, node.args, dict(node.kwargs), like=node)
    old_value, value = node.meta["val"], new.meta["val"]
    if value.dtype != old_value.dtype or not same_shape(value.shape, old_value.shape):
        rewriter.graph.erase_node(new)  # type promotion differs from writing in place
        return False
    rewriter.replace(node, new)
    return True


def _split(rewriter: Rewriter, node: fx.Node) -> bool:
    """Each part of a split that is read becomes a view of its own."""
    if not is_call(node, *_SPLITS) or not all(is_call(u, operator.getitem) for u in node.users):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(shape_of(source) or ())
    is_unbind = node.target is aten.unbind.int
    dim = argument(node, 1 if is_unbind else 2, "dim", 0) % max(rank, 1)
    parts = node.meta["val"]
    sizes = [1 if is_unbind else part.shape[dim] for part in parts]
    if not node.users or not all(isinstance(size, int) for size in sizes[:-1]):
        return False
    if not allow("split into views", [node]):
        return False
    for reader in list(node.users):
        index = int(reader.args[1]) % len(parts)  # type: ignore[arg-type]
        value = reader.meta.get("val")
        if is_unbind:
            new = rewriter.call(aten.select.int, (source, dim, index), like=reader, value=value)
        else:
            low = sum(sizes[:index])
            high = low + sizes[index] if isinstance(sizes[index], int) else _INT_MAX
            args = (source, dim, low, high)
            new = rewriter.call(aten.slice.Tensor, args, like=reader, value=value)
        rewriter.replace(reader, new)
    rewriter.graph.erase_node(node)
    return True


def _reshape(rewriter: Rewriter, node: fx.Node) -> bool:
    """Every operator that only changes the shape becomes ``reshape``."""
    if not is_call(node, *_VIEWS):
        return False
    value = node.meta["val"]
    if node.target in (aten.view.default, aten._unsafe_view.default, aten.view_copy.default):
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs["size"]
    else:
        sizes = static_sizes(value.shape)
    if sizes is None or not allow("reshape", [node]):
        return False
    new = rewriter.call(
        aten.reshape.default, (argument(node, 0, "self"), sizes), like=node, value=value
    )
    rewriter.replace(node, new)
    return True


def static_sizes(shape: tuple[Any, ...]) -> list[int] | None:
    """``shape`` as a ``reshape`` argument of ints, -1 for one symbol; None if it takes more."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1 or (-1 in sizes and 0 in sizes):
        return None
    return sizes


def _permute(rewriter: Rewriter, node: fx.Node) -> bool:
    """Every reordering of dimensions becomes ``permute`` with non-negative numbers."""
    if not is_call(node, *_TRANSPOSES, aten.permute.default):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    order = _order(node, len(shape_of(source) or ()))
    if node.target is aten.permute.default and list(order) == list(argument(node, 1, "dims")):
        return False
    if not allow("permute", [node]):
        return False
    value = node.meta["val"]
    new = rewriter.call(aten.permute.default, (source, order), like=node, value=value)
    rewriter.replace(node, new)
    return True


def _order(node: fx.Node, rank: int) -> list[int]:
    """The dimensions of the argument of a transposing call, in the order of its result."""
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [dim % rank for dim in argument(node, 1, "dims")]
    if node.target in (aten.t.default, aten.numpy_T.default):
        return order[::-1]
    if node.target is aten.mT.default:
        return [*order[:-2], rank - 1, rank - 2]
    if rank == 0:
        return order
    a, b = (dim % rank for dim in _two_dims(node))
    if node.target is aten.movedim.int:
        order.remove(a)
        order.insert(b, a)
    else:
        order[a], order[b] = order[b], order[a]
    return order


def _two_dims(node: fx.Node) -> tuple[int, int]:
    names = [arg.name for arg in node.target._schema.arguments]  # type: ignore[union-attr]
    return argument(node, 1, names[1]), argument(node, 2, names[2])


def _compose(rewriter: Rewriter, node: fx.Node) -> bool:
    """Two reshapes, or two permutations, in a row become one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.target is not node.target:
        return False
    if node.target not in (aten.reshape.default, aten.permute.default):
        return False
    if not allow("compose views", [node]):
        return False
    second = argument(node, 1, "shape" if node.target is aten.reshape.default else "dims")
    if node.target is aten.permute.default:
        first = argument(source, 1, "dims")
        second = [first[dim] for dim in second]
    node.args, node.kwargs = (source.args[0], second), {}
    return True


def _fill(rewriter: Rewriter, node: fx.Node) -> bool:
    """Every tensor filled with one number, of a size that is known, becomes ``full``."""
    if not is_call(node, *_FILLS):
        return False
    value = node.meta["val"]
    if not all(type(size) is int for size in value.shape) or value.layout != torch.strided:
        return False
    number = _FILLS[node.target]
    if number is None:
        names = [arg.name for arg in node.target._schema.arguments]  # type: ignore[union-attr]
        at = next(i for i, name in enumerate(names) if name in ("fill_value", "s"))
        number = argument(node, at, names[at])
    if not isinstance(number, int | float) or not allow("fill", [node]):
        return False
    kwargs = {"dtype": value.dtype, "device": value.device}
    args = (list(value.shape), number)
    rewriter.replace(node, rewriter.call(aten.full.default, args, kwargs, like=node))
    return True


def _global_pool(rewriter: Rewriter, node: fx.Node) -> bool:
    """Adaptive pooling to one value per channel becomes the mean, as in eager mode."""
    if not is_call(node, *_POOLS):
        return False
    value, dims = node.meta["val"], list(range(-_POOLS[node.target], 0))
    if any(not same_size(value.shape[d], 1) for d in dims) or not allow("global pool", [node]):
        return False
    args = (argument(node, 0, "self"), dims, True)
    rewriter.replace(node, rewriter.call(aten.mean.dim, args, like=node, value=value))
    return True


def _assertion(rewriter: Rewriter, node: fx.Node) -> bool:
    """Assertions that hold for every input go: metadata is fixed by capture."""
    if not is_call(node, aten._assert_tensor_metadata.default, aten._assert_scalar.default):
        return False
    if node.users:
        return False
    if node.target is aten._assert_scalar.default:
        claim = node.args[0]
        value = claim.meta.get("val") if isinstance(claim, fx.Node) else claim
        if isinstance(value, torch.SymBool):
            value = value.node.expr == True  # noqa: E712 - sympy's true is no Python bool
        if value is not True:
            return False
    if not allow("drop assertion", [node]):
        return False
    rewriter.graph.erase_node(node)
    return True


_RULES = (_assertion, _functional, _split, _reshape, _permute, _compose, _fill, _global_pool)
