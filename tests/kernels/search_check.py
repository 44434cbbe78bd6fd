"""Groups, memory and references for the tests of schedule search and tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from plait.kernels import packing
from plait.kernels.abi import Kernel, TensorArg
from plait.kernels.group import Group
from plait.kernels.metaschedule import Bench
from plait.kernels.race import Candidate

aten = torch.ops.aten
ANCHORS = (aten.linear.default, aten.mm.default, aten.bmm.default, aten.conv2d.default)


@dataclass
class Problem:
    """A group with tensors in the memory that its arguments describe."""

    group: Group
    io: dict[fx.Node, TensorArg]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    expected: list[torch.Tensor]
    function: Callable[..., Any]

    def candidate(self, kernel: Kernel, address: int) -> Candidate:
        packs = kernel.packs or (None,) * len(self.inputs)
        held = [
            packing.apply(pack, t) if pack else t
            for pack, t in zip(packs, self.inputs, strict=True)
        ]
        words = [t.data_ptr() for t in (*held, *self.outputs)]
        assert isinstance(kernel.tasks, int)
        size = float(sum(t.nbytes for t in held))
        return Candidate.kernel(
            kernel.name, address, kernel.tasks, words, kernel.config, size, held
        )

    def check(self) -> float:
        errors = [
            (have.double() - want).abs().max() / want.abs().max()
            for have, want in zip(self.outputs, self.expected, strict=True)
        ]
        return float(torch.stack(errors).max())  # NaN if any is

    def reset(self) -> None:
        for tensor in self.outputs:
            tensor.fill_(float("nan"))

    def bench(self) -> Bench:
        return Bench(self.candidate, self.check, self.reset, 1e-5)


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def problem(
    kind: str,
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    const: Sequence[int] = (),
    halo: int = 0,
    nhwc: bool = False,
    wider: int = 0,
) -> Problem:
    """A group of ``function``.

    With ``nhwc`` its first input and its output are images in that layout, the input with ``halo``
    zeros around it, the output a slice of a buffer with ``wider`` more channels.
    """
    torch.manual_seed(0)
    tensors = list(tensors)
    graph = torch.export.export(_Module(function), tuple(tensors), strict=False).graph
    nodes = tuple(n for n in graph.nodes if n.op == "call_function")
    inputs = tuple(n for n in graph.nodes if n.op == "placeholder")
    outputs = tuple(graph.find_nodes(op="output")[0].args[0])
    anchor = next((n for n in nodes if n.target in ANCHORS), None)
    expected = function(*(t.double() if t.is_floating_point() else t for t in tensors))
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    dtype = tensors[0].dtype
    results = [
        torch.empty(e.shape, dtype=dtype if e.is_floating_point() else e.dtype) for e in expected
    ]
    io: dict[fx.Node, TensorArg] = {}
    if nhwc:
        n, c, h, w = tensors[0].shape
        padded = torch.zeros(n, h + 2 * halo, w + 2 * halo, c, dtype=dtype)
        image = padded[:, halo : halo + h, halo : halo + w].permute(0, 3, 1, 2)
        tensors[0] = image.copy_(tensors[0])
        n, c, h, w = results[0].shape
        size = n * h * w * (c + wider)
        buffer = torch.zeros(size + wider, dtype=dtype)[:size].view(
            n, h, w, c + wider
        )  # room to shift a view
        results[0] = buffer[..., wider // 2 :][..., :c].permute(0, 3, 1, 2)
        around = ((0, 0), (0, 0), (halo, halo), (halo, halo))
        shape, strides = tuple(tensors[0].shape), tuple(tensors[0].stride())
        io[inputs[0]] = TensorArg(dtype, shape, strides, around)
    for i, (node, t) in enumerate(zip(inputs, tensors, strict=True)):
        arg = TensorArg(t.dtype, tuple(t.shape), tuple(t.stride()), const=i in const)
        io.setdefault(node, arg)
    for node, t in zip(outputs, results, strict=True):
        io[node] = TensorArg(t.dtype, tuple(t.shape), tuple(t.stride()))
    group = Group(kind, nodes, inputs, outputs, anchor)
    return Problem(group, io, tensors, results, expected, function)


def linear(m: int = 32, k: int = 64, n: int = 128, dtype: torch.dtype = torch.float32) -> Problem:
    """relu(x @ w.T + b)."""
    return problem(
        "gemm",
        lambda x, w, b: aten.relu.default(aten.linear.default(x, w, b)),
        [torch.randn(*shape).to(dtype) for shape in ((m, k), (n, k), (n,))],
        const=(1, 2),
    )
