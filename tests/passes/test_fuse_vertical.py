"""fuse-vertical: which operators share a kernel, and that groups can run one after another."""

import operator

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings

from plait.kernels import (
    ops,
    routing,  # noqa: F401 - defines the operators
)
from plait.passes.annotations import annotation
from plait.passes.base import Counter, counting
from plait.passes.fuse_vertical import FuseVertical, groups_of
from plait.passes.normalize import Normalize
from plait.passes.verifier import verify

from .graphs import Builder, aten, inputs_for, random_graphs

CONFIG = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def fused(graph_module, **options):
    result = FuseVertical(**options).run(graph_module)
    verify(result.graph_module)
    return result.graph_module


def summary(graph_module, **options):
    """Groups as "kind: names", in order."""
    groups = groups_of(fused(graph_module, **options))
    return [f"{g.kind}: {' '.join(n.name for n in g.nodes)}" for g in groups]


# Properties ------------------------------------------------------------------------------------


def check_groups(graph_module):
    """Everything that groups promise; by brute force."""
    calls = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    groups = groups_of(graph_module)
    owner = {n: i for i, g in enumerate(groups) for n in g.nodes}
    assert sum(len(g.nodes) for g in groups) == len(owner), "a node is in two groups"
    assert set(owner) == {n for n in calls if ops.category(n) != "symbolic"}
    below: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(list(graph_module.graph.nodes)):
        below[node] = {r for u in node.users for r in (u, *below[u])}
    for i, group in enumerate(groups):
        inside = set(group.nodes)
        for node in group.nodes:
            for arg in node.all_input_nodes:
                assert owner.get(arg, i) <= i, "a group runs before one that it needs"
                assert arg in inside or arg in group.inputs or ops.category(arg) == "symbolic"
            outside = below[node] - inside
            assert not any(below[n] & inside for n in outside), "a path leaves and comes back"
        assert set(group.outputs) == {n for n in inside if set(n.users) - inside}
        assert not set(group.inputs) & inside
        assert list(group.nodes) == sorted(group.nodes, key=calls.index)
        first = calls.index(group.nodes[0])
        assert calls[first : first + len(group.nodes)] == list(group.nodes), "not in one piece"
    return groups


@CONFIG
@given(random_graphs(torch.float32))
def test_groups_partition_any_graph_and_run_in_order(graph_module):
    for graph in (graph_module, Normalize().run(graph_module).graph_module):
        before = str(graph.graph)
        result = fused(graph)
        assert str(graph.graph) == before and not any(
            "plait" in n.meta for n in graph_module.graph.nodes
        )
        check_groups(result)
        inputs = inputs_for(graph, 0)
        for a, e in zip(result(*inputs), graph(*inputs), strict=True):
            assert torch.equal(a, e)


@CONFIG
@given(random_graphs(torch.float32))
def test_each_kernel_template_gets_the_group_it_was_promised(graph_module):
    for group in check_groups(fused(Normalize().run(graph_module).graph_module)):
        heavy = [n for n in group.nodes if ops.category(n) == group.kind]
        shapes = {tuple(n.meta["val"].shape) for n in group.outputs}
        if group.kind in ("gemm", "conv", "pool", "attention", "reduce"):
            assert group.anchor is heavy[0] and len(group.outputs) == 1
        elif group.kind == "pointwise":
            assert group.anchor is None and len(shapes) == 1
        elif group.kind in ("view", "concat"):
            assert len(group.nodes) == 1
        if group.kind not in ("library", "view"):
            for node in group.nodes:
                assert ops.category(node) in (
                    group.kind,
                    "pointwise",
                    "view",
                    "reduce",
                    "rows",
                    "scan",
                )


@CONFIG
@given(random_graphs(torch.float32))
def test_any_options_and_any_limit_leave_valid_groups(graph_module):
    off = {"epilogues": False, "rows": False, "pointwise": False, "concat": False}
    for options in ({"max_nodes": 2}, off, {"rows": False}):
        for group in check_groups(fused(graph_module, **options)):
            assert options is not off or len([n for n in group.nodes if not _is_free(n)]) <= 1
            assert len(group.nodes) <= options.get("max_nodes", 99) or group.kind == "library"
    with counting(Counter(3)):
        check_groups(fused(graph_module))


