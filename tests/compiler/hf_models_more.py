"""More tiny Hugging Face models, added to `hf_models.MODELS` by importing this module.

What they bring beside the first table: heads that pick positions by the data, detection and
segmentation with deformable attention, backbones inside other models, several kinds of state-space
and linear attention layers, vocoders, forecasting, and inputs of several kinds at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hf_models import (
    EXPERTS,
    HEAD,
    KV,
    MLA,
    MODELS,
    SEQ2SEQ,
    SPEECH,
    T5,
    TEXT,
    VISION,
    Inputs,
    both,
    both_masked,
    causal,
    image_and_text,
    library,
    masked,
    model,
    noise,
    pixels,
    text,
    tokens,
    waves,
)
from torch import nn


def ending(token: int) -> Inputs:
    """Tokens that end in ``token``, which classifiers of encoder-decoders look for."""
    return {"input_ids": torch.cat([tokens()["input_ids"], torch.full((2, 1), token)], 1)}


def large() -> Inputs:
    """Two images of 64 by 64."""
    return pixels(64)


def illustrated(token: int, count: int) -> Inputs:
    """Two images, and tokens of which ``count`` stand for the image's parts."""
    ids = torch.cat([torch.full((2, count), token), tokens(4)["input_ids"]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels()}


def video() -> Inputs:
    """Two videos of four frames."""
    return noise("pixel_values", 2, 4, 3, 32, 32)


def boxed() -> Inputs:
    """Masked tokens, each with a box on a page."""
    corner = torch.randint(0, 60, (2, 11, 2), generator=torch.Generator().manual_seed(0))
    return {**masked(), "bbox": torch.cat([corner, corner + 3], -1)}


def series() -> Inputs:
    """A series with its features in time, and its future."""
    return {
        **noise("past_values", 2, 10),
        **noise("past_time_features", 2, 10, 1),
        "past_observed_mask": torch.ones(2, 10),
        **noise("future_values", 2, 4),
        **noise("future_time_features", 2, 4, 1),
    }


def on(
    backbone: tuple[str, dict[str, Any]],
    name: str,
    prefix: str,
    head: str,
    inputs: Callable[[], Inputs],
    **settings: Any,
) -> None:
    """``<prefix><head>`` over a backbone that has a configuration of its own."""

    def make() -> tuple[nn.Module, Inputs]:
        transformers = library()
        torch.manual_seed(0)
        kind, values = backbone
        config = getattr(transformers, f"{prefix}Config")(
            backbone_config=getattr(transformers, kind)(**values), **settings
        )
        return getattr(transformers, prefix + head)(config).eval(), inputs()

    MODELS[name] = make


# fmt: off
# -- encoders --------------------------------------------------------------------------------------
text("big-bird", "BigBirdModel", "BigBirdConfig", attention_type="original_full")
text("xlm-roberta-xl", "XLMRobertaXLModel", "XLMRobertaXLConfig", pad_token_id=1)
text("xmod", "XmodModel", "XmodConfig", default_language="en_XX", pad_token_id=1,
     languages=["en_XX", "de_DE"])
text("roc-bert", "RoCBertModel", "RoCBertConfig", pronunciation_vocab_size=40, shape_vocab_size=40,
     pronunciation_embed_dim=8, shape_embed_dim=8)
text("roberta-prelayernorm", "RobertaPreLayerNormModel", "RobertaPreLayerNormConfig")
text("bert-states", "BertModel", "BertConfig", output_hidden_states=True, output_attentions=True,
     attn_implementation="eager")
text("eurobert", "EuroBertModel", "EuroBertConfig")
text("nomic-bert", "NomicBertModel", "NomicBertConfig")
text("ernie-mlm", "ErnieForMaskedLM", "ErnieConfig", use_task_id=True)
text("deberta-v2-conv", "DebertaV2ForQuestionAnswering", "DebertaV2Config",
     relative_attention=False, conv_kernel_size=3, conv_act="gelu")
text("longformer", "LongformerModel", "LongformerConfig", attention_window=4)
model("lilt", "LiltModel", "LiltConfig", boxed, **{**TEXT, "hidden_size": 48},
      channel_shrink_ratio=2)
model("layoutlmv3", "LayoutLMv3Model", "LayoutLMv3Config", lambda: {**boxed(), **pixels()}, **TEXT,
      coordinate_size=6, shape_size=4, input_size=32, patch_size=8, max_2d_position_embeddings=128)
model("tapas", "TapasModel", "TapasConfig",
      lambda: {**masked(), "token_type_ids": torch.tensor([0, 7, 5, 1, 6, 3, 2]).repeat(2, 11, 1)},
      **TEXT, type_vocab_sizes=[3, 8, 8, 2, 8, 8, 3])
model("funnel-token", "FunnelForTokenClassification", "FunnelConfig", masked, vocab_size=99,
      block_sizes=[1, 2], num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=37)
model("perceiver", "PerceiverForMaskedLM", "PerceiverConfig",
      lambda: {"inputs": tokens(16)["input_ids"]}, num_latents=4, d_latents=16, d_model=16,
      num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2,
      vocab_size=99, max_position_embeddings=16, qk_channels=16, v_channels=16)

# -- decoders --------------------------------------------------------------------------------------
causal("olmo3", "Olmo3", sliding_window=6)
causal("diffllama", "DiffLlama")
causal("nanochat", "NanoChat")
causal("vaultgemma", "VaultGemma", **HEAD, sliding_window=6, query_pre_attn_scalar=8)
causal("minicpm3", "MiniCPM3", q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
       qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
causal("phimoe", "Phimoe", **EXPERTS)
causal("glm4-moe-lite", "Glm4MoeLite", **MLA)
causal("nemotron-h", "NemotronH", **HEAD, layers_block_type=["mamba", "attention"],
       mamba_num_heads=8, mamba_head_dim=8, n_groups=1, ssm_state_size=8, chunk_size=4)
causal("granite-moe-hybrid", "GraniteMoeHybrid", **EXPERTS, shared_intermediate_size=16,
       layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_n_groups=1, mamba_d_state=8,
       mamba_d_head=8, mamba_chunk_size=4)
text("llama4", "Llama4ForCausalLM", "Llama4TextConfig", **KV, **HEAD, **EXPERTS,
     intermediate_size_mlp=36, attention_chunk_size=8)
causal("dbrx", "Dbrx", d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
       attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
       ffn_config={"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2})
causal("hunyuan-moe", "HunYuanMoEV1", **HEAD, num_experts=4, moe_topk=2)
causal("exaone-moe", "ExaoneMoe", **HEAD, num_experts=4, num_experts_per_tok=2,
       moe_intermediate_size=16, num_shared_experts=1, first_k_dense_replace=1, n_group=1,
       topk_group=1, sliding_window=6)
causal("minimax-m2", "MiniMaxM2", **HEAD, **EXPERTS)
model("longcat-flash", "LongcatFlashForCausalLM", "LongcatFlashConfig", masked, **TEXT,
      num_layers=2, ffn_hidden_size=36, moe_topk=2, n_routed_experts=4, zero_expert_num=2,
      expert_ffn_hidden_size=16, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
      qk_nope_head_dim=8, v_head_dim=8, head_dim=4)
causal("lfm2-moe", "Lfm2Moe", layer_types=["conv", "full_attention"], num_dense_layers=1,
       num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
model("nllb-moe", "NllbMoeModel", "NllbMoeConfig", both_masked, **SEQ2SEQ, num_experts=4,
      encoder_sparse_step=2, decoder_sparse_step=2)
text("gemma3n", "Gemma3nForCausalLM", "Gemma3nTextConfig", **KV, **HEAD, sliding_window=6,
     layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=99,
     hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4,
     activation_sparsity_pattern=[0.5, 0.0])
model("cpmant", "CpmAntForCausalLM", "CpmAntConfig", tokens, vocab_size=99, hidden_size=32,
      num_attention_heads=4, dim_head=8, dim_ff=37, num_hidden_layers=2, prompt_length=4,
      prompt_types=4, segment_types=4, position_bias_num_buckets=8, position_bias_max_distance=16)

# -- encoder-decoders ------------------------------------------------------------------------------
model("bart-classifier", "BartForSequenceClassification", "BartConfig", lambda: ending(2),
      **SEQ2SEQ)
model("t5-classifier", "T5ForSequenceClassification", "T5Config", lambda: ending(1), **T5,
      eos_token_id=1)
model("pegasus-x", "PegasusXModel", "PegasusXConfig", both_masked, **SEQ2SEQ, num_global_tokens=4,
      block_size=4)
model("fsmt", "FSMTForConditionalGeneration", "FSMTConfig", both,
      **{k: v for k, v in SEQ2SEQ.items() if k != "vocab_size"}, langs=["en", "de"],
      src_vocab_size=99, tgt_vocab_size=99)

# -- vision ----------------------------------------------------------------------------------------
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2], "window_size": 4}
STAGES = [f"stage{i}" for i in (1, 2, 3, 4)]
DETECTION = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37,
             "num_queries": 5, "num_labels": 5}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
LAST = ("ResNetConfig", {**RESNET, "out_features": STAGES[3:]})
on(LAST, "detr", "Detr", "ForObjectDetection", large, **DETECTION, use_timm_backbone=False)
on(LAST, "conditional-detr", "ConditionalDetr", "ForObjectDetection", large, **DETECTION,
   use_timm_backbone=False)
on(("RTDetrResNetConfig", {**RESNET, "out_features": STAGES[1:], "layer_type": "basic"}),
   "rt-detr", "RTDetr", "ForObjectDetection", large, encoder_hidden_dim=32,
   encoder_in_channels=[16, 16, 24], encoder_ffn_dim=37, encoder_attention_heads=2, d_model=32,
   num_queries=5, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=37, decoder_n_points=2,
   decoder_layers=2, decoder_attention_heads=2, num_labels=5, eval_size=None)
on(("SwinConfig", {**SWIN, "out_features": STAGES}), "mask2former", "Mask2Former",
   "ForUniversalSegmentation", large, feature_size=32, mask_feature_size=32, hidden_dim=32,
   encoder_feedforward_dim=37, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
   dim_feedforward=37, num_queries=5)
on(("ConvNextConfig", {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1],
                       "out_features": STAGES}),
   "upernet", "UperNet", "ForSemanticSegmentation", large, hidden_size=16,
   pool_scales=[1, 2, 3, 6], auxiliary_in_channels=16, auxiliary_channels=8, num_labels=5)
on(("Dinov2Config", {**VISION, "num_hidden_layers": 4, "mlp_ratio": 2, "out_features": STAGES,
                     "reshape_hidden_states": False}),
   "depth-anything", "DepthAnything", "ForDepthEstimation", pixels, reassemble_hidden_size=32,
   patch_size=8, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, head_hidden_size=8)
model("superpoint", "SuperPointForKeypointDetection", "SuperPointConfig", large,
      encoder_hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, descriptor_decoder_dim=16)
model("hiera", "HieraModel", "HieraConfig", large, embed_dim=16, image_size=[64, 64],
      depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
model("dinov3-convnext", "DINOv3ConvNextModel", "DINOv3ConvNextConfig", pixels,
      hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1])
model("maskformer-swin", "MaskFormerSwinModel", "MaskFormerSwinConfig", large, **SWIN)
model("sam-vision", "SamVisionModel", "SamVisionConfig", pixels, **VISION, output_channels=16,
      window_size=2, global_attn_indexes=[1], mlp_dim=37)
model("vitdet", "VitDetModel", "VitDetConfig", pixels, **VISION, window_size=2,
      window_block_indices=[0])
model("mgp-str", "MgpstrForSceneTextRecognition", "MgpstrConfig", pixels, image_size=[32, 32],
      patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_token_length=7,
      num_character_labels=10, num_bpe_labels=20, num_wordpiece_labels=20, mlp_ratio=2.0)
model("mobilevitv2-segmentation", "MobileViTV2ForSemanticSegmentation", "MobileViTV2Config", large,
      image_size=64, width_multiplier=0.25, num_labels=5, aspp_out_channels=16)
model("vivit", "VivitModel", "VivitConfig", video, **VISION, num_frames=4, tubelet_size=[2, 8, 8])
model("videomae", "VideoMAEModel", "VideoMAEConfig", video, **VISION, num_frames=4, tubelet_size=2)
model("timesformer", "TimesformerModel", "TimesformerConfig", video, **VISION, num_frames=4)

# -- image and text --------------------------------------------------------------------------------
model("altclip", "AltCLIPModel", "AltCLIPConfig", image_and_text,
      text_config={**TEXT, "project_dim": 16, "pad_token_id": 1}, vision_config={**VISION},
      projection_dim=16)
model("owlv2", "Owlv2Model", "Owlv2Config", image_and_text, text_config={**TEXT},
      vision_config={**VISION}, projection_dim=16)
PALIGEMMA = {"text_config": {**TEXT, **KV, **HEAD, "model_type": "gemma"},
             "vision_config": {**VISION, "projection_dim": 32, "model_type": "siglip_vision_model"},
             "image_token_index": 95, "projection_dim": 32, "hidden_size": 32}
model("paligemma", "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
      lambda: {**illustrated(95, 16), "token_type_ids": torch.eye(20, dtype=torch.int64)[18:]},
      **PALIGEMMA)
model("aimv2", "Aimv2TextModel", "Aimv2TextConfig", masked, **TEXT)
model("paligemma-untyped", "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
      lambda: illustrated(95, 16), **PALIGEMMA)
model("git", "GitForCausalLM", "GitConfig", lambda: {**pixels(), **masked()}, **TEXT,
      vision_config={**VISION})
model("flava", "FlavaModel", "FlavaConfig", lambda: {**pixels(), **masked()},
      text_config={**TEXT}, image_config={**VISION}, hidden_size=32, projection_dim=16,
      multimodal_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                         "intermediate_size": 37})
