"""BERT that stops early: Xin et al., "DeeBERT: Dynamic Early Exiting", 2020.

A classifier behind every layer; a sample leaves behind the first that is confident about it. The
weights are random, the classifiers' temperatures such that equal shares leave at each exit. Six
layers of hidden 256, 64 tokens, batch 8; the paper has BERT-base: 12 layers of 768, 128 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .common import SEED
from .loops import LoopEarlyExit, balance_exits
from .transformer import Layer, initialise

CLASSES, CONFIDENT, VOCABULARY, BATCH = 4, 0.8, 4096, 8


class Embed(nn.Module):
    """Hidden states ``[N, tokens, hidden]`` of token numbers ``[N, tokens]``."""

    def __init__(self, hidden: int, tokens: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, hidden), nn.Embedding(tokens, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.token(x) + self.position.weight[: x.shape[1]])


class Head(nn.Module):
    """Logits ``[N, classes]`` from the first token of ``[N, tokens, hidden]``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.pool, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.pool(x[:, 0])))


def _sizes(size: str) -> tuple[int, int, int, int]:
    """Layers, hidden, heads, tokens."""
    return (12, 768, 12, 128) if size == "paper" else (6, 256, 4, 64)


def _network(early_exit: Callable[..., nn.Module], size: str) -> nn.Module:
    layers, hidden, heads, tokens = _sizes(size)
    stages: list[nn.Module] = [Layer(hidden, heads, 4 * hidden) for _ in range(layers)]
    stages[0] = nn.Sequential(Embed(hidden, tokens), stages[0])
    return early_exit(stages, [Head(hidden) for _ in range(layers)], CONFIDENT)


def build_plain(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with a Python loop over the layers that drops the samples that are done."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randint(0, VOCABULARY, (BATCH, _sizes(size)[3]), generator=generator)
    model = initialise(_network(LoopEarlyExit, size))
    balance_exits(model.stages, model.heads, lambda head: head.out, x, CONFIDENT)
    return model, (x,)


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Token numbers ``[8, tokens]`` to logits ``[8, 4]``."""
    from ... import EarlyExit

    plain, inputs = build_plain(size)
    model = _network(EarlyExit, size)
    model.load_state_dict(plain.state_dict())
    return model.eval(), inputs
