"""BERT-base encoder: Devlin et al., "BERT", 2019 (post-norm Transformer of Vaswani et al.).

Hidden size 768, 12 heads, feed-forward 3072, 128 tokens; 12 layers in the paper, 4 in the CPU size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import SEED

HIDDEN, HEADS, INNER, TOKENS = 768, 12, 3072, 128


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.norm1, self.norm2 = (nn.LayerNorm(HIDDEN, eps=1e-12) for _ in range(2))
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, tokens, HEADS, HIDDEN // HEADS).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        )
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, HIDDEN)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class BertLayers(nn.Module):
    """Maps hidden states ``[N, tokens, 768]`` to hidden states of the same shape."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Batch 1, 128 tokens; 4 layers ("cpu") or 12 ("paper")."""
    model = BertLayers(12 if size == "paper" else 4)
    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # the paper's own initialisation, a little wider
            nn.init.normal_(module.weight, std=0.03, generator=generator)
            nn.init.uniform_(module.bias, -0.1, 0.1, generator=generator)
    return model.eval(), (torch.randn(1, TOKENS, HIDDEN, generator=generator),)
