"""Tiny, randomly initialised Hugging Face models: name -> (model in eval mode, inputs by name).

Nothing is downloaded. Every configuration is small enough that a model is made in milliseconds, yet
keeps the parts that make the architecture what it is (grouped heads, sliding windows, routers,
relative positions, convolutions over time).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
Maker = Callable[[], tuple[nn.Module, Inputs]]

TEXT: Mapping[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV = {"num_key_value_heads": 2}
HEAD = {"head_dim": 8}
VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
}
SEQ2SEQ: Mapping[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
SPEECH: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
}


def tokens(length: int = 11, vocab: int = 99, name: str = "input_ids") -> Inputs:
    """Two rows of token numbers, none of them a special token."""
    ids = torch.randint(3, vocab, (2, length), generator=torch.Generator().manual_seed(0))
    return {name: ids}


def masked(length: int = 11, vocab: int = 99) -> Inputs:
    """Tokens and an attention mask whose second row is padded at its end."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, -3:] = 0
    return {**tokens(length, vocab), "attention_mask": mask}


def both() -> Inputs:
    """Tokens for an encoder and a decoder."""
    return {**tokens(11), **tokens(7, name="decoder_input_ids")}


def both_masked() -> Inputs:
    """Tokens and masks for an encoder and a decoder."""
    masks = {"attention_mask": torch.ones(2, 11), "decoder_attention_mask": torch.ones(2, 7)}
    return {**both(), **masks}


def noise(name: str, *shape: int) -> Inputs:
    """Normally distributed numbers."""
    return {name: torch.randn(*shape, generator=torch.Generator().manual_seed(0))}


def pixels(size: int = 32, channels: int = 3) -> Inputs:
    """Two images."""
    return noise("pixel_values", 2, channels, size, size)


def waves(length: int = 1000) -> Inputs:
    """Two sound waves."""
    return noise("input_values", 2, length)


def image_and_text() -> Inputs:
    """Two images and two rows of tokens."""
    return {**pixels(), **tokens()}


MODELS: dict[str, Maker] = {}


def library() -> Any:
    """The transformers package.

    Where torchvision cannot be imported (it was built for another torch) it is hidden first:
    transformers would refuse to import its models, though no model here needs it.
    """
    if "transformers" not in sys.modules:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):
            sys.modules["torchvision"] = None  # type: ignore[assignment]
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def model(name: str, cls: str, config: str, inputs: Callable[[], Inputs], **settings: Any) -> None:
    """Registers ``transformers.<cls>(transformers.<config>(**settings))``."""

    def make() -> tuple[nn.Module, Inputs]:
        transformers = library()
        torch.manual_seed(0)
        made = getattr(transformers, cls)(getattr(transformers, config)(**settings))
        return made.eval(), inputs()

    MODELS[name] = make


def text(name: str, cls: str, config: str, **settings: Any) -> None:
    """A language model over `masked` tokens."""
    model(name, cls, config, masked, **{**TEXT, **settings})


def causal(name: str, prefix: str, **settings: Any) -> None:
    """``<prefix>ForCausalLM`` with ``<prefix>Config``, grouped key-value heads by default."""
    text(name, f"{prefix}ForCausalLM", f"{prefix}Config", **{**KV, **settings})


# -- encoders --------------------------------------------------------------------------------------
text("bert", "BertModel", "BertConfig")
text("bert-mlm", "BertForMaskedLM", "BertConfig")
text("bert-classifier", "BertForSequenceClassification", "BertConfig", num_labels=3)
text("bert-qa", "BertForQuestionAnswering", "BertConfig")
text("bert-eager", "BertModel", "BertConfig", attn_implementation="eager")
text("roberta", "RobertaModel", "RobertaConfig", max_position_embeddings=80)
text("roberta-classifier", "RobertaForSequenceClassification", "RobertaConfig", pad_token_id=1)
text("xlm-roberta", "XLMRobertaModel", "XLMRobertaConfig")
text("camembert", "CamembertModel", "CamembertConfig")
model(
    "distilbert", "DistilBertForMaskedLM", "DistilBertConfig", masked,
    vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37, max_position_embeddings=64,
)  # fmt: skip
text("albert", "AlbertModel", "AlbertConfig", embedding_size=16)
text("electra", "ElectraForPreTraining", "ElectraConfig", embedding_size=16)
text(
    "deberta", "DebertaModel", "DebertaConfig", relative_attention=True, pos_att_type=["c2p", "p2c"]
)
text(
    "deberta-v2", "DebertaV2Model", "DebertaV2Config",
    relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8,
)  # fmt: skip
text("mpnet", "MPNetModel", "MPNetConfig")
text("ernie", "ErnieModel", "ErnieConfig")
text("megatron-bert", "MegatronBertModel", "MegatronBertConfig")
text("convbert", "ConvBertModel", "ConvBertConfig", embedding_size=16)
text("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", embedding_size=32,
     q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1,
     intermediate_groups=1, output_groups=1)  # fmt: skip