model("siglip2-vision", "Siglip2VisionModel", "Siglip2VisionConfig",
      lambda: {**noise("pixel_values", 2, 16, 192),
               "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
               "spatial_shapes": torch.tensor([[4, 4], [4, 4]])},
      hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
      patch_size=8, num_patches=16)

# -- sound -----------------------------------------------------------------------------------------
model("wav2vec2-conformer", "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", waves, **SPEECH,
      conv_depthwise_kernel_size=5, position_embeddings_type="rotary")
model("unispeech-sat", "UniSpeechSatModel", "UniSpeechSatConfig", waves, **SPEECH)
model("sew-d", "SEWDModel", "SEWDConfig", waves, **SPEECH, squeeze_factor=1,
      max_position_embeddings=32, position_buckets=8)
model("moonshine", "MoonshineForConditionalGeneration", "MoonshineConfig",
      lambda: {**waves(1500), **tokens(7, name="decoder_input_ids")}, vocab_size=99,
      hidden_size=32, intermediate_size=37, encoder_num_hidden_layers=2,
      decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
      max_position_embeddings=64)
model("hifigan", "SpeechT5HifiGan", "SpeechT5HifiGanConfig", lambda: noise("spectrogram", 2, 9, 8),
      model_in_dim=8, upsample_initial_channel=16, upsample_rates=[2, 2],
      upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 5],
      resblock_dilation_sizes=[[1, 3], [1, 3]])
