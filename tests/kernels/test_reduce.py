"""Reductions over any dimensions: values, positions, empty dimensions, memory orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import tvm.tirx as tir

from plait.kernels.ops.common import i64, linear, unravel
from plait.kernels.ops.table import REDUCE
from plait.kernels.templates import reduce
from plait.kernels.templates.rows import _simple

from .row_check import Case, case, check, errors, opinfos
from .test_rows import sample_case

Function = Callable[[torch.Tensor], Any]

FLOATS: dict[str, Callable[..., Function]] = {
    "sum": lambda d, k: lambda x: x.sum(d, keepdim=k),
    "mean": lambda d, k: lambda x: x.mean(d, keepdim=k),
    "amax": lambda d, k: lambda x: x.amax(d, keepdim=k),
    "amin": lambda d, k: lambda x: x.amin(d, keepdim=k),
    "var": lambda d, k: lambda x: torch.var(x, d, correction=1, keepdim=k),
    "std": lambda d, k: lambda x: torch.std(x, d, correction=0, keepdim=k),
    "norm": lambda d, k: lambda x: torch.linalg.vector_norm(x, 2, d, keepdim=k),
    "var_mean": lambda d, k: lambda x: torch.var_mean(x, d, correction=1, keepdim=k),
}


@pytest.mark.parametrize("kind", FLOATS)
def test_any_dimensions_of_floats(kind: str) -> None:
    cases = []
    shapes = [(3, 5, 7), (17, 2, 33), (4, 20, 65), (1, 1, 1), (2, 130, 16), (40, 3, 3)]
    for i, shape in enumerate(shapes):
        torch.manual_seed(i)
        x = torch.randn(shape)
        for j, dims in enumerate([(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)]):
            if kind == "var" and shape == (1, 1, 1):
                continue
            if kind == "var_mean" and shape == (1, 1, 1):
                continue
            name = f"{kind}_{i}_{j}"
            cases.append(case(reduce, name, FLOATS[kind](dims, (i + j) % 2 == 0), x))
    check(cases, atol=1e-5, rtol=1e-5)


def test_any_memory_order() -> None:
    cases = []
    functions: dict[str, Function] = {
        "pool": lambda x: x.mean((2, 3)),
        "flat": lambda x: x.amax((2, 3), keepdim=True),
        "channels": lambda x: x.sum(1),
        "batch": lambda x: torch.var_mean(x, (0, 2, 3), correction=0),
        "rows": lambda x: x.argmax(3),
    }
    layouts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "nchw": lambda x: x,
        "nhwc": lambda x: x.to(memory_format=torch.channels_last),
        "hnwc": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        "strided": lambda x: torch.randn(2, 70, 9, 16)[:, ::2, :, 1::2],
        "expanded": lambda x: x[:, :1].expand(-1, 35, -1, -1),
    }
    x = torch.randn(2, 35, 9, 8)
    for layout, arrange in layouts.items():
        given = arrange(x)
        for name, function in functions.items():
            cases.append(case(reduce, f"{name}_{layout}", function, given))
    check(cases, atol=1e-5, rtol=1e-5)


def test_positions_and_their_ties() -> None:
    torch.manual_seed(0)
    cases = []
    for i, n in enumerate([1, 2, 7, 16, 33, 200]):
        x = torch.randint(0, 4, (6, n)).float()
        y = torch.randint(-3, 3, (n, 6))
        cases += [
            case(reduce, f"argmax{i}", lambda x: x.argmax(-1), x),
            case(reduce, f"argmin{i}", lambda x: x.argmin(0, keepdim=True), x),
            case(reduce, f"flat{i}", lambda x: x.argmax(), x),
            case(reduce, f"max{i}", lambda x: x.max(-1), x),
            case(reduce, f"min{i}", lambda x: x.min(0), y),
            case(reduce, f"half{i}", lambda x: x.max(1), x.bfloat16()),
        ]
    check(cases)


def test_nan_wins_and_the_first_one_is_found() -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.randn(5, 70)
    x[0, 60] = nan
    x[1, 5], x[1, 64] = nan, nan
    x[2] = -inf
    x[3, 69] = inf
    x[4] = nan
    functions: dict[str, Function] = {
        "amax": lambda x: x.amax(1),
        "amin": lambda x: x.amin(1),
        "max": lambda x: x.max(1),
        "min": lambda x: x.min(1),
        "argmax": lambda x: x.argmax(1),
        "whole": lambda x: x.max(),
        "sum": lambda x: x.sum(1),
        "var": lambda x: torch.var(x, 1, correction=1),
        "any": lambda x: x.any(1),
        "count": lambda x: x.count_nonzero(1),
        "inf_norm": lambda x: torch.linalg.vector_norm(x, inf, 1),
    }
    cases = [case(reduce, n, f, x) for n, f in functions.items()]
    down = [case(reduce, f"{n}_t", f, x.t().contiguous().t()) for n, f in functions.items()]
    check(cases + down)


def test_integers_and_bool() -> None:
    torch.manual_seed(1)
    small = torch.randint(-100, 100, (6, 45), dtype=torch.int8)
    long = torch.randint(-(2**20), 2**20, (45, 6))
    flags = torch.rand(6, 45) > 0.9
    functions: dict[str, Function] = {
        "sum": lambda x: x.sum(1),
        "sum0": lambda x: x.sum(0),
        "all_sum": lambda x: x.sum(),
        "amax": lambda x: x.amax(0),
        "any": lambda x: x.any(1, keepdim=True),
        "all": lambda x: x.all(0),
        "all_any": lambda x: x.any(),
        "mean": lambda x: x.mean(1, dtype=torch.float32),
        "count": lambda x: x.count_nonzero(0),
        "prod": lambda x: x.prod(1),
    }
    cases = []
    for kind, x in {"small": small, "long": long, "flags": flags}.items():
        cases += [case(reduce, f"{n}_{kind}", f, x) for n, f in functions.items()]
    check(cases)


def test_empty_dimensions() -> None:
    x = torch.randn(3, 0, 4)
    functions: dict[str, Function] = {
        "sum": lambda x: x.sum(1),
        "mean": lambda x: x.mean((0, 1)),
        "whole": lambda x: x.sum(),
        "prod": lambda x: x.prod(1),
        "any": lambda x: x.any(1),
        "all": lambda x: x.all(),
        "var": lambda x: torch.var(x, 1, correction=1),
        "norm": lambda x: torch.linalg.vector_norm(x, 2, 1),
        "logsumexp": lambda x: torch.logsumexp(x, 1),
        "amax": lambda x: x.amax(2),
        "keep": lambda x: x.amax(0, keepdim=True),
    }
    check([case(reduce, n, f, x) for n, f in functions.items()])


def test_pointwise_operators_before_and_after() -> None:
    x, y = torch.randn(12, 3, 50), torch.randn(50)
    check(
        [
            case(reduce, "loss", lambda x, y: ((x - y) ** 2).mean(), x, y),
            case(reduce, "gate", lambda x: torch.sigmoid(F.relu(x).mean((1, 2)) * 3) + 1, x),
            case(reduce, "scaled", lambda x: torch.var_mean(x.abs(), 0, correction=0)[0] + 1, x),
            case(reduce, "where", lambda x: torch.where(x > 0, x, 0.0).sum(-1).sqrt(), x),
            case(reduce, "best", lambda x: (x * 2).max(-1)[0].exp(), x),
            case(reduce, "half", lambda x: x.to(torch.float32).sum(0).to(torch.bfloat16), x.half()),
        ],
        atol=1e-5,
        rtol=1e-5,
    )


def test_sizes_known_at_run_time() -> None:
    dim = torch.export.Dim.DYNAMIC
    functions: dict[str, Function] = {
        "last": lambda x: x.sum(2),
        "first": lambda x: x.mean(0),
        "middle": lambda x: x.amax(1, keepdim=True),
        "whole": lambda x: x.mean(),
        "find": lambda x: x.argmax(1),
        "two": lambda x: torch.var_mean(x, (1, 2), correction=1),
    }
    cases = []
    for i, shape in enumerate([(1, 2, 3), (2, 5, 15), (7, 3, 64), (33, 17, 70), (2, 2, 300)]):
        for name, function in functions.items():
            first, x = torch.randn(3, 4, 5), torch.randn(shape)
            dynamic = [{0: dim, 1: dim, 2: dim}]
            cases.append(case(reduce, f"{name}{i}", function, first, dynamic=dynamic, run=[x]))
    check(cases, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sides", [(7, 7), (14, 14), (28, 5), (3, 5, 7)])
def test_offsets_in_merged_dimensions_tell_neighbours(sides: tuple[int, ...]) -> None:
    step, lane = tir.Var("step", "int64"), tir.Var("lane", "int64")
    extents = [i64(d) for d in sides]
    for start in (lane, step * 64 + lane):
        for shift in (0, 16, 48, 1000):
            offset = linear(unravel(start, extents, shift), extents)
            left = _simple(offset - start)
            assert isinstance(left, tir.IntImm) and int(left) == shift, _simple(offset)


def test_long_sums_keep_their_digits() -> None:
    torch.manual_seed(3)
    x = torch.rand(60000, 5)
    functions: dict[str, Function] = {
        "whole": lambda x: x.sum(),
        "down": lambda x: x.sum(0),
        "mean": lambda x: x.mean(0),
        "var": lambda x: torch.var(x + 100, 0, correction=1),
        "norm": lambda x: torch.linalg.vector_norm(x, 2),
    }
    for name, function in functions.items():
        mine, theirs = errors(case(reduce, name, function, x), function)
        size = function(x.double()).abs().max().item()
        assert mine <= 2 * theirs + 2e-7 * size, (name, mine, theirs)


def test_sums_across_rows_keep_their_digits() -> None:
    torch.manual_seed(4)
    shapes = [(200, 300), (120, 64), (13, 13, 1000), (7, 7, 512)]
    for shape in shapes:
        x = torch.rand(shape)
        function: Function = lambda x: x.mean(tuple(range(x.dim() - 1)))  # noqa: E731
        mine, theirs = errors(case(reduce, "mean", function, x), function)
        assert mine <= 1.5 * theirs, (shape, mine, theirs)


NAMES = (
    "sum", "mean", "amax", "amin", "prod", "any", "all", "argmax", "argmin", "var", "std",
    "var_mean", "count_nonzero", "linalg.vector_norm", "max", "min",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_torchs_samples(dtype: torch.dtype) -> None:
    cases: list[Case] = []
    for op in opinfos(*(n for n in NAMES if n not in ("max", "min"))):
        if dtype not in op.supported_dtypes("cpu"):
            continue
        samples = list(op.sample_inputs("cpu", dtype))
        for i, sample in enumerate(samples[:: max(1, len(samples) // 6)][:6]):
            sample = sample.noncontiguous() if i % 2 else sample
            found = sample_case(op, sample, f"{op.name.replace('.', '_')}_{len(cases)}", reduce)
            cases += [found] if found else []
    assert len(cases) > 20
    check(cases, **({"atol": 1e-2, "rtol": 1.6e-2} if dtype == torch.bfloat16 else {}))


def test_every_reduction_has_a_converter() -> None:
    from plait.kernels.ops import registered

    have = registered()
    for name in REDUCE:
        full = f"aten.{name}" if "." in name else f"aten.{name}.default"
        assert full in have, name
