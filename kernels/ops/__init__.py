"""ATen operators as index-to-scalar functions, and what kind of kernel each needs.

`category` and `library_reason` sort nodes without importing TVM. `convert` turns one FX node into
a `kernels.value.Value` (a tuple of them for operators with several results); `evaluate` does so for
a whole group. Converters register themselves with `converter` and are imported at first use.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from .bounds import index_checks
from .halves import column_halves
from .table import CATEGORIES, CATEGORY, argument, category, library_reason

if TYPE_CHECKING:
    from ..value import Context, Value

__all__ = [
    "CATEGORIES",
    "CATEGORY",
    "argument",
    "category",
    "column_halves",
    "convert",
    "converter",
    "evaluate",
    "index_checks",
    "library_reason",
    "registered",
]

Converter = Callable[[fx.Node, "Context"], Any]

_MODULES = (
    "unary", "binary", "choose", "create", "views", "move", "index", "reductions", "norms",
    "scans",
)  # fmt: skip
_registry: dict[str, Converter] = {}


def converter(*targets: str) -> Callable[[Converter], Converter]:
    """Registers a converter for operators named as they print, without the namespace.

    ``"add.Tensor"`` is ``torch.ops.aten.add.Tensor``; a missing overload name means ``default``.
    """

    def register(function: Converter) -> Converter:
        for name in targets:
            if not name.startswith("plait."):
                name = f"aten.{name}" if "." in name else f"aten.{name}.default"
            if name in _registry:
                raise ValueError(f"{name} has two converters")
            _registry[name] = function
        return function

    return register


def registered() -> dict[str, Converter]:
    """All converters by operator name. Imports TVM."""
    for module in _MODULES:
        importlib.import_module(f".{module}", __name__)
    return _registry


def convert(node: fx.Node, ctx: Context) -> Value | tuple[Value, ...]:
    """The value of a pointwise or view node whose inputs are in ``ctx.env``.

    Raises NotImplementedError for an operator without a converter.
    """
    target = str(node.target)
    found = registered().get(target)
    if found is None:
        raise NotImplementedError(f"{target} has no converter")
    return found(node, ctx)


def evaluate(nodes: Iterable[fx.Node], ctx: Context) -> None:
    """Converts, in order, the nodes that are not in ``ctx.env`` yet and puts them there.

    Parts of a tuple whose producer is in the environment are looked up; symbolic nodes are left
    out (sizes come from ``meta["val"]``).
    """
    from .scope import share

    for node in nodes:
        if node in ctx.env or category(node) == "symbolic":
            continue
        if node.target is operator.getitem:
            parent: Any = ctx.env[node.args[0]]
            index: Any = node.args[1]
            ctx.env[node] = parent[index]
        else:
            value = convert(node, ctx)
            ctx.env[node] = share(node, value)  # type: ignore[assignment]
