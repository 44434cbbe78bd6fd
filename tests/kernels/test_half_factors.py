"""Products of 16-bit matrices: pairs of bfloat16, and what becomes float32 on the way."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F

from plait.kernels import packing
from plait.kernels.group import Unsupported
from plait.kernels.target import Target, host
from plait.kernels.templates import gemm
from plait.kernels.templates.half_factors import even

from . import gemm_check
from .gemm_check import Case, check, odd_blocks, rand, trace

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["pairs", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of a case, on a machine with multiplications of pairs or without."""
    torch.manual_seed(0)
    pairs = request.param == "pairs"
    if pairs and not host().bf16_pairs:
        pytest.skip("this CPU has no AVX512-BF16")
    monkeypatch.setattr(gemm_check, "host", lambda: dataclasses.replace(host(), bf16_pairs=pairs))
    return F16 if request.param == "float16" else BF16


def test_every_tail(dtype: torch.dtype) -> None:
    sizes = itertools.product((1, 2, 7, 13, 60), (1, 2, 17, 64, 300), (1, 16, 33, 100))
    check(
        [
            Case(f"{m}x{k}x{n}", F.linear, [rand(m, k, dtype=dtype), rand(n, k, dtype=dtype)], [1])
            for i, (m, k, n) in enumerate(sizes)
            if i % 2 == 0
        ]
    )


def test_every_candidate_and_odd_blocks(dtype: torch.dtype) -> None:
    tensors = [rand(61, 151, dtype=dtype), rand(90, 151, dtype=dtype)]
    case = Case("blocks", F.linear, tensors, const=[1])
    group, io = trace(case)
    configs = gemm.candidates(group, io, gemm_check.host())
    check([dataclasses.replace(case, name=str(c), config=c) for c in (*configs, *odd_blocks(75))])


def test_strides_and_added_terms(dtype: torch.dtype) -> None:
    wide, w, b = (rand(*s, dtype=dtype) for s in ((40, 100), (40, 30), (40,)))
    r = rand(20, 40, dtype=dtype)
    lefts = {
        "rows apart": wide[:20, 5:35],
        "odd rows": rand(20, 31, dtype=dtype)[:, :30],
        "transposed": rand(30, 20, dtype=dtype).t(),
        "steps apart": wide[::2, ::3][:, :30],
        "expanded": rand(1, 30, dtype=dtype).expand(20, 30),
    }
    cases = [Case(name, F.linear, [x, w, b], [1, 2]) for name, x in lefts.items()]
    x = wide[:20, :30]
    cases += [
        Case("mm", torch.mm, [x, rand(30, 40, dtype=dtype)], [1]),
        Case("residual", lambda x, w, b, r: F.silu(F.linear(x, w, b)) * r, [x, w, b, r], [1, 2]),
        Case("cast", lambda x, w: F.linear(x, w).float(), [x, w], [1]),
        Case("not packed", torch.mm, [x, rand(30, 40, dtype=dtype)]),
        Case("turned", F.linear, [rand(40, 64, dtype=dtype), rand(50, 64, dtype=dtype)]),
        Case("batches", torch.bmm, [rand(3, 5, 8, dtype=dtype), rand(3, 8, 9, dtype=dtype)], [1]),
    ]
    check(cases)


def test_symbolic_rows(dtype: torch.dtype) -> None:
    w = rand(72, 41, dtype=dtype)
    others = [[rand(m, 41, dtype=dtype), w] for m in (0, 1, 3, 64, 200)]
    check([Case("rows", F.linear, [rand(12, 41, dtype=dtype), w], [1], {0: (0,)}, others)])


def test_nan_and_infinity_stay_in_their_rows(dtype: torch.dtype) -> None:
    x, w = rand(13, 41, dtype=dtype), rand(50, 41, dtype=dtype)
    x[3, 7], x[5, 0], x[12, 40] = float("nan"), float("inf"), float("-inf")
    w[49, 3] = float("inf")
    check([Case("linear", F.linear, [x, w], [1]), Case("even", F.linear, [x[:, 1:], w[:, 1:]])])


def test_no_steps(dtype: torch.dtype) -> None:
    check(
        [
            Case("no steps", F.linear, [rand(4, 0, dtype=dtype), rand(5, 0, dtype=dtype)], [1]),
            Case("no rows", F.linear, [rand(0, 7, dtype=dtype), rand(5, 7, dtype=dtype)], [1]),
        ]
    )


def test_random_products(dtype: torch.dtype) -> None:
    rng = random.Random(7)
    cases = []
    for i in range(16):
        m, k, n = (int(2 ** rng.uniform(0, 8)) for _ in range(3))
        a, b = rand(rng.randint(1, 2), m, k, dtype=dtype), rand(k, n, dtype=dtype)
        if rng.random() < 0.4:
            a = a.transpose(-1, -2).contiguous().transpose(-1, -2)
        if rng.random() < 0.4:
            b = b.t().contiguous().t()
        cases.append(Case(f"random {i}", torch.matmul, [a, b], [1], config=rng.randrange(6)))
    check(cases)


def test_pairs_lie_beside_each_other() -> None:
    weight = rand(2, 5, 3)
    panels = packing.gemm_panels(weight, width=4, transposed=True, pairs=True)
    assert panels.shape == (2, 2, 2, 4, 2) and panels.is_contiguous()
    assert torch.equal(panels[1, 0, 0, 3], weight[1, 3, :2])
    assert torch.equal(panels[1, 1, 1, 0], torch.tensor([weight[1, 4, 2], 0]))


def test_even_for_every_value() -> None:
    a, b = sympy.symbols("a b")
    assert even(0) and even(4) and even(2 * a) and even(4 * a * b + 6)
    assert not even(3) and not even(a) and not even(2 * a + 1) and not even(a * b)


def test_a_machine_with_tiles_keeps_the_library_for_unknown_sizes() -> None:
    tiles = Target("cpu", "sapphirerapids", 64, 32, bf16_pairs=True, tiles=True)
    w = rand(8, 4, dtype=BF16)
    group, io = trace(Case("rows", F.linear, [rand(12, 4, dtype=BF16), w], [1], {0: (0,)}))
    with pytest.raises(Unsupported) as error:
        gemm.candidates(group, io, tiles)
    assert error.value.remark == "PLT-HLF-001" and error.value.hint
    group, io = trace(Case("known", F.linear, [rand(12, 4, dtype=BF16), w], [1]))
    assert gemm.candidates(group, io, tiles)


def test_the_database_tells_machines_apart() -> None:
    one = Target("cpu", "znver4", 64, 32)
    other: Any = dataclasses.replace(one, bf16_pairs=True)
    assert one.key() != other.key()
