"""Graphs at other sizes: values with symbols replaced, and operators copied into another graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .base import with_graph
from .ir import COND, attribute, fake_mode_of

Attach = Callable[[str, Any], str]
"""Makes a tensor or graph an attribute of the module that nodes are copied to; returns its name."""


class Sizes:
    """Values in which the symbols of ``replaced`` are other sizes (expressions or numbers)."""

    def __init__(self, mode: FakeTensorMode, replaced: Mapping[Any, Any]) -> None:
        self.mode, self.replaced = mode, dict(replaced)

    def value(self, value: Any) -> Any:
        """A node's value, or a size among its arguments, in the new sizes."""
        if isinstance(value, torch.Tensor):
            shape = [self.value(d) for d in value.shape]
            strides = [self.value(s) for s in value.stride()]
            with self.mode:
                return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        if isinstance(value, torch.SymInt):
            expr = value.node.expr.xreplace(self.replaced)
            if expr.is_Integer:
                return int(expr)
            env: Any = self.mode.shape_env
            return env.create_symintnode(expr, hint=None)
        if isinstance(value, torch.SymBool):
            expr = value.node.expr.xreplace(self.replaced)
            return bool(expr) if expr in (sympy.true, sympy.false) else value
        if isinstance(value, (list, tuple)):
            return type(value)(self.value(v) for v in value)
        return value

    def learn(self, module: fx.GraphModule, node: fx.Node) -> None:
        """Call before the `value` of a `torch.cond` of ``module`` is asked for, when those of its
        sides are known. Where data tells a size, the result has a symbol of its own for it; which
        is what the sides have there, if they agree.
        """
        args: Any = node.args
        sides = [attribute(module, str(graph.target)) for graph in args[1:3]]
        outputs = [side.graph.find_nodes(op="output")[0].args[0] for side in sides]
        for result, *made in zip(node.meta["val"], *outputs, strict=True):
            values = [result, *(n.meta.get("val") for n in made if isinstance(n, fx.Node))]
            if len(values) < 3 or not all(isinstance(v, torch.Tensor) for v in values):
                continue
            for size, *both in zip(*(v.shape for v in values), strict=True):
                new, other = map(_expression, map(self.value, both))
                if new == other and free_unbacked_symbols(size) and size.node.expr.is_Symbol:
                    self.replaced.setdefault(size.node.expr, new)


def fitting(mode: FakeTensorMode, inputs: Sequence[fx.Node], given: Sequence[Any]) -> Sizes | None:
    """The sizes at which placeholders ``inputs`` take values like ``given``; None if at none, or
    if a size may be 0: graphs are traced with symbols that are not.
    """
    replaced: dict[Any, Any] = {}
    for node, value in zip(inputs, given, strict=True):
        for old, new in zip(node.meta["val"].shape, value.shape, strict=True):
            if not isinstance(old, torch.SymInt):
                if not isinstance(new, int) or new != old:
                    return None
                continue
            expr = old.node.expr
            now = sympy.Integer(new) if isinstance(new, int) else new.node.expr
            if not expr.is_Symbol:
                continue  # follows from the symbols in it
            if replaced.setdefault(expr, now) != now:
                return None
            if not now.is_positive and mode.shape_env.bound_sympy(now).lower < 1:  # type: ignore[union-attr]
                return None
    return Sizes(mode, replaced)


def copy_into(
    graph: fx.Graph,
    source: fx.GraphModule,
    arguments: Sequence[fx.Node],
    sizes: Sizes,
    attach: Attach,
    skip: Callable[[fx.Node], bool],
) -> list[Any]:
    """Copies the operators of ``source`` to where ``graph`` inserts, its placeholders being
    ``arguments``; returns its results, in order. Nodes that ``skip`` names are left out.
    """
    inner: dict[fx.Node, Any] = {}
    supply = iter(arguments)
    for node in source.graph.nodes:
        if node.op == "placeholder":
            inner[node] = next(supply)
        elif node.op == "get_attr":
            name = attach(str(node.target), attribute(source, str(node.target)))
            inner[node] = graph.get_attr(name)
            inner[node].meta = dict(node.meta)
        elif node.op == "output":
            return list(fx.map_arg(node.args[0], lambda n: inner[n]))
        elif not skip(node):
            if node.target is COND:
                sizes.learn(source, node)
            value = sizes.value(node.meta.get("val"))
            if isinstance(value, int) and not isinstance(value, bool):
                inner[node] = value  # a size that is known now
                continue
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: inner[n])
            args = fx.node.map_aggregate(args, sizes.value)
            copied = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            copied.meta = {**node.meta, "val": value}
            inner[node] = copied
    raise AssertionError("a graph ends in its output")


def attacher(module: fx.GraphModule) -> Attach:
    """Attributes for ``module``: the name asked for, or another where that is taken."""

    def attach(name: str, value: Any) -> str:
        stem, number = name.replace(".", "_"), 0
        candidate = stem
        while (have := getattr(module, candidate, None)) is not None and have is not value:
            number += 1
            candidate = f"{stem}_{number}"
        if have is None:
            if isinstance(value, fx.GraphModule):
                module.add_submodule(candidate, value)
            else:
                module.register_buffer(candidate, value.detach(), persistent=True)
        return candidate

    return attach


def at_rows(source: fx.GraphModule, rows: int, skip: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """``source`` for a first input of ``rows`` rows, a number, in place of a symbol."""
    first = source.graph.find_nodes(op="placeholder")[0]
    symbol = first.meta["val"].shape[0].node.expr
    return at_sizes(source, Sizes(fake_mode_of(source.graph), {symbol: sympy.Integer(rows)}), skip)


def at_sizes(
    source: fx.GraphModule, sizes: Sizes, skip: Callable[[fx.Node], bool]
) -> fx.GraphModule:
    """``source``, and the graphs in it, at other sizes; without the nodes that ``skip`` names."""
    graph = fx.Graph()
    arguments = []
    for node in source.graph.find_nodes(op="placeholder"):
        argument = graph.placeholder(node.name)
        argument.meta = {**node.meta, "val": sizes.value(node.meta["val"])}
        arguments.append(argument)
    inner: dict[str, fx.GraphModule] = {}

    def attach(name: str, value: Any) -> str:
        if isinstance(value, fx.GraphModule):
            inner[name] = at_sizes(value, sizes, skip)
        return name

    graph.output(tuple(copy_into(graph, source, arguments, sizes, attach, skip)))
    result = with_graph(source, graph)
    for name, module in inner.items():
        setattr(result, name, module)
    return result


def _expression(size: Any) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr
