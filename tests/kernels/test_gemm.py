"""The GEMM template computes what torch computes: shapes, strides, tails, dtypes, epilogues."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from plait.kernels import packing
from plait.kernels.abi import contiguous_strides
from plait.kernels.group import Unsupported
from plait.kernels.target import Target, host
from plait.kernels.templates import gemm

from .gemm_check import Case, check, lower, odd_blocks, rand, trace


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_every_tail_of_rows_and_columns() -> None:
    check(
        [
            Case(f"linear {m}x{k}x{n}", F.linear, [rand(m, k), rand(n, k)], const=[1], config=i)
            for i, (m, k, n) in enumerate(
                itertools.product((1, 2, 5, 7, 13, 29, 100), (1, 17, 64), (1, 7, 16, 33, 100))
            )
            if i % 2 == 0
        ]
    )


def test_every_candidate_and_odd_blocks() -> None:
    case = Case("blocks", F.linear, [rand(61, 150), rand(90, 150)], const=[1])
    group, io = trace(case)
    configs = gemm.candidates(group, io, host())
    assert 2 <= len(configs) <= 6
    check([dataclasses.replace(case, name=str(c), config=c) for c in (*configs, *odd_blocks(149))])


def test_anchors_constant_or_not() -> None:
    cases = []
    for const in ([], [1]):
        cases += [
            Case("mm", torch.mm, [rand(20, 30), rand(30, 40)], const),
            Case("bmm", torch.bmm, [rand(3, 20, 30), rand(3, 30, 40)], const),
            Case("matmul 4d", torch.matmul, [rand(2, 3, 9, 30), rand(2, 3, 30, 17)], const),
            Case("matmul 4d x 2d", torch.matmul, [rand(2, 3, 9, 30), rand(30, 17)], const),
            Case("matmul broadcast", torch.matmul, [rand(2, 1, 9, 30), rand(3, 30, 17)], const),
            Case("matmul 2d x 3d", torch.matmul, [rand(9, 30), rand(3, 30, 17)], const),
            Case("matmul 1d x 2d", torch.matmul, [rand(30), rand(30, 17)], const),
            Case("matmul 1d x 3d", torch.matmul, [rand(30), rand(4, 30, 17)], const),
            Case("matmul 2d x 1d", torch.matmul, [rand(9, 30), rand(30)], const),
            Case("matmul 3d x 1d", torch.matmul, [rand(2, 9, 30), rand(30)], const),
            Case("matmul 1d x 1d", torch.matmul, [rand(30), rand(30)], const),
            Case("linear 3d", F.linear, [rand(2, 9, 30), rand(17, 30), rand(17)], const),
            Case("linear 1d", F.linear, [rand(30), rand(17, 30), rand(17)], const),
            Case("linear 1d out", F.linear, [rand(9, 30), rand(30)], const),
            Case("gram", lambda x: torch.mm(x, x), [rand(19, 19)], [0] if const else []),
        ]
    check(cases)


def test_scales_and_added_matrix() -> None:
    a, b = rand(20, 30), rand(30, 40)
    nan = torch.full((20, 40), float("nan"))

    def add(alpha: float, beta: float) -> Callable[..., torch.Tensor]:
        return lambda c, x, y: torch.addmm(c, x, y, alpha=alpha, beta=beta)

    cases = [
        Case(f"addmm {c.shape} {alpha} {beta}", add(alpha, beta), [c, a, b], [2])
        for c in (rand(40), rand(20, 40), rand(20, 1), rand(1, 40), torch.tensor(2.0))
        for alpha, beta in ((1, 1), (0.5, -2.0), (2, 0))
    ]
    cases += [
        Case("beta 0 ignores NaN", add(1, 0), [nan, a, b], [2]),
        Case(
            "baddbmm",
            lambda c, x, y: torch.baddbmm(c, x, y, beta=0.25, alpha=3.0),
            [rand(2, 5, 7), rand(2, 5, 11), rand(2, 11, 7)],
        ),
        Case("bias is the weight", lambda w, x: torch.addmm(w, x, w), [rand(30, 30), rand(30, 30)]),
    ]
    check(cases)


def test_strides_of_operands_and_output() -> None:
    wide = rand(40, 100)
    expanded = rand(1, 30).expand(20, 30)

    def column_major(shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(reversed(contiguous_strides(tuple(reversed(shape)))))

    def gaps(shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(3 * s for s in contiguous_strides(shape))

    cases = []
    for const in ([], [1]):
        cases += [
            Case("a transposed", torch.mm, [rand(30, 20).t(), rand(30, 40)], const),
            Case("a slice", torch.mm, [wide[:20, 5:35], rand(30, 40)], const),
            Case("a step", torch.mm, [wide[::2, ::4], rand(25, 40)], const),
            Case("a expanded", torch.mm, [expanded, rand(30, 40)], const),
            Case("a not foldable", F.linear, [rand(3, 50, 30)[:, :7], rand(17, 30)], const),
            Case("a permuted", F.linear, [rand(7, 3, 30).permute(1, 0, 2), rand(17, 30)], const),
            Case("b transposed", torch.mm, [rand(20, 70), rand(90, 70).t()], const),
            Case("b slice", torch.mm, [rand(20, 30), wide[5:35, 7:77]], const),
            Case("b step", torch.mm, [rand(20, 20), wide[::2, ::3]], const),
            Case("b batch order", torch.bmm, [rand(3, 5, 8), rand(8, 3, 9).transpose(0, 1)], const),
        ]
    for strides in (column_major, gaps):
        cases.append(
            Case("out", F.linear, [rand(2, 9, 30), rand(37, 30)], [1], out_strides=strides)
        )
    check(cases)


def test_views_of_operands_inside_the_group() -> None:
    def projected(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.mm(x.view(6, 30), w.t()).view(2, 3, 40)

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1))

    def shared(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, w.unsqueeze(0).expand(3, 30, 20))

    check(
        [
            Case("view and t", projected, [rand(2, 3, 30), rand(40, 30)], [1]),
            Case("square t", lambda x, w: torch.mm(x, w.t()), [rand(5, 8), rand(8, 8)], [1]),
            Case("scores", scores, [rand(2, 9, 4, 16), rand(2, 9, 4, 16)]),
            Case("expanded weight", shared, [rand(3, 5, 30), rand(30, 20)], [1]),
        ]
    )


def test_epilogues() -> None:
    x, w, b = rand(2, 21, 48), rand(80, 48), rand(80)
    r = rand(2, 21, 80)

    def residual(x: Any, w: Any, b: Any, r: Any) -> Any:
        return F.gelu(F.linear(x, w, b)) + r

    def two_outputs(x: Any, w: Any, b: Any, r: Any) -> Any:
        y = F.linear(x, w, b)
        return y, torch.relu(y) * r

    def diamond(x: Any, w: Any, b: Any, r: Any) -> Any:
        y = F.linear(x, w, b)
        for _ in range(12):
            y = y * 0.5 + y * r
        return y

    def heads(x: Any, w: Any, b: Any) -> Any:
        return F.linear(x, w, b).view(2, 21, 5, 16).transpose(1, 2)

    def odd_heads(x: Any, w: Any, b: Any) -> Any:
        return torch.relu(F.linear(x, w, b).view(2, 21, 8, 10).permute(2, 0, 1, 3)) + 1

    def merged(p: Any, v: Any) -> Any:
        return torch.matmul(p, v).permute(0, 2, 1, 3).reshape(2, 9, 64)

    def split(x: Any, w: Any, b: Any) -> Any:
        return F.linear(x, w, b).reshape(42, 5, 16) * 2

    check(
        [
            Case("gelu", lambda x, w, b: F.gelu(F.linear(x, w, b)), [x, w, b], [1, 2]),
            Case("silu", lambda x, w: F.silu(F.linear(x, w)), [x, w], [1]),
            Case("residual", residual, [x, w, b, r], [1, 2]),
            Case("two outputs", two_outputs, [x, w, b, r], [1, 2]),
            Case("reads of one value do not multiply", diamond, [x, w, b, r], [1, 2]),
            Case("cast", lambda x, w: F.linear(x, w).to(torch.bfloat16), [x, w], [1]),
            Case("heads", heads, [x, w, b], [1, 2]),
            Case("odd heads", odd_heads, [x, w, b], [1, 2]),
            Case("merged heads", merged, [rand(2, 4, 9, 9), rand(2, 4, 9, 16)]),
            Case("split columns", split, [x, w, b], [1]),
            Case("narrow", lambda x, w: F.relu(F.linear(x, w)), [x, rand(5, 48)], [1]),
        ]
    )


def test_symbolic_sizes() -> None:
    w, b = rand(72, 40), rand(72)

    def layer(x: Any, w: Any, b: Any) -> Any:
        return F.relu(F.linear(x, w, b))

    def weighted(p: Any, v: Any) -> Any:
        return torch.matmul(p, v)

    def scores(q: Any, k: Any) -> Any:
        return torch.matmul(q, k.transpose(-1, -2)) * 0.125

    qk = [[rand(2, 3, s, 16), rand(2, 3, s, 16)] for s in (37, 1, 16, 130)]
    pv = [[rand(2, 3, s, s), rand(2, 3, s, 16)] for s in (37, 1, 16, 300)]
    check(
        [
            Case(
                "rows", layer, [rand(12, 40), w, b], [1, 2], {0: (0,)},
                [[rand(m, 40), w, b] for m in (0, 1, 2, 3, 7, 64, 65, 301)],
            ),
            Case(
                "deep rows", layer, [rand(12, 5000), rand(40, 5000), rand(40)], [1], {0: (0,)},
                [[rand(m, 5000), rand(40, 5000), rand(40)] for m in (1, 9, 70)],
            ),
            Case(
                "batch and rows", layer, [rand(3, 12, 40), w, b], [1, 2], {0: (0, 1)},
                [[rand(p, m, 40), w, b] for p, m in ((1, 1), (2, 77), (5, 3))],
            ),
            Case("scores", scores, qk[0], (), {0: (2,), 1: (2,)}, qk[1:]),
            Case("weighted", weighted, pv[0], (), {0: (2, 3), 1: (2,)}, pv[1:]),
        ]
    )  # fmt: skip


def test_nan_and_infinity_stay_in_their_rows() -> None:
    x = rand(13, 40)
    x[3, 7], x[5, 0], x[12, 39] = float("nan"), float("inf"), float("-inf")
    w = rand(50, 40)
    w[49, 3] = float("inf")
    check(
        [
            Case("linear", F.linear, [x, w], [1]),
            Case("mm", torch.mm, [x, w.t().contiguous()]),
            Case("mm t", torch.mm, [x, w.t()]),
        ]
    )


def test_empty() -> None:
    cases = []
    for const in ([], [1]):
        cases += [
            Case("no rows", F.linear, [rand(0, 8), rand(5, 8), rand(5)], const),
            Case("no steps", F.linear, [rand(4, 0), rand(5, 0), rand(5)], const),
            Case("no columns", torch.mm, [rand(4, 8), rand(8, 0)], const),
            Case("no batch", torch.bmm, [rand(0, 4, 8), rand(0, 8, 3)], const),
        ]
    check(cases)


def test_random_products() -> None:
    rng = random.Random(5)
    cases = []
    for i in range(40):
        m, k, n = (int(2 ** rng.uniform(0, 8)) for _ in range(3))
        batch = [rng.randint(1, 3) for _ in range(rng.randint(0, 2))]
        left = [1 if rng.random() < 0.3 else d for d in batch]
        right = [1 if rng.random() < 0.3 else d for d in batch]
        a, b = rand(*left, m, k), rand(*right[rng.randint(0, len(right)) :], k, n)
        if rng.random() < 0.4:
            a = a.transpose(-1, -2).contiguous().transpose(-1, -2)
        if rng.random() < 0.4:
            b = b.transpose(-1, -2).contiguous().transpose(-1, -2)
        const = [1] if rng.random() < 0.5 else []
        cases.append(Case(f"random {i}", torch.matmul, [a, b], const, config=rng.randrange(6)))
    check(cases)


def test_narrow_vectors_of_other_machines() -> None:
    case = Case("avx2", F.linear, [rand(33, 50), rand(45, 50)], [1])
    group, io = trace(case)
    for target in (Target("cpu", "haswell", 32, 16), Target("cpu", "generic", 16, 16)):
        for config in gemm.candidates(group, io, target):
            registers = config["ri"] * config["nv"] + config["nv"]
            assert registers <= target.vector_registers - 1
            assert gemm.lower(group, io, target, config).tasks >= 1


@pytest.mark.parametrize(
    ("function", "tensors", "remark"),
    [
        (torch.mm, [torch.ones(4, 4).double()] * 2, "PLT-GEM-004"),
        (torch.mm, [torch.ones(4, 4, dtype=torch.int64)] * 2, "PLT-GEM-004"),
        (lambda x, y: torch.mm(x + 1, y), [torch.ones(4, 4), torch.ones(4, 4)], "PLT-GEM-001"),
        (
            lambda x, y: (lambda z: z + z.t())(torch.mm(x, y)),
            [torch.ones(4, 4), torch.ones(4, 4)],
            "gemm.epilogue-index",
        ),
        (lambda x, y: torch.mm(x, y).sum(0), [torch.ones(4, 4)] * 2, "gemm.epilogue-shape"),
    ],
)
def test_declines_with_a_remark(function: Any, tensors: list[torch.Tensor], remark: str) -> None:
    tensors = [t.clone() for t in tensors]
    with pytest.raises(Unsupported) as error:
        lower(Case("declined", function, tensors))
    assert error.value.remark == remark


def test_bad_configuration_and_target() -> None:
    group, io = trace(Case("mm", torch.mm, [rand(8, 8), rand(8, 8)]))
    with pytest.raises(ValueError, match="impossible tile sizes"):
        gemm.lower(group, io, host(), {"ri": 4, "nv": 1, "mc": 6, "kc": 8})
    with pytest.raises(Unsupported):
        gemm.candidates(group, io, Target("cuda", "sm_90", 0, 0))


def test_packed_panels() -> None:
    weight = rand(2, 5, 3)
    panels = packing.gemm_panels(weight, width=4, transposed=True)
    assert panels.shape == (2, 2, 3, 4) and panels.is_contiguous()
    assert torch.equal(panels[1, 1, 2], torch.tensor([weight[1, 4, 2], 0, 0, 0]))
    again = packing.gemm_panels(weight.transpose(1, 2), width=4, transposed=False)
    assert torch.equal(panels, again)
    with pytest.raises(KeyError, match="unknown pack"):
        packing.apply(dataclasses.replace(_pack(), op="nothing"), weight)


def _pack() -> Any:
    group, io = trace(Case("mm", torch.mm, [rand(8, 8), rand(8, 8)], [1]))
    config = gemm.candidates(group, io, host())[0]
    (pack,) = (p for p in gemm.lower(group, io, host(), config).packs if p)
    return pack
