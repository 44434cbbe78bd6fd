"""``torch.compile(model, backend="plait")``.

Dynamo hands over graph pieces with the weights as inputs. Each piece is compiled like any function
by `Dispatcher`, after binding what Dynamo marks as parameters and buffers. Sizes that Dynamo passes
as integers are read from the tensors they belong to, so they stay dynamic. The entry point
``torch_dynamo_backends`` names `plait_backend`; `register` does the same for a process in which
plait is importable but not installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.export import Dim

from .dispatch import Dispatcher
from .notes import Notes
from .options import Options

NAME = "plait"


def plait_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """A callable for ``graph_module``. ``options`` are those of `Options` ("tune", "pipeline").

    A piece whose weights require gradients runs as it is while gradients are enabled, and so does
    one that is given a number that is no tensor's size.
    """
    return _Piece(graph_module, example_inputs, Options(**(options.get("options") or options)))


def register() -> None:
    """Makes the name "plait" known to `torch.compile` in this process."""
    from torch._dynamo.backends.registry import register_backend

    register_backend(name=NAME)(plait_backend)  # type: ignore[call-arg]


class _Bound(nn.Module):
    """A graph piece with its static inputs as buffers and its integer inputs derived from sizes."""

    def __init__(self, piece: fx.GraphModule, count: int) -> None:
        super().__init__()
        self.piece = piece
        self.fixed: dict[int, str] = {}
        self.sizes: dict[int, tuple[int, int]] = {}
        self.count = count
        self.eval()

    def bind(self, position: int, tensor: torch.Tensor) -> None:
        self.fixed[position] = name = f"static_{position}"
        self.register_buffer(name, tensor.detach(), persistent=False)

    def forward(self, *free: torch.Tensor) -> Any:
        supply = iter(free)
        values: list[Any] = [None] * self.count
        for i in range(self.count):
            if i in self.fixed:
                values[i] = getattr(self, self.fixed[i])
            elif i not in self.sizes:
                values[i] = next(supply)
        for i, (tensor, dim) in self.sizes.items():
            values[i] = values[tensor].shape[dim]
        return self.piece(*values)


class _Piece:
    """The callable Dynamo gets. Compiles at the first call, when real tensors are at hand."""

    def __init__(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options
    ) -> None:
        self.graph_module, self.options = graph_module, options
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        self.static = [i for i, n in enumerate(placeholders) if _is_static(n)]
        pairs = zip(placeholders, example_inputs, strict=True)
        values = [n.meta.get("example_value", e) for n, e in pairs]
        self.sizes = _size_sources(values)
        self.supported = self.sizes is not None
        if not self.supported:
            Notes().say(
                "PLT-CAP-011",
                "a piece is given a number that is no size of its tensors, so it runs as it is",
                "compute it from a tensor's shape within the piece, or use plait.compile",
            )
            return
        bound = {*self.static, *(self.sizes or ())}
        self.free = [i for i in range(len(placeholders)) if i not in bound]
        self.dynamic = [_open_dims(values[i]) for i in self.free]
        self.bound: list[torch.Tensor] = []
        self.dispatcher: Dispatcher | None = None

    def __call__(self, *inputs: Any) -> Any:
        if not self.supported:
            return self.graph_module(*inputs)
        static = [inputs[i] for i in self.static]
        if torch.is_grad_enabled() and any(t.requires_grad for t in static):
            return self.graph_module(*inputs)
        dispatcher = self.dispatcher
        if dispatcher is None or any(a is not b for a, b in zip(static, self.bound, strict=True)):
            dispatcher = self._bind(inputs, static)
        return dispatcher(*[inputs[i] for i in self.free])

    def _bind(self, inputs: Sequence[Any], static: list[torch.Tensor]) -> Dispatcher:
        """Weights become constants; other weights than last time get a compilation of their own."""
        module = _Bound(copy.copy(self.graph_module), len(inputs))
        for i, tensor in zip(self.static, static, strict=True):
            module.bind(i, tensor)
        module.sizes = dict(self.sizes or {})
        shapes = tuple(self.dynamic) if any(self.dynamic) else None
        self.bound, self.dispatcher = static, Dispatcher(module, self.options, shapes)
        return self.dispatcher


def _is_static(node: fx.Node) -> bool:
    """Whether Dynamo knows an input as a parameter or buffer of the user's model."""
    return bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def _size_sources(values: Sequence[Any]) -> dict[int, tuple[int, int]] | None:
    """For every integer input the (tensor input, dimension) of that size; None if one has none."""
    where: dict[Any, tuple[int, int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            for d, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    where.setdefault(size.node.expr, (i, d))
    sources: dict[int, tuple[int, int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            continue
        found = where.get(value.node.expr) if isinstance(value, torch.SymInt) else None
        if found is None:
            return None
        sources[i] = found
    return sources


def _open_dims(value: Any) -> dict[int, Any]:
    return {d: Dim.AUTO for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