def _is_free(node):
    return node.target in (operator.getitem, aten.full.default)


# Heavy operators -------------------------------------------------------------------------------


def test_a_product_absorbs_what_follows_on_its_shape():
    b = Builder()
    x, residual = b.input(3, 4), b.input(3, 5)
    y = b.call(aten.linear.default, x, b.constant(torch.ones(5, 4)))
    y = b.call(aten.add.Tensor, b.call(aten.gelu.default, y), residual)
    graph = fused(b.finish(b.call(aten.sum.dim_IntList, y, [0])))
    product, reduction = groups_of(graph)
    assert [n.name for n in product.nodes] == ["linear_default", "gelu_default", "add_tensor"]
    assert product.kind == "gemm" and product.anchor is product.nodes[0]
    assert residual.name in [n.name for n in product.inputs]
    assert [n.name for n in product.outputs] == ["add_tensor"]
    assert reduction.kind == "reduce"


def test_the_accumulator_may_be_read_twice_inside():
    b = Builder()
    y = b.call(aten.mm.default, b.input(3, 4), b.input(4, 5))
    y = b.call(aten.mul.Tensor, y, b.call(aten.sigmoid.default, y))
    assert summary(b.finish(y)) == ["gemm: mm_default sigmoid_default mul_tensor"]


def test_a_value_that_another_kernel_reads_ends_the_epilogue():
    b = Builder()
    y = b.call(aten.mm.default, b.input(4, 4), b.input(4, 4))
    z = b.call(aten.relu.default, y)
    assert summary(b.finish(z, y)) == ["gemm: mm_default", "pointwise: relu_default"]


def test_another_shape_ends_the_epilogue():
    b = Builder()
    y = b.call(aten.mm.default, b.input(1, 4), b.input(4, 4))
    y = b.call(aten.add.Tensor, y, b.input(3, 4))
    assert summary(b.finish(y)) == ["gemm: mm_default", "pointwise: add_tensor"]


def test_of_two_products_that_meet_only_one_absorbs_the_sum():
    b = Builder()
    x = b.input(4, 4)
    first, second = b.call(aten.mm.default, x, x), b.call(aten.mm.default, x, b.input(4, 4))
    graph = fused(b.finish(b.call(aten.relu.default, b.call(aten.add.Tensor, first, second))))
    assert [len(g.nodes) for g in check_groups(graph)] == [1, 3]


def test_a_sum_with_a_value_computed_from_the_product_goes_to_the_later_one():
    b = Builder()
    x = b.input(4, 4)
    first = b.call(aten.mm.default, x, x)
    second = b.call(aten.mm.default, b.call(aten.relu.default, first), x)
    assert summary(b.finish(b.call(aten.add.Tensor, first, second))) == [
        "gemm: mm_default",
        "pointwise: relu_default",
        "gemm: mm_default_1 add_tensor",
    ]


# Rows and reductions ---------------------------------------------------------------------------


def test_a_norm_written_out_is_one_kernel_with_the_sum_before_it():
    b = Builder()
    x = b.call(aten.add.Tensor, b.input(2, 3, 8), b.input(2, 3, 8))
    mean = b.call(aten.mean.dim, b.call(aten.mul.Tensor, x, x), [-1], True)
    y = b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, b.call(aten.add.Scalar, mean, 1e-5)))
    graph = fused(b.finish(b.call(aten.mul.Tensor, y, b.constant(torch.ones(8))), x))
    (group,) = check_groups(graph)
    assert group.kind == "rows" and len(group.outputs) == 2


def test_softmax_takes_the_pointwise_operators_around_it():
    b = Builder()
    x = b.call(aten.mul.Tensor, b.input(2, 3), 0.5)
    y = b.call(aten.neg.default, b.call(aten._softmax.default, x, -1, False))
    assert summary(b.finish(y)) == ["rows: mul_tensor _softmax_default neg_default"]


