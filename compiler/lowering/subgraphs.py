"""Graphs inside graphs: which of their inputs bind their sizes, and running one as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from .. import sizes


def bound_symbols(module: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """Which input and dimension of a graph's bind each symbol of its sizes.

    Raises NotImplementedError for a size that no input has.
    """
    bound: dict[str, tuple[int, int]] = {}
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    for k, node in enumerate(inputs):
        for d, size in enumerate(map(sizes.dim, node.meta["val"].shape)):
            if not isinstance(size, int) and size.is_Symbol:
                bound.setdefault(str(size), (k, d))
    for node in module.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor):
                for size in tensor.shape:
                    unknown = sizes.symbols(sizes.dim(size)) - bound.keys()
                    if unknown and sizes.is_backed(size):
                        raise NotImplementedError(f"no input of the branch has size {size}")
    return bound


def subgraph_call(
    graph_module: fx.GraphModule, node: fx.Node, is_operand: Callable[[fx.Node], bool]
) -> Callable[..., Any]:
    """A callable that runs a higher-order operator on the values of its operand nodes, in order."""
    operands = [a for a in node.all_input_nodes if is_operand(a)]

    def call(*values: Any) -> Any:
        env = dict(zip(operands, values, strict=True))

        def value(a: fx.Node) -> Any:
            if a in env:
                return env[a]
            if a.op == "get_attr":
                return getattr(graph_module, str(a.target))
            return a.meta["val"]

        return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))  # type: ignore[operator]

    return call
