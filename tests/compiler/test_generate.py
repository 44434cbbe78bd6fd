"""Text generation through compiled language models, and the caches that it carries along."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plait
from plait.compiler.capture.state import states_of
from plait.compiler.capture.tree import (
    flatten,
    flatten_call,
    from_json,
    leaf_names,
    to_json,
    unflatten,
)

sys.path.insert(0, str(Path(__file__).parent))
import hf_models  # a plain module beside this file

transformers = pytest.importorskip("transformers")

NEW = 8


@dataclass
class Made:
    """A model, compiled, arguments for generation, and whether each run of its code was traced."""

    model: Any
    compiled: Any
    given: dict[str, Any]
    traced: list[bool]


@pytest.fixture(scope="module")
def mixtral() -> Made:
    """Decodes greedily and does not end early."""
    model, inputs = hf_models.MODELS["mixtral"]()
    model.generation_config.eos_token_id = None
    traced: list[bool] = []
    embedding, forward = model.model.embed_tokens, model.model.embed_tokens.forward

    def counted(*args: Any) -> Any:
        traced.append(torch.compiler.is_exporting())
        return forward(*args)

    embedding.forward = counted
    given = {**inputs, "max_new_tokens": NEW, "do_sample": False}
    return Made(model, plait.compile(model, tune="off"), given, traced)


def runs(compiled: plait.Compiled) -> int:
    """How often a program ran."""
    return sum(p.calls for p in compiled.programs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_runs_compiled_and_gives_the_same_tokens(mixtral: Made, cache: str) -> None:
    model, compiled, given = mixtral.model, mixtral.compiled, mixtral.given
    given = given if cache == "dynamic" else {**given, "cache_implementation": cache}
    want = model.generate(**given)
    before = runs(compiled)
    mixtral.traced.clear()
    have = compiled.generate(**given)
    assert torch.equal(have, want) and have.shape[1] == given["input_ids"].shape[1] + NEW
    assert runs(compiled) == before + NEW  # each step, the first and all that follow
    assert all(mixtral.traced), "the original ran outside of capture"
    assert not [r for r in compiled.remarks if r.pass_name == "capture" and r.kind == "missed"]


def test_beams_and_samples_are_the_models(mixtral: Made) -> None:
    model, compiled, given = mixtral.model, mixtral.compiled, mixtral.given
    for change in ({"num_beams": 2}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(7)
        want = model.generate(**{**given, **change})
        torch.manual_seed(7)
        assert torch.equal(compiled.generate(**{**given, **change}), want)


def caches(model: Any, kind: str) -> Any:
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=24)
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_cache_is_changed_in_place(mixtral: Made, kind: str) -> None:
    model, compiled, given = mixtral.model, mixtral.compiled, mixtral.given
    mine, theirs = caches(model, kind), caches(model, kind)
    layers, x = list(mine.layers), given["input_ids"]
    for step in range(4):
        held = [layer.keys for layer in mine.layers]
        with torch.no_grad():
            have = compiled(input_ids=x, past_key_values=mine)
            want = model(input_ids=x, past_key_values=theirs)
        torch.testing.assert_close(have.logits, want.logits, rtol=1e-5, atol=1e-6)
        assert have.past_key_values is mine and all(
            a is b for a, b in zip(mine.layers, layers, strict=True)
        )
        assert mine.get_seq_length() == theirs.get_seq_length()
        for a, b in zip(mine.layers, theirs.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a.values, b.values, rtol=1e-5, atol=1e-6)
        if kind == "static" and step:
            assert all(a is layer.keys for a, layer in zip(held, mine.layers, strict=True))
        x = want.logits[:, -1:].argmax(-1)


def test_caches_keep_apart(mixtral: Made) -> None:
    model, compiled, given = mixtral.model, mixtral.compiled, mixtral.given
    first, second = caches(model, "static"), caches(model, "static")
    with torch.no_grad():
        compiled(input_ids=given["input_ids"], past_key_values=first)
        kept = copy.deepcopy(first)
        compiled(input_ids=given["input_ids"].flip(0), past_key_values=second)
    for a, b, other in zip(first.layers, kept.layers, second.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and not torch.equal(a.keys, other.keys)


def test_two_caches_follow_their_arguments() -> None:
    """Whichever way round they are written."""

    class Swaps(nn.Module):
        def forward(self, x: torch.Tensor, a: Any = None, b: Any = None) -> Any:
            a.update(x, x + 1, 0)
            b.update(2 * x, x, 0)
            return x.sum(), b, a

    model = Swaps().eval()
    compiled = plait.compile(model, tune="off")
    x = torch.randn(1, 2, 3, 4)
    for names in ("ab", "ba"):
        made = {name: transformers.DynamicCache() for name in names}
        with torch.no_grad():
            _, second, first = compiled(x, **made)
        assert first is made["a"] and second is made["b"]
        assert torch.equal(first.layers[0].keys, x) and torch.equal(first.layers[0].values, x + 1)
        assert torch.equal(second.layers[0].keys, 2 * x)
    assert runs(compiled) == 2


def test_a_saved_decoding_step_loads(mixtral: Made, tmp_path: Path) -> None:
    model, given = mixtral.model, mixtral.given
    compiled = plait.compile(model, tune="off")
    prompt, token = given["input_ids"], torch.full((2, 1), 5)
    results = []
    with torch.no_grad():
        cache = caches(model, "static")
        compiled(input_ids=prompt, past_key_values=cache)
        compiled(input_ids=token, past_key_values=cache)
        compiled.save(tmp_path / "decode.plait")
        for each in (compiled, plait.load(tmp_path / "decode.plait")):
            cache = caches(model, "static")
            each(input_ids=prompt, past_key_values=cache)
            out = each(input_ids=token, past_key_values=cache)
            assert out.past_key_values is cache
            results.append((out.logits, cache.layers[1].values))
    assert all(map(torch.equal, *results))


def test_methods_of_a_compiled_module_call_it_compiled() -> None:
    class Predicts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

        def predict(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
            """Doc."""
            self.asked = times
            return self(x).argmax(-1)

        def fluent(self) -> Any:
            return self

        def copied(self) -> Any:
            return copy.deepcopy(self)

        @classmethod
        def make(cls) -> Any:
            return cls

    class Derived(Predicts):
        def predict(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
            return super().predict(x, times)

    model = Derived().eval()
    compiled = plait.compile(model, tune="off")
    x = torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(compiled.predict(x, times=3), model(x).argmax(-1))
    assert runs(compiled) == 1 and model.asked == 3
    assert compiled.fluent() is compiled and compiled.make() is Derived
    assert type(compiled.copied()) is Derived
    assert compiled.predict.__name__ == "predict"


def test_state_objects_are_caches_and_nothing_else(mixtral: Made) -> None:
    cache = caches(mixtral.model, "dynamic")
    assert states_of({"a": [cache, 1], "b": (object(), nn.Linear(1, 1))}) == [cache]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_sliding_window_does_not_take_a_program_for_each_token(cache: str) -> None:
    """Such caches count tokens by a Python number."""
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.MistralConfig(**small, **heads, sliding_window=8)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    compiled = plait.compile(model, tune="off", pipeline="normalize")
    given = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        given["cache_implementation"] = cache
    for length in (5, 5, 6):  # the window is full after some tokens
        ids = torch.randint(3, 60, (2, length))
        before = runs(compiled)
        assert torch.equal(compiled.generate(ids, **given), model.generate(ids, **given))
        assert runs(compiled) == before + 16
    assert len(compiled.programs) <= 6


def test_static_caches_of_other_sizes_share_programs(mixtral: Made) -> None:
    model, compiled = mixtral.model, plait.compile(mixtral.model, tune="off", pipeline="normalize")
    with torch.no_grad():
        for room, length in ((16, 5), (19, 7), (24, 9), (30, 6)):
            mine, theirs = (
                transformers.StaticCache(config=model.config, max_cache_len=room) for _ in range(2)
            )
            for ids in (torch.randint(3, 60, (2, length)), torch.full((2, 1), 4)):
                have = compiled(input_ids=ids, past_key_values=mine)
                want = model(input_ids=ids, past_key_values=theirs)
                torch.testing.assert_close(have.logits, want.logits, rtol=1e-5, atol=1e-6)
            assert mine.layers[1].max_cache_len == mine.layers[0].keys.shape[2] == room
    assert len(compiled.programs) == 4 and runs(compiled) == 8


def test_counters_of_caches_are_sizes_and_come_back_as_numbers() -> None:
    layer = transformers.cache_utils.DynamicSlidingWindowLayer(8)
    layer.cumulative_length = 3
    leaves, tree = flatten_call(([layer],))
    names = leaf_names(tree)
    assert leaves[names.index("[0][0].cumulative_length")].shape == (5, 0)
    (copied,) = unflatten(tree, leaves)[0]
    assert type(copied) is type(layer) and vars(copied) == vars(layer)
    assert from_json(to_json(tree)).count == tree.count == len(leaves) == len(names)
    plain, _ = flatten(([layer],))
    assert plain[names.index("[0][0].cumulative_length")] == 3
