"""merge-parallel-ops: the same function for every input, whatever is merged; and what is not."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.passes.base import Counter, counting
from plait.passes.ir import COND, branches_of
from plait.passes.merge_parallel import JUDGE, MergeParallelOps
from plait.passes.verifier import verify

from .graphs import Builder, aten, targets

CONFIG = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
TINY = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}


def _always(
    apart: fx.GraphModule, merged: fx.GraphModule, beside: bool = False
) -> tuple[float, float]:
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


def _twice(kind: str) -> fx.GraphModule:
    """Two operators of a kind on one tensor, and what follows them."""
    b = Builder()
    name, _, how = kind.partition(" ")
    shapes = {"vector": (6,), "square": (6, 6), "unbatched": (6, 5, 5), "line": (2, 6, 5)}
    image = name in ("conv2d", "convolution")
    x = b.input(*shapes.get(how, (2, 6, 5, 5) if image else (3, 6)), dtype=torch.float64)
    found = []
    for k in range(2):
        width = 4 if how in ("sizes", "square", "bias matrix") else 4 + k
        kwargs = {"beta": 2.0} if how == "scaled" else {}
        if name in ("mm", "matmul"):
            weight = _weight(b, 2, 6, width) if how == "batch" else _weight(b, 6, width)
            args = (x, weight)
        elif name == "addmm":
            shape = {"bias matrix": (3, width), "bias of one": (1,)}.get(how, (width,))
            args = (_weight(b, *shape), x, _weight(b, 6, width))
        elif name == "linear":
            args = (x, _weight(b, width, 6), _weight(b, width))
        elif how == "turned":
            weight = _weight(b, 6, width, 3, 3)
            args = (x, weight, None, [1, 1], [1, 1], [1, 1], True, [0, 0], 1)
        else:
            groups = 2 if how == "groups" else 1
            kernel = (3 + 2 * (how == "kernels" and k),) * (1 if how == "line" else 2)
            stride = 1 + (how == "strides" and k)
            padding, dilation = 1 + (how == "paddings" and k), 1 + (how == "dilations" and k)
            weight = _weight(b, 2 * width, 6 // groups, *kernel)
            args = (x, weight, _weight(b, 2 * width) if k else None)
            args = (*args, *([n] for n in (stride, padding, dilation)), groups)
        name = "conv1d" if how == "line" else name
        y = b.call(getattr(aten, name).default, *args, **kwargs)
        if how == "sizes":
            y = b.call(aten.new_full.default, y, [3, 4], 2.0)
        found.append(b.call(aten.exp.default, y))
    return b.finish(*(b.call(aten.neg.default, f) for f in found))


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("linear", 1), ("linear vector", 1), ("linear sizes", 1), ("mm", 1), ("mm square", 1),
        ("matmul", 1), ("matmul vector", 1), ("matmul batch", 2), ("addmm", 1),
        ("addmm bias matrix", 2), ("addmm bias of one", 2), ("addmm scaled", 2), ("conv2d", 1),
        ("conv2d line", 1), ("conv2d groups", 2), ("conv2d unbatched", 2), ("conv2d kernels", 2),
        ("conv2d strides", 2), ("conv2d paddings", 2), ("conv2d dilations", 2),
        ("convolution turned", 2),
    ],
)  # fmt: skip
def test_which_operators_become_one(kind: str, count: int) -> None:
    graph_module = _twice(kind)
    result = _merged(graph_module)
    calls = [t for t in targets(result.graph_module) if kind.split()[0][:4] in str(t)]
    assert len(calls) == count
    reasons = [r.reason for r in result.remarks if r.id == "PLT-MRG-003"]
    assert any("interleaved" in r for r in reasons) == kind.endswith("groups")
    (node,) = graph_module.graph.find_nodes(op="placeholder")
    x = torch.randn(node.meta["val"].shape, dtype=torch.float64)
    for a, e in zip(result.graph_module(x), graph_module(x), strict=True):
        torch.testing.assert_close(a, e, **TINY)


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


@pytest.mark.parametrize(
    ("kernels", "paddings", "count"),
    [((1, 3), (0, 1), 1), ((1, 3), (0, 0), 2), ((1, 3), (1, 1), 2), ((2, 3), (1, 1), 2)],
)
def test_only_kernels_around_the_same_middle_grow(
    kernels: tuple[int, int], paddings: tuple[int, int], count: int
) -> None:
    b = Builder()
    x, found = b.input(1, 4, 7, 7, dtype=torch.float64), []
    for k, p in zip(kernels, paddings, strict=True):
        weight = _weight(b, 9, 4, k, k)
        y = b.call(aten.conv2d.default, x, weight, None, [2, 2], [p, p])
        found.append(b.call(aten.exp.default, y))
    graph_module = b.finish(*(b.call(aten.neg.default, f) for f in found))
    result = _merged(graph_module, enlarge=True, most_growth=9.0)
    assert targets(result.graph_module).count(aten.conv2d.default) == count
    given = torch.randn(1, 4, 7, 7, dtype=torch.float64)
    for a, e in zip(result.graph_module(given), graph_module(given), strict=True):
        torch.testing.assert_close(a, e, **TINY)


def _steps(kind: str) -> tuple[fx.GraphModule, int]:
    """Two products with a step behind each; how many such steps a merged graph has."""
    b = Builder()
    x = b.input(3, 6, dtype=torch.float64)
    ends = [b.call(aten.linear.default, x, _weight(b, 4, 6)) for _ in range(2)]
    exp = aten.exp.default
    if kind == "read twice":
        return b.finish(*(b.call(aten.mul.Tensor, b.call(exp, e), e) for e in ends)), 2
    if kind == "the same":
        both = b.call(aten.add.Tensor, *ends)
        return b.finish(b.call(aten.neg.default, both), b.call(exp, both)), 1
    if kind == "of rows":
        steps = [b.call(aten.softmax.int, e, -1) for e in ends]
    elif kind == "of others":
        steps = [b.call(aten.mul.Tensor, e, b.input(3, 4, dtype=torch.float64)) for e in ends]
    elif kind == "results":
        return b.finish(*(b.call(exp, e) for e in ends)), 2
    elif kind == "written":
        steps = [b.call(exp, e) for e in ends]
        b.call(aten.add_.Tensor, steps[0], 1.0)
    elif kind == "turned":
        steps = [b.call(aten.permute.default, e, [1, 0]) for e in ends]
    elif kind == "of other numbers":
        how = [{}, {"approximate": "tanh"}]
        steps = [b.call(aten.gelu.default, e, **h) for e, h in zip(ends, how, strict=True)]
    elif kind == "of chance":
        steps = [b.call(aten.rand_like.default, e) for e in ends]
    else:
        steps = [b.call(exp, e) for e in ends]
        return b.finish(*(b.call(aten.neg.default, s) for s in steps)), 1
    return b.finish(*(b.call(aten.abs.default, s) for s in steps)), 2


@pytest.mark.parametrize(
    "kind",
    [
        "alike", "read twice", "the same", "of rows", "of others", "results", "written", "turned",
        "of other numbers", "of chance",
    ],
)  # fmt: skip
def test_which_steps_happen_before_the_cut(kind: str) -> None:
    graph_module, count = _steps(kind)
    result = _merged(graph_module)
    before, after = targets(graph_module), targets(result.graph_module)
    assert after.count(aten.linear.default) == 1
    nodes = graph_module.graph.find_nodes(op="placeholder")
    given = [torch.randn(n.meta["val"].shape, dtype=torch.float64) for n in nodes]
    results = []
    for module in (result.graph_module, graph_module):
        torch.manual_seed(0)
        results.append(module(*(x.clone() for x in given)))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, **TINY)
    kinds = {t for t in before if t not in (aten.linear.default, aten.neg.default)}
    assert max(after.count(t) for t in kinds) == count


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


def test_what_is_merged_may_read_what_was_merged_before() -> None:
    b = Builder()
    x = b.input(3, 6, dtype=torch.float64)
    first, second = (b.call(aten.linear.default, x, _weight(b, 6, 6)) for _ in range(2))
    further = [b.call(aten.linear.default, first, _weight(b, 4, 6)) for _ in range(2)]
    graph_module = b.finish(*(b.call(aten.exp.default, f) for f in (second, *further)))
    result = _merged(graph_module)
    assert targets(result.graph_module).count(aten.linear.default) == 2
    given = torch.randn(3, 6, dtype=torch.float64)
    for a, e in zip(result.graph_module(given), graph_module(given), strict=True):
        torch.testing.assert_close(a, e, **TINY)


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

    def judge(apart: fx.GraphModule, merged: fx.GraphModule, _: bool) -> tuple[float, float]:
        seen.extend([targets(apart), targets(merged)])
        return 1.0, 1.0

    _merged(b.finish(b.call(aten.linear.default, both, _weight(b, 6, 4))), judge)
    assert [aten.mul.Tensor in t for t in seen] == [True, True]
    assert [t.count(aten.linear.default) for t in seen] == [2, 1]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("none", False), ("before", False), ("after one", True), ("after both", False),
        ("independent", True), ("on the source", True), ("address", False),
    ],
)  # fmt: skip
def test_the_judge_knows_whether_anything_can_run_beside(other: str, expected: bool) -> None:
    b = Builder()
    x, y = b.input(3, 6, dtype=torch.float64), b.input(3, 6, dtype=torch.float64)
    if other == "before":
        x = b.call(aten.softmax.int, x, -1)
    ends = [b.call(aten.linear.default, x, _weight(b, 4, 6)) for _ in range(2)]
    if other == "after one":
        ends[0] = b.call(aten.softmax.int, ends[0], -1)
    results = [b.call(aten.linear.default, b.call(aten.cat.default, ends, 1), _weight(b, 4, 8))]
    if other == "after both":
        results.append(b.call(aten.softmax.int, results[0], -1))
    elif other in ("independent", "on the source"):
        source = y if other == "independent" else x
        results.append(b.call(aten.softmax.int, source, -1))
    elif other == "address":
        results.append(b.call(aten.permute.default, y, [1, 0]))
    seen = []

    def judge(apart: fx.GraphModule, merged: fx.GraphModule, beside: bool) -> str:
        seen.append(beside)
        return "seen"

    _merged(b.finish(*results), judge)
    assert seen == [expected]


def test_products_of_branches_become_one() -> None:
    inner = Builder()
    y = inner.input(3, 6, dtype=torch.float64)
    ends = [inner.call(aten.linear.default, y, _weight(inner, 4, 6)) for _ in range(2)]
    branch = inner.finish(*(inner.call(aten.exp.default, e) for e in ends))
    b = Builder()
    b.root.side = branch
    sides = [b.graph.get_attr("side") for _ in range(2)]
    x = b.input(3, 6, dtype=torch.float64)
    results = b.graph.call_function(COND, (b.input(dtype=torch.bool), *sides, (x,)))
    results.meta["val"] = tuple(e.meta["val"] for e in ends)
    graph_module = b.finish(*(b.part(results, k) for k in range(2)))
    graph_module.meta[JUDGE] = _always
    result = MergeParallelOps().run(graph_module)
    (found,) = (m for _, m in branches_of(result.graph_module))
    assert targets(found).count(aten.linear.default) == 1


def test_growth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="most_growth must be at least 1"):
        MergeParallelOps(most_growth=0.5)
