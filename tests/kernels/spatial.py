"""Builds groups around convolution and pooling nodes and judges kernels made from them.

Tensors lie in memory as the compiler lays them: NHWC strides inside a larger buffer whose halo is
zero and whose other channels belong to someone else (NaN here, so that reading them shows).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from plait.kernels import packing
from plait.kernels.abi import Dim, Kernel, TensorArg, contiguous_strides
from plait.kernels.group import Group
from plait.kernels.ops import category
from plait.kernels.target import host
from plait.kernels.templates import conv

from .harness import Batch

Halo = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """NHWC with ``halo`` (per spatial dimension) in a buffer of ``extra`` channels more, of which
    ``skip`` come first; or plain row-major."""

    halo: Halo = ()
    skip: int = 0
    extra: int = 0
    plain: bool = False


def dims(shape: Sequence[Any]) -> tuple[Dim, ...]:
    """Sizes of a fake tensor as ints and sympy expressions."""
    return tuple(d if isinstance(d, int) else d.node.expr for d in shape)


def arg(shape: Sequence[Dim], layout: Layout, dtype: torch.dtype = torch.float32) -> TensorArg:
    """The argument that describes a tensor of ``shape`` laid out so."""
    if layout.plain:
        return TensorArg(dtype, tuple(shape), contiguous_strides(tuple(shape)))
    spatial = shape[2:]
    halo = layout.halo or ((0, 0),) * len(spatial)
    padded = tuple(d + a + b for d, (a, b) in zip(spatial, halo, strict=True))
    n, *rest = contiguous_strides((shape[0], *padded, shape[1] + layout.extra))
    return TensorArg(dtype, tuple(shape), (n, 1, *rest[:-1]), ((0, 0), (0, 0), *halo))


def lay(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``tensor`` copied into memory as ``layout`` says."""
    if layout.plain:
        return tensor.contiguous()
    n, c, *spatial = tensor.shape
    halo = layout.halo or ((0, 0),) * len(spatial)
    padded = [d + a + b for d, (a, b) in zip(spatial, halo, strict=True)]
    buffer = torch.full((n, *padded, c + layout.extra), math.nan, dtype=tensor.dtype)
    view = buffer.movedim(-1, 1)[:, layout.skip : layout.skip + c]
    view.zero_()
    for d, (a, _) in enumerate(halo):
        view = view.narrow(d + 2, a, spatial[d])
    view.copy_(tensor)
    return view


@dataclass
class Case:
    """A function of tensors around one convolution or pooling, and how its tensors lie.

    ``const`` numbers the tensors that are weights; ``layouts`` maps others to their layout.
    """

    label: str
    function: Callable[..., Any]
    tensors: list[torch.Tensor]
    layouts: dict[int, Layout] = field(default_factory=dict)
    const: tuple[int, ...] = ()
    out: Layout = Layout()
    symbolic: bool = False

    def _fakes(self) -> list[torch.Tensor]:
        """Fake tensors: all sizes but the channels are symbols where ``symbolic``."""
        mode = FakeTensorMode(shape_env=ShapeEnv())
        made = []
        for i, tensor in enumerate(self.tensors):
            free = self.symbolic and i not in self.const
            sizes = [
                DimDynamic.DYNAMIC if free and d != 1 else DimDynamic.STATIC
                for d in range(tensor.dim())
            ]
            context = StatelessSymbolicContext(dynamic_sizes=sizes)
            made.append(mode.from_tensor(tensor, symbolic_context=context))
        return made

    def trace(self) -> tuple[fx.GraphModule, Group, dict[fx.Node, TensorArg]]:
        """The graph, its one group, and the arguments of the group's inputs and outputs."""
        fakes = self._fakes()
        module = make_fx(self.function, tracing_mode="real", pre_dispatch=True)(*fakes)
        graph = module.graph
        graph.eliminate_dead_code()
        inputs = tuple(n for n in graph.nodes if n.op == "placeholder")
        nodes = tuple(
            n for n in graph.nodes if n.op == "call_function" and category(n) != "symbolic"
        )
        heavy = [n for n in nodes if n.target is not operator.getitem]
        (anchor,) = (n for n in heavy if category(n) in ("conv", "pool"))
        results = graph.output_node().args[0]
        outputs = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        group = Group(category(anchor), nodes, inputs, outputs, anchor)
        io: dict[fx.Node, TensorArg] = {}
        for i, node in enumerate(inputs):
            value = node.meta["val"]
            if i in self.const:
                shape = tuple(self.tensors[i].shape)
                io[node] = TensorArg(value.dtype, shape, contiguous_strides(shape), const=True)
            else:
                default = Layout(plain=value.dim() < 3)
                layout = self.layouts.get(i, default)
                io[node] = arg(dims(value.shape), layout, value.dtype)
        for node in outputs:
            value = node.meta["val"]
            layout = self.out if value.dim() > 2 else Layout(plain=True)
            io[node] = arg(dims(value.shape), layout, value.dtype)
        return module, group, io


