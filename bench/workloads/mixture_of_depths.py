"""Mixture of depths: Raposo et al., "Dynamically allocating compute", 2024.

Every other block lets only the quarter of the tokens pass that its router scores highest; the
others skip it. How many pass is fixed (expert choice), so this is plain PyTorch: topk, gather,
scatter_add. A causal language model's blocks of hidden 256 over 256 tokens; the paper size has
hidden 1024 and 2048 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import SEED
from .transformer import Attention, FeedForward, Layer, initialise

CAPACITY = 0.25


class Delta(nn.Module):
    """What a block adds to its input."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads, causal=True)
        self.ffn = FeedForward(hidden, 4 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attention(self.norm1(x))
        return mixed + self.ffn(self.norm2(x + mixed))


class Routed(nn.Module):
    """Equation 1 of the paper: ``x + score * f(x)`` for the tokens that pass, x for the others."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.router, self.block = nn.Linear(hidden, 1), Delta(hidden, heads)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).squeeze(2)
        passes = scores.topk(int(x.shape[1] * CAPACITY), dim=1).indices.sort(1).values
        rows = passes.unsqueeze(2).expand(-1, -1, x.shape[2])
        delta = self.block(x.gather(1, rows))
        return x.scatter_add(1, rows, delta * scores.gather(1, passes).unsqueeze(2))


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Hidden states ``[1, tokens, hidden]`` through 6 (cpu) or 24 blocks."""
    blocks, hidden, heads, tokens = (24, 1024, 16, 2048) if size == "paper" else (6, 256, 4, 256)
    layers = [
        Routed(hidden, heads) if number % 2 else Layer(hidden, heads, 4 * hidden, causal=True)
        for number in range(blocks)
    ]
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, tokens, hidden, generator=generator)
    return initialise(nn.Sequential(*layers)), (x,)
