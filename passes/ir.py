"""Questions about FX nodes that several passes ask, and the tool they rewrite graphs with.

An FX value is a tensor, a tuple of tensors, a symbol (SymInt and kin) or nothing; what it is at
trace time lies in ``meta["val"]``. *Purity* and *aliasing* are read off operator schemas, so an
operator that nobody taught plait about is treated by what it declares, and with caution.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx as fx
from torch._guards import detect_fake_mode
from torch._library.utils import is_impure
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode

from .annotations import annotate
from .base import with_graph

aten = torch.ops.aten
COND = torch.ops.higher_order.cond

_OFF_BY_FLAG: dict[Any, tuple[int, str, Any]] = {
    # Operators that declare themselves random, and the argument value that makes them not so.
    aten.dropout.default: (2, "train", False),
    aten.feature_dropout.default: (2, "train", False),
    aten.alpha_dropout.default: (2, "train", False),
    aten.feature_alpha_dropout.default: (2, "train", False),
    aten.native_dropout.default: (2, "train", False),
    aten.scaled_dot_product_attention.default: (4, "dropout_p", 0.0),
    aten.rrelu.default: (3, "training", False),
}

_SEES_STRIDES = (
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
    aten.view.dtype,
    aten.view_as_complex.default,
)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or by keyword; ``default`` where it was left out."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def branches_of(graph_module: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    """The graphs that operators of ``graph_module`` take as arguments, by their attribute."""
    names = dict.fromkeys(str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr")
    found = ((name, getattr(graph_module, name, None)) for name in names)
    return [(name, value) for name, value in found if isinstance(value, fx.GraphModule)]


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` is a call of one of ``targets`` (of anything, if none are given)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return not targets or node.target in targets


def is_random(node: fx.Node) -> bool:
    """Whether a call draws from a random number generator."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    if node.target not in _OFF_BY_FLAG:
        return True
    position, name, off = _OFF_BY_FLAG[node.target]
    return argument(node, position, name, off if name == "dropout_p" else None) != off


def is_mutating(node: fx.Node) -> bool:
    """Whether a call writes to one of its arguments."""
    target = node.target
    return (
        node.op == "call_function" and isinstance(target, OpOverload) and target._schema.is_mutable
    )


def is_pure(node: fx.Node) -> bool:
    """Whether the node may be dropped when unread, and merged with an equal node."""
    if node.op in ("placeholder", "output", "call_module", "call_method"):
        return False
    if node.op == "get_attr":
        return True
    if isinstance(node.target, HigherOrderOperator):
        return False
    if is_random(node):
        return False
    # Randomness is judged above, where switched-off dropout is known not to draw.
    return not is_impure(node.target, args=node.args, kwargs=dict(node.kwargs), impure_random=False)  # type: ignore[arg-type]


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that a mutating call writes to."""
    if not is_mutating(node):
        return []
    found: list[fx.Node] = []
    for i, arg in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if arg.alias_info is not None and arg.alias_info.is_write:
            fx.map_arg(argument(node, i, arg.name), found.append)
    return found


def alias_source(node: fx.Node) -> fx.Node | None:
    """The node whose memory the result of ``node`` may share; None for memory of its own."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is operator.getitem:
        return node.args[0] if alias_source(node.args[0]) is not None else None
    if not isinstance(node.target, OpOverload):
        return None
    if torch.Tag.maybe_aliasing_or_mutating in node.target.tags:
        return node.args[0]
    returns = node.target._schema.returns
    return node.args[0] if any(r.alias_info is not None for r in returns) else None


