"""Equal computations are done once, unread ones not at all (part of `passes.normalize`)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch.fx as fx

from .base import allow
from .ir import Aliases, Rewriter, alias_source, is_pure


def merge_equal(rewriter: Rewriter) -> list[str]:
    """Let each pure node that repeats an earlier one be that one. Returns the names removed.

    Left alone: random operators, whatever touches memory that is written in place, results that
    would make two outputs share memory, and the cells that routers give to branches: two routers
    of equal routes are two, each with its own gather.
    """
    aliases = Aliases(rewriter.graph)
    first: dict[Hashable, fx.Node] = {}
    done: list[str] = []
    for node in list(rewriter.graph.nodes):
        if node.op not in ("get_attr", "call_function") or not is_pure(node):
            continue
        if str(node.target) == "plait.scatter.default":
            continue
        touched = (node, *node.all_input_nodes) if node.op == "call_function" else ()
        if aliases.mutated and any(map(aliases.is_mutated, touched)):
            continue
        original = first.setdefault(_key(node), node)
        if original is node:
            continue
        shares = node.op == "get_attr" or alias_source(node) is not None
        if not shares and not _may_merge(aliases, node, original):
            continue
        if allow("merge", [node, original]):
            done.append(node.name)
            rewriter.replace(node, original)
    return done


def _may_merge(aliases: Aliases, node: fx.Node, original: fx.Node) -> bool:
    """Whether one result may stand for both; two outputs must stay two tensors."""
    if node not in aliases.escaping:
        return True
    if original in aliases.escaping:
        return False
    aliases.escaping.add(original)
    return True


def _key(node: fx.Node) -> Hashable:
    return node.op, node.target, _freeze(node.args), _freeze(node.kwargs)


def _freeze(value: Any) -> Hashable:
    """A hashable stand-in that tells 1 from 1.0 and True, and 0.0 from -0.0."""
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    if isinstance(value, dict):
        return tuple((key, _freeze(item)) for key, item in sorted(value.items()))
    if isinstance(value, slice):
        return "slice", _freeze((value.start, value.stop, value.step))
    if isinstance(value, int | float | complex):
        return type(value), repr(value)
    return value


def drop_dead(rewriter: Rewriter) -> list[str]:
    """Remove pure nodes that nobody reads. Returns their names."""
    done: list[str] = []
    for node in reversed(list(rewriter.graph.nodes)):
        if node.users or not is_pure(node):
            continue
        if node.op == "get_attr" or allow("drop dead", [node]):
            if node.op != "get_attr":
                done.append(node.name)
            rewriter.graph.erase_node(node)
    return done
