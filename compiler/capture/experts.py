"""Mixture-of-experts models of transformers, captured as routed products.

transformers lets the computation of experts be chosen by name (its experts interface). While a
model is captured, its experts are sent to `forward` below, whose operators have kernels; those of
architectures outside the interface have adapters (`adapters`). Afterwards the model is as
it was. Nothing is imported where transformers is not in use.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..guards.watch import modules_of
from .adapters import adapted

NAME = "plait"
_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")  # of transformers' experts


def forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts module's result: ``[tokens, hidden]`` from tokens, expert numbers and weights.

    ``top_k_index`` and ``top_k_weights`` are ``[tokens, k]``; ``num_experts`` stands for no expert.
    """
    from ...kernels.routing_experts import slots_of_experts, weighted_sum

    def layer(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None

    out = slots_of_experts(
        hidden_states, top_k_index, self.num_experts,
        layer("gate_up_proj" if self.has_gate else "up_proj"),
        self._apply_gate if self.has_gate else self.act_fn,
        layer("down_proj"), self.is_transposed,
    )  # fmt: skip
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    return weighted_sum(out, top_k_weights).to(hidden_states.dtype)


@contextlib.contextmanager
def routed_experts(target: Any) -> Iterator[int]:
    """Within it, experts inside ``target`` are routed products; yields how many there are."""
    if "transformers" not in sys.modules:
        yield 0
        return
    modules = list(dict.fromkeys(_modules(target)))
    with _by_name(modules) as named, adapted(modules) as others:
        yield named + others


@contextlib.contextmanager
def _by_name(modules: list[nn.Module]) -> Iterator[int]:
    """Within it, modules that choose their computation by name compute by `forward`."""
    interface = _interface()
    found = [] if interface is None else [m for m in modules if _is_experts(m)]
    # Modules of one configuration are switched together.
    left_alone = {id(m.config) for m in found if not _covered(m)}
    found = [m for m in found if id(m.config) not in left_alone]
    if interface is None or not found:
        yield 0
        return
    if NAME not in interface:
        interface.register(NAME, forward)
    configs = {id(m.config): m.config for m in found}.values()
    before = [c._experts_implementation_internal for c in configs]
    for config in configs:
        config._experts_implementation_internal = NAME
    try:
        yield len(found)
    finally:
        for config, name in zip(configs, before, strict=True):
            config._experts_implementation_internal = name


def _modules(target: Any) -> Iterator[nn.Module]:
    for root in modules_of(target):
        yield from root.modules()


def _is_experts(module: Any) -> bool:
    """Whether a module chooses its computation by the name in its configuration."""
    config = getattr(module, "config", None)
    marked = all(hasattr(module, mark) for mark in _MARKS)
    return marked and hasattr(config, "_experts_implementation_internal")


def _covered(module: Any) -> bool:
    """Whether `forward` can compute a module's result."""
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = [getattr(module, n, None) for n in names]
    return all(isinstance(w, torch.Tensor) and w.dim() == 3 for w in weights)


def _interface() -> Any:
    """transformers' table of experts implementations, if it is loaded and has one."""
    moe = sys.modules.get("transformers.integrations.moe")
    return getattr(moe, "ALL_EXPERTS_FUNCTIONS", None)
