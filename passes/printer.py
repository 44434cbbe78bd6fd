"""A graph as Python text that one can read, and run.

Each line tells in a comment what the value is, where it runs and where it comes from::

    # after fuse-vertical (0.4 ms)
    import torch

    def forward(self, x):  # x: float32[1, 3, 8, 8] cpu
        weight = self.conv.weight                           # float32[8, 3, 3, 3] cpu
        conv2d = torch.ops.aten.conv2d.default(x, weight)   # float32[1, 8, 6, 6] cpu | 0 conv*
        return (conv2d,)

After ``exec`` of the text, ``forward(graph_module, *flat_inputs)`` computes the flat outputs. A
star marks the anchor of its group.
"""

from __future__ import annotations

import math
import operator
import re
import types
from typing import Any

import torch
import torch.fx as fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from .annotations import KEY, Provenance, annotation, origin

_COLUMN = 72  # comments start here, or two blanks after a longer line


def print_graph(graph_module: fx.GraphModule, *, origins: bool = True) -> str:
    """The graph as a Python module with one function, ``forward``.

    ``origins`` adds the module path and source line that each node was captured from.
    """
    writer = _Writer()
    body = [line for node in graph_module.graph.nodes for line in writer.node(node, origins)]
    made = graph_module.meta.get(KEY)
    head = []
    if isinstance(made, Provenance):
        head.append(f"# after {made.made_by} ({made.seconds * 1e3:.1f} ms)")
    modules = [f"import {name}" for name in sorted(writer.modules | {"torch"})]
    signature = [f"def forward({', '.join(['self', *(name for name, _ in writer.inputs)])}):"]
    notes = [f"    # {name}: {note}" for name, note in writer.inputs]
    branches = _branches(graph_module, origins)
    return "\n".join([*head, *modules, "", "", *signature, *notes, *body, *branches, ""])


def _branches(graph_module: fx.GraphModule, origins: bool) -> list[str]:
    """The branches of control flow, as comments below the graph that they belong to."""
    lines: list[str] = []
    for node in graph_module.graph.nodes:
        branch = getattr(graph_module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(branch, fx.GraphModule):
            text = print_graph(branch, origins=origins).rstrip().split("\n")
            lines += ["", f"# self.{node.target}:", *(f"#   {line}".rstrip() for line in text)]
    return lines


class _Writer:
    def __init__(self) -> None:
        self.inputs: list[tuple[str, str]] = []
        self.modules: set[str] = set()

    def node(self, node: fx.Node, origins: bool) -> list[str]:
        if node.op == "placeholder":
            self.inputs.append((node.name, describe(node.meta.get("val"))))
            return []
        if node.op == "output":
            return [f"    return {self.value(node.args[0])}"]
        line = f"    {node.name} = {self.expression(node)}"
        comment = _comment(node, origins)
        return [f"{line.ljust(_COLUMN - 2)}  # {comment}" if comment else line]

    def expression(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return _attribute(str(node.target))
        args = [self.value(arg) for arg in node.args]
        args += [f"{key}={self.value(value)}" for key, value in node.kwargs.items()]
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join(args[1:])})"
        if node.op == "call_module":
            return f"{_attribute(str(node.target))}({', '.join(args)})"
        if node.target is operator.getitem and not node.kwargs:
            return f"{args[0]}[{args[1]}]"
        return f"{self.function(node.target)}({', '.join(args)})"

    def function(self, target: Any) -> str:
        if isinstance(target, HigherOrderOperator):
            return f"torch.ops.higher_order.{target.__name__}"
        if isinstance(target, OpOverload | OpOverloadPacket):
            return f"torch.ops.{target}"
        module, name = str(target.__module__), target.__qualname__
        module = "operator" if module == "_operator" else module
        self.modules.add(module)
        return f"{module}.{name}"

    def value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list):
            return f"[{', '.join(map(self.value, value))}]"
        if isinstance(value, tuple):
            return f"({', '.join(map(self.value, value))}{',' * (len(value) == 1)})"
        if isinstance(value, dict):
            items = (f"{self.value(key)}: {self.value(item)}" for key, item in value.items())
            return f"{{{', '.join(items)}}}"
        if isinstance(value, slice):
            return f"slice({', '.join(map(self.value, (value.start, value.stop, value.step)))})"
        if isinstance(value, float) and not math.isfinite(value):
            self.modules.add("math")
            sign = "-" if value < 0 else ""
            return "math.nan" if math.isnan(value) else f"{sign}math.inf"
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            return self.function(value)
        return repr(value)


def _attribute(target: str) -> str:
    """``self.a.b`` for a dotted target; parts that are no identifiers by ``getattr``."""
    text = "self"
    for part in target.split("."):
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text


def describe(value: Any) -> str:
    """A value in short: ``float32[2, s0] cpu``; tuples in parentheses; numbers by type."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}] {value.device}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return f"{type(value).__name__} {value}"
    return "" if value is None else type(value).__name__


def _comment(node: fx.Node, origins: bool) -> str:
    record = annotation(node)
    group = []
    if record.group is not None:
        group.append(f"{record.group} {record.kind}{'*' if record.anchor else ''}")
    if record.stage is not None:
        group.append(f"stage {record.stage}")
    if record.device is not None:
        group.append(f"on {record.device}")
    if record.layout is not None:
        group.append(record.layout)
    parts = [describe(node.meta.get("val")), ", ".join(group)]
    if origins:
        parts.append(str(origin(node)))
        parts.append(f"by {record.made_by}" if record.made_by else "")
    return re.sub(r"\s+", " ", " | ".join(part for part in parts if part))
