"""Encoders of torch give zeros for padding, as they do in eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait

NORM = nn.LayerNorm(4)
nn.init.normal_(NORM.bias)


@pytest.mark.parametrize("options", [{"norm": NORM}, {"enable_nested_tensor": False}])
def test_what_is_given_for_padding(options: dict[str, Any]) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, **options).eval()
    compiled = plait.compile(model, tune="off")

    def agree(lengths: tuple[int, ...], size: int, first: int = 0) -> Tensor:
        x, places = torch.randn(len(lengths), size, 4), torch.arange(size)
        hidden = (places >= torch.tensor(lengths)[:, None]) | (places < first)
        with torch.no_grad():
            have = compiled(x, src_key_padding_mask=hidden)
            want = model(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
        return have[hidden]

    padding = agree((3, 5), 5)
    left_out = bool((padding == padding[0]).all())
    assert left_out == ("norm" in options)
    agree((2, 4, 6), 6)
    agree((5, 4, 6), 6, first=1)  # hidden at the beginning, so nothing is left out
    assert len(compiled.programs) == 2