model("univnet", "UnivNetModel", "UnivNetConfig",
      lambda: {**noise("input_features", 2, 7, 16), **noise("noise_sequence", 2, 7, 8)},
      model_in_channels=8, model_hidden_channels=8, num_mel_bins=16, resblock_kernel_sizes=[3, 3],
      resblock_stride_sizes=[4, 4], resblock_dilation_sizes=[[1, 3], [1, 3]],
      kernel_predictor_hidden_channels=8)
model("fastspeech2-conformer", "FastSpeech2ConformerModel", "FastSpeech2ConformerConfig", tokens,
      vocab_size=99, hidden_size=32, num_mel_bins=8, encoder_layers=1, decoder_layers=1,
      encoder_num_attention_heads=2, decoder_num_attention_heads=2, encoder_linear_units=37,
      decoder_linear_units=37, speech_decoder_postnet_layers=2, speech_decoder_postnet_units=16)
model("mimi", "MimiModel", "MimiConfig", lambda: noise("input_values", 2, 1, 643), num_filters=4,
      hidden_size=16, upsampling_ratios=[4, 2], codebook_size=16, codebook_dim=8,
      vector_quantization_hidden_dimension=8, num_quantizers=4, num_semantic_quantizers=1,
      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
      intermediate_size=16, upsample_groups=16, sliding_window=8)
