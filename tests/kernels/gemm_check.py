"""Builds groups around matrix products and compares their kernels with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from plait.kernels import packing
from plait.kernels.abi import TensorArg, contiguous_strides
from plait.kernels.group import HALF, Group
from plait.kernels.target import host
from plait.kernels.templates import gemm

from .harness import Batch

MATRIX = tuple(gemm.ANCHORS)


@dataclass
class Case:
    """A function of ``tensors``; those numbered in ``const`` are weights.

    ``dynamic`` maps a tensor's number to the dimensions that are symbols; the kernel is then also
    called with ``others``, further lists of tensors.
    """

    name: str
    function: Callable[..., Any]
    tensors: Sequence[torch.Tensor]
    const: Sequence[int] = ()
    dynamic: dict[int, tuple[int, ...]] = field(default_factory=dict)
    others: Sequence[Sequence[torch.Tensor]] = ()
    out_strides: Callable[[tuple[Any, ...]], tuple[Any, ...]] = contiguous_strides
    config: dict[str, int] | int = 0  # or which candidate


def odd_blocks(depth: int) -> list[dict[str, int]]:
    """Configurations that no cost model would choose, the last with a block of ``depth`` steps."""
    return [
        {"ri": 3, "nv": 2, "mc": 12, "kc": 16},
        {"ri": 5, "nv": 1, "mc": 5, "kc": 7},
        {"ri": 1, "nv": 4, "mc": 1, "kc": 1},
        {"ri": 6, "nv": 4, "mc": 66, "kc": depth},
    ]


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def trace(case: Case) -> tuple[Group, dict[fx.Node, TensorArg]]:
    """The group of a case's function, and its tensors as they lie in memory."""
    auto = torch.export.Dim.AUTO
    shapes = tuple(
        dict.fromkeys(case.dynamic.get(i, ()), auto) if t.dim() else None
        for i, t in enumerate(case.tensors)
    )
    program = torch.export.export(
        _Module(case.function),
        tuple(case.tensors),
        dynamic_shapes=(shapes,) if case.dynamic else None,
        strict=False,
    )
    nodes = program.graph_module.graph.nodes
    inputs = [n for n in nodes if n.op == "placeholder"]
    (result,) = (n.args[0] for n in nodes if n.op == "output")
    outputs = list(dict.fromkeys(result))
    work = [
        n for n in nodes
        if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)
    ]  # fmt: skip
    io = {}
    for i, n in enumerate(inputs):
        value = n.meta["val"]
        strides = case.tensors[i].stride()
        if i in case.dynamic:
            strides = tuple(_dim(s) for s in value.stride())
        shape = tuple(_dim(s) for s in value.shape)
        io[n] = TensorArg(value.dtype, shape, strides, const=i in case.const)
    for n in outputs:
        shape = tuple(_dim(s) for s in n.meta["val"].shape)
        io[n] = TensorArg(n.meta["val"].dtype, shape, case.out_strides(shape))
    anchor = next(n for n in work if n.target in MATRIX)
    return Group("gemm", tuple(work), tuple(inputs), tuple(outputs), anchor), io


def _dim(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def lower(case: Case, name: str = "kernel") -> tuple[Any, Group]:
    group, io = trace(case)
    config = case.config
    if isinstance(config, int):
        choices = gemm.candidates(group, io, host())
        config = choices[config % len(choices)]
    return gemm.lower(group, io, host(), config, name), group


def symbols_of(group: Group, kernel: Any, tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    found = {}
    for node, tensor in zip(group.inputs, tensors, strict=True):
        for size, real in zip(node.meta["val"].shape, tensor.shape, strict=True):
            if not isinstance(size, int) and _dim(size).is_Symbol:
                found[str(_dim(size))] = real
    return {s: found[s] for s in kernel.symbols}


def check(cases: Sequence[Case]) -> None:
    """Compiles all cases in one library and compares each with float64."""
    jobs = []
    for i, case in enumerate(cases):
        try:
            jobs.append((case, *lower(case, f"kernel{i}")))
        except Exception as error:
            raise AssertionError(f"{case.name}: {error}") from error
    batch = Batch([kernel for _, kernel, _ in jobs])
    for case, kernel, group in jobs:
        for tensors in (case.tensors, *case.others):
            symbols = symbols_of(group, kernel, tensors)
            results = []
            for splits in (1, 4):
                got = batch.run(kernel.name, tensors, symbols, splits, packing.apply)
                results.append(got)
            where = f"{case.name} {[tuple(t.shape) for t in tensors]} {kernel.config}"
            for one, two in zip(*results, strict=True):
                assert torch.equal(_bits(one), _bits(two)), f"{where}: depends on the task ranges"
            compare(case.function, tensors, results[0], where)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    kinds = {torch.float32: torch.int32, **dict.fromkeys(HALF, torch.int16)}
    tensor = tensor.contiguous()
    return tensor.view(kinds[tensor.dtype]) if tensor.dtype in kinds else tensor


def compare(
    function: Callable[..., Any], tensors: Sequence[torch.Tensor],
    got: Sequence[torch.Tensor], where: str,
) -> None:  # fmt: skip
    """No worse than twice torch's own error, measured against float64."""

    def results(*args: torch.Tensor) -> list[torch.Tensor]:
        out = function(*args)
        return list(out) if isinstance(out, tuple) else [out]

    torchs = results(*tensors)
    exact = results(*(t.double() if t.is_floating_point() else t for t in tensors))
    for mine, theirs, true in zip(got, torchs, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, where
        if not mine.numel():
            continue
        finite = torch.isfinite(theirs)
        special = torch.nan_to_num(theirs[~finite].float(), 7.0)
        assert torch.equal(torch.nan_to_num(mine[~finite].float(), 7.0), special), where
        if not finite.any():
            continue
        size = true[finite].abs().max()
        error = (mine[finite].double() - true[finite]).abs().max()
        floor = torch.finfo(mine.dtype).eps * size * (4 if mine.dtype == torch.float32 else 1)
        allowed = 2 * max((theirs[finite].double() - true[finite]).abs().max(), floor)
        assert error <= allowed, f"{where}: error {error:.3g} of {allowed:.3g}"


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)