text(
    "mobilebert", "MobileBertModel", "MobileBertConfig", embedding_size=32, intra_bottleneck_size=32
)
text("roformer", "RoFormerModel", "RoFormerConfig", embedding_size=32)
text("layoutlm", "LayoutLMModel", "LayoutLMConfig")
text("ibert", "IBertModel", "IBertConfig")
text("yoso", "YosoModel", "YosoConfig", use_expectation=True)
text("rembert", "RemBertModel", "RemBertConfig", input_embedding_size=16, output_embedding_size=16)
text("data2vec-text", "Data2VecTextModel", "Data2VecTextConfig")
text("splinter", "SplinterModel", "SplinterConfig")
text("modernbert", "ModernBertModel", "ModernBertConfig", global_attn_every_n_layers=2,
     local_attention=8, cls_token_id=1, sep_token_id=2)  # fmt: skip
text("esm", "EsmModel", "EsmConfig", mask_token_id=4)
model("fnet", "FNetModel", "FNetConfig", tokens, vocab_size=99, hidden_size=32, num_hidden_layers=2,
      intermediate_size=37, max_position_embeddings=64)  # fmt: skip
model("canine", "CanineModel", "CanineConfig", lambda: masked(32), hidden_size=32,
      num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, max_position_embeddings=64,
      num_hash_buckets=32, local_transformer_stride=16, downsampling_rate=4,
      upsampling_kernel_size=4)  # fmt: skip
model("funnel", "FunnelBaseModel", "FunnelConfig", tokens, vocab_size=99, block_sizes=[1, 1],
      num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=37)  # fmt: skip
model("xlnet", "XLNetModel", "XLNetConfig", tokens, vocab_size=99, d_model=32, n_layer=2, n_head=4,
      d_inner=37)  # fmt: skip
model("flaubert", "FlaubertModel", "FlaubertConfig", tokens, vocab_size=99, emb_dim=32, n_layers=2,
      n_heads=4, max_position_embeddings=64)  # fmt: skip

# -- decoders --------------------------------------------------------------------------------------
model("gpt2", "GPT2LMHeadModel", "GPT2Config", masked, vocab_size=99, n_embd=32,
      n_layer=2, n_head=4, n_positions=64)  # fmt: skip
model("gpt2-eager", "GPT2Model", "GPT2Config", masked, vocab_size=99, n_embd=32,
      n_layer=2, n_head=4, n_positions=64, attn_implementation="eager")  # fmt: skip
model("openai-gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", tokens, vocab_size=99, n_embd=32,
      n_layer=2, n_head=4, n_positions=64)  # fmt: skip
model("gpt-neo", "GPTNeoForCausalLM", "GPTNeoConfig", masked, vocab_size=99,
      hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global",
      "local"], 1]], window_size=5, max_position_embeddings=64)  # fmt: skip
model("gpt-j", "GPTJForCausalLM", "GPTJConfig", masked, vocab_size=99, n_embd=32,
      n_layer=2, n_head=4, n_positions=64, rotary_dim=4)  # fmt: skip
model("codegen", "CodeGenForCausalLM", "CodeGenConfig", masked, vocab_size=99, n_embd=32, n_layer=2,
      n_head=4, n_positions=64, rotary_dim=4)  # fmt: skip
model("gpt-bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", masked, vocab_size=99, n_embd=32,
      n_layer=2, n_head=4, n_positions=64)  # fmt: skip
text("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig")
text("gpt-neox-japanese", "GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig")
model("opt", "OPTForCausalLM", "OPTConfig", masked, vocab_size=99, hidden_size=32,
      num_hidden_layers=2, num_attention_heads=4, ffn_dim=37,
      max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=1)  # fmt: skip
model("bloom", "BloomForCausalLM", "BloomConfig", masked, vocab_size=99, hidden_size=32, n_layer=2,
      n_head=4)  # fmt: skip
