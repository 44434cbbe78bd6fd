"""merge-parallel-ops: the same function for every input, whatever is merged; and what is not."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.passes.base import Counter, counting
from plait.passes.merge_parallel import JUDGE, MergeParallelOps
from plait.passes.verifier import verify

from .graphs import Builder, aten, targets

CONFIG = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
TINY = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}


def _always(apart: fx.GraphModule, merged: fx.GraphModule) -> tuple[float, float]:
    """A judge for whom every merger gains; it checks that both graphs compute the same."""
    (source,) = apart.graph.find_nodes(op="placeholder")
    value = source.meta["val"]
    x = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=value.dtype)
    verify(merged, "full")
    wanted, found = apart(x), merged(x)
    if len(found) == 1 and found[0].numel() == sum(t.numel() for t in wanted):
        channels = 1 if x.dim() == 4 else -1
        torch.testing.assert_close(torch.cat(list(wanted), channels), found[0], **TINY)
    return 2e-6, 1e-6


def _merged(graph_module: fx.GraphModule, judge=_always, **options):
    graph_module.meta[JUDGE] = judge
    result = MergeParallelOps(**options).run(graph_module)
    verify(result.graph_module, "full")
    return result


def _weight(b: Builder, *shape: int) -> fx.Node:
    seed = torch.Generator().manual_seed(len(b.graph.nodes))
    return b.constant(torch.randn(shape, generator=seed, dtype=torch.float64))


def _projections(widths=(3, 5, 2), biases=(True, False, True)) -> fx.GraphModule:
    b = Builder()
    x = b.input(2, 4, 6, dtype=torch.float64)
    found = []
    for width, biased in zip(widths, biases, strict=True):
        args = (x, _weight(b, width, 6), *([_weight(b, width)] if biased else []))
        found.append(b.call(aten.tanh.default, b.call(aten.linear.default, *args)))
    return b.finish(*(b.call(aten.mul.Tensor, f, f) for f in found))


def test_projections_become_one_product_and_what_all_go_through_stays_before_the_cut() -> None:
    graph_module = _projections()
    result = _merged(graph_module)
    calls = targets(result.graph_module)
    assert calls.count(aten.linear.default) == calls.count(aten.tanh.default) == 1
    assert calls.count(aten.slice.Tensor) == calls.count(aten.mul.Tensor) == 3
    assert [r.id for r in result.remarks] == ["PLT-MRG-001"]
    assert result.remarks[0].predicted_gain == pytest.approx(1e-6)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    x[0, 0, 0], x[1, 1, 1] = torch.inf, torch.nan
    for a, e in zip(result.graph_module(x), graph_module(x), strict=True):
        torch.testing.assert_close(a, e, **TINY)
    names = {name for name, _ in result.graph_module.named_buffers()}
    assert len(names) == 2, "the separate weights are dropped"


@st.composite
def _graphs(draw) -> fx.GraphModule:
    """Several operators on each of some tensors, what follows them, and outputs among them all."""
    b = Builder()
    image = draw(st.booleans())
    sources = [b.input(*((2, 6, 5, 5) if image else (2, 3, 6)), dtype=torch.float64)]
    values = []
    for _ in range(draw(st.integers(2, 7))):
        x = draw(st.sampled_from(sources))
        width = draw(st.sampled_from([2, 6, 6]))
        if image:
            k = draw(st.sampled_from([1, 3]))
            stride = draw(st.sampled_from([1, 1, 2]))
            bias = _weight(b, width) if draw(st.booleans()) else None
            args = (x, _weight(b, width, 6, k, k), bias, [stride, stride], [k // 2, k // 2])
            y = b.call(aten.conv2d.default, *args)
        else:
            kind = draw(st.sampled_from(["linear", "matmul"]))
            shape = (width, 6) if kind == "linear" else (6, width)
            y = b.call(getattr(aten, kind).default, x, _weight(b, *shape))
        values.append(y)
        for _ in range(draw(st.integers(0, 2))):
            step = draw(st.sampled_from([aten.relu.default, aten.sigmoid.default, "view", "add"]))
            if step == "view":
                y = b.call(aten.permute.default, y, list(reversed(range(y.meta["val"].dim()))))
                y = b.call(aten.permute.default, y, list(reversed(range(y.meta["val"].dim()))))
            elif step == "add":
                y = b.call(aten.add.Tensor, y, 0.5)
            else:
                y = b.call(step, y)
            values.append(y)
        if y.meta["val"].shape == sources[0].meta["val"].shape:
            sources.append(y)
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=4, unique=True))
    return b.finish(*outputs)


@CONFIG
@given(_graphs(), st.booleans(), st.integers(0, 6))
def test_any_graph_computes_the_same_after_any_number_of_mergers(graph_module, enlarge, limit):
    value = next(iter(graph_module.graph.find_nodes(op="placeholder"))).meta["val"]
    x = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with counting(Counter(limit)):
        some = _merged(graph_module, enlarge=enlarge).graph_module
    every = _merged(graph_module, enlarge=enlarge).graph_module
    wanted = graph_module(x)
    for module in (some, every):
        found = module(x)
        for a, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, e, **TINY)

    def shared(outputs) -> int:
        return len(outputs) - len({t.untyped_storage().data_ptr() for t in outputs})

    assert shared(every(x)) <= shared(wanted)


def test_kernels_grow_only_when_asked_and_not_too_much() -> None:
    def build(channels: tuple[int, int]) -> fx.GraphModule:
        b = Builder()
        x = b.input(1, 4, 6, 6, dtype=torch.float64)
        small = b.call(aten.conv2d.default, x, _weight(b, channels[0], 4, 1, 1))
        large = b.call(
            aten.conv2d.default, x, _weight(b, channels[1], 4, 3, 3), None, [1, 1], [1, 1]
        )
        return b.finish(b.call(aten.relu.default, small), b.call(aten.neg.default, large))

    assert not _merged(build((1, 9))).remarks
    graph_module = build((1, 9))
    result = _merged(graph_module, enlarge=True)
    assert targets(result.graph_module).count(aten.conv2d.default) == 1
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    for a, e in zip(result.graph_module(x), graph_module(x), strict=True):
        torch.testing.assert_close(a, e, **TINY)
    assert not _merged(build((9, 1)), enlarge=True).remarks, "nine times the work for most of it"


def test_results_of_the_model_do_not_become_slices_of_one_tensor() -> None:
    b = Builder()
    x = b.input(3, 6, dtype=torch.float64)
    first, second = (b.call(aten.linear.default, x, _weight(b, 4, 6)) for _ in range(2))
    result = _merged(b.finish(first, b.call(aten.permute.default, second, [1, 0])))
    assert targets(result.graph_module).count(aten.linear.default) == 2
    assert [r.id for r in result.remarks] == ["PLT-MRG-003"]


@pytest.mark.parametrize("written", ["result", "source", "what it shows", "weight", "bias"])
def test_what_is_written_in_place_stays_apart(written: str) -> None:
    b = Builder()
    given, weight, bias = b.input(3, 6, dtype=torch.float64), _weight(b, 4, 6), _weight(b, 4)
    x = b.call(aten.permute.default, given, [0, 1])
    first = b.call(aten.linear.default, x, weight, bias)
    at = {"result": first, "source": x, "what it shows": given, "weight": weight, "bias": bias}
    b.call(aten.add_.Tensor, at[written], 1.0)
    second = b.call(aten.linear.default, x, _weight(b, 4, 6), bias)
    graph_module = b.finish(*(b.call(aten.exp.default, f) for f in (first, second)))
    assert _merged(graph_module).graph_module is graph_module


@pytest.mark.parametrize(
    ("judge", "remark", "text"),
    [
        (None, "PLT-MRG-004", "nobody measures"),
        (lambda *_: "too tired", "PLT-MRG-004", "too tired"),
        (lambda *_: (1.0, 0.98), "PLT-MRG-002", "980000.0 us merged"),
    ],
)
def test_what_is_not_measured_faster_stays_apart_and_is_told(judge, remark, text) -> None:
    graph_module = _projections()
    result = _merged(graph_module, judge)
    assert result.graph_module is graph_module
    assert [r.id for r in result.remarks] == [remark] and text in result.remarks[0].reason


def test_a_gate_is_judged_with_the_pointwise_operators_behind_it() -> None:
    b = Builder()
    x = b.input(3, 6, dtype=torch.float64)
    gate, up = (b.call(aten.linear.default, x, _weight(b, 4, 6)) for _ in range(2))
    both = b.call(aten.mul.Tensor, b.call(aten.silu.default, gate), up)
    seen = []

    def judge(apart: fx.GraphModule, merged: fx.GraphModule) -> tuple[float, float]:
        seen.extend([targets(apart), targets(merged)])
        return 1.0, 1.0

    _merged(b.finish(b.call(aten.linear.default, both, _weight(b, 6, 4))), judge)
    assert [aten.mul.Tensor in t for t in seen] == [True, True]
    assert [t.count(aten.linear.default) for t in seen] == [2, 1]


def test_growth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="most_growth must be at least 1"):
        MergeParallelOps(most_growth=0.5)
