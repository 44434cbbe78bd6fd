"""Printer: a graph is Python that one can read, and run."""

# ruff: noqa: E501 - golden text is as wide as it is

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from plait.passes.annotations import KEY, Provenance, annotate, origin
from plait.passes.fuse_vertical import FuseVertical
from plait.passes.printer import describe, print_graph

from .graphs import Builder, aten, inputs_for, named, random_graphs


def run(text, graph_module, *inputs):
    scope = {}
    exec(text, scope)
    return scope["forward"](graph_module, *inputs)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_graphs())
def test_what_is_printed_computes_the_same(graph_module):
    graph_module = FuseVertical().run(graph_module).graph_module
    inputs = inputs_for(graph_module, 0)
    actual = run(print_graph(graph_module), graph_module, *inputs)
    for a, e in zip(actual, graph_module(*inputs), strict=True):
        assert torch.equal(a, e)


GOLDEN = """\
# after fuse-vertical{max_nodes=9} (1.5 ms)
import math
import torch


def forward(self, x0):
    # x0: float32[2, 3] cpu
    w = self.w                                                          # float32[3, 4] cpu
    mm_default = torch.ops.aten.mm.default(x0, w)                       # float32[2, 4] cpu | 0 gemm*
    clamp_default = torch.ops.aten.clamp.default(mm_default, 0, math.inf)  # float32[2, 4] cpu | 0 gemm, stage 2, on cuda:0, nhwc | encoder.proj model.py:7 | by normalize
    max_dim = torch.ops.aten.max.dim(clamp_default, 1)                  # (float32[2] cpu, int64[2] cpu) | 1 reduce*
    getitem = max_dim[0]                                                # float32[2] cpu | 1 reduce
    return (clamp_default, getitem, 3, None)
"""


def golden_graph():
    b = Builder()
    y = b.call(aten.mm.default, b.input(2, 3), b.constant(torch.ones(3, 4), "w"))
    y = b.call(aten.clamp.default, y, 0, math.inf)
    graph_module = b.finish(y, b.part(b.call(aten.max.dim, y, 1), 0), 3, None)
    graph_module = FuseVertical(max_nodes=9).run(graph_module).graph_module
    graph_module.meta[KEY] = Provenance("fuse-vertical{max_nodes=9}", 0.0015)
    node = named(graph_module, "clamp_default")
    annotate(node, stage=2, device="cuda:0", layout="nhwc", made_by="normalize")
    node.meta["nn_module_stack"] = {"a": ("", "M"), "b": ("encoder.proj", "Linear")}
    node.meta["stack_trace"] = (
        '  File "/home/me/model.py", line 7, in forward\n    y = self.proj(x)\n'
        '  File "/site-packages/torch/nn/modules/linear.py", line 125, in forward\n    return F\n'
    )
    return graph_module


def test_the_golden_text():
    assert print_graph(golden_graph()) == GOLDEN


def test_origins_can_be_left_out():
    text = print_graph(golden_graph(), origins=False)
    assert "model.py" not in text and "by normalize" not in text and "0 gemm*" in text


def test_origin_prefers_the_users_own_line():
    found = origin(named(golden_graph(), "clamp_default"))
    assert (found.file, found.line, found.code) == ("/home/me/model.py", 7, "y = self.proj(x)")
    assert found.module == "encoder.proj"
    assert str(origin(named(golden_graph(), "w"))) == ""


def test_attribute_paths_that_are_no_identifiers():
    module = torch.export.export(
        torch.nn.Sequential(torch.nn.Linear(2, 3)), (torch.ones(1, 2),), strict=False
    ).module()
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            module.graph.erase_node(node)
    text = print_graph(module)
    assert "getattr(self, '0').weight" in text
    torch.testing.assert_close(run(text, module, torch.ones(1, 2))[0], module(torch.ones(1, 2)))


def test_numbers_that_have_no_literal_are_run_as_they_are():
    b = Builder()
    x = b.input(2)
    y = [b.call(aten.add.Tensor, x, v) for v in (math.inf, -math.inf, math.nan, -0.0)]
    z = b.call(aten._to_copy.default, x, dtype=torch.float64, device=torch.device("cpu"))
    graph_module = b.finish(*y, z)
    inputs = inputs_for(graph_module, 0)
    for a, e in zip(
        run(print_graph(graph_module), graph_module, *inputs), graph_module(*inputs), strict=True
    ):
        torch.testing.assert_close(a, e, equal_nan=True)


def test_sizes_and_branches_of_control_flow_are_shown():
    class Branching(torch.nn.Module):
        def forward(self, x):
            n = x.shape[0] * 2
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)).reshape(n)

    x = torch.ones(3, 2)
    program = torch.export.export(
        Branching(), (x,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False
    )
    module = program.module()
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            module.graph.erase_node(node)
    text = print_graph(module)
    assert "# self.true_graph_0:" in text and "torch.ops.higher_order.cond(" in text
    assert "SymInt " in text and "import operator\n" in text
    torch.testing.assert_close(run(text, module, x)[0], module(x))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(2, 3, dtype=torch.bfloat16), "bfloat16[2, 3] cpu"),
        ((torch.empty(()), None), "(float32[] cpu, )"),
        (None, ""),
        (3, "int"),
    ],
)
def test_values_in_short(value, text):
    assert describe(value) == text


def test_a_part_of_a_tuple_reads_as_an_index():
    b = Builder()
    both = b.call(aten.split.Tensor, b.input(2), 1)
    assert "getitem = split_tensor[1]  " in print_graph(b.finish(b.part(both, 1)))