model("mpt", "MptForCausalLM", "MptConfig", masked, vocab_size=99, d_model=32,
      n_layers=2, n_heads=4, max_seq_len=64)  # fmt: skip
model("ctrl", "CTRLLMHeadModel", "CTRLConfig", tokens, vocab_size=99, n_embd=32,
      n_layer=2, n_head=4, dff=37, n_positions=64)  # fmt: skip
model("biogpt", "BioGptForCausalLM", "BioGptConfig", masked, vocab_size=99, hidden_size=32,
      num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
      max_position_embeddings=64)  # fmt: skip
model("xglm", "XGLMForCausalLM", "XGLMConfig", masked, vocab_size=99, d_model=32, num_layers=2,
      attention_heads=4, ffn_dim=37, max_position_embeddings=64)  # fmt: skip
causal("llama", "Llama")
causal("llama-eager", "Llama", attn_implementation="eager")
causal("llama-rope-scaled", "Llama", rope_scaling={"rope_type": "linear", "factor": 2.0})
text("llama-classifier", "LlamaForSequenceClassification", "LlamaConfig", **KV)
causal("mistral", "Mistral", sliding_window=6)
causal("qwen2", "Qwen2")
causal("qwen3", "Qwen3", **HEAD)
causal("gemma", "Gemma", **HEAD)
causal("gemma2", "Gemma2", **HEAD, sliding_window=6, query_pre_attn_scalar=8)
text("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", **KV, **HEAD, sliding_window=6,
     query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"])  # fmt: skip
causal("phi", "Phi")
causal("phi3", "Phi3")
model("falcon", "FalconForCausalLM", "FalconConfig", masked, vocab_size=99, hidden_size=32,
      num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
model("falcon-alibi", "FalconForCausalLM", "FalconConfig", masked, vocab_size=99, hidden_size=32,
      num_hidden_layers=2, num_attention_heads=4, alibi=True)  # fmt: skip
causal("stablelm", "StableLm")
causal("olmo", "Olmo")
causal("olmo2", "Olmo2")
causal("cohere", "Cohere")
causal("cohere2", "Cohere2", sliding_window=6)
causal("starcoder2", "Starcoder2")
causal("granite", "Granite")
causal("nemotron", "Nemotron")
causal("persimmon", "Persimmon")
causal("glm", "Glm", **HEAD)
causal("glm4", "Glm4", **HEAD)
causal("exaone4", "Exaone4", sliding_window=6)
causal("smollm3", "SmolLM3")
causal("ernie4_5", "Ernie4_5", **HEAD)
causal("seed-oss", "SeedOss", **HEAD)
causal("helium", "Helium", **HEAD)
causal("arcee", "Arcee")
causal("apertus", "Apertus")
causal("hunyuan", "HunYuanDenseV1", **HEAD)

# -- experts ---------------------------------------------------------------------------------------
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
causal("mixtral", "Mixtral", **EXPERTS)
causal("olmoe", "Olmoe", num_experts=4, num_experts_per_tok=2)
causal("qwen2-moe", "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
       shared_expert_intermediate_size=16)  # fmt: skip
causal(
    "qwen3-moe", "Qwen3Moe", **HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
causal("deepseek-v2", "DeepseekV2", **MLA)
causal("deepseek-v3", "DeepseekV3", **MLA)
causal("gpt-oss", "GptOss", **HEAD, **EXPERTS, sliding_window=6)
causal("granite-moe", "GraniteMoe", **EXPERTS)
causal("phi-moe", "Phimoe", **EXPERTS)
causal("glm4-moe", "Glm4Moe", **HEAD, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
       moe_intermediate_size=16, first_k_dense_replace=1, n_group=1, topk_group=1)  # fmt: skip
causal("ernie4_5-moe", "Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
       moe_num_shared_experts=1, moe_layer_start_index=1)  # fmt: skip
causal("flex-olmo", "FlexOlmo", num_experts=4, num_experts_per_tok=2)
causal("minimax", "MiniMax", **EXPERTS, **HEAD, block_size=4)
causal("dots1", "Dots1", **HEAD, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
       moe_intermediate_size=16, first_k_dense_replace=1, n_group=1, topk_group=1)  # fmt: skip
causal("jetmoe", "JetMoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=8)
model("switch", "SwitchTransformersModel", "SwitchTransformersConfig", both_masked,
      vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_decoder_layers=2,
      num_heads=4, num_experts=4, num_sparse_encoder_layers=1,
      num_sparse_decoder_layers=1, pad_token_id=0, decoder_start_token_id=0)  # fmt: skip

# -- state-space and recurrent ---------------------------------------------------------------------
model("mamba", "MambaForCausalLM", "MambaConfig", tokens, vocab_size=99,
      hidden_size=32, state_size=4, num_hidden_layers=2)  # fmt: skip
model("falcon-mamba", "FalconMambaForCausalLM", "FalconMambaConfig", tokens, vocab_size=99,
      hidden_size=32, state_size=4, num_hidden_layers=2)  # fmt: skip
model("mamba2", "Mamba2ForCausalLM", "Mamba2Config", tokens, vocab_size=99,
      hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8,
      n_groups=2, chunk_size=4)  # fmt: skip
model("rwkv", "RwkvForCausalLM", "RwkvConfig", lambda: tokens(5), vocab_size=99, hidden_size=32,
      num_hidden_layers=2, context_length=16)  # fmt: skip
causal("jamba", "Jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
       attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
       mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)  # fmt: skip
causal("bamba", "Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_n_groups=1, mamba_d_state=8,
       mamba_d_head=8, mamba_chunk_size=4)  # fmt: skip
causal("falcon-h1", "FalconH1", **HEAD, mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64,
       mamba_d_state=8, mamba_chunk_size=4)  # fmt: skip
causal("lfm2", "Lfm2", layer_types=["conv", "full_attention"])
causal("recurrent-gemma", "RecurrentGemma", lru_width=32, attention_window_size=8,
       block_types=["recurrent", "attention"])  # fmt: skip
causal("qwen3-next", "Qwen3Next", **HEAD, num_experts=4, num_experts_per_tok=2,
       moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2,
       linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
       layer_types=["linear_attention", "full_attention"])  # fmt: skip

# -- encoder-decoders ------------------------------------------------------------------------------
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4,
      "pad_token_id": 0, "decoder_start_token_id": 0}  # fmt: skip
model("t5", "T5ForConditionalGeneration", "T5Config", both, **T5)
model("t5-encoder", "T5EncoderModel", "T5Config", masked, **T5)
model(
    "t5-gated", "T5ForConditionalGeneration", "T5Config", both, **T5, feed_forward_proj="gated-gelu"
)
model("mt5", "MT5Model", "MT5Config", both, **T5)
model("umt5", "UMT5Model", "UMT5Config", both, **T5)
model("longt5", "LongT5EncoderModel", "LongT5Config", masked, **T5, local_radius=4)
model("bart", "BartForConditionalGeneration", "BartConfig", both, **SEQ2SEQ)
model("mbart", "MBartModel", "MBartConfig", both, **SEQ2SEQ)
model("pegasus", "PegasusModel", "PegasusConfig", both, **SEQ2SEQ)
model("marian", "MarianMTModel", "MarianConfig", both, **SEQ2SEQ)
model("blenderbot", "BlenderbotModel", "BlenderbotConfig", both, **SEQ2SEQ)
model("blenderbot-small", "BlenderbotSmallModel", "BlenderbotSmallConfig", both, **SEQ2SEQ)
model("m2m-100", "M2M100Model", "M2M100Config", both, **SEQ2SEQ)
model("plbart", "PLBartModel", "PLBartConfig", both, **SEQ2SEQ)
model("led", "LEDModel", "LEDConfig", both, **SEQ2SEQ, max_encoder_position_embeddings=64,
      max_decoder_position_embeddings=64, attention_window=4)  # fmt: skip
model("prophetnet", "ProphetNetModel", "ProphetNetConfig", both, vocab_size=99, hidden_size=32,
      encoder_ffn_dim=37, num_encoder_layers=2, num_encoder_attention_heads=4, decoder_ffn_dim=37,
      num_decoder_layers=2, num_decoder_attention_heads=4, max_position_embeddings=64)  # fmt: skip

# -- vision ----------------------------------------------------------------------------------------
model("vit", "ViTModel", "ViTConfig", pixels, **VISION)
model("vit-classifier", "ViTForImageClassification", "ViTConfig", pixels, **VISION, num_labels=5)
model("ijepa", "IJepaModel", "IJepaConfig", pixels, **VISION)
model("deit", "DeiTForImageClassification", "DeiTConfig", pixels, **VISION)
model("beit", "BeitModel", "BeitConfig", pixels, **VISION)
model("data2vec-vision", "Data2VecVisionModel", "Data2VecVisionConfig", pixels, **VISION)
model("dinov2", "Dinov2Model", "Dinov2Config", pixels, **VISION, mlp_ratio=2)
model("dinov2-registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", pixels, **VISION,
      mlp_ratio=2)  # fmt: skip
model("dinov3-vit", "DINOv3ViTModel", "DINOv3ViTConfig", pixels, **VISION)
model("vit-msn", "ViTMSNModel", "ViTMSNConfig", pixels, **VISION)
model("yolos", "YolosModel", "YolosConfig", pixels, **{**VISION, "image_size": [32, 32]},
      num_detection_tokens=4)  # fmt: skip
model("dpt", "DPTForDepthEstimation", "DPTConfig", pixels,
      **{**VISION, "num_hidden_layers": 4}, neck_hidden_sizes=[8, 8, 8, 8],
      backbone_out_indices=[0, 1, 2, 3], fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5],
      is_hybrid=False, use_auxiliary_head=False)  # fmt: skip
model("swin", "SwinModel", "SwinConfig", pixels, image_size=32, patch_size=2, embed_dim=16,
      depths=[2, 2], num_heads=[2, 4], window_size=4)  # fmt: skip
model("swinv2", "Swinv2Model", "Swinv2Config", pixels, image_size=32, patch_size=2, embed_dim=16,
      depths=[2, 2], num_heads=[2, 4], window_size=4)  # fmt: skip
model("donut-swin", "DonutSwinModel", "DonutSwinConfig", pixels, image_size=32, patch_size=2,
      embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)  # fmt: skip
model("convnext", "ConvNextForImageClassification", "ConvNextConfig", pixels,
      hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1])  # fmt: skip
model("convnextv2", "ConvNextV2Model", "ConvNextV2Config", pixels, hidden_sizes=[8, 16, 16, 24],
      depths=[1, 1, 1, 1])  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 2, 1]}