def test_a_reduction_that_broadcasts_over_other_rows_is_not_fused():
    b = Builder()
    x = b.input(4, 4)
    means = b.call(aten.mean.dim, x, [-1])  # shape [4]: broadcasts along the rows, not down them
    assert summary(b.finish(b.call(aten.sub.Tensor, x, means))) == [
        "reduce: mean_dim",
        "pointwise: sub_tensor",
    ]


def test_reductions_of_different_dimensions_are_apart():
    b = Builder()
    x = b.input(3, 4)
    y = [b.call(aten.sum.dim_IntList, x, [dim], True) for dim in (0, 1)]
    assert summary(b.finish(*y)) == ["reduce: sum_dim_int_list", "reduce: sum_dim_int_list_1"]


def test_a_reduction_absorbs_private_operands_and_followers():
    b = Builder()
    x = b.input(3, 4)
    private, shared = b.call(aten.exp.default, x), b.call(aten.neg.default, x)
    total = b.call(aten.sum.dim_IntList, b.call(aten.mul.Tensor, private, shared), [0])
    result = summary(b.finish(b.call(aten.log.default, total), shared))
    assert result == [
        "pointwise: neg_default",
        "reduce: exp_default mul_tensor sum_dim_int_list log_default",
    ]


def test_parts_of_a_reduction_with_two_results_stay_with_it():
    b = Builder()
    both = b.call(aten.max.dim, b.input(3, 4), 1)
    graph = fused(b.finish(b.part(both, 0), b.part(both, 1)))
    (group,) = check_groups(graph)
    assert group.kind == "reduce" and len(group.outputs) == 2


# Pointwise, views ------------------------------------------------------------------------------


def test_pointwise_operators_merge_also_with_several_results():
    b = Builder()
    x = b.call(aten.exp.default, b.input(3, 4))
    outputs = b.call(aten.neg.default, x), b.call(aten.abs.default, x)
    assert summary(b.finish(*outputs)) == ["pointwise: exp_default neg_default abs_default"]


def test_a_broadcast_value_is_computed_apart():
    b = Builder()
    small = b.call(aten.exp.default, b.input(4))
    y = b.call(aten.add.Tensor, small, b.input(3, 4))
    assert summary(b.finish(y)) == ["pointwise: exp_default", "pointwise: add_tensor"]


def test_views_between_pointwise_operators_come_along():
    b = Builder()
    y = b.call(aten.permute.default, b.call(aten.exp.default, b.input(3, 4)), [1, 0])
    y = b.call(aten.neg.default, b.call(aten.unsqueeze.default, y, 0))
    assert len(summary(b.finish(y))) == 1


def test_a_view_that_others_read_too_stays_free():
    b = Builder()
    y = b.call(aten.permute.default, b.call(aten.exp.default, b.input(3, 4)), [1, 0])
    graph = b.finish(b.call(aten.neg.default, y), y)
    assert summary(graph) == [
        "pointwise: exp_default",
        "view: permute_default",
        "pointwise: neg_default",
    ]


def test_a_value_read_in_two_orders_is_computed_once():
    b = Builder()
    x = b.call(aten.exp.default, b.input(4, 4))
    y = b.call(aten.permute.default, x, [1, 0])
    graph = b.finish(b.call(aten.add.Tensor, x, b.call(aten.neg.default, y)))
    assert summary(graph)[0] == "pointwise: exp_default"


def test_norms_of_other_dimensions_take_what_follows_them():
    b = Builder()
    x = b.call(aten.exp.default, b.input(2, 6, 4, 4))
    y = b.call(aten.group_norm.default, x, 3)
    z = b.call(aten._softmax.default, b.call(aten.silu.default, y), 1, False)
    graph = b.finish(b.call(aten.mul.Tensor, z, b.input(2, 6, 4, 4)))
    assert summary(graph) == [
        "pointwise: exp_default",
        "rows: group_norm_default silu_default",
        "rows: _softmax_default mul_tensor",
    ]


