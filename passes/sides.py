"""Constants that only one side of a `torch.cond` reads are that side's own (part of
`passes.normalize`).

before: y = cond(p, f, g, (x, weight1, weight2))    f reads x and weight1, g reads x and weight2
after:  y = cond(p, f, g, (x,))                     f holds weight1, g holds weight2

Capture hands all weights to both sides. Within a side, what depends on its constants alone can be
folded and packed for its kernels, and is not wanted while the other side runs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.fx as fx

from .base import allow, copy_graph
from .ir import COND, Aliases, Rewriter, attribute
from .resize import attacher


def own_constants(rewriter: Rewriter) -> list[str]:
    """Let sides hold the constants that they alone read. Returns the names of the constants."""
    module, aliases = rewriter.graph_module, Aliases(rewriter.graph)
    uses = Counter(str(a.target) for n in rewriter.graph.nodes for a in _graphs(n))
    done: list[str] = []
    for node in rewriter.graph.find_nodes(op="call_function", target=COND):
        if any(uses[str(graph.target)] > 1 for graph in _graphs(node)):
            continue  # somebody else, who gives other operands, runs the same graph
        own = [
            operand
            for operand in own_operands(module, node)
            if rewriter.value(operand) is not None and not aliases.is_mutated(operand)
        ]
        if own and allow("give constants to sides", [node, *own]):
            _give(module, node, own)
            done += [operand.name for operand in own]
    return done


def own_operands(module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The operands of a `torch.cond` that one of its sides reads, or none."""
    operands: Any = node.args[3]
    readers: dict[fx.Node, set[int]] = {a: set() for a in operands if isinstance(a, fx.Node)}
    for side, graph in enumerate(_graphs(node)):
        inputs = attribute(module, str(graph.target)).graph.find_nodes(op="placeholder")
        for operand, placeholder in zip(operands, inputs, strict=True):
            if placeholder.users and operand in readers:
                readers[operand].add(side)
    return [operand for operand, sides in readers.items() if len(sides) < 2]


def _graphs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The graphs of both sides."""
    args: Any = node.args
    return tuple(args[1:3]) if node.op == "call_function" and node.target is COND else ()


def _give(module: fx.GraphModule, node: fx.Node, own: list[fx.Node]) -> None:
    """Turns operands of a `torch.cond` into constants of the side that reads them."""
    args: Any = node.args
    predicate, *graphs, operands = args
    for graph in graphs:
        side = copy_graph(attribute(module, str(graph.target)))
        attach = attacher(side)
        inputs = list(side.graph.find_nodes(op="placeholder"))
        for operand, placeholder in zip(operands, inputs, strict=True):
            if operand not in own:
                continue
            if placeholder.users:
                value = attribute(module, str(operand.target))
                with side.graph.inserting_after(inputs[-1]):
                    constant = side.graph.get_attr(attach(str(operand.target), value))
                constant.meta = dict(operand.meta)
                placeholder.replace_all_uses_with(constant)
            side.graph.erase_node(placeholder)
        side.recompile()
        setattr(module, str(graph.target), side)
    node.args = (predicate, *graphs, tuple(a for a in operands if a not in own))
