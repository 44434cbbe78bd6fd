"""Small ATen graphs for tests, written by hand or drawn at random."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from plait.passes.ir import fake_result
from plait.passes.normalize import Normalize
from plait.passes.verifier import verify

aten = torch.ops.aten


class Builder:
    """Writes a graph node by node, as capture would: flat, with fake tensors in ``meta["val"]``."""

    def __init__(self) -> None:
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._constants = 0

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def constant(self, tensor: torch.Tensor, name: str = "") -> fx.Node:
        name = name or f"c{self._constants}"
        self._constants += 1
        self.root.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_result(node, self.mode)
        return node

    def part(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def finish(self, *outputs: Any) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(self.root, self.graph)


def targets(graph_module: fx.GraphModule) -> list[Any]:
    """The functions that a graph calls, in order."""
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def named(graph_module: fx.GraphModule, name: str) -> fx.Node:
    """The node of this name."""
    return next(node for node in graph_module.graph.nodes if node.name == name)


def normalized(graph_module, **options):
    """The graph after `normalize`; the one before is checked to be left as it was."""
    before = str(graph_module.graph), copy.copy(graph_module._buffers)
    result = Normalize(**options).run(graph_module).graph_module
    assert (str(graph_module.graph), graph_module._buffers) == before
    verify(result, "full")
    return result


def captured(module, x, decompose=True, dynamic_shapes=None):
    """The flat graph that torch.export makes of a module."""
    program = torch.export.export(module, (x,), dynamic_shapes=dynamic_shapes, strict=False)
    program = program.run_decompositions({}) if decompose else program
    graph_module = program.module()
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module":
            graph_module.graph.erase_node(node)
    return graph_module


SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, 3.5)


def inputs_for(graph_module: fx.GraphModule, seed: int, special: bool = False) -> list[Any]:
    """Random inputs; ``special`` sprinkles NaN, infinities and signed zeros over them."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            tensor = torch.randn(value.shape, dtype=torch.float64, generator=generator)
            if special and tensor.numel():
                flat = tensor.view(-1)
                for k, number in enumerate(SPECIAL):
                    flat[(seed + 5 * k) % len(flat)] = number
            result.append(tensor.to(value.dtype))
    return result


UNARY = (
    lambda b, x: b.call(aten.relu.default, x),
    lambda b, x: b.call(aten.neg.default, x),
    lambda b, x: b.call(aten.sigmoid.default, x),
    lambda b, x: b.call(aten.mul.Tensor, x, 1),
    lambda b, x: b.call(aten.add.Tensor, x, 0.0),
    lambda b, x: b.call(aten.add.Tensor, x, -0.0),
    lambda b, x: b.call(aten.sub.Tensor, x, 0),
    lambda b, x: b.call(aten.clone.default, x),
    lambda b, x: b.call(aten.detach.default, x),
    lambda b, x: b.call(aten.dropout.default, x, 0.5, False),
    lambda b, x: b.call(aten.masked_fill.Scalar, x, b.call(aten.gt.Scalar, x, 1), 0.5),
    lambda b, x: b.call(aten.add.Tensor, x, b.call(aten.full.default, [], 2.0, dtype=x_dtype(x))),
)
VIEWS = (
    lambda b, x: b.call(aten.reshape.default, x, [-1]),
    lambda b, x: b.call(aten.transpose.int, x, 0, -1),
    lambda b, x: b.call(aten.unsqueeze.default, x, 0),
    lambda b, x: b.call(aten.slice.Tensor, x, 0, 0, 1),
    lambda b, x: b.call(aten.flip.default, x, [0]),
    lambda b, x: b.part(b.call(aten.split.Tensor, x, 1, 0), 0),
    lambda b, x: b.part(b.call(aten.unbind.int, x, -1), -1),
    lambda b, x: b.call(aten.clone.default, b.call(aten.transpose.int, x, 0, -1)),
)


def assert_same_bits(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Equal including the sign of zeros; all NaN are equal."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
        if a.is_floating_point():
            there = ~a.isnan()
            assert torch.equal(a.signbit() & there, e.signbit() & there)


def x_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of a node's value."""
    return node.meta["val"].dtype


ROWS = (
    lambda b, x: b.call(aten._softmax.default, x, -1, False),
    lambda b, x: b.call(aten.mean.dim, x, [-1], True),
    lambda b, x: b.call(aten.sum.dim_IntList, x, [0]),
    lambda b, x: b.call(aten.amax.default, x, [-1], False),
    lambda b, x: b.call(aten.layer_norm.default, x, [x.meta["val"].shape[-1]]),
    lambda b, x: b.call(aten.logcumsumexp.default, x, 0),
)


@st.composite
def random_graphs(draw: Any, dtype: torch.dtype = torch.float64) -> fx.GraphModule:
    """Graphs of pointwise operators, views, products, convolutions and reductions."""
    b = Builder()
    shapes = ((3, 4), (2, 3, 4), (1, 2, 5, 5), (4,))
    pool = [b.input(*draw(st.sampled_from(shapes)), dtype=dtype) for _ in range(2)]
    pool.append(b.constant(torch.randn(3, 4, dtype=dtype, generator=torch.manual_seed(0))))
    for step in range(draw(st.integers(1, 14))):
        x = pool[draw(st.integers(0, len(pool) - 1))]
        rank = x.meta["val"].dim()
        kind = draw(st.sampled_from(("unary", "binary", "view", "rows", "heavy", "cat")))
        if kind == "unary":
            pool.append(draw(st.sampled_from(UNARY))(b, x))
        elif kind == "binary":
            y = pool[draw(st.integers(0, len(pool) - 1))]
            shape, other = x.meta["val"].shape, y.meta["val"].shape
            fits = all(
                m == n or 1 in (m, n) for m, n in zip(shape[::-1], other[::-1], strict=False)
            )
            if fits and x.meta["val"].numel() < 1000:
                pool.append(b.call(draw(st.sampled_from((aten.add.Tensor, aten.mul.Tensor))), x, y))
        elif kind == "view" and rank and rank < 5:
            pool.append(draw(st.sampled_from(VIEWS))(b, x))
        elif kind == "rows" and rank:
            pool.append(draw(st.sampled_from(ROWS))(b, x))
        elif kind == "heavy" and rank:
            pool.append(_heavy(b, x, step, dtype))
        elif kind == "cat" and rank:
            pool.append(b.call(aten.cat.default, [x, x], 0))
    calls = [node for node in pool if node.op == "call_function"] or pool[:1]
    count = draw(st.integers(1, min(3, len(calls))))
    return b.finish(*calls[-count:])


def _heavy(b: Builder, x: fx.Node, seed: int, dtype: torch.dtype) -> fx.Node:
    shape = x.meta["val"].shape
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 4 and shape[2] >= 3 and shape[3] >= 3:
        weight = torch.randn(4, shape[1], 3, 3, dtype=dtype, generator=generator)
        return b.call(aten.conv2d.default, x, b.constant(weight), None, [1, 1], [1, 1])
    weight = torch.randn(3, shape[-1], dtype=dtype, generator=generator)
    return b.call(aten.linear.default, x, b.constant(weight))