model("dac", "DacModel", "DacConfig", lambda: noise("input_values", 2, 1, 640),
      encoder_hidden_size=8, downsampling_ratios=[2, 4], decoder_hidden_size=16, n_codebooks=2,
      codebook_size=16, codebook_dim=4, upsampling_ratios=[4, 2])

# -- series ----------------------------------------------------------------------------------------
FORECAST = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "d_model": 16,
            "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "num_time_features": 1}
model("time-series-transformer", "TimeSeriesTransformerModel", "TimeSeriesTransformerConfig",
      series, **FORECAST)
model("informer", "InformerModel", "InformerConfig", series, **FORECAST, attention_type="full")
model("autoformer", "AutoformerModel", "AutoformerConfig", series, **FORECAST, label_length=2)
model("timesfm", "TimesFmModel", "TimesFmConfig",
      lambda: {**noise("past_values", 2, 32),
               "past_values_padding": torch.zeros(2, 32, dtype=torch.int64),
               "freq": torch.zeros(2, 1, dtype=torch.int64)},
      patch_length=8, context_length=32, horizon_length=8, hidden_size=16, num_hidden_layers=2,
      num_attention_heads=2, head_dim=8, intermediate_size=16)
# fmt: on


# -- series ----------------------------------------------------------------------------------------
model("patchtst", "PatchTSTModel", "PatchTSTConfig",
      lambda: noise("past_values", 2, 32, 3),
      num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=16,
      num_hidden_layers=2, num_attention_heads=4, ffn_dim=32)  # fmt: skip
model("patchtsmixer", "PatchTSMixerModel", "PatchTSMixerConfig",
      lambda: noise("past_values", 2, 32, 3),
      num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=16,
      num_layers=2)  # fmt: skip
model("decision-transformer", "DecisionTransformerModel", "DecisionTransformerConfig",
      lambda: {
          **noise("states", 2, 5, 6),
          **noise("actions", 2, 5, 3),
          **noise("rewards", 2, 5, 1),
          **noise("returns_to_go", 2, 5, 1),
          "timesteps": torch.arange(5).repeat(2, 1),
          "attention_mask": torch.ones(2, 5, dtype=torch.int64),
      },
      state_dim=6, act_dim=3, hidden_size=32, n_layer=2, n_head=4)  # fmt: skip
