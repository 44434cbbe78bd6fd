"""Verifier: a broken graph is refused, and the message says how it is broken."""

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings

from plait.passes.annotations import KEY, annotate
from plait.passes.fuse_vertical import FuseVertical
from plait.passes.verifier import InvalidGraph, verify

from .graphs import Builder, aten, named, random_graphs


def simple():
    b = Builder()
    x = b.call(aten.relu.default, b.input(2, 3))
    return b.finish(b.call(aten.mm.default, x, b.constant(torch.ones(3, 4), "w")))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_graphs())
def test_captured_and_fused_graphs_are_valid(graph_module):
    verify(graph_module, "full")
    verify(FuseVertical().run(graph_module).graph_module, "full")


def missing_value(g):
    del named(g, "relu_default").meta["val"]


def wrong_annotation(g):
    named(g, "relu_default").meta[KEY] = {"group": 1}


def partly_grouped(g):
    annotate(named(g, "relu_default"), group=0, kind="pointwise")


def two_kinds(g):
    annotate(named(g, "relu_default"), group=0, kind="pointwise")
    annotate(named(g, "mm_default"), group=0, kind="gemm")


def two_anchors(g):
    for name in ("relu_default", "mm_default"):
        annotate(named(g, name), group=0, kind="gemm", anchor=True)


def missing_attribute(g):
    del g.w


def other_attribute(g):
    g.w = torch.ones(3, 5)


def reader_before_writer(g):
    named(g, "relu_default").prepend(named(g, "mm_default"))


def a_method(g):
    with g.graph.inserting_after(named(g, "relu_default")):
        g.graph.call_method("relu", (named(g, "relu_default"),))


BROKEN = [
    (missing_value, 'relu_default: meta["val"] is missing'),
    (wrong_annotation, "relu_default: meta['plait'] is a dict, not an Annotation"),
    (partly_grouped, "mm_default: in no group, although the graph has groups"),
    (two_kinds, "nodes of one group differ in kind: relu_default, mm_default"),
    (two_anchors, "group 0 has 2 anchors"),
    (missing_attribute, "w"),
    (other_attribute, "attribute w has shape [3, 5], claimed is [3, 4]"),
    (reader_before_writer, "used before it has been defined"),
    (a_method, "call_method nodes are not allowed"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_broken_structure_is_explained(damage, message):
    graph_module = simple()
    damage(graph_module)
    with pytest.raises(InvalidGraph) as caught:
        verify(graph_module, where="after damage")
    assert message in str(caught.value)
    assert str(caught.value).startswith("invalid graph after damage:\n")
    verify(graph_module, "off")


def test_groups_that_need_each_other_are_named():
    b = Builder()
    x = b.call(aten.relu.default, b.input(3))
    y = b.call(aten.neg.default, x)
    graph_module = b.finish(b.call(aten.add.Tensor, x, y))
    for name, group in (("relu_default", 0), ("neg_default", 1), ("add_tensor", 0)):
        annotate(named(graph_module, name), group=group, kind="pointwise")
    with pytest.raises(InvalidGraph, match="need each other in a cycle"):
        verify(graph_module)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.empty(2, 4, dtype=torch.float64), "has dtype torch.float32, claimed is"),
        (torch.empty(4, 2), r"has shape \[2, 4\], claimed is \[4, 2\]"),
        ((torch.empty(2, 4), torch.empty(1)), "has 2 values, the operator makes 1"),
        (3, "is a int, not FakeTensor"),
    ],
)
def test_full_verification_finds_wrong_values(value, message):
    graph_module = simple()
    named(graph_module, "mm_default").meta["val"] = value
    verify(graph_module)
    with pytest.raises(InvalidGraph, match=message):
        verify(graph_module, "full")


def test_full_verification_finds_operators_that_reject_their_arguments():
    graph_module = simple()
    named(graph_module, "mm_default").args = (named(graph_module, "w"),) * 2
    with pytest.raises(InvalidGraph, match="mm.default rejects its arguments"):
        verify(graph_module, "full")


def test_many_problems_are_cut_short_in_the_message_only():
    b = Builder()
    x = b.input(3)
    for _ in range(30):
        x = b.call(aten.neg.default, x)
    graph_module = b.finish(x)
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(InvalidGraph) as caught:
        verify(graph_module)
    assert len(caught.value.problems) == 31
    assert str(caught.value).endswith("and 21 more")


def test_branches_are_verified_too():
    def broken(x):
        return (x.relu(),)

    outer = simple()
    outer.branch = fx.symbolic_trace(broken)
    with outer.graph.inserting_before(named(outer, "relu_default")):
        outer.graph.get_attr("branch")
    with pytest.raises(InvalidGraph, match="in branch: "):
        verify(outer)
