"""Mixtral: Jiang et al., "Mixtral of Experts", 2024, the model of the transformers library.

The paper size is Mixtral 8x7B itself (46.7 billion parameters, bfloat16). The CPU size keeps its
proportions at hidden size 512 with 4 layers. Weights are random.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import SEED, select_experts

TOKENS = 32


def config(size: str):
    """The transformers configuration; needs transformers."""
    from transformers import MixtralConfig

    if size == "paper":
        return MixtralConfig(use_cache=False)
    return MixtralConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        use_cache=False,
    )


def build(size: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Batch 1, 32 tokens; the output is a dataclass with ``logits`` ``[1, 32, vocabulary]``."""
    from transformers import MixtralForCausalLM

    settings = config(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if size == "paper":
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = MixtralForCausalLM(settings)
            finally:
                torch.set_default_dtype(default)
        else:
            model = MixtralForCausalLM(settings)
        tokens = torch.randint(0, settings.vocab_size, (1, TOKENS))
    return model.eval(), (tokens,)


def build_plain(size: str = "cpu", form: str = "loop") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with transformers' own loop over experts, or its batched product."""
    model, inputs = build(size)
    select_experts(model, form)
    return model, inputs