def alias_root(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` reads, through any number of views."""
    while (source := alias_source(node)) is not None:
        node = source
    return node


class Aliases:
    """Which nodes' memory the caller can see, and which is written in place.

    ``escaping`` holds the nodes that are outputs, or whose views are. ``mutated`` holds those
    that a mutating call writes to, directly or through views. ``layout_matters`` tells that some
    operator sees strides, so that no copy may be dropped.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.escaping: set[fx.Node] = set()
        self.mutated: set[fx.Node] = set()
        self.layout_matters = False
        targets: set[Any] = set()
        for node in graph.nodes:
            self.layout_matters |= is_call(node, *_SEES_STRIDES)
            if node.op == "output":
                for arg in node.all_input_nodes:
                    self._mark(arg, self.escaping)
            for arg in mutated_arguments(node):
                self._mark(arg, self.mutated)
                root = alias_root(arg)
                if root.op == "get_attr":
                    targets.add(root.target)
        if targets:
            same = (n for n in graph.nodes if n.op == "get_attr" and n.target in targets)
            self.mutated.update(same)

    @staticmethod
    def _mark(node: fx.Node | None, seen: set[fx.Node]) -> None:
        while node is not None and node not in seen:
            seen.add(node)
            node = alias_source(node)

    def is_mutated(self, node: fx.Node) -> bool:
        """Whether the memory that ``node`` reads is written somewhere in the graph."""
        return node in self.mutated or alias_root(node) in self.mutated

    def may_replace(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether readers of ``node``, a copy of ``source``, may read ``source`` instead.

        Not if that made an output share memory with an input, a constant or another output,
        and not across writes. On True the answer is remembered as if it was acted upon.
        """
        if self.layout_matters or self.is_mutated(node) or self.is_mutated(source):
            return False
        if node not in self.escaping:
            return True
        root = alias_root(source)
        if root.op != "call_function" or root in self.escaping:
            return False
        self._mark(source, self.escaping)
        return True


def attribute(graph_module: torch.nn.Module, target: str) -> Any:
    """The object that a ``get_attr`` node with this (dotted) target yields."""
    value: Any = graph_module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Sizes of a tensor-valued node (ints and SymInts); None for anything else."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input. Adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _expression(a) == _expression(b)


def same_shape(a: Iterable[Any] | None, b: Iterable[Any] | None) -> bool:
    """Whether two shapes are equal for every input; False if one is None."""
    if a is None or b is None:
        return False
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(same_size, a, b))


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The mode of the graph's fake tensors; a new one where it has none."""
    values = [n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), FakeTensor)]
    return detect_fake_mode(values[:1]) or FakeTensorMode(allow_non_fake_inputs=True)


_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "seq_nr")


class Rewriter:
    """Creates and replaces nodes of a graph that is ours to change.

    ``graph_module`` must be a copy (`base.copy_graph`). Nodes created get ``meta["val"]`` by
    running the operator on fake tensors, and inherit where they come from.
    """

    def __init__(self, graph_module: fx.GraphModule, pass_name: str) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.pass_name = pass_name
        self.mode = fake_mode_of(self.graph)
        self._numbers: dict[str, int] = {}

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor of a ``get_attr`` node; None for any other node."""
        if node.op != "get_attr":
            return None
        value = attribute(self.graph_module, str(node.target))
        return value.detach() if isinstance(value, torch.Tensor) else None

    def constant(self, tensor: torch.Tensor, hint: str, before: fx.Node) -> fx.Node:
        """A new constant, as a buffer called after ``hint``, and the node that reads it."""
        stem = f"_plait_{hint.replace('.', '_')}"
        number = self._numbers.get(stem, 0)
        while hasattr(self.graph_module, f"{stem}_{number}"):
            number += 1
        self._numbers[stem] = number + 1
        name = f"{stem}_{number}"
        self.graph_module.register_buffer(name, tensor.detach(), persistent=True)
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name, (), {}, hint.replace(".", "_"))
        node.meta["val"] = self.mode.from_tensor(tensor.detach(), static_shapes=True)
        self._inherit(node, before)
        return node

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        like: fx.Node,
        value: Any = None,
    ) -> fx.Node:
        """A new call just before ``like``, from which it inherits its origin.

        ``value`` is its ``meta["val"]`` where the caller knows it.
        """
        with self.graph.inserting_before(like):
            node = self.graph.create_node("call_function", target, args, kwargs, like.name)
        node.meta["val"] = fake_result(node, self.mode) if value is None else value
        self._inherit(node, like)
        return node

    def _inherit(self, node: fx.Node, like: fx.Node) -> None:
        for key in _INHERITED:
            if key in like.meta:
                node.meta[key] = like.meta[key]
        annotate(node, made_by=self.pass_name)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let readers of ``old`` read ``new``, and drop ``old``."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def finish(self) -> fx.GraphModule:
        """The graph as a module of its own, without attributes that no node reads any more."""
        return with_graph(self.graph_module, self.graph)


def fake_result(node: fx.Node, mode: FakeTensorMode) -> Any:
    """What ``node`` yields on fake tensors, its arguments taken from their ``meta["val"]``.

    What torch asks of open sizes meanwhile does not narrow them: the program is for all of them.
    """
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    env = mode.shape_env
    open_sizes = contextlib.nullcontext() if env is None else env.suppress_guards()
    with mode, torch.no_grad(), open_sizes:
        return node.target(*args, **kwargs)  # type: ignore[operator]
