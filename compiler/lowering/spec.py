"""Canonical text of a group: equal text means one kernel serves both."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from ...kernels.abi import TensorArg
from ...kernels.group import Group
from .. import sizes


class Spec:
    """The text of a group on given tensors, with its symbols renamed in order of appearance.

    ``rename`` maps the graph's symbol names to canonical ones (k0, k1, ...).
    """

    def __init__(self, group: Group, io: Mapping[fx.Node, TensorArg]) -> None:
        names = {n: f"i{k}" for k, n in enumerate(group.inputs)}
        names |= {n: f"n{k}" for k, n in enumerate(group.nodes)}
        lines = [group.kind]
        lines += [f"in {io[n].key()}" for n in group.inputs]
        for node in group.nodes:
            args = ", ".join(_argument(a, names) for a in node.args)
            kwargs = ", ".join(f"{k}={_argument(v, names)}" for k, v in sorted(node.kwargs.items()))
            lines.append(
                f"{names[node]} = {_target(node)}({args}; {kwargs}) {_meta(node.meta.get('val'))}"
            )
        lines += [f"out {names[n]} {io[n].key()}" for n in group.outputs]
        raw = "\n".join(lines)
        self.rename: dict[str, str] = {}
        symbols = sorted(
            {s for n in (*group.nodes, *group.inputs) for s in _symbols(n.meta.get("val"))}
            | {s for a in io.values() for d in (*a.shape, *a.strides) for s in sizes.symbols(d)}
        )
        if symbols:
            pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
            for match in pattern.finditer(raw):
                self.rename.setdefault(match.group(), f"k{len(self.rename)}")
            raw = pattern.sub(lambda m: self.rename[m.group()], raw)
        self.text = raw

    def hash(self, *context: str) -> str:
        """Content hash of the spec in a context (target, configuration, versions)."""
        return hashlib.sha256("\n".join((self.text, *context)).encode()).hexdigest()[:32]


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.name()
    return getattr(node.target, "__name__", str(node.target))


def _argument(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        known = names.get(value)
        return known if known is not None else f"<{value.meta.get('val')}>"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v, names) for v in value) + "]"
    return repr(value)


def _meta(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{[str(sizes.dim(d)) for d in value.shape]}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_meta(v) for v in value) + ")"
    if isinstance(value, torch.SymInt):
        return str(value.node.expr)
    return str(value)


def _symbols(value: Any) -> set[str]:
    if isinstance(value, torch.Tensor):
        return {s for d in value.shape for s in sizes.symbols(sizes.dim(d))}
    if isinstance(value, (list, tuple)):
        return {s for v in value for s in _symbols(v)}
    if isinstance(value, torch.SymInt):
        return sizes.symbols(sizes.dim(value))
    return set()
