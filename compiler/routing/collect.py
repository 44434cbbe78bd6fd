"""Watches a model run: which routes it takes, and in which of its modules."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...kernels import routes, routing  # noqa: F401 - the operators must be there
from ..capture.experts import routed_experts
from ..guards.watch import modules_of
from .stats import Route


def original(model: Any) -> Any:
    """The model itself where a compiled one was given."""
    return getattr(model, "__dict__", {}).get("_original", model)


def fingerprint(model: Any) -> str:
    """A hash of a model's structure: names and classes of its modules, names and shapes of its
    parameters. The same in every process, for any weights, dtype and device.
    """
    parts: list[Any] = []
    for root in modules_of(original(model)):
        parts.append([(n, type(m).__name__) for n, m in root.named_modules()])
        parts.append([(n, list(p.shape)) for n, p in root.named_parameters()])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@contextlib.contextmanager
def _conds_shown() -> Iterator[None]:
    """Within it `torch.cond` is a router with two branches that sends one cell to one of them."""
    original = torch.cond

    def cond(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
        if torch.compiler.is_compiling() or not routes.is_observed():
            return original(pred, true_fn, false_fn, operands)
        side = 0 if bool(pred) else 1
        routes.show(torch.tensor([[side]]), 2)
        return (true_fn, false_fn)[side](*operands)

    torch.cond = cond
    try:
        yield
    finally:
        torch.cond = original


class Collector:
    """The routes that a model takes: watched inside `watching`, handed over by `taken`."""

    def __init__(self, model: Any) -> None:
        self._names: dict[nn.Module, str] = {}
        roots = modules_of(model)
        for number, root in enumerate(roots):
            prefix = "" if isinstance(model, nn.Module) else f"{number}:"
            for name, module in root.named_modules():
                self._names.setdefault(module, prefix + name)
        self._model = model
        self._running: list[str] = []
        self._calls: Counter[str] = Counter()
        self._routes: list[Route] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it routes are recorded; experts of transformers compute as routed products.

        Hooks are on the model's modules meanwhile, and off afterwards.
        """
        with contextlib.ExitStack() as stack:
            # Before the hooks: what users' hooks watch keeps its own way, and ours look like them.
            stack.enter_context(routed_experts(self._model))
            for module, name in self._names.items():
                entering = module.register_forward_pre_hook(self._entering(name))
                stack.callback(entering.remove)
                leaving = module.register_forward_hook(self._leaving, always_call=True)
                stack.callback(leaving.remove)
            stack.enter_context(routes.observed(self._record))
            stack.enter_context(_conds_shown())
            yield

    def taken(self) -> list[Route]:
        """The routes since the last call, in order: those of one run of the model."""
        found = self._routes
        self._routes = []
        self._calls.clear()
        self._running.clear()
        return found

    def _entering(self, name: str) -> Any:
        return lambda module, arguments: self._running.append(name)

    def _leaving(self, module: nn.Module, arguments: Any, result: Any) -> None:
        if self._running:
            self._running.pop()

    def _record(self, index: torch.Tensor, branches: int) -> None:
        name = self._running[-1] if self._running else ""
        key = name, self._calls[name]
        self._calls[name] += 1
        cells = index.shape[0] if index.dim() else 1
        slots = index.numel() // cells if cells else 1
        kept = index.detach().to("cpu", copy=True).reshape(cells, slots)
        self._routes.append(Route(key, kept, branches))
