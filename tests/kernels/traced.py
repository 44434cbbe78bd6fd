"""One traced call as groups ready to lower: the setting of the operator tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from plait.kernels.abi import TensorArg
from plait.kernels.group import Group
from plait.kernels.ops import category


def trace(function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The ATen graph of a call, composite operators kept whole, unused nodes removed."""
    module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*tensors)
    module.graph.eliminate_dead_code()
    return module


def tensor_arg(tensor: torch.Tensor) -> TensorArg:
    """How a tensor lies in memory."""
    return TensorArg(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def outputs_of(module: fx.GraphModule) -> list[fx.Node]:
    """The tensor-valued nodes that the graph returns, each once."""
    (output,) = module.graph.find_nodes(op="output")
    found = [n for n in output.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return list(dict.fromkeys(found))


def group_for(outputs: Sequence[fx.Node], kind: str = "pointwise") -> Group:
    """The group of all operators that ``outputs`` depend on."""
    needed: set[fx.Node] = set()
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(node.all_input_nodes)
    graph = outputs[0].graph
    nodes = tuple(n for n in graph.nodes if n in needed and n.op == "call_function")
    inputs = tuple(
        n
        for n in graph.nodes
        if n in needed and n.op in ("placeholder", "get_attr") and category(n) != "symbolic"
    )
    return Group(kind, nodes, inputs, tuple(outputs))
