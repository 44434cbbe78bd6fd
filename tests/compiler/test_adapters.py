"""transformers' modules that note something down at every call, which shall not matter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import plait

sys.path.insert(0, str(Path(__file__).parent))
import hf_models  # plain modules beside this file
import hf_models_more

pytest.importorskip("transformers")


def check(model: nn.Module, calls: list[dict[str, torch.Tensor]], programs: int) -> None:
    """Every call gives what the model gives, by ``programs`` at most; no method stays replaced."""
    before = [(m, set(vars(m))) for m in model.modules()]
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        found = [compiled(**inputs)[0] for inputs in calls]
        assert all(set(vars(m)) == names for m, names in before)
        for have, inputs in zip(found, calls, strict=True):
            torch.testing.assert_close(have, model(**inputs)[0], rtol=1e-4, atol=1e-4)
    assert not [r for r in compiled.remarks if r.pass_name == "capture" and r.kind == "missed"]
    assert 0 < len(compiled.programs) <= programs


def test_funnel_notes_a_length_that_nothing_reads() -> None:
    model, _ = hf_models.MODELS["funnel-token"]()
    check(model, [hf_models.masked(length) for length in (11, 8, 13)], programs=3)


def test_a_table_of_the_last_length_is_made_by_the_program() -> None:
    model, _ = hf_models.MODELS["wav2vec2-conformer"]()
    lengths = (1000, 1200, 900, 1000, 1500, 1100)
    check(model, [hf_models_more.waves(length) for length in lengths], programs=2)
