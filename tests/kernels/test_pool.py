"""Pooling kernels against torch in float64: windows, edges, dtypes and layouts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from plait.kernels.group import Unsupported
from plait.kernels.target import host
from plait.kernels.templates import pool

from .spatial import Case, Layout, check

Function = Callable[..., Any]
NHWC = Layout()


def case(
    label: str, function: Function, shape: tuple[int, ...] = (1, 20, 9, 11), *,
    layout: Layout = NHWC, out: Layout = NHWC, symbolic: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    return Case(f"{label} {shape} {layout}", function, [x], {0: layout}, (), out, symbolic)


def maximum(*args: Any, **kwargs: Any) -> Function:
    return lambda x: F.max_pool2d(x, *args, **kwargs)


def average(*args: Any, **kwargs: Any) -> Function:
    return lambda x: F.avg_pool2d(x, *args, **kwargs)


WINDOWS: list[tuple[Any, Any, Any]] = [
    (3, 2, 0), (3, 1, 1), (2, 2, 0), (3, 2, 1), ((1, 3), (1, 2), (0, 1)), ((3, 2), 1, (1, 0)),
    (5, 3, 2), (1, 1, 0), (1, 2, 0), ((9, 11), 1, 0), (8, 8, 4),
]  # fmt: skip


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_maximum_windows(ceil_mode: bool) -> None:
    check(
        [case(f"max {k} {s} {p}", maximum(k, s, p, ceil_mode=ceil_mode)) for k, s, p in WINDOWS],
        pool,
    )


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_average_windows(ceil_mode: bool, include: bool) -> None:
    check(
        [
            case(
                f"avg {k} {s} {p}", average(k, s, p, ceil_mode=ceil_mode, count_include_pad=include)
            )
            for k, s, p in WINDOWS
        ],
        pool,
    )


def test_every_candidate_computes_the_pooling() -> None:
    check(
        [
            case("max", maximum(3, 2, 1), (2, 70, 15, 16)),
            case("avg", average(3, 1, 1), (2, 70, 15, 16)),
            case("avg", average(3, 1, 1), (1, 33, 8, 8)),
            case("global", lambda x: F.adaptive_avg_pool2d(x, 1), (2, 70, 8, 8)),
        ],
        pool,
        every=True,
    )


def test_dilated_maximum_and_divisor() -> None:
    check(
        [
            case("dilated", maximum(3, 1, 1, dilation=2)),
            case("dilated", maximum(2, 2, 0, dilation=(3, 4))),
            case("divisor", average(3, 2, 1, divisor_override=5)),
        ],
        pool,
    )


ADAPTIVE = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}
OUTPUTS: list[Any] = [1, (3, 11), (4, 5), (9, 1), (12, 13), (2, 3)]


def adaptive(name: str, size: Any) -> Function:
    return lambda x: ADAPTIVE[name](x, size)


def test_adaptive_windows() -> None:
    check([case(f"{name} {o}", adaptive(name, o)) for name in ADAPTIVE for o in OUTPUTS], pool)


def test_channel_tails() -> None:
    shapes = [(1, c, 6, 6) for c in (1, 2, 3, 7, 15, 16, 17, 33, 100)]
    check([case("max", maximum(3, 2), s) for s in shapes], pool)
    check([case("avg", average(3, 1, 1), s) for s in shapes], pool)


def test_row_major_input_and_channel_slices() -> None:
    plain, inner = Layout(plain=True), Layout(((1, 2), (2, 0)), skip=3, extra=9)
    check(
        [
            case(name, function, (2, 20, 9, 11), layout=layout, out=out)
            for name, function in (("max", maximum(3, 2, 1)), ("avg", average(3, 1, 1)))
            for layout, out in ((plain, plain), (inner, inner), (plain, inner))
        ],
        pool,
    )


def test_one_dimensional_and_unbatched() -> None:
    plain = Layout(plain=True)
    check(
        [
            case("max 1d", lambda x: F.max_pool1d(x, 3, 2, 1), (2, 10, 15)),
            case("avg 1d", lambda x: F.avg_pool1d(x, 4, 2, 1), (2, 10, 15)),
            case("adaptive 1d", lambda x: F.adaptive_avg_pool1d(x, 4), (2, 10, 15)),
            case("max", maximum(3, 2, 1), (10, 15, 16), layout=plain, out=plain),
            case("avg", average(2), (10, 15, 16), layout=plain, out=plain),
        ],
        pool,
    )


def test_positions_next_to_values_are_allowed_when_unused() -> None:
    def values(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])[0]

    check([case("values", values)], pool)

    def positions(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])[1]

    _, group, io = case("positions", positions).trace()
    with pytest.raises(Unsupported, match="PLT-POL-003"):
        pool.candidates(group, io, host())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types(dtype: torch.dtype) -> None:
    check(
        [
            case("max", maximum(3, 2, 1), dtype=dtype),
            case("avg", average(3, 1, 1), dtype=dtype),
            case("global", lambda x: F.adaptive_avg_pool2d(x, 1), dtype=dtype),
        ],
        pool,
    )


def test_nan_wins_a_maximum_and_padding_never_does() -> None:
    made = case("nan", maximum(3, 1, 1), (1, 17, 12, 30))
    x = made.tensors[0]
    x.sub_(10.0)
    x[0, 3, 4, 5] = math.nan
    x[0, 5, 0, 29] = math.nan
    x[0, 7, 2:6, 2:6] = -math.inf
    x[0, 8, 7, 7] = math.inf
    check([made, Case("nan", maximum(3, 2), [x])], pool, every=True)


def test_epilogues() -> None:
    x, r = torch.randn(1, 20, 8, 9), torch.randn(1, 20, 8, 9)
    slices = {1: Layout(skip=1, extra=2)}
    check(
        [
            Case("relu", lambda x, r: F.relu(F.avg_pool2d(x, 3, 1, 1)), [x, r]),
            Case(
                "sum",
                lambda x, r: F.max_pool2d(x, 3, 1, 1) + r,
                [x, r],
                slices,
            ),
            Case("two", lambda x, r: (y := F.avg_pool2d(x, 3, 1, 1), y + r), [x, r]),
        ],
        pool,
    )


def test_sizes_known_only_at_run_time() -> None:
    kernels = check(
        [
            case("max", maximum(3, 2, 1), (2, 20, 9, 11), symbolic=True),
            case("avg", average(3, 1, 1), (2, 20, 9, 11), symbolic=True),
            case("avg", average(3, 2, 1, ceil_mode=True), (2, 20, 9, 11), symbolic=True),
            case("global", lambda x: F.adaptive_avg_pool2d(x, 1), (2, 20, 9, 11), symbolic=True),
        ],
        pool,
    )
    assert all(k.symbols for k in kernels)


def test_random_poolings() -> None:
    rng = random.Random(5)
    cases = []
    for _ in range(40):
        kernel = (rng.randint(1, 6), rng.randint(1, 6))
        pad = tuple(rng.randint(0, k // 2) for k in kernel)
        stride = (rng.randint(1, 3), rng.randint(1, 3))
        shape = (rng.randint(1, 2), rng.randint(1, 40), rng.randint(6, 20), rng.randint(6, 30))
        if rng.random() < 0.5:
            function = maximum(kernel, stride, pad, ceil_mode=rng.random() < 0.5)
        else:
            function = average(
                kernel, stride, pad, ceil_mode=rng.random() < 0.5,
                count_include_pad=rng.random() < 0.5,
            )  # fmt: skip
        cases.append(case(f"{kernel} {stride} {pad}", function, shape))
    check(cases, pool)


def test_candidates_are_deterministic_plain_json() -> None:
    _, group, io = case("max", maximum(3, 2)).trace()
    first = pool.candidates(group, io, host())
    assert first == pool.candidates(group, io, host())
    assert json.loads(json.dumps(first)) == first


def test_integers_and_computed_inputs_are_declined() -> None:
    _, group, io = case("int", maximum(3, 2), dtype=torch.int64).trace()
    with pytest.raises(Unsupported, match="PLT-POL-004"):
        pool.candidates(group, io, host())
    _, group, io = case("prologue", lambda x: F.max_pool2d(F.relu(x), 3)).trace()
    with pytest.raises(Unsupported, match="PLT-POL-002"):
        pool.candidates(group, io, host())
