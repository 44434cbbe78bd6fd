"""Convolutions of 16 bits: pairs of bfloat16 channels, and what becomes float32 as it is read."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F

from plait.kernels import packing_conv
from plait.kernels.target import host
from plait.kernels.templates import conv

from . import spatial
from .spatial import Case, Layout, case, check
from .test_conv import random_case


@pytest.fixture(params=["pairs", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of a case, on a machine with multiplications of pairs or without."""
    pairs = request.param == "pairs"
    if pairs and not host().bf16_pairs:
        pytest.skip("this CPU has no AVX512-BF16")
    machine = dataclasses.replace(host(), bf16_pairs=pairs)
    monkeypatch.setattr(spatial, "host", lambda: machine)
    return torch.float16 if request.param == "float16" else torch.bfloat16


def narrowed(made: Case, dtype: torch.dtype) -> Case:
    """A case with its tensors in ``dtype``."""
    return dataclasses.replace(made, tensors=[t.to(dtype) for t in made.tensors])


@pytest.mark.parametrize("halo", [True, False])
def test_every_candidate(dtype: torch.dtype, halo: bool) -> None:
    cases = [
        case(1, 16, 48, (3, 3), (8, 9), padding=1, halo=halo),
        case(2, 20, 40, (1, 1), (7, 5), halo=halo),
        case(1, 9, 33, (1, 7), (17, 17), padding=(0, 3), halo=halo),
    ]
    check([narrowed(c, dtype) for c in cases], conv, every=True)


def test_channels_strides_and_layouts(dtype: torch.dtype) -> None:
    odd = Layout(((1, 1), (1, 1)), skip=1, extra=1)  # images are odd distances apart
    even = Layout(((1, 2), (0, 1)), skip=1, extra=2)
    cases = [
        *(case(1, c, 32, (3, 3), (6, 7), padding=1) for c in (1, 2, 3, 6)),
        *(case(1, 8, oc, (3, 3), (6, 7), padding=1) for oc in (5, 16, 17, 50)),
        *(case(2, 6, 20, (3, 3), (9, 11), padding=1, layout=x) for x in (odd, even)),
        case(1, 8, 32, (3, 3), (11, 12), padding=1, stride=2, halo=False),
        case(1, 8, 32, (5, 1), (11, 12), padding=(2, 0), dilation=(2, 1)),
        case(1, 64, 64, (3, 3), (6, 6), padding=1, groups=2),
        case(1, 8, 32, (3, 3), (6, 6), layout=Layout(plain=True), out=Layout(plain=True)),
        case(1, 300, 32, (3, 3), (5, 5), padding=1, bias=False),
        *(case(2, 6, 20, (3, 3), (9, 11), padding=1, symbolic=True, halo=h) for h in (True, False)),
    ]
    check([narrowed(c, dtype) for c in cases], conv)


def test_epilogue(dtype: torch.dtype) -> None:
    made = case(1, 16, 48, (3, 3), (8, 9), padding=1)
    product = made.function
    made.function = lambda x, w, b, r: F.silu(product(x, w, b)) * r + 1
    made.tensors.append(torch.randn(1, 48, 8, 9))
    check([narrowed(made, dtype)], conv)


def test_random_convolutions(dtype: torch.dtype) -> None:
    rng = random.Random(11)
    check([narrowed(random_case(rng), dtype) for _ in range(24)], conv)


@pytest.mark.parametrize("halo", [True, False])
def test_narrow_groups(dtype: torch.dtype, halo: bool) -> None:
    cases = [
        case(1, 32, 32, (3, 3), (14, 13), padding=1, groups=8, halo=halo),
        case(1, 48, 48, (5, 5), (9, 16), padding=2, groups=48, stride=2, halo=halo),
        case(1, 16, 32, (3, 3), (7, 7), padding=1, groups=16, halo=halo, symbolic=True),
    ]
    check([narrowed(c, dtype) for c in cases], conv, every=True)


def test_packed_pairs() -> None:
    weight = torch.randn(32, 4, 3, 3)
    packed = packing_conv.conv_direct(weight, groups=1, lanes=16, vectors=1, pairs=True)
    assert packed.shape == (2, 3, 3, 2, 16, 2) and packed.is_contiguous()
    assert torch.equal(packed[1, 2, 0, 1, 5], weight[21, 2:, 2, 0])