model("resnet", "ResNetForImageClassification", "ResNetConfig", pixels, **RESNET)
model("resnet-basic", "ResNetModel", "ResNetConfig", pixels, **RESNET, layer_type="basic")
model("regnet", "RegNetModel", "RegNetConfig", pixels, **RESNET, groups_width=8)
model("bit", "BitModel", "BitConfig", pixels, **RESNET, num_groups=1)
model("mobilenet-v1", "MobileNetV1Model", "MobileNetV1Config", pixels, depth_multiplier=0.25,
      min_depth=8)  # fmt: skip
model("mobilenet-v2", "MobileNetV2Model", "MobileNetV2Config", pixels, depth_multiplier=0.25,
      min_depth=8)  # fmt: skip
model("mobilevit", "MobileViTModel", "MobileViTConfig", lambda: pixels(64), image_size=64,
      hidden_sizes=[16, 24, 24], neck_hidden_sizes=[8, 8, 16, 16, 16, 24, 24],
      num_attention_heads=4)  # fmt: skip
model("mobilevitv2", "MobileViTV2Model", "MobileViTV2Config", lambda: pixels(64), image_size=64,
      width_multiplier=0.25)  # fmt: skip
model("efficientnet", "EfficientNetModel", "EfficientNetConfig", pixels, image_size=32,
      width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320)  # fmt: skip
