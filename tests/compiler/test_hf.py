"""Hugging Face architectures through plait.compile: same outputs as eager, and compiled whole.

By default a choice that covers every family runs; ``PLAIT_HF=all`` in the environment runs every
model, ``PLAIT_HF=name,name`` some.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import plait
from plait.compiler.capture.tree import flatten

sys.path.insert(0, str(Path(__file__).parent))
import hf_models  # plain modules beside this file
import hf_models_more  # noqa: F401

pytest.importorskip("transformers")

CHOICE = """
    albert audio-spectrogram bart beit bert bert-classifier bert-eager bit blip-vision bloom
    clip clip-text clip-vision convnext convnextv2 ctrl data2vec-audio deberta-v2 deepseek-v3
    deit dinov2 distilbert electra encodec ernie esm falcon-alibi fnet focalnet gemma2 gemma3
    gpt-bigcode gpt-neo gpt-neox gpt-oss gpt2 gpt2-eager granite-moe hubert layoutlm llama mamba
    mistral mixtral mobilenet-v1 modernbert mpt olmoe openai-gpt opt patchtsmixer patchtst phi3
    poolformer qwen2 qwen3 qwen3-moe resnet resnet-basic roberta segformer siglip-vision
    squeezebert swin t5 t5-encoder unispeech vit wav2vec2 whisper xlnet yolos bart-classifier
    cpmant hifigan informer llama4 mimi nemotron-h paligemma paligemma-untyped perceiver
    siglip2-vision tapas timesfm univnet upernet vitdet
""".split()

NOT_CAPTURED = {
    "fastspeech2-conformer": "does otherwise where all durations that it predicts are 0",
}
"""Models that a graph cannot stand for: they must run as they are, with a remark."""


def selected() -> list[str]:
    wanted = os.environ.get("PLAIT_HF", "")
    if wanted == "all":
        return sorted(hf_models.MODELS)
    return wanted.split(",") if wanted else [*CHOICE, *NOT_CAPTURED]


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    yield
    gc.collect()


def tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in flatten(value, objects=True)[0] if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", selected())
def test_architecture(name: str) -> None:
    model, inputs = hf_models.MODELS[name]()
    compiled = plait.compile(model, tune="off")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(**inputs)
        results = compiled(**inputs)
        again = compiled(**inputs)
    assert type(results) is type(expected)
    want, got = tensors(expected), tensors(results)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, _scale(b)))
    for a, b in zip(got, tensors(again), strict=True):
        told = "repeated calls must agree to the bit"
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=told)
    refused = [r for r in compiled.remarks if r.pass_name == "capture" and r.kind == "missed"]
    if name in NOT_CAPTURED:
        assert [r.id for r in refused] == ["PLT-CAP-001"], refused
    else:
        assert not refused, refused
        assert compiled.plan is not None


def _scale(tensor: torch.Tensor) -> float:
    if not tensor.is_floating_point() or not tensor.numel():
        return 1.0
    finite = tensor[tensor.isfinite()]
    values = finite[finite.abs() < 1e30]  # masks hold the lowest number of the type
    return float(values.abs().max()) if values.numel() else 1.0


def test_the_choice_is_wide_enough() -> None:
    assert set(CHOICE) | set(NOT_CAPTURED) <= set(hf_models.MODELS)
    assert len(set(CHOICE)) >= 60
    assert len(hf_models.MODELS) >= 240
    assert len(NOT_CAPTURED) <= 0.05 * len(hf_models.MODELS)


def test_second_sequence_length_is_dynamic() -> None:
    model, _ = hf_models.MODELS["bert"]()
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        for length in (5, 9, 13, 30):
            inputs = hf_models.masked(length)
            got, want = compiled(**inputs), model(**inputs)
            torch.testing.assert_close(
                got.last_hidden_state, want.last_hidden_state, rtol=1e-4, atol=1e-4
            )
    assert compiled.explain().count("program ") == 2