def test_scans_take_what_is_around_them_and_no_other_rows():
    b = Builder()
    x = b.call(aten.exp.default, b.input(2, 6, 4))
    y = b.call(aten.neg.default, b.call(aten.cumsum.default, x, 1))
    graph = b.finish(b.call(aten._softmax.default, b.call(aten.cumsum.default, y, -1), -1, False))
    assert summary(graph) == [
        "rows: exp_default cumsum_default neg_default",
        "rows: cumsum_default_1",
        "rows: _softmax_default",
    ]


def test_views_of_memory_are_free_and_views_that_copy_are_kernels():
    b = Builder()
    x = b.call(aten.permute.default, b.input(2, 3, 4), [0, 2, 1])
    flat = b.call(aten.reshape.default, x, [2, 12])
    rows = b.call(aten.reshape.default, x, [2, 2, 2, 3])
    result = summary(b.finish(*(b.call(aten.logcumsumexp.default, y, 0) for y in (flat, rows))))
    assert "pointwise: reshape_default" in result
    assert "view: reshape_default_1" in result
    assert "view: permute_default" in result


def test_halves_swapped_and_negated_are_one_kernel():
    b = Builder()
    x, cos, sin = b.input(2, 8), b.input(2, 8), b.input(2, 8)
    low = b.call(aten.slice.Tensor, x, 1, 0, 4)
    high = b.call(aten.neg.default, b.call(aten.slice.Tensor, x, 1, 4, 8))
    turned = b.call(aten.mul.Tensor, b.call(aten.cat.default, [high, low], 1), sin)
    y = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, cos), turned)
    kinds = [line.split(":")[0] for line in summary(b.finish(y))]
    assert kinds == ["view", "view", "pointwise"]


def test_gathering_repeats_nothing():
    b = Builder()
    table = b.call(aten.exp.default, b.input(5, 4))
    index = b.input(20, dtype=torch.int64)
    y = b.call(aten.neg.default, b.call(aten.embedding.default, table, index))
    assert summary(b.finish(y)) == [
        "pointwise: exp_default",
        "pointwise: embedding_default neg_default",
    ]


def test_a_constant_fill_is_repeated_in_every_reader():
    b = Builder()
    x, y, fill = b.input(3), b.input(5), b.call(aten.full.default, [], 2.0)
    graph = fused(b.finish(b.call(aten.mul.Tensor, x, fill), b.call(aten.add.Tensor, y, fill)))
    groups = check_groups(graph)
    assert [[n.target for n in g.nodes] for g in groups] == [
        [aten.full.default, aten.mul.Tensor],
        [aten.full.default, aten.add.Tensor],
    ]


def _gated(alternate: bool, read_again: bool) -> fx.GraphModule:
    """silu(gate) * up, both columns of one routed product."""
    plait = torch.ops.plait
    b = Builder()
    x, index = b.input(5, 8), b.input(5, 2, dtype=torch.int64)
    route = b.call(plait.route.default, index, 4)
    offsets, order = b.part(route, 0), b.part(route, 1)
    weight = b.constant(torch.ones(4, 12, 8))
    product = b.call(plait.routed_linear.default, x, offsets, order, weight, None, False, 2, False)
    spans = ((0, 12, 2), (1, 12, 2)) if alternate else ((0, 6, 1), (6, 12, 1))
    gate, up = (b.call(aten.slice.Tensor, product, 1, *span) for span in spans)
    result = b.call(aten.mul.Tensor, b.call(aten.silu.default, gate), up)
    return b.finish(*([result, product] if read_again else [result]))


@pytest.mark.parametrize("alternate", [False, True])
def test_a_gate_is_computed_on_the_product_that_feeds_it(alternate):
    groups = summary(_gated(alternate, False))
    assert groups[-1].split()[0] == "experts:" and groups[-1].endswith("mul_tensor")
    assert not any(g.startswith("pointwise") for g in groups)


def test_a_gates_product_that_is_read_elsewhere_is_written_whole():
    kinds = [g.split(":")[0] for g in summary(_gated(False, True))]
    assert kinds.count("experts") == 1 and "pointwise" in kinds