model("segformer", "SegformerForSemanticSegmentation", "SegformerConfig", pixels,
      hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
      decoder_hidden_size=16)  # fmt: skip
model("poolformer", "PoolFormerModel", "PoolFormerConfig", pixels, hidden_sizes=[8, 8, 16, 16],
      depths=[1, 1, 1, 1])  # fmt: skip
model("pvt", "PvtModel", "PvtConfig", pixels, image_size=32, hidden_sizes=[8, 8, 16, 16],
      depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2])  # fmt: skip
model("pvt-v2", "PvtV2Model", "PvtV2Config", pixels, image_size=32, hidden_sizes=[8, 8, 16, 16],
      depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2])  # fmt: skip
model("levit", "LevitModel", "LevitConfig", lambda: pixels(64), image_size=64,
      hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
      key_dim=[8, 8, 8])  # fmt: skip
model("swiftformer", "SwiftFormerModel", "SwiftFormerConfig", lambda: pixels(64),
      embed_dims=[8, 16, 16, 24], depths=[1, 1, 1, 1])  # fmt: skip
model("focalnet", "FocalNetModel", "FocalNetConfig", pixels, image_size=32,
      patch_size=2, embed_dim=8, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3,
      3], hidden_sizes=[8, 16])  # fmt: skip
