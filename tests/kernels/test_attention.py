"""Attention: sizes, masks, memory orders, grouped heads, dtypes, against torch and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from plait.kernels.abi import TensorArg
from plait.kernels.group import Group, Unsupported
from plait.kernels.ops import category
from plait.kernels.target import host
from plait.kernels.templates import attention

from .harness import Batch
from .row_check import Case, case, check, errors, traced

sdpa = F.scaled_dot_product_attention
INF = float("inf")


def operands(
    lead: tuple[int, ...], s: int, t: int, d: int, e: int | None = None
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(s * 100 + t)
    return (
        torch.randn(*lead, s, d),
        torch.randn(*lead, t, d),
        torch.randn(*lead, t, d if e is None else e),
    )


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, is_causal=True)


def with_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, attn_mask=m)


def attend(name: str, function: Any, *tensors: torch.Tensor, **options: Any) -> Case:
    return case(attention, name, function, *tensors, **options)


SIZES = [
    (1, 1),
    (1, 40),
    (2, 300),
    (6, 7),
    (7, 9),
    (15, 64),
    (16, 65),
    (33, 1),
    (64, 128),
    (100, 3),
]


def test_any_number_of_queries_and_keys() -> None:
    cases = []
    for i, (s, t) in enumerate(SIZES):
        q, k, v = operands((2, 3), s, t, (16, 20, 33)[i % 3])
        cases += [attend(f"plain{i}", plain, q, k, v), attend(f"causal{i}", causal, q, k, v)]
    check(cases, atol=2e-6, rtol=2e-5)


def test_any_size_of_a_head() -> None:
    cases = []
    for i, (d, e) in enumerate(
        [(1, 1), (3, 5), (16, 8), (24, 40), (64, 64), (80, 80), (128, 96), (160, 17)]
    ):
        q, k, v = operands((1, 2), 20, 30, d, e)
        cases += [
            attend(f"many{i}", plain, q, k, v),
            attend(f"few{i}", plain, q[..., :2, :].contiguous(), k, v),
        ]
    check(cases, atol=2e-6, rtol=2e-5)


def test_masks_broadcast_and_hide() -> None:
    torch.manual_seed(5)
    cases = []
    for s in (3, 35):
        q, k, v = operands((2, 3), s, 70, 16)
        for i, shape in enumerate(
            [(1, 1, 70), (s, 70), (2, 1, 1, 70), (2, 3, s, 70), (1, 1, s, 1), (1, 70)]
        ):
            flags = torch.rand(shape) > 0.4
            if shape[-1] == 1:
                flags[:] = True
            added = torch.randn(shape)
            added[torch.rand(shape) > 0.7] = -INF
            cases += [
                attend(f"flags{s}_{i}", with_mask, q, k, v, flags),
                attend(f"added{s}_{i}", with_mask, q, k, v, added),
            ]
        q, k, v = operands((2, 3), s, 70, 16)
        k[0, 0, 5], k[0, 1, 69] = float("nan"), INF  # hidden keys count, as in torch
        flags = torch.ones(s, 70, dtype=torch.bool)
        flags[:, [5, 69]] = False
        cases.append(attend(f"strange{s}", with_mask, q, k, v, flags))
        q, k, v = operands((2, 3), s, 70, 16)
        strided = torch.randn(s, 140)[:, ::2]
        cases.append(attend(f"strided{s}", with_mask, q, k, v, strided))
    check(cases, atol=2e-6, rtol=2e-5)


def test_queries_that_see_no_key_give_zeros() -> None:
    cases = []
    for s in (4, 20):
        q, k, v = operands((1, 2), s, 80, 16)
        flags = torch.ones(s, 80, dtype=torch.bool)
        flags[1], flags[2, :70] = False, False
        cases += [
            attend(f"flags{s}", with_mask, q, k, v, flags),
            attend(f"added{s}", with_mask, q, k, v, torch.where(flags, 0.0, -INF)),
            attend(f"no_keys{s}", plain, q, k[..., :0, :].contiguous(), v[..., :0, :].contiguous()),
        ]
    check(cases, atol=2e-6, rtol=2e-5)


def test_nothing_to_do() -> None:
    q, k, v = operands((2, 3), 5, 7, 8)
    check([attend("no_queries", plain, q[..., :0, :].contiguous(), k, v)])
    q, k, v = operands((0, 3), 5, 7, 8)
    check([attend("no_batch", plain, q, k, v)])


def test_nan_and_infinities_stay_where_torch_has_them() -> None:
    cases = []
    for s in (2, 18):
        q, k, v = operands((1, 1), s, 40, 16)
        q[0, 0, 1, 3] = float("nan")
        v[0, 0, 2, 1] = INF
        k[0, 0, 39] = 1e20
        cases.append(attend(f"odd{s}", plain, q, k, v))
    check(cases, atol=2e-6, rtol=2e-5)


def test_grouped_heads_scale_and_ranks() -> None:
    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)

    cases = []
    for s in (1, 19):
        q = torch.randn(2, 6, s, 16)
        k, v = torch.randn(2, 2, 45, 16), torch.randn(2, 2, 45, 16)
        cases.append(attend(f"grouped{s}", grouped, q, k, v))
        cases.append(attend(f"rank3_{s}", plain, *operands((4,), s, 33, 8)))
        cases.append(attend(f"rank2_{s}", plain, *operands((), s, 33, 8)))
        cases.append(attend(f"shared{s}", plain, q, k[:1, :1], v[:1, :1]))
    check(cases, atol=2e-6, rtol=2e-5)


def test_any_memory_order() -> None:
    cases = []
    for s in (2, 50):
        q, k, v = (torch.randn(2, n, 3, 16).transpose(1, 2) for n in (s, 60, 60))
        cases.append(attend(f"heads_inside{s}", plain, q, k, v))
        q, k, v = (torch.randn(2, 3, 16, n).transpose(2, 3) for n in (s, 60, 60))
        cases.append(attend(f"columns{s}", causal, q, k, v))
        packed = torch.randn(2, 60, 3, 4, 16)
        q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
        cases.append(attend(f"packed{s}", causal, q, k, v))
        q, k, v = (torch.randn(1, n, 64, 16).transpose(1, 2)[:, :2] for n in (s, 60, 60))
        cases.append(attend(f"far{s}", plain, q, k, v))
    check(cases, atol=2e-6, rtol=2e-5)


def test_the_result_may_lie_in_another_order() -> None:
    for s in (2, 40):
        q, k, v = operands((2, 3), s, 50, 16)
        group, io = traced(plain, [q, k, v])
        (out,) = group.outputs
        inside = TensorArg(torch.float32, (2, 3, s, 16), (3 * 16 * s, 16, 48, 1))
        config = attention.candidates(group, io, host())[0]
        kernel = attention.lower(group, {**io, out: inside}, host(), config)
        check([Case(kernel, [q, k, v], [plain(q, k, v)], {})], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_accumulate_in_float32(dtype: torch.dtype) -> None:
    for s, t, function in ((1, 200, plain), (70, 90, causal), (70, 90, plain)):
        given = [x.to(dtype) for x in operands((1, 2), s, t, 64)]
        mine, theirs = errors(attend("half", function, *given), function)
        assert mine <= 1.5 * theirs + torch.finfo(dtype).eps / 4, (s, mine, theirs)


def test_errors_are_no_worse_than_torchs() -> None:
    for s, t in ((1, 1024), (128, 512)):
        given = operands((1, 4), s, t, 64)
        mine, theirs = errors(attend("error", plain, *given), plain)
        assert mine <= 2 * theirs, (s, mine, theirs)
    for s in (1, 16):  # thousands of terms of one sign
        q, k, v = operands((1, 2), s, 5000, 32)
        mine, theirs = errors(attend("long", plain, q, k, v.abs()), plain)
        assert mine <= 2.5 * theirs, (s, mine, theirs)


def test_pointwise_operators_after() -> None:
    cases = []
    for s in (3, 30):
        q, k, v = operands((1, 2), s, 40, 16)
        other = torch.randn(1, 2, s, 16)
        cases.append(
            attend(
                f"after{s}",
                lambda q, k, v, other: F.gelu(sdpa(q, k, v) * 2) + other,
                *(q, k, v, other),
            )
        )
    check(cases, atol=5e-6, rtol=2e-5)


def test_the_cpu_flash_operator() -> None:
    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]

    check([attend("flash", flash, *operands((2, 2), 30, 30, 16))], atol=2e-6, rtol=2e-5)


def test_sizes_known_at_run_time() -> None:
    dim = torch.export.Dim.DYNAMIC
    cases = []
    many = [{0: dim, 2: dim}, {0: dim, 2: dim}, {0: dim, 2: dim}]
    keys = [{0: None}, {2: dim}, {2: dim}]
    masked = [{0: None}, {2: dim}, {2: dim}, {1: dim}]
    for i, (b, s, t) in enumerate([(1, 1, 1), (2, 31, 17), (1, 100, 130), (3, 64, 64), (2, 0, 9)]):
        first, run = operands((2, 2), 5, 7, 16), operands((b, 2), s, t, 16)
        for function in (plain, causal):
            name = f"{function.__name__}{i}"
            cases.append(attend(name, function, *first, dynamic=many, run=run))
        first, run = operands((1, 2), 1, 7, 16), operands((1, 2), 1, t * 3, 16)
        cases.append(attend(f"decode{i}", plain, *first, dynamic=keys, run=run))
        first = (*first, torch.rand(1, 7) > 0.2)
        run = (*run, torch.rand(1, t * 3) > 0.2)
        cases.append(attend(f"mask{i}", with_mask, *first, dynamic=masked, run=run))
    check(cases, atol=2e-6, rtol=2e-5)


def test_all_tile_sizes_give_the_same() -> None:
    q, k, v = operands((1, 2), 50, 70, 24)
    mask = torch.rand(50, 70) > 0.3
    configs: list[dict[str, Any]] = [
        {"kind": "block", "nv": 1, "rk": 16, "ri": 8, "tb": 32},
        {"kind": "block", "nv": 2, "rk": 1, "ri": 1, "tb": 17},
        {"kind": "block", "nv": 3, "rk": 8, "ri": 2, "tb": 64},
        {"kind": "block", "nv": 4, "rk": 6, "ri": 4, "tb": 66},
        {"kind": "line", "tb": 32},
    ]
    cases = [attend(f"c{i}", with_mask, q, k, v, mask, config=c) for i, c in enumerate(configs)]
    check(cases, atol=2e-6, rtol=2e-5)


def test_repeated_calls_give_the_same_bits() -> None:
    given = operands((1, 2), 100, 100, 32)
    c = attend("bits", causal, *given)
    batch = Batch([c.kernel])
    runs = [batch.run("bits", c.tensors, splits=n)[0] for n in (1, 2, 4)]
    assert all(torch.equal(r, runs[0]) for r in runs)


def test_what_is_declined() -> None:
    q, k, v = operands((1, 2), 4, 4, 8)
    aten = torch.ops.aten
    for remark, function, tensors in (
        ("PLT-ATT-002", lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), (q, k, v)),
        ("PLT-ATT-004", plain, (q.double(), k.double(), v.double())),
        (
            "PLT-ATT-007",
            lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[1] * 2,
            (q, k, v),
        ),
    ):
        group, io = traced(function, tensors)
        with pytest.raises(Unsupported, match=remark):
            attention.candidates(group, io, host())
    group, io = traced(plain, (q, k, v))
    with pytest.raises(ValueError, match="tile sizes"):
        bad = {"kind": "block", "nv": 4, "rk": 7, "ri": 4, "tb": 64}
        attention.lower(group, io, host(), bad)
    assert isinstance(group, Group) and category(group.nodes[-1]) == "attention"
