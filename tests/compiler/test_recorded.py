"""Hidden states and attentions of transformers' models, which hooks record."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import plait

sys.path.insert(0, str(Path(__file__).parent))
import hf_models  # a plain module beside this file

pytest.importorskip("transformers")


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["llama-eager", "t5", "vit"])
def test_a_first_call_that_asks_for_states_is_compiled(name: str) -> None:
    model, inputs = hf_models.MODELS[name]()
    given: dict[str, Any] = {**inputs, "output_hidden_states": True, "output_attentions": True}
    twin = copy.deepcopy(model)
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        have = compiled(**given)
        assert not hooks(model), "a trace leaves nothing on the model"
        want = twin(**given)
        again = model(**given)  # which puts its hooks on now
        last = compiled(**given)
    for each in (have, again, last):
        assert each.keys() == want.keys()
        for key in want.keys() & {"hidden_states", "attentions", "decoder_hidden_states"}:
            torch.testing.assert_close(each[key], want[key], rtol=1e-4, atol=1e-5)
    assert not [r for r in compiled.remarks if r.pass_name == "capture" and r.kind == "missed"]


def test_a_model_within_another_leaves_the_record_of_the_other() -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": 16, "patch_size": 8}
    vision = {**sizes, **image, "output_channels": 16, "mlp_dim": 16, "window_size": 2}
    config = transformers.SamConfig(
        vision_config={**vision, "num_pos_feats": 8, "global_attn_indexes": [0]},
        prompt_encoder_config={"hidden_size": 16, **image, "mask_input_channels": 4},
        mask_decoder_config={**sizes, "mlp_dim": 16, "iou_head_hidden_dim": 8, "iou_head_depth": 1},
    )
    model = transformers.SamModel(config).eval()
    given: dict[str, Any] = {
        "pixel_values": torch.randn(1, 3, 16, 16),
        "input_points": torch.tensor([[[[3.0, 5.0]]]]),
        "output_attentions": True,
    }
    with torch.no_grad():
        have, want = plait.compile(model, tune="off")(**given), model(**given)
    assert have.keys() == want.keys() and want.mask_decoder_attentions
    pairs = zip(have.mask_decoder_attentions, want.mask_decoder_attentions, strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)