model("glpn", "GLPNForDepthEstimation", "GLPNConfig", pixels, hidden_sizes=[8, 8, 16, 16],
      depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8)  # fmt: skip
model("hgnet-v2", "HGNetV2ForImageClassification", "HGNetV2Config", lambda: pixels(64))
model("swin2sr", "Swin2SRForImageSuperResolution", "Swin2SRConfig", pixels,
      image_size=32, patch_size=1, embed_dim=16, depths=[1], num_heads=[2],
      window_size=8, upscale=2)  # fmt: skip

# -- image and text --------------------------------------------------------------------------------
CLIP_TEXT = {**TEXT, "projection_dim": 16}
CLIP_VISION = {**VISION, "projection_dim": 16}
CLIP = {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 16}
model("clip", "CLIPModel", "CLIPConfig", image_and_text, **CLIP)
model("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", pixels, **CLIP_VISION)
model("clip-text", "CLIPTextModel", "CLIPTextConfig", masked, **CLIP_TEXT)
model("siglip", "SiglipModel", "SiglipConfig", image_and_text, text_config={**TEXT},
      vision_config={**VISION})  # fmt: skip
model("siglip-vision", "SiglipVisionModel", "SiglipVisionConfig", pixels, **VISION)
model("chinese-clip", "ChineseCLIPModel", "ChineseCLIPConfig", image_and_text, **CLIP)
model("clipseg-vision", "CLIPSegVisionModel", "CLIPSegVisionConfig", pixels, **VISION)
model("x-clip-vision", "XCLIPVisionModel", "XCLIPVisionConfig", lambda: pixels(), **VISION,
      mit_hidden_size=32, mit_intermediate_size=37, mit_num_hidden_layers=1,
      mit_num_attention_heads=4, num_frames=2)  # fmt: skip
model("blip", "BlipModel", "BlipConfig", image_and_text,
      text_config={**TEXT, "encoder_hidden_size": 32, "projection_dim": 16},
      vision_config={**CLIP_VISION}, projection_dim=16)  # fmt: skip
model("blip-vision", "BlipVisionModel", "BlipVisionConfig", pixels, **VISION)
model("owlvit-vision", "OwlViTVisionModel", "OwlViTVisionConfig", pixels, **VISION)

# -- sound -----------------------------------------------------------------------------------------
model("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", waves, **SPEECH)
model(
    "wav2vec2-ctc",
    "Wav2Vec2ForCTC",
    "Wav2Vec2Config",
    lambda: {**waves(), "labels": torch.tensor([[3, 4, 5], [6, 7, -100]])},
    **SPEECH,
)
model("hubert", "HubertModel", "HubertConfig", waves, **SPEECH)
model("wavlm", "WavLMModel", "WavLMConfig", waves, **SPEECH)
model("data2vec-audio", "Data2VecAudioModel", "Data2VecAudioConfig", waves,
      **{**SPEECH, "num_conv_pos_embeddings": 2})  # fmt: skip
model("unispeech", "UniSpeechModel", "UniSpeechConfig", waves, **SPEECH)
model("sew", "SEWModel", "SEWConfig", waves, **SPEECH, squeeze_factor=1)
model("whisper", "WhisperModel", "WhisperConfig",
      lambda: {**noise("input_features", 2, 8, 40),
               **tokens(7, name="decoder_input_ids")},
      **SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=16)  # fmt: skip
model("speech-to-text", "Speech2TextModel", "Speech2TextConfig",
      lambda: {**noise("input_features", 2, 40, 8),
               **tokens(7, name="decoder_input_ids")},
      **SEQ2SEQ, num_conv_layers=2, conv_kernel_sizes=(3, 3), conv_channels=16,
      input_feat_per_channel=8, max_source_positions=64, max_target_positions=64)  # fmt: skip
model("audio-spectrogram", "ASTModel", "ASTConfig",
      lambda: noise("input_values", 2, 24, 16),
      hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
      patch_size=4, max_length=24, num_mel_bins=16, frequency_stride=4, time_stride=4)  # fmt: skip
model("encodec", "EncodecModel", "EncodecConfig",
      lambda: noise("input_values", 2, 1, 640),
      num_filters=4, hidden_size=16, codebook_size=16, upsampling_ratios=[4, 2],
      num_lstm_layers=1)  # fmt: skip
