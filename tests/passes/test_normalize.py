"""normalize: a simpler graph that computes the same, for every input."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from plait.passes.base import Counter, counting
from plait.passes.normalize import Normalize

from .graphs import (
    Builder,
    assert_same_bits,
    aten,
    captured,
    inputs_for,
    normalized,
    random_graphs,
    targets,
)

CONFIG = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


# Properties ------------------------------------------------------------------------------------


@CONFIG
@given(random_graphs(), st.integers(0, 99))
def test_any_graph_computes_the_same(graph_module, seed):
    for special in (False, True):
        inputs = inputs_for(graph_module, seed, special)
        expected = graph_module(*inputs)
        actual = normalized(graph_module)(*inputs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, equal_nan=True)


@CONFIG
@given(random_graphs())
def test_a_second_run_changes_nothing(graph_module):
    once = normalized(graph_module)
    again = Normalize().run(once)
    assert again.graph_module is once
    assert all(remark.kind != "done" for remark in again.remarks)


@CONFIG
@given(random_graphs(), st.integers(0, 8))
def test_any_prefix_of_the_transformations_computes_the_same(graph_module, limit):
    inputs = inputs_for(graph_module, 0)
    with counting(Counter(limit)):
        result = Normalize().run(graph_module).graph_module
    for a, e in zip(result(*inputs), graph_module(*inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@CONFIG
@given(random_graphs())
def test_outputs_share_memory_only_where_they_did(graph_module):
    def sharing(module):
        inputs = inputs_for(graph_module, 0)
        outputs = [t for t in module(*inputs) if t.numel()]
        tensors = [*outputs, *inputs, *graph_module.buffers()]
        places = [t.untyped_storage().data_ptr() for t in tensors]
        return {(i, j) for i in range(len(outputs)) for j in range(i) if places[i] == places[j]} | {
            (i, j)
            for i in range(len(outputs))
            for j in range(len(outputs), len(tensors))
            if places[i] == places[j]
        }

    assert sharing(normalized(graph_module)) <= sharing(graph_module)


# Identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.mul.Tensor, (1,)),
        (aten.mul.Tensor, (1.0,)),
        (aten.div.Tensor, (1,)),
        (aten.sub.Tensor, (0,)),
        (aten.add.Tensor, (-0.0,)),
        (aten.pow.Tensor_Scalar, (1,)),
        (aten.clone.default, ()),
        (aten.detach.default, ()),
        (aten.alias.default, ()),
        (aten.dropout.default, (0.5, False)),
        (aten.to.dtype, (torch.float32,)),
        (aten._to_copy.default, ()),
        (aten.contiguous.default, ()),
        (aten.expand.default, ([3, 4],)),
        (aten.reshape.default, ([3, 4],)),
        (aten.slice.Tensor, (0, 0, 9)),
        (aten.permute.default, ([0, 1],)),
        (aten.repeat.default, ([1, 1],)),
        (aten.constant_pad_nd.default, ([0, 0], 1.0)),
    ],
)
def test_an_operator_without_effect_goes(target, args):
    b = Builder()
    graph_module = b.finish(b.call(aten.neg.default, b.call(target, b.input(3, 4), *args)))
    result = normalized(graph_module)
    assert targets(result) == [aten.neg.default]
    inputs = inputs_for(graph_module, 0, special=True)
    assert_same_bits(result(*inputs), graph_module(*inputs))


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.add.Tensor, (0.0,)),  # -0.0 + 0.0 is 0.0
        (aten.add.Tensor, (0,)),
        (aten.sub.Tensor, (-0.0,)),
        (aten.mul.Tensor, (-1,)),
        (aten.expand.default, ([2, 3, 4],)),
        (aten.constant_pad_nd.default, ([1, -1], 0.0)),  # the shape stays, the values move
        (aten.to.dtype, (torch.float64,)),
    ],
)
def test_an_operator_that_only_looks_neutral_stays(target, args):
    b = Builder()
    graph_module = b.finish(b.call(aten.neg.default, b.call(target, b.input(3, 4), *args)))
    result = normalized(graph_module)
    assert len(targets(result)) == 2
    inputs = inputs_for(graph_module, 0, special=True)
    assert_same_bits(result(*inputs), graph_module(*inputs))


@pytest.mark.parametrize(
    ("target", "shape", "sizes"),
    [
        (aten.adaptive_avg_pool1d.default, (3, 4, 5), [1]),
        (aten._adaptive_avg_pool2d.default, (3, 4, 5), [1, 1]),
        (aten.adaptive_avg_pool2d.default, (2, 3, 4, 5), [1, 1]),
        (aten.adaptive_avg_pool3d.default, (2, 3, 4, 5, 6), [1, 1, 1]),
    ],
)
def test_pooling_to_one_value_is_a_mean(target, shape, sizes):
    b = Builder()
    graph_module = b.finish(b.call(target, b.input(*shape), sizes))
    result = normalized(graph_module)
    assert targets(result) == [aten.mean.dim]
    inputs = inputs_for(graph_module, 0)
    for a, e in zip(result(*inputs), graph_module(*inputs), strict=True):
        torch.testing.assert_close(a, e)
    other = Builder()
    pooled = other.call(target, other.input(*shape), [2, *sizes[1:]])
    assert targets(normalized(other.finish(pooled))) == [target]


def test_adding_integer_zero_to_integers_goes_but_promotion_stays():
    b = Builder()
    x = b.input(3, dtype=torch.int64)
    same, wider = b.call(aten.add.Tensor, x, 0), b.call(aten.mul.Tensor, x, 1.0)
    result = normalized(b.finish(b.call(aten.neg.default, same), wider))
    assert sorted(map(str, targets(result))) == ["aten.mul.Tensor", "aten.neg.default"]


def test_complex_multiplication_by_one_stays():
    b = Builder()
    x = b.input(3, dtype=torch.complex64)
    result = normalized(b.finish(b.call(aten.neg.default, b.call(aten.mul.Tensor, x, 1))))
    assert aten.mul.Tensor in targets(result)


def test_dropout_in_training_stays():
    b = Builder()
    x = b.call(aten.dropout.default, b.input(3), 0.5, True)
    result = normalized(b.finish(b.call(aten.neg.default, x)))
    assert aten.dropout.default in targets(result)


def test_a_copy_that_keeps_an_output_apart_from_an_input_stays():
    b = Builder()
    x = b.input(3)
    assert targets(normalized(b.finish(b.call(aten.clone.default, x)))) == [aten.clone.default]


def test_a_copy_that_keeps_two_outputs_apart_stays():
    b = Builder()
    y = b.call(aten.neg.default, b.input(3))
    result = normalized(b.finish(y, b.call(aten.clone.default, y)))
    assert targets(result) == [aten.neg.default, aten.clone.default]


def test_a_copy_whose_original_is_overwritten_stays():
    b = Builder()
    state, x = b.constant(torch.zeros(3), "state"), b.input(3)
    old = b.call(aten.clone.default, state)
    b.call(aten.copy_.default, state, x)
    graph_module = b.finish(b.call(aten.add.Tensor, old, x))
    result = normalized(graph_module)
    assert aten.clone.default in targets(result)
    assert torch.equal(result(torch.ones(3))[0], torch.ones(3))


def test_a_mean_with_the_strides_of_an_image_in_channels_last_memory_is_a_mean():
    b = Builder()
    image = b.call(aten.permute.default, b.input(3, 4, 5, 6), [0, 3, 1, 2])
    mean = b.call(aten.mean.dim, image, [-1, -2], True)
    pooled = b.call(aten.as_strided.default, mean, [3, 6, 1, 1], [6, 1, 6, 6])
    graph_module = b.finish(b.call(aten.neg.default, pooled))
    result = normalized(graph_module)
    assert aten.as_strided.default not in targets(result)
    inputs = inputs_for(graph_module, 0)
    assert_same_bits(result(*inputs), graph_module(*inputs))


@pytest.mark.parametrize("offset", [None, 0])
def test_a_view_by_the_strides_that_its_argument_has_goes(offset):
    b = Builder()
    x = b.call(aten.exp.default, b.input(3, 4))
    y = b.call(aten.as_strided.default, x, [3, 4], [4, 1], offset)
    graph_module = b.finish(b.call(aten.neg.default, y))
    assert targets(normalized(graph_module)) == [aten.exp.default, aten.neg.default]


# Canonical form --------------------------------------------------------------------------------


def test_splits_become_views_of_their_parts():
    b = Builder()
    parts = b.call(aten.split.Tensor, b.input(5, 2), 2)
    rows = b.call(aten.unbind.int, b.input(2, 3), 1)
    outputs = [b.part(parts, 2), b.part(parts, 0), b.part(rows, 1)]
    graph_module = b.finish(*(b.call(aten.neg.default, x) for x in outputs))
    result = normalized(graph_module)
    assert set(targets(result)) == {aten.slice.Tensor, aten.select.int, aten.neg.default}
    inputs = inputs_for(graph_module, 1)
    assert_same_bits(result(*inputs), graph_module(*inputs))


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.t.default, ()),
        (aten.transpose.int, (-1, 0)),
        (aten.numpy_T.default, ()),
        (aten.mT.default, ()),
        (aten.movedim.int, (0, 1)),
        (aten.swapaxes.default, (0, 1)),
        (aten.permute.default, ([-1, 0],)),
    ],
)
def test_every_transposition_becomes_permute(target, args):
    b = Builder()
    graph_module = b.finish(b.call(aten.neg.default, b.call(target, b.input(3, 4), *args)))
    result = normalized(graph_module)
    assert targets(result) == [aten.permute.default, aten.neg.default]
    inputs = inputs_for(graph_module, 1)
    assert_same_bits(result(*inputs), graph_module(*inputs))


def test_moving_a_dimension_keeps_the_order_of_the_others():
    b = Builder()
    moved = b.call(aten.movedim.int, b.input(2, 3, 4, 5), 0, 2)
    graph_module = b.finish(b.call(aten.neg.default, moved))
    inputs = inputs_for(graph_module, 1)
    assert_same_bits(normalized(graph_module)(*inputs), graph_module(*inputs))


def test_two_permutations_that_cancel_vanish():
    b = Builder()
    y = b.call(aten.permute.default, b.input(2, 3, 4), [1, 2, 0])
    y = b.call(aten.permute.default, y, [2, 0, 1])
    assert targets(normalized(b.finish(b.call(aten.neg.default, y)))) == [aten.neg.default]


def test_a_copy_made_for_view_becomes_part_of_reshape():
    b = Builder()
    y = b.call(aten.permute.default, b.input(2, 3), [1, 0])
    y = b.call(aten.clone.default, y, memory_format=torch.contiguous_format)
    graph_module = b.finish(b.call(aten.neg.default, b.call(aten.view.default, y, [6])))
    result = normalized(graph_module)
    assert targets(result) == [aten.permute.default, aten.reshape.default, aten.neg.default]
    inputs = inputs_for(graph_module, 1)
    assert_same_bits(result(*inputs), graph_module(*inputs))


def test_writing_in_place_to_a_temporary_becomes_functional():
    b = Builder()
    x = b.input(3)
    y = b.call(aten.relu_.default, b.call(aten.neg.default, x))
    assert targets(normalized(b.finish(y))) == [aten.neg.default, aten.relu.default]


@pytest.mark.parametrize("reader", ["input", "again", "view"])
def test_writing_in_place_to_what_others_see_stays(reader):
    b = Builder()
    x = b.input(3)
    y = x if reader == "input" else b.call(aten.neg.default, x)
    z = b.call(aten.slice.Tensor, y, 0, 0, 2) if reader == "view" else y
    written = b.call(aten.relu_.default, z)
    graph_module = b.finish(written, b.call(aten.abs.default, y))
    result = normalized(graph_module)
    assert aten.relu_.default in targets(result)
    assert_same_bits(result(*inputs_for(result, 3)), graph_module(*inputs_for(result, 3)))


def test_metadata_assertions_go_and_assertions_on_data_stay():
    b = Builder()
    x = b.input(3)
    b.call(aten._assert_tensor_metadata.default, x, None, None, torch.float32)
    b.call(aten._assert_scalar.default, True, "never")
    b.call(aten._assert_async.msg, b.call(aten.any.default, x), "empty")
    result = normalized(b.finish(b.call(aten.neg.default, x)))
    assert targets(result) == [aten.any.default, aten._assert_async.msg, aten.neg.default]


# Constants -------------------------------------------------------------------------------------


def test_what_depends_on_constants_alone_is_computed_once():
    b = Builder()
    weight = b.constant(torch.randn(4, 3))
    scaled = b.call(aten.mul.Tensor, b.call(aten.t.default, weight), 2.0)
    graph_module = b.finish(b.call(aten.mm.default, b.input(2, 3), scaled))
    result = normalized(graph_module)
    assert targets(result) == [aten.mm.default]
    inputs = inputs_for(graph_module, 2)
    torch.testing.assert_close(result(*inputs), graph_module(*inputs))


def test_a_view_of_a_constant_shares_its_memory():
    b = Builder()
    weight = torch.randn(300, 400)
    view = b.call(aten.t.default, b.constant(weight))
    result = normalized(b.finish(b.call(aten.mm.default, b.input(2, 400), view)), max_constant=0)
    (constant,) = result.buffers()
    assert constant.data_ptr() == weight.data_ptr()


def test_a_large_result_of_small_constants_is_not_stored():
    b = Builder()
    big = b.call(aten.repeat.default, b.constant(torch.ones(4)), [100])
    graph_module = b.finish(b.call(aten.add.Tensor, b.input(400), big))
    outcome = Normalize(max_constant=99).run(graph_module)
    assert [r.id for r in outcome.remarks] == ["PLT-NRM-005"]
    assert targets(normalized(graph_module, max_constant=400)) == [aten.add.Tensor]


def test_of_several_results_those_count_that_are_read():
    class Standardised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3, dtype=torch.float64))

        def forward(self, x):
            rows = self.weight.reshape(1, 4, -1)
            weight = nn.functional.batch_norm(rows, None, None, training=True, momentum=0.0)
            return nn.functional.conv2d(x, weight.reshape(4, 3, 3, 3))

    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    graph_module = captured(Standardised(), x)
    result = normalized(graph_module, max_constant=0)
    assert len(targets(result)) == 1
    assert_same_bits(result(x), graph_module(x))


@pytest.mark.parametrize(("limit", "stays"), [(1, True), (9, True), (25, False)])
def test_a_large_result_that_only_a_small_constant_is_computed_from_is_not_stored(limit, stays):
    b = Builder()
    big = b.call(aten.repeat.default, b.constant(torch.ones(4)), [100])
    view = b.call(aten.reshape.default, big, [4, 100])
    total = b.call(aten.sum.default, b.call(aten.exp.default, view))
    graph_module = b.finish(b.call(aten.add.Tensor, b.input(400), total))
    result = normalized(graph_module, max_constant=limit)
    assert (aten.repeat.default in targets(result)) == stays
    assert sum(buffer.numel() for buffer in result.buffers()) == (4 if stays else 1)
    inputs = inputs_for(graph_module, 0)
    assert_same_bits(result(*inputs), graph_module(*inputs))


def test_a_large_result_that_others_read_too_is_computed_at_run_time():
    b = Builder()
    big = b.call(aten.repeat.default, b.constant(torch.ones(4)), [100])
    total = b.call(aten.sum.default, big)
    y = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, b.input(400), big), total)
    graph_module = b.finish(y)
    result = normalized(graph_module, max_constant=99)
    assert aten.repeat.default in targets(result) and aten.sum.default not in targets(result)
    inputs = inputs_for(graph_module, 0)
    assert_same_bits(result(*inputs), graph_module(*inputs))


def test_a_constant_output_stays_a_fresh_tensor():
    b = Builder()
    graph_module = b.finish(b.call(aten.neg.default, b.constant(torch.ones(2))))
    result = normalized(graph_module)
    result()[0].zero_()
    assert torch.equal(result()[0], -torch.ones(2))


def test_random_and_overwritten_values_are_no_constants():
    b = Builder()
    state = b.constant(torch.zeros(3), "state")
    noise = b.call(aten.rand.default, [3])
    double = b.call(aten.mul.Tensor, state, 2)
    b.call(aten.copy_.default, state, b.input(3))
    graph_module = b.finish(b.call(aten.add.Tensor, b.call(aten.mul.Tensor, noise, 3), double))
    assert sorted(map(str, targets(normalized(graph_module)))) == sorted(
        map(str, targets(graph_module))
    )


def test_an_attention_mask_that_hides_nothing_goes():
    b = Builder()
    q = b.input(1, 2, 3, 4)
    for value, count in ((True, 0), (False, 1)):
        mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
        mask[..., 0] = value
        b = Builder()
        q = b.input(1, 2, 3, 4)
        sdpa = aten.scaled_dot_product_attention.default
        graph_module = b.finish(b.call(sdpa, q, q, q, b.constant(mask)))
        result = normalized(graph_module)
        assert len(list(result.buffers())) == count
        inputs = inputs_for(graph_module, 0)
        torch.testing.assert_close(result(*inputs), graph_module(*inputs))


# Common subexpressions -------------------------------------------------------------------------


def test_equal_computations_are_done_once():
    b = Builder()
    x = b.input(3)
    y = [b.call(aten.exp.default, b.call(aten.neg.default, x)) for _ in range(2)]
    result = normalized(b.finish(b.call(aten.add.Tensor, *y)))
    assert targets(result) == [aten.neg.default, aten.exp.default, aten.add.Tensor]


@pytest.mark.parametrize("pair", [(1, 1.0), (0.0, -0.0), (1, True)])
def test_constants_that_only_compare_equal_are_different(pair):
    b = Builder()
    x = b.input(3, dtype=torch.int64)
    y = [b.call(aten.mul.Scalar, x, number) for number in pair]
    graph_module = b.finish(*(b.call(aten.neg.default, v) for v in y))
    result = normalized(graph_module)
    assert_same_bits(result(torch.ones(3).long()), graph_module(torch.ones(3).long()))


def test_random_draws_are_never_merged():
    b = Builder()
    x = b.input(3)
    y = [b.call(aten.bernoulli.default, x) for _ in range(2)]
    assert (
        targets(normalized(b.finish(b.call(aten.add.Tensor, *y)))).count(aten.bernoulli.default)
        == 2
    )


def test_two_equal_outputs_stay_two_tensors():
    b = Builder()
    x = b.input(3)
    result = normalized(b.finish(*(b.call(aten.neg.default, x) for _ in range(2))))
    first, second = result(torch.ones(3))
    assert first.data_ptr() != second.data_ptr()


def test_unread_operators_go_and_unread_draws_stay():
    b = Builder()
    x = b.input(3)
    b.call(aten.exp.default, b.call(aten.neg.default, x))
    b.call(aten.rand.default, [2])
    result = normalized(b.finish(b.call(aten.abs.default, x)))
    assert targets(result) == [aten.rand.default, aten.abs.default]


# Options and control flow ----------------------------------------------------------------------


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="max_constant must not be negative"):
        Normalize(max_constant=-1)


def test_branches_of_control_flow_are_normalized_too():
    class Branching(nn.Module):
        def forward(self, x):
            def double(x):
                return (x * 1) * 2

            return torch.cond(x.sum() > 0, double, lambda x: x - 1, (x,))

    x = torch.ones(3)
    graph_module = captured(Branching(), x)
    result = normalized(graph_module)
    branches = [m for m in result.children() if isinstance(m, torch.fx.GraphModule)]
    assert [aten.mul.Tensor] in [targets(branch) for branch in branches]
    for value in (x, -x):
        torch.testing.assert_close(result(value), graph_module(value))


def test_symbolic_shapes_stay_symbolic():
    class Dynamic(nn.Module):
        def forward(self, x):
            y = x.permute(0, 2, 1).contiguous().view(x.shape[0], -1)
            return y.expand(x.shape[0], -1) * 1, torch.zeros_like(y)

    x = torch.randn(2, 3, 4)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Dynamic(), (x,), dynamic_shapes=({0: batch},), strict=False)
    graph_module = program.run_decompositions({}).module()
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module":
            graph_module.graph.erase_node(node)
    result = normalized(graph_module)
    assert aten.clone.default not in targets(result)
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 4)
        torch.testing.assert_close(result(x), graph_module(x))