def symbol_values(case: Case, group: Group) -> dict[str, int]:
    """The values that the case's tensors give to the shape symbols."""
    found: dict[str, int] = {}
    for node, tensor in zip(group.inputs, case.tensors, strict=True):
        for dim, size in zip(dims(node.meta["val"].shape), tensor.shape, strict=True):
            if not isinstance(dim, int) and dim.is_Symbol:
                found[str(dim)] = size
    return found


def check(
    cases: Sequence[Case], template: Any, every: bool = False, slack: float = 2.0
) -> list[Kernel]:
    """Runs the first (or ``every``) candidate of each case and compares with float64.

    A kernel may be ``slack`` times as far from the float64 result as torch's own, and a rounding
    error more.
    """
    jobs = []
    for number, case in enumerate(cases):
        _, group, io = case.trace()
        configs = template.candidates(group, io, host())
        assert 1 <= len(configs) <= 6
        for i, config in enumerate(configs if every else configs[:1]):
            name = f"k{number}_{i}"
            jobs.append((case, group, template.lower(group, io, host(), config, name)))
    batch = Batch([kernel for *_, kernel in jobs])
    for case, group, kernel in jobs:
        held = [
            t if i in case.const else lay(t, case.layouts.get(i, Layout(plain=t.dim() < 3)))
            for i, t in enumerate(case.tensors)
        ]
        symbols = symbol_values(case, group)
        symbols = {s: symbols[s] for s in kernel.symbols}
        results = batch.run(kernel.name, held, symbols, packer=packing.apply)
        label = f"{case.label} {kernel.config}"
        exact = _outputs(case.function(*(_wide(t) for t in case.tensors)))
        own = _outputs(case.function(*case.tensors))
        for result, want, torchs in zip(results, exact, own, strict=True):
            assert result.dtype == torchs.dtype, label
            _compare(result, want, torchs, slack, label)
    return [kernel for *_, kernel in jobs]


def _outputs(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _compare(
    result: torch.Tensor, want: torch.Tensor, torchs: torch.Tensor, slack: float, label: str
) -> None:
    assert result.shape == want.shape, label
    special = ~want.isfinite()
    torch.testing.assert_close(
        result.double()[special],
        want.double()[special],
        equal_nan=True,
        msg=lambda m: f"{label}: {m}",
    )
    if special.all():
        return
    error = (result.double() - want)[~special].abs().max().item()
    reference = (torchs.double() - want)[~special].abs().max().item()
    size = want[~special].abs().max().item()
    allowed = slack * reference + torch.finfo(result.dtype).eps * max(size, 1e-30)
    assert error <= allowed, f"{label}: error {error:.2e}, torch {reference:.2e}"


NHWC = Layout()


def case(
    n: int, c: int, oc: int, kernel: tuple[int, ...], size: tuple[int, ...], *,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, bias: bool = True,
    halo: bool = True, layout: Layout | None = None, out: Layout = NHWC,
    label: str = "", symbolic: bool = False,
) -> Case:  # fmt: skip
    """A convolution alone; with ``halo`` its input has all the zeros around it that it reads."""
    torch.manual_seed(0)
    x = torch.randn(n, c, *size)
    weight = torch.randn(oc, c // groups, *kernel) / (c // groups * math.prod(kernel)) ** 0.5
    tensors = [x, weight, torch.randn(oc)] if bias else [x, weight]

    def function(*args: torch.Tensor) -> torch.Tensor:
        x, w, b = args if bias else (*args, None)
        convolve = F.conv2d if len(size) == 2 else F.conv1d
        return convolve(x, w, b, stride, padding, dilation, groups)

    made = Case(label, function, tensors, {}, (1, 2) if bias else (1,), out, symbolic)
    if layout is None:
        layout = NHWC
        if halo:
            layout = Layout(conv.required_halo(made.trace()[1].anchor)[2:])
    made.layouts[0] = layout
    text = f"{n}x{c}->{oc} k{kernel} {size} s{stride} p{padding} d{dilation} g{groups} {layout}"
    made.label = f"{label} {text}"
    return made
