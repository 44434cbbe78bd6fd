"""Task-level mixture of experts: Kudugunta et al., "Beyond Distillation", 2021.

A multilingual encoder in which the experts of every other layer are chosen by the sentence's task
(its language pair), all tokens alike. Tasks are hashed to experts: some experts serve several
tasks, some none. 16 sentences of 32 tokens, their tasks drawn by Zipf's law from 16; hidden 256, 4
layers. The paper size has hidden 1024, 12 layers, 32 experts and tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..routes import zipf
from .common import SEED
from .loops import LoopRouter
from .transformer import FeedForward, Layer, initialise

SENTENCES, TOKENS = 16, 32


class TaskLayer(Layer):
    """A layer whose feed-forward is chosen by the task of the sentence."""

    def __init__(self, hidden: int, heads: int, inner: int, experts: nn.Module) -> None:
        super().__init__(hidden, heads, inner)
        self.ffn = experts

    def forward(self, x: Tensor, task: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x), keys=task)


class Encoder(nn.Module):
    """Hidden states ``[N, tokens, hidden]`` and tasks ``[N]`` (int64) to hidden states."""

    def __init__(self, size: str, router: Callable[[list[nn.Module]], nn.Module]) -> None:
        super().__init__()
        layers, hidden, heads, self.tasks = _sizes(size)
        self.layers = nn.ModuleList()
        for number in range(layers):
            if number % 2:
                experts: list[nn.Module] = [
                    FeedForward(hidden, 4 * hidden) for _ in range(self.tasks)
                ]
                self.layers.append(TaskLayer(hidden, heads, 4 * hidden, router(experts)))
            else:
                self.layers.append(Layer(hidden, heads, 4 * hidden))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, task) if isinstance(layer, TaskLayer) else layer(x)
        return x


def _sizes(size: str) -> tuple[int, int, int, int]:
    """Layers, hidden, heads, tasks (as many as experts)."""
    return (12, 1024, 16, 32) if size == "paper" else (4, 256, 4, 16)


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Hidden states ``[16, 32, hidden]`` and the tasks of the sentences ``[16]``."""
    from ... import Router

    model = Encoder(size, lambda experts: Router(experts, "hash", combine="select"))
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(SENTENCES, TOKENS, _sizes(size)[1], generator=generator)
    task = zipf(SENTENCES, model.tasks, 1, seed=SEED).squeeze(1)
    return initialise(model), (x, task)


def build_plain(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with a table from tasks to experts and a Python loop over the experts."""
    routed, inputs = build(size)
    first: Any = next(m for m in routed.modules() if isinstance(m, TaskLayer))
    table = first.ffn.scorer(torch.arange(_sizes(size)[3]))
    model = Encoder(
        size, lambda experts: LoopRouter(experts, lambda task: table[task], combine="select")
    )
    model.load_state_dict(routed.state_dict())
    return model.eval(), inputs
