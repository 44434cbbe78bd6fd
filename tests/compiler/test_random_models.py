"""Models drawn at random give what they give in eager mode, also for other sizes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import plait

from .random_models import RandomModel, inputs_of, random_model

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}


def longer(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors with one row more."""
    return [torch.cat([x, x[:1] * 0.5]) for x in tensors]


def check(model: RandomModel, seed: int, dtype: torch.dtype) -> bool:
    """Compares calls of two sizes; returns whether the model was captured.

    A model that does not run with the other size in eager mode is not called with it.
    """
    compiled = plait.compile(model.eval(), tune="off")
    for change in (list, longer):
        mine, own = (change(inputs_of(random.Random(seed), dtype)) for _ in range(2))
        with torch.no_grad():
            try:
                want = model(*own)
            except (RuntimeError, IndexError):
                assert change is longer
                continue
            have = compiled(*mine)
        for a, b in zip((*have, *mine), (*want, *own), strict=True):
            same = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "equal_nan": True}
            torch.testing.assert_close(a, b, **same, msg=lambda text: f"{text}\n{model}")
    return bool(compiled.programs)


@pytest.mark.parametrize("seed", range(6))
def test_any_model_gives_what_it_gives_in_eager_mode(seed: int) -> None:
    dtype = list(TOLERANCE)[seed % 2]
    assert check(random_model(seed, dtype), seed, dtype)
