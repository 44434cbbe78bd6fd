"""From a model to a placement problem: `torch.export` on whatever device, meta too.

Nothing is run and no weights are needed: shapes give sizes and FLOPs, a roofline model gives times.
What the graph says becomes the problem as follows.

- An operator is an op; operators that only view their input belong to what they view, for a view
  holds no memory and takes no time.
- A parameter or buffer stays with all its readers, which therefore are one colocation group, with
  its gradient and its optimizer's state.
- Inputs, random ops, and ops that write in place or read what is written may not be recomputed.
- A tensor is an edge to each reader; inputs of the program are ops without time.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ...passes.annotations import annotation
from ...passes.ir import is_pure, mutated_arguments
from ...passes.placement.devices import Placed, host_links, times
from ...passes.placement.placement import Placement
from ...passes.placement.problem import Edge, Link, Op, Problem
from ..errors import CaptureError

_STATE = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
OPTIMIZERS = {"none": 0, "sgd": 0, "momentum": 1, "adam": 2}
"""Float32 states that an optimizer keeps for each parameter."""


@dataclass
class Work:
    """What one op of the graph costs: FLOPs, bytes touched, and the width of its elements."""

    flops: float = 0.0
    nbytes: float = 0.0
    width: int = 4


@dataclass
class Graph:
    """A traced model, before devices are known; ``weights`` are the parameters that ops read."""

    name: str
    ops: list[Op] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    work: dict[str, Work] = field(default_factory=dict)
    weights: dict[str, list[str]] = field(default_factory=dict)
    wrapped: bool = False

    def device_map(self, placement: Placement) -> dict[str, int | str]:
        """Where each parameter and buffer goes, as accelerate's ``device_map`` takes it.

        Devices of one kind but "cpu" are numbered from 0 on, in the order of the problem; a module
        whose parts are all on one device is named instead of its parts.
        """
        names = sorted(set(placement.assign.values()), key=_natural)
        numbers: dict[str, int | str] = {}
        for name in names:
            on_host = name.startswith("cpu")
            accelerators = sum(not str(x).startswith("cpu") for x in numbers)
            numbers[name] = "cpu" if on_host else accelerators
        where = {
            w: numbers[placement.assign[op]] for op, all_ in self.weights.items() for w in all_
        }
        return _shortened({name.removeprefix("model.") if self.wrapped else name: device
                           for name, device in where.items()})  # fmt: skip

    def problem(
        self, devices: Sequence[Placed], link: Link, host_link: Link | None = None
    ) -> Problem:
        """The problem of placing the graph on devices that are joined by equal links, but for
        those between CPUs and others, where ``host_link`` is given.
        """
        ops = []
        same = all(x.kind is devices[0].kind for x in devices)
        for op in self.ops:
            work = self.work[op.name]
            seconds = times(devices, work.flops, work.nbytes, work.width)
            if not work.nbytes and not work.flops:
                seconds = tuple(0.0 for _ in devices)
            time: Any = seconds[0] * devices[0].device.speed if same else seconds
            ops.append(replace(op, time_s=time))
        found = tuple(x.device for x in devices)
        links = {} if host_link is None else host_links(devices, host_link)
        return Problem(self.name, "dynamic", found, link, links, tuple(ops), tuple(self.edges))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts d2 before d10."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", name)]


def _shortened(where: dict[str, int | str]) -> dict[str, int | str]:
    """The same map with modules for their parts wherever all of them are on one device."""
    found: dict[str, int | str] = {}
    children: dict[str, dict[str, int | str]] = {}
    for name, device in where.items():
        head, dot, rest = name.partition(".")
        if dot:
            children.setdefault(head, {})[rest] = device
        else:
            found[name] = device
    for head, parts in children.items():
        devices = set(parts.values())
        if len(devices) == 1:
            found[head] = devices.pop()
        else:
            found.update({f"{head}.{name}": d for name, d in _shortened(parts).items()})
    return found


def trace(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    optimizer: str | None = None,
) -> Graph:
    """The graph of one call of ``model``; with ``optimizer`` of a training step, loss to gradients.

    A training step needs a model that returns its loss, alone or first. Raises CaptureError with
    torch's reason where the model cannot be exported.
    """
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise CaptureError(
            "PLT-PLC-001", f"unknown optimizer {optimizer!r}", f"use {', '.join(OPTIMIZERS)}"
        )
    wrapped = model if optimizer is None else _Loss(model)
    try:
        # Without gradients a model's own `torch.no_grad` changes nothing, and leaves no subgraph.
        with torch.set_grad_enabled(optimizer is not None):
            program = torch.export.export(wrapped, tuple(args), dict(kwargs or {}), strict=False)
        traced = _forward(program)
        if optimizer is not None:
            traced = _joint(program, args, kwargs or {})
    except Exception as error:  # export raises whatever the model or torch raise
        line = (str(error).strip().splitlines() or [""])[0]
        raise CaptureError(
            "PLT-PLC-002",
            f"{type(model).__name__} cannot be exported: {type(error).__name__}: {line}",
            "plait check MODEL shows more",
        ) from error
    for node in traced.graph.nodes:
        if any(map(has_free_unbacked_symbols, values_of(node))):
            raise CaptureError(
                "PLT-PLC-002",
                f"the size of {node.name!r} in {type(model).__name__} is known only from data",
                "put experts of one shape in place of branches, or place the branches' parts alone",
            )
    return _Builder(traced, type(model).__name__, optimizer).graph()


def _forward(program: Any) -> Traced:
    """The exported graph, with what its placeholders are."""
    states = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in _STATE:
            states[spec.arg.name] = (str(spec.target), spec.kind is InputKind.PARAMETER)
    return Traced(program.graph, states, {})


def _joint(program: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Traced:
    """The exported graph and its gradients as one, traced through autograd on fake tensors."""
    module = program.module()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    state = {**trained, **frozen, **dict(module.named_buffers())}

    def step(state: Mapping[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
        loss = torch.func.functional_call(module, dict(state), args, kwargs)
        weights = [state[name] for name in trained]
        return loss, torch.autograd.grad(loss, weights, allow_unused=True)

    joint = make_fx(step, tracing_mode="fake")(state, tuple(args), dict(kwargs))
    holders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    states = {
        node.name: (name, name in trained) for node, name in zip(holders, state, strict=False)
    }
    (output,) = (node for node in joint.graph.nodes if node.op == "output")
    gradients = output.args[0][1:]  # flat: the loss, then a gradient or None for each
    named = zip(gradients, trained, strict=True)
    return Traced(joint.graph, states, {n.name: name for n, name in named if n is not None})


@dataclass(frozen=True)
class Traced:
    """A graph; its placeholders that are state (name, whether it is trained); its gradients."""

    graph: fx.Graph
    states: Mapping[str, tuple[str, bool]]
    gradients: Mapping[str, str]


class _Loss(torch.nn.Module):
    """Returns the loss alone: joint graphs have one scalar output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves(self.model(*args, **kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        return tensors[0] if tensors[0].ndim == 0 else tensors[0].float().mean()


class _Builder:
    def __init__(self, traced: Traced, name: str, optimizer: str | None) -> None:
        self.traced, self.optimizer = traced, optimizer
        self.out = Graph(name, wrapped=optimizer is not None)
        # A node -> (op that made its tensor, tensor name); None for state, which no edge carries.
        self.home: dict[fx.Node, tuple[str, str] | None] = {}
        self.state_of: dict[fx.Node, str] = {}
        self.parent: dict[str, str] = {}  # union-find of colocated ops and states
        self.bytes: dict[str, float] = {}  # state -> bytes
        self.items: dict[str, dict[str, Any]] = {}
        self.written: set[str] = set()  # ops and states whose values change in place

    def graph(self) -> Graph:
        for node in self.traced.graph.nodes:
            if node.op == "placeholder" and node.name in self.traced.states:
                self._state(node, *self.traced.states[node.name])
            elif node.op == "placeholder" and _has_tensor(node):
                self.home[node] = (node.name, "")
                self._add(node.name, Work(), bytes_of(node), recompute=False)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "get_attr" and _has_tensor(node):
                self._state(node, str(node.target))
            elif node.op == "output":
                self._outputs(node, self.traced.gradients)
        return self._finish()

    def _state(self, node: fx.Node, target: str, trained: bool = False) -> None:
        size = bytes_of(node)
        if trained and self.optimizer not in (None, "none"):
            value = node.meta["val"]
            size = 2 * size + 4 * OPTIMIZERS[self.optimizer] * value.numel()
        elif trained and self.optimizer is not None:
            size *= 2  # its gradient
        self.home[node] = None
        self.state_of[node] = target
        self.bytes[target] = size
        self.parent.setdefault("/" + target, "/" + target)

    def _call(self, node: fx.Node) -> None:
        inputs = [x for x in node.all_input_nodes if x in self.home]
        if node.target is operator.getitem:
            source = inputs[0]
            home = self.home[source]
            self.home[node] = home and (home[0], f"{home[1]}[{node.args[1]}]")
            if source in self.state_of:
                self.state_of[node] = self.state_of[source]
            return
        if not _has_tensor(node):  # a number: computed on the host
            self.home[node] = None
            return
        if is_view(node) and inputs:
            self.home[node] = self.home[inputs[0]]
            if inputs[0] in self.state_of:
                self.state_of[node] = self.state_of[inputs[0]]
            return
        sizes = [bytes_of(x) for x in inputs]
        made = bytes_of(node)
        width = max([width_of(x) for x in (*inputs, node) if _floating(x)], default=4)
        widths = [width_of(x) for x in inputs if _floating(x)]
        work = Work(flops_of(node), sum(sizes) + made, min(widths, default=width))
        self.home[node] = (node.name, "")
        self._add(node.name, work, made, recompute=is_pure(node))
        for x in mutated_arguments(node):
            home = self.home.get(x)
            self.written.add(home[0] if home is not None else "/" + self.state_of.get(x, ""))
        for x, size in zip(inputs, sizes, strict=True):
            home = self.home[x]
            if home is not None:
                self.out.edges.append(Edge(home[0], node.name, size, home[1]))
            elif x in self.state_of:
                self._join(node.name, "/" + self.state_of[x])
                self.out.weights.setdefault(node.name, []).append(self.state_of[x])

    def _outputs(self, node: fx.Node, gradients: Mapping[str, str]) -> None:
        for x in tree_leaves(node.args):
            home = self.home.get(x) if isinstance(x, fx.Node) else None
            if home is None:
                continue
            target = gradients.get(x.name)
            if target is not None:  # its bytes are counted beside the parameter's
                self._join(home[0], "/" + target)
                self.items[home[0]]["output_bytes"] = 0.0
            elif not home[1]:
                self.items[home[0]]["keep"] = True

    def _add(self, name: str, work: Work, made: float, recompute: bool) -> None:
        self.items[name] = {"output_bytes": made, "keep": False, "recompute": recompute}
        self.out.work[name] = work
        self.parent.setdefault(name, name)

    def _find(self, x: str) -> str:
        while self.parent[x] != x:
            self.parent[x] = self.parent[self.parent[x]]
            x = self.parent[x]
        return x

    def _join(self, a: str, b: str) -> None:
        self.parent[self._find(a)] = self._find(b)

    def _finish(self) -> Graph:
        members: dict[str, list[str]] = {}
        for name in self.items:
            members.setdefault(self._find(name), []).append(name)
        # A state's bytes go to the first op of its group; unread states take no room.
        held = dict.fromkeys(self.items, 0.0)
        for target, size in self.bytes.items():
            readers = members.get(self._find("/" + target))
            if readers:
                held[readers[0]] += size
        group = {
            n: names[0] if len(names) > 1 else None for names in members.values() for n in names
        }
        # What is written to has another value later: neither it nor its readers can run again.
        again = {*self.written}
        again.update(edge.dst for edge in self.out.edges if edge.src in self.written)
        for name, states in self.out.weights.items():
            if not self.written.isdisjoint("/" + x for x in states):
                again.add(name)
        for name in again.intersection(self.items):
            self.items[name]["recompute"] = False
        for name, item in self.items.items():
            self.out.ops.append(Op(name, 0.0, held[name], 0.0, group=group[name], **item))
        return self.out


def values_of(node: fx.Node) -> list[torch.Tensor]:
    return [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]


def _has_tensor(node: fx.Node) -> bool:
    return bool(values_of(node))


def bytes_of(node: fx.Node) -> float:
    """Bytes of a node's tensors; broadcast dimensions of an expanded tensor take none."""
    total = 0.0
    for value in values_of(node):
        count = 1
        for size, stride in zip(value.shape, value.stride(), strict=True):
            count *= int(size) if stride else 1
        total += count * value.element_size()
    return total


def _floating(node: fx.Node) -> bool:
    values = values_of(node)
    return bool(values) and values[0].is_floating_point()


def width_of(node: fx.Node) -> int:
    return values_of(node)[0].element_size()


def is_view(node: fx.Node) -> bool:
    """Whether an operator returns a view of its first argument and does nothing else."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target is torch.ops.aten._unsafe_view.default:  # by its schema it copies
        return True
    returns = target._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def flops_of(node: fx.Node) -> float:
    """FLOPs by torch's own formulas for products; others do about one per element they make."""
    target: Any = node.target
    values = [x.meta["val"] for x in node.all_input_nodes if _has_tensor(x)]
    (made, *_) = values_of(node)
    name = str(target).split(".")[1] if str(target).startswith("aten.") else ""
    if name in ("linear", "matmul"):  # operators that export keeps whole
        return 2.0 * made.numel() * values[0].shape[-1]
    if name in ("conv1d", "conv2d", "conv3d"):
        return 2.0 * made.numel() * values[1][0].numel()
    if name == "scaled_dot_product_attention":
        query, key = values[0], values[1]
        return 2.0 * query.numel() * key.shape[-2] + 2.0 * made.numel() * key.shape[-2]
    if str(target) == "plait.routed_linear.default":
        return 2.0 * made.numel() * values[0].shape[-1] * (annotation(node).load or 1.0)
    packet = getattr(target, "overloadpacket", None)
    formula: Callable[..., Any] | None = flop_registry.get(packet)  # type: ignore[arg-type]
    if formula is None:
        return float(sum(x.numel() for x in values_of(node)))
    take = lambda x: x.meta.get("val") if isinstance(x, fx.Node) else x  # noqa: E731
    args, kwargs = fx.node.map_aggregate(node.args, take), fx.node.map_aggregate(node.kwargs, take)
    return float(formula(*args, **kwargs, out_val=node.meta.get("val")))
