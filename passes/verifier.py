"""Is this a graph that plait's passes may rely on?

The invariants, all checked by `verify`:

* the graph is a DAG in topological order, ends in its one output, and every attribute exists;
* nodes are placeholders, attributes, calls of functions and the output: no modules or methods;
* every placeholder, tensor attribute and call has ``meta["val"]``, and an attribute's agrees with
  its tensor;
* annotations have their one type; if there are groups, then each call on tensors is in one, the
  nodes of a group agree about its kind, have at most one anchor, and no two groups need each
  other (which makes every group convex);
* at level "full": running each operator on fake tensors gives the dtype, shape and device that
  ``meta["val"]`` claims. This costs about as much as capture does.

Branches of control flow are graphs too and are checked likewise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.fx as fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils import _pytree as pytree

from .annotations import KEY, Annotation, annotation
from .groups import groups_of
from .ir import attribute, fake_mode_of, fake_result, is_mutating

Level = Literal["off", "structure", "full"]
_SHOWN = 10


class InvalidGraph(ValueError):
    """A graph breaks an invariant; ``problems`` lists how, one sentence each."""

    def __init__(self, problems: list[str], where: str = "") -> None:
        self.problems = problems
        shown = [f"  {problem}" for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            shown.append(f"  and {len(problems) - _SHOWN} more")
        super().__init__("\n".join([f"invalid graph{where and ' ' + where}:", *shown]))


def verify(graph_module: fx.GraphModule, level: Level = "structure", where: str = "") -> None:
    """Check the invariants.

    Args:
        level: "off" checks nothing, "structure" all that is cheap, "full" shapes and dtypes too.
        where: for the message, such as "after normalize".

    Raises:
        InvalidGraph: listing every problem found.
    """
    found = list(problems(graph_module, level))
    if found:
        raise InvalidGraph(found, where)


def problems(graph_module: fx.GraphModule, level: Level = "structure") -> Iterator[str]:
    """Every broken invariant, one sentence each."""
    if level == "off":
        return
    try:
        graph_module.graph.lint()
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        yield str(error).strip().split("\n", 1)[0]
        return
    nodes = list(graph_module.graph.nodes)
    outputs = [node for node in nodes if node.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        yield f"the graph has {len(outputs)} output nodes; it must end in exactly one"
    for node in nodes:
        yield from _node_problems(graph_module, node)
    yield from _group_problems(graph_module)
    if level == "full":
        yield from _value_problems(graph_module)
    for node in nodes:
        if node.op == "get_attr":
            branch = attribute(graph_module, str(node.target))
            if isinstance(branch, fx.GraphModule):
                for problem in problems(branch, level):
                    yield f"in {node.target}: {problem}"


def _node_problems(graph_module: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    if node.op == "output":
        return
    if node.op in ("call_module", "call_method"):
        yield f"{node.name}: {node.op} nodes are not allowed; capture the model with torch.export"
        return
    record = node.meta.get(KEY)
    if record is not None and not isinstance(record, Annotation):
        yield f"{node.name}: meta[{KEY!r}] is a {type(record).__name__}, not an Annotation"
    if node.op != "get_attr":
        if "val" not in node.meta and not _returns_nothing(node):
            yield f'{node.name}: meta["val"] is missing'
        return
    value = attribute(graph_module, str(node.target))
    if not isinstance(value, torch.Tensor):
        return
    claim = node.meta.get("val")
    if not isinstance(claim, torch.Tensor):
        yield f'{node.name}: meta["val"] of a tensor attribute is missing'
    elif difference := _difference(claim, value, absent=value.is_meta):
        yield f"{node.name}: attribute {node.target} {difference}"


def _returns_nothing(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def _group_problems(graph_module: fx.GraphModule) -> Iterator[str]:
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    if any(not isinstance(node.meta.get(KEY, Annotation()), Annotation) for node in calls):
        return  # told already
    grouped = [node for node in calls if annotation(node).group is not None]
    if not grouped:
        return
    for node in calls:
        if annotation(node).group is None and isinstance(node.meta.get("val"), torch.Tensor):
            yield f"{node.name}: in no group, although the graph has groups"
    try:
        groups = groups_of(graph_module)
    except ValueError as error:
        yield str(error)
        return
    for group in groups:
        anchors = [node.name for node in group.nodes if annotation(node).anchor]
        if len(anchors) > 1:
            yield f"group {annotation(group.nodes[0]).group} has {len(anchors)} anchors: {anchors}"


def _value_problems(graph_module: fx.GraphModule) -> Iterator[str]:
    mode = fake_mode_of(graph_module.graph)
    with _without_traces(mode):
        for node in graph_module.graph.nodes:
            if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
                continue
            if is_mutating(node) or any("val" not in arg.meta for arg in node.all_input_nodes):
                continue
            try:
                result = fake_result(node, mode)
            except Exception as error:  # operators raise what they like
                text = str(error).strip().split("\n", 1)[0]
                yield f"{node.name}: {node.target} rejects its arguments: {text}"
                continue
            yield from _compare(node, result)


@contextlib.contextmanager
def _without_traces(mode: FakeTensorMode) -> Iterator[None]:
    """Evaluate operators without leaving guards or new symbols behind."""
    with contextlib.ExitStack() as stack:
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield


def _compare(node: fx.Node, result: Any) -> Iterator[str]:
    claims = pytree.tree_leaves(node.meta.get("val"))
    facts = pytree.tree_leaves(result)
    if len(claims) != len(facts):
        yield f'{node.name}: meta["val"] has {len(claims)} values, the operator makes {len(facts)}'
        return
    for claim, fact in zip(claims, facts, strict=True):
        if isinstance(claim, torch.Tensor) != isinstance(fact, torch.Tensor):
            yield f'{node.name}: meta["val"] is a {type(claim).__name__}, not {type(fact).__name__}'
        elif isinstance(claim, torch.Tensor) and (difference := _difference(claim, fact)):
            yield f"{node.name}: the operator's result {difference}"


def _difference(claim: torch.Tensor, fact: torch.Tensor, absent: bool = False) -> str:
    """How a tensor differs from what ``meta["val"]`` claims; empty if it does not. A weight that is
    ``absent`` will be where it is claimed to be once it is loaded.
    """
    if fact.dtype != claim.dtype:
        return f"has dtype {fact.dtype}, claimed is {claim.dtype}"
    if fact.device.type != claim.device.type and not absent:
        return f"is on {fact.device}, claimed is {claim.device}"
    same = fact.dim() == claim.dim() and all(map(_same_or_unknown, fact.shape, claim.shape))
    return "" if same else f"has shape {list(fact.shape)}, claimed is {list(claim.shape)}"


def _same_or_unknown(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if free_unbacked_symbols(a) or free_unbacked_symbols(b):
        return True  # each run of such an operator makes new symbols
    return statically_known_true(a == b)
