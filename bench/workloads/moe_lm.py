"""Mixture-of-experts language models of the transformers library, random weights, no cache.

| family | paper | what its routing has of its own |
|---|---|---|
| mixtral | Jiang et al., "Mixtral of Experts", 2024 | top 2 of 8, softmax |
| olmoe | Muennighoff et al., "OLMoE", 2024 | many small experts, weights not renormalised |
| qwen3_moe | Yang et al., "Qwen3 Technical Report", 2025 | top 8 of 128 |
| deepseek_v3 | DeepSeek-AI, "DeepSeek-V3", 2024 | sigmoid scores, groups, a shared expert |
| gpt_oss | OpenAI, "gpt-oss-120b & gpt-oss-20b", 2025 | biases, transposed weights, clamped gate |

The paper size is the released model (mixtral 8x7B, OLMoE 1B-7B, Qwen3 30B-A3B, DeepSeek-V3 671B,
gpt-oss 20B) in bfloat16; the CPU size keeps the routing and shrinks everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .common import SEED, select_experts

_SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
# family: prefix of transformers' class names, what the CPU size has besides _SMALL, the paper's
# size where it is not the library's default
_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {},
    ),
    "olmoe": (
        "Olmoe",
        {
            "intermediate_size": 256,
            "num_key_value_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        },
        {"intermediate_size": 1024},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "head_dim": 64,
            "num_experts": 32,
            "num_experts_per_tok": 8,
        },
        {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
        {},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "intermediate_size": 256,
            "head_dim": 64,
            "sliding_window": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {"num_hidden_layers": 24, "num_local_experts": 32},
    ),
}


def config(family: str, size: str) -> Any:
    """The transformers configuration; needs transformers."""
    import transformers

    prefix, small, large = _FAMILIES[family]
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = large if size == "paper" else {**_SMALL, **small, **ends}
    return getattr(transformers, f"{prefix}Config")(**settings, use_cache=False)


def build(
    size: str = "cpu", family: str = "mixtral", tokens: int = 64
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Batch 1; the output is a dataclass with ``logits`` ``[1, tokens, vocabulary]``."""
    import transformers

    settings = config(family, size)
    make = getattr(transformers, f"{_FAMILIES[family][0]}ForCausalLM")
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if size == "paper":
            torch.set_default_dtype(torch.bfloat16)
        try:
            model = make(settings)
        finally:
            torch.set_default_dtype(default)
        x = torch.randint(0, settings.vocab_size, (1, tokens))
    return model.eval(), (x,)


def build_plain(
    size: str = "cpu", family: str = "mixtral", tokens: int = 64, form: str = "loop"
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """As `build`, with transformers' own loop over experts, or its batched product."""
    model, inputs = build(size, family, tokens)
    select_experts(model, form)
    return model, inputs
