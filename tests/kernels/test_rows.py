"""Normalisations and softmax, alone and with pointwise operators around them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from plait.kernels.group import Unsupported
from plait.kernels.target import host
from plait.kernels.templates import rows

from .row_check import Case, case, check, errors, opinfos, traced

SIZES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 50, 64, 65, 100, 257, 768, 1000)
FULL = (torch.float32, torch.bfloat16)


def cast_all(dtype: torch.dtype, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(dtype) for t in tensors]


def norm_cases(n: int, dtype: torch.dtype, tag: str) -> list[Case]:
    torch.manual_seed(n)
    x, y = torch.randn(5, n) * 3 + 1, torch.randn(5, n)
    w, b = torch.randn(n), torch.randn(n)
    x, y, w, b = cast_all(dtype, x, y, w, b)
    return [
        case(rows, f"ln_{tag}", lambda x, w, b: F.layer_norm(x, (n,), w, b), x, w, b),
        case(rows, f"rms_{tag}", lambda x, w: F.rms_norm(x, (n,), w, 1e-6), x, w),
        case(rows, f"sm_{tag}", lambda x: torch.softmax(x, -1), x),
        case(rows, f"lsm_{tag}", lambda x: torch.log_softmax(x, -1), x),
        case(rows, f"add_ln_{tag}", residual(n), x, y, w),
    ]


def residual(n: int) -> Any:
    def function(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Any:
        h = x + y
        return h, F.layer_norm(h, (n,), w) * 2.0

    return function


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_rows_of_every_length(dtype: torch.dtype) -> None:
    cases = [c for n in SIZES for c in norm_cases(n, dtype, f"{n}_{str(dtype)[6:]}")]
    # torch rounds to bfloat16 between the steps of some of these.
    half = {"atol": 8e-3, "rtol": 1.6e-2}
    tolerance = half if dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 2e-5}
    check(cases, **tolerance)


def test_pointwise_operators_before_between_and_after() -> None:
    x, y, w = torch.randn(3, 7, 40), torch.randn(3, 7, 40), torch.randn(40)

    def decomposed_rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def half_rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return w.bfloat16() * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).bfloat16()

    def normalise(x: torch.Tensor) -> torch.Tensor:
        return x / x.pow(2).sum(-1, keepdim=True).sqrt().clamp_min(1e-12)

    def own_softmax(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        peak = x.amax(-1, keepdim=True)
        e = torch.exp(x - peak)
        return e / e.sum(-1, keepdim=True), peak, e.sum(-1)

    def two_norms(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(F.gelu(x) + y, (40,), w)
        return torch.softmax(h * 0.5, -1)

    check(
        [
            case(rows, "decomposed_rms", decomposed_rms, x, w),
            case(rows, "half_rms", half_rms, x.bfloat16(), w),
            case(rows, "normalise", normalise, x),
            case(rows, "own_softmax", own_softmax, x),
            case(rows, "two_norms", two_norms, x, y, w),
        ],
        atol=2e-5,
        rtol=2e-5,
    )


def test_parts_of_tuples_and_statistics() -> None:
    x, w, b = torch.randn(4, 3, 24), torch.randn(24), torch.randn(24)
    g = torch.randn(2, 6, 5, 3)
    aten = torch.ops.aten
    check(
        [
            case(
                rows, "native", lambda x, w, b: aten.native_layer_norm(x, [24], w, b, 1e-5), x, w, b
            ),
            case(rows, "two", lambda x: aten.native_layer_norm(x, [3, 24], None, None, 1e-5), x),
            case(
                rows, "group", lambda x: aten.native_group_norm(x, None, None, 2, 6, 15, 3, 1e-5), g
            ),
        ],
        atol=1e-5,
        rtol=1e-5,
    )


def group_norm(groups: int) -> Any:
    return lambda x, w, b: F.group_norm(x, groups, w, b)


def test_group_norm_in_both_memory_orders() -> None:
    w, b = torch.randn(12), torch.randn(12)
    cases = []
    for i, shape in enumerate([(2, 12, 5, 7), (1, 12, 8, 8), (3, 12, 16, 33), (2, 12, 9), (2, 12)]):
        x = torch.randn(shape) + 3
        for groups in (1, 3, 12):
            name = f"gn_{i}_{groups}"
            if shape != (2, 12) or groups != 12:
                cases.append(case(rows, name, group_norm(groups), x, w, b))
        if len(shape) == 4:
            last = x.to(memory_format=torch.channels_last)
            cases.append(
                case(rows, f"nhwc_{i}", lambda x, w: F.silu(F.group_norm(x, 3, w)), last, w)
            )
            cases.append(case(rows, f"each_{i}", group_norm(12), last, w, b))
    check(cases, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("each", [1, 2, 3, 8, 10, 24])
def test_lanes_are_channels_of_whole_groups_where_these_are_neighbours(each: int) -> None:
    lanes = host().vector_bytes // 4
    block = math.lcm(lanes, each)
    cases = []
    for groups in (block // each, 2 * block // each + 1):
        x = torch.randn(2, groups * each, 5, 41) * (torch.rand(groups * each, 1, 1) + 0.5) + 3
        w, b = torch.randn(groups * each), torch.randn(groups * each)
        for memory, lane in ((torch.channels_last, rows.CHANNELS), (torch.contiguous_format, 4)):
            given = x.to(memory_format=memory)
            group, io = traced(lambda x: F.group_norm(x, groups), [given])  # noqa: B023
            (config,) = rows.candidates(group, io, host())
            assert config["lane"] == lane and config["width"] > 1
            name = f"{'last' if lane < 0 else 'first'}_{groups}"
            cases.append(case(rows, name, group_norm(groups), given, w, b))
    check(cases, atol=2e-5, rtol=2e-5)


def test_groups_of_more_channels_than_lanes_take_have_a_row_each() -> None:
    x = torch.randn(1, 42, 3, 3).to(memory_format=torch.channels_last)
    for groups in (1, 2):  # 42 and 21 channels
        group, io = traced(lambda x: F.group_norm(x, groups), [x])  # noqa: B023
        assert rows.candidates(group, io, host())[0]["lane"] == 2


def test_instance_norm_and_operators_of_decompositions() -> None:
    x, w, b = torch.randn(2, 6, 5, 9) + 2, torch.randn(6), torch.randn(6)
    y, v = torch.randn(7, 33), torch.randn(33)
    aten = torch.ops.aten
    check(
        [
            case(rows, "instance", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), x, w, b),
            case(rows, "fused", lambda y, v: aten._fused_rms_norm(y, [33], v, 1e-6), y, v),
            case(rows, "soft", lambda y: aten._softmax(y, -1, False), y),
            case(rows, "log", lambda y: aten._log_softmax(y, 0, False), y),
            case(rows, "norm", lambda y: y / aten.norm.ScalarOpt_dim(y, 2, [-1], True), y),
            case(rows, "norm3", lambda y: torch.linalg.vector_norm(y, 3, -1), y),
        ],
        atol=1e-5,
        rtol=1e-5,
    )


def test_softmax_over_a_dimension_that_is_not_the_last() -> None:
    cases = []
    for i, shape in enumerate([(5, 3), (7, 100), (3, 65, 17), (2, 300, 70)]):
        x = torch.randn(shape)
        cases.append(case(rows, f"sm{i}", lambda x: torch.softmax(x * 2, 0), x))
        cases.append(case(rows, f"lsm{i}", lambda x: torch.log_softmax(x, 1), x))
    cases.append(case(rows, "transposed", lambda x: torch.softmax(x, -1), torch.randn(50, 30).t()))
    cases.append(case(rows, "sliced", lambda x: torch.softmax(x, -1), torch.randn(9, 64)[:, ::2]))
    check(cases)


def test_nan_and_infinities() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.randn(6, 37)
    x[0, 3], x[1, 36], x[2, 5] = nan, inf, -inf
    x[3] = -inf
    x[4, :20] = -inf
    x[5] = 3e38
    z = torch.zeros(2, 9)
    check(
        [
            case(rows, "softmax", lambda x: torch.softmax(x, -1), x),
            case(rows, "log_softmax", lambda x: torch.log_softmax(x, -1), x),
            case(rows, "safe", lambda x: torch.ops.aten._safe_softmax(x, -1), x),
            case(rows, "logsumexp", lambda x: torch.logsumexp(x, -1), x),
            case(rows, "down", lambda x: torch.softmax(x, 0), x.t().contiguous()),
            case(rows, "constant", lambda x: F.layer_norm(x, (9,)), z),
            case(rows, "rms_zero", lambda x: F.rms_norm(x, (9,), None, 1e-6), z),
            case(rows, "norm_nan", lambda x: F.layer_norm(x, (37,)), x[:3]),
        ]
    )


def test_empty_rows_and_no_rows() -> None:
    check(
        [
            case(rows, "no_rows", lambda x: torch.softmax(x, -1), torch.randn(0, 5)),
            case(rows, "no_columns", lambda x: torch.softmax(x, -1), torch.randn(5, 0)),
            case(rows, "none", lambda x: F.layer_norm(x, (7,)), torch.randn(3, 0, 7)),
            case(rows, "scalar", lambda x: torch.softmax(x, 0), torch.randn(())),
        ]
    )


def test_sizes_known_at_run_time() -> None:
    dim = torch.export.Dim.DYNAMIC
    w = torch.randn(48)

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x + 1, (48,), w)

    def softmax(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x * 0.5, -1)

    def down(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, 1)

    cases = []
    for i, (b, s) in enumerate([(2, 3), (1, 1), (5, 40), (3, 0)]):
        x = torch.randn(b, s, 48)
        first = torch.randn(2, 3, 48)
        shapes = [{0: dim, 1: dim, 2: None}, {0: None}]
        cases.append(case(rows, f"norm{i}", norm, first, w, dynamic=shapes, run=[x, w]))
    for i, n in enumerate([1, 2, 15, 16, 17, 63, 64, 65, 129, 200, 1000]):
        first, x = torch.randn(3, 7), torch.randn(4, n)
        cases.append(case(rows, f"softmax{i}", softmax, first, dynamic=[{0: dim, 1: dim}], run=[x]))
        first, x = torch.randn(2, 5, 7), torch.randn(3, 6, n)
        cases.append(
            case(rows, f"down{i}", down, first, dynamic=[{0: dim, 1: dim, 2: dim}], run=[x])
        )
    check(cases, atol=1e-5, rtol=1e-5)


def test_lanes_are_channels_where_sizes_of_images_are_known_at_run_time() -> None:
    last, dim = {"memory_format": torch.channels_last}, torch.export.Dim.DYNAMIC
    example = torch.randn(2, 12, 5, 7).contiguous(**last)
    cases = []
    for name, function in {
        "mean": lambda x: x.mean((2, 3), keepdim=True),
        "instance": lambda x: F.instance_norm(x),
    }.items():
        for i, shape in enumerate([(2, 12, 6, 9), (3, 12, 17, 2)]):
            x = torch.randn(shape).contiguous(**last)
            open_sizes = [{0: dim, 2: dim, 3: dim}]
            c = case(rows, f"{name}{i}", function, example, dynamic=open_sizes, run=[x])
            assert c.kernel.config["lane"] in (1, rows.CHANNELS), name
            cases.append(c)
    check(cases, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_errors_are_no_worse_than_torchs(shift: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3001) + shift
    for name, function in {
        "layer_norm": lambda x: F.layer_norm(x, (3001,)),
        "rms_norm": lambda x: F.rms_norm(x, (3001,), None, 1e-6),
        "softmax": lambda x: torch.softmax(x, -1),
        "log_softmax": lambda x: torch.log_softmax(x, -1),
    }.items():
        mine, theirs = errors(case(rows, name, function, x), function)
        assert mine <= 2 * theirs + 1e-9, (name, mine, theirs)
    image = (torch.randn(1, 32, 90, 91) + shift).to(memory_format=torch.channels_last)
    across = {
        "group_norm": (lambda x: F.group_norm(x, 4), image),
        "total": (lambda x: x - x.sum(0, keepdim=True) / 9001, torch.randn(9001, 32) + shift),
    }
    for name, (function, given) in across.items():
        mine, theirs = errors(case(rows, name, function, given), function)
        assert mine <= 2 * theirs + 1e-9, (name, mine, theirs)


def test_other_configurations_give_the_same() -> None:
    x, w = torch.randn(9, 150), torch.randn(150)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(torch.softmax(x, -1), (150,), w)

    configs = [{"width": 4}, {"width": 1, "unroll": 1}, {"unroll": 2, "grain": 4}, {"width": 8}]
    check(
        [case(rows, f"c{i}", function, x, w, config=c) for i, c in enumerate(configs)],
        atol=1e-5,
        rtol=1e-5,
    )


def test_groups_that_mix_rows_are_declined() -> None:
    x = torch.randn(6, 6)
    for function, remark in {
        (lambda x: x - x.mean(-1)): "PLT-ROW-006",
        (lambda x: x.sum(-1, keepdim=True) + x.sum(0, keepdim=True)): "PLT-ROW-002",
        (lambda x: x.t().reshape(36).softmax(0) * 2): "PLT-ROW-004",
    }.items():
        group, io = traced(function, [x])
        with pytest.raises(Unsupported, match=remark):
            rows.candidates(group, io, host())


def test_torchs_samples() -> None:
    names = ("softmax", "log_softmax", "logsumexp", "nn.functional.layer_norm")
    names += ("nn.functional.group_norm", "nn.functional.rms_norm", "native_layer_norm")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cases: list[Case] = []
        for op in opinfos(*names):
            if dtype not in op.supported_dtypes("cpu"):
                continue
            samples = list(op.sample_inputs("cpu", dtype))
            for i, sample in enumerate(samples[:: max(1, len(samples) // 6)][:6]):
                sample = sample.noncontiguous() if i % 2 else sample
                found = sample_case(op, sample, f"{op.name.split('.')[-1]}_{len(cases)}")
                cases += [found] if found else []
        assert len(cases) > 25, (dtype, len(cases))
        # torch computes some of these in bfloat16 itself.
        check(cases, **({"atol": 8e-3, "rtol": 1.6e-2} if dtype == torch.bfloat16 else {}))


def sample_case(op: Any, sample: Any, name: str, template: Any = rows) -> Case | None:
    """The call of an OpInfo sample, or None if it is not all one group with reductions."""
    flat, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
    places = [j for j, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]

    def function(*tensors: torch.Tensor) -> Any:
        leaves = list(flat)
        for j, tensor in zip(places, tensors, strict=True):
            leaves[j] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        result = op.op(*args, **kwargs)
        return tuple(result) if isinstance(result, (tuple, list)) else result

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return case(template, name, function, *[flat[j].detach() for j in places])
    except Unsupported as error:
        assert error.remark in ("PLT-ROW-001", "PLT-ROW-004"), error
        return None
