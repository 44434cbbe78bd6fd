"""The sparse block of Mixtral alone, routing included: Jiang et al., "Mixtral of Experts", 2024.

transformers' own module at a size that fits a cache: hidden 256, experts of 512, 16 of them, two
for each token. The paper's block has hidden 4096, 8 experts of 14336 (1.4 billion parameters).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import SEED, select_experts


def config(size: str):
    """The transformers configuration; needs transformers."""
    from transformers import MixtralConfig

    if size == "paper":
        return MixtralConfig()
    return MixtralConfig(
        hidden_size=256, intermediate_size=512, num_local_experts=16, num_experts_per_tok=2
    )


class Block(nn.Module):
    """Maps hidden states ``[1, tokens, hidden]`` to the same shape."""

    def __init__(self, settings) -> None:
        super().__init__()
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        self.config = settings
        self.moe = MixtralSparseMoeBlock(settings)
        self.set_experts_implementation("grouped_mm")  # what a whole model starts with

    def set_experts_implementation(self, name: str) -> None:
        """As transformers' models have it: "grouped_mm", "batched_mm" or "eager" (a loop)."""
        self.config._experts_implementation_internal = name

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)


def build(size: str = "cpu", tokens: int = 128) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Batch 1, ``tokens`` tokens; the load of the experts is nearly even."""
    settings = config(size)
    model = Block(settings)
    generator = torch.Generator().manual_seed(SEED)
    for weight in model.parameters():  # [..., out, in]
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5, generator=generator)
    x = torch.randn(1, tokens, settings.hidden_size, generator=generator)
    return model.eval(), (x,)


def build_plain(
    size: str = "cpu", tokens: int = 128, form: str = "loop"
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with transformers' own loop over experts, or its batched product."""
    model, inputs = build(size, tokens)
    select_experts(model, form)
    return model, inputs
