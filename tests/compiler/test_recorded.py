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