# Concatenation, library, order -----------------------------------------------------------------


@pytest.mark.parametrize(("on", "kind"), [(True, "concat"), (False, "pointwise")])
def test_convolutions_write_into_their_concatenation(on, kind):
    b = Builder()
    x, weight = b.input(1, 3, 6, 6), b.constant(torch.ones(4, 3, 1, 1))
    branch = b.call(aten.relu.default, b.call(aten.conv2d.default, x, weight))
    y = b.call(aten.cat.default, [branch, x], 1)
    assert summary(b.finish(y), concat=on)[-1] == f"{kind}: cat_default"


def test_what_has_no_kernel_is_a_library_call_with_a_reason():
    b = Builder()
    both = b.call(aten.kthvalue.default, b.input(3), 2)
    result = FuseVertical().run(b.finish(b.part(both, 0), b.part(both, 1)))
    (group,) = check_groups(result.graph_module)
    assert group.kind == "library" and len(group.nodes) == 3
    (remark,) = result.remarks
    assert (remark.id, remark.nodes) == ("PLT-FUS-002", ("kthvalue_default",))
    assert "no lowering" in remark.reason


def test_a_write_stays_after_the_reads_before_it():
    b = Builder()
    state, x = b.constant(torch.zeros(3), "state"), b.input(3)
    old = b.call(aten.neg.default, state)
    b.call(aten.copy_.default, state, x)
    new = b.call(aten.neg.default, b.call(aten.abs.default, state))
    graph_module = b.finish(b.call(aten.add.Tensor, old, new))
    graph = fused(graph_module)
    check_groups(graph)
    assert torch.equal(graph(torch.ones(3))[0], -torch.ones(3))


def test_random_draws_stay_in_order():
    b = Builder()
    draws = [b.call(aten.rand.default, [4]) for _ in range(3)]
    total = b.call(aten.add.Tensor, draws[2], b.call(aten.mul.Tensor, draws[0], draws[1]))
    graph_module = b.finish(total)
    outputs = []
    for graph in (graph_module, fused(graph_module)):
        torch.manual_seed(0)
        outputs.append(graph()[0])
    assert torch.equal(*outputs)


def test_sizes_belong_to_no_group():
    class Dynamic(torch.nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0] * 3) + 1

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Dynamic(), (torch.ones(2, 3),), dynamic_shapes=({0: batch},), strict=False
    )
    graph_module = program.module()
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module":
            graph_module.graph.erase_node(node)
    graph = fused(graph_module)
    sizes = [n for n in graph.graph.nodes if ops.category(n) == "symbolic"]
    assert sizes and all(annotation(n).group is None for n in sizes)
    for group in check_groups(graph):
        assert not set(group.inputs) & set(sizes)


def test_remarks_tell_what_was_fused_and_what_was_too_large():
    b = Builder()
    x = b.input(3)
    for _ in range(3):
        x = b.call(aten.neg.default, x)
    remarks = FuseVertical(max_nodes=2).run(b.finish(x)).remarks
    assert [r.id for r in remarks] == ["PLT-FUS-001", "PLT-FUS-005"]


def test_a_group_of_no_node_is_refused():
    with pytest.raises(ValueError, match="max_nodes must be at least 1"):
        FuseVertical(max_nodes=0)


def test_five_thousand_nodes_take_seconds():
    import time

    b = Builder()
    x = b.input(8, 8)
    layers = [x]
    for i in range(1250):
        y = b.call(aten.mm.default, layers[-1], layers[-1 - i % 7 if i > 7 else -1])
        y = b.call(aten.relu.default, b.call(aten.add.Tensor, y, layers[max(0, i - 5)]))
        layers.append(b.call(aten.mul.Tensor, y, y))
    graph_module = b.finish(layers[-1])
    start = time.thread_time()  # others may have the machine meanwhile
    graph = Normalize().run(graph_module).graph_module
    graph = FuseVertical().run(graph).graph_module
    seconds = time.thread_time() - start
    assert len(groups_of(graph)) < 5000
    assert seconds < 20, f"{seconds:.1f} s"
