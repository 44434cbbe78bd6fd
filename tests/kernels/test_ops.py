"""Every converter gives what torch gives, on torch's own sample inputs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from trace import group_for, outputs_of, tensor_arg, trace
from typing import Any

import pytest
import torch
from harness import Batch
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from plait.kernels.abi import Kernel
from plait.kernels.ops import CATEGORY, category, library_reason
from plait.kernels.target import host
from plait.kernels.templates import pointwise

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
SAMPLES = {torch.float32: 8, torch.bfloat16: 3, torch.int64: 3, torch.bool: 2}
seen: set[str] = set()


def sample_calls(op: Any, dtype: torch.dtype) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """(function of the tensors, tensors) for some of an OpInfo's samples, strided ones too."""
    samples = list(op.sample_inputs("cpu", dtype))
    step = max(1, len(samples) // SAMPLES[dtype])
    for i, sample in enumerate(samples[::step][: SAMPLES[dtype]]):
        if i % 3 == 1:
            sample = sample.noncontiguous()
        flat, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        places = [j for j, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]

        def function(*tensors, flat=flat, spec=spec, places=places):
            leaves = list(flat)
            for j, tensor in zip(places, tensors, strict=True):
                leaves[j] = tensor
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            return op.op(*args, **kwargs)

        yield function, [flat[j].detach() for j in places]


@dataclass
class Case:
    """A kernel, its inputs, and what torch makes of them, also in float64 where that exists."""

    kernel: Kernel
    inputs: list[torch.Tensor]
    want: torch.Tensor
    exact: torch.Tensor | None


def lowered(function, tensors, name) -> list[Case] | str:
    """One case for each result of a call, or the reason why it is not all kernels of ours."""
    try:
        module = trace(function, tensors)
    except (GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound):
        return "sizes are data"
    for node in module.graph.nodes:
        if node.op == "call_function" and category(node) not in ("pointwise", "view"):
            return library_reason(node) or category(node)
    expected = dict(zip(_returned(module), _results(function, tensors), strict=True))
    exact = {}
    if any(t.dtype == torch.bfloat16 for t in tensors):
        wide = [t.double() if t.dtype == torch.bfloat16 else t for t in tensors]
        exact = dict(zip(expected, _results(function, wide), strict=True))
    given = dict(zip(module.graph.find_nodes(op="placeholder"), tensors, strict=True))
    given |= {n: getattr(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    found = []
    for i, out in enumerate(outputs_of(module)):
        if out.op != "call_function":
            continue
        group = group_for([out])
        io = {n: tensor_arg(given[n]) for n in group.inputs}
        io[out] = tensor_arg(torch.empty(out.meta["val"].shape, dtype=out.meta["val"].dtype))
        # Every other kernel is cut into many small tasks.
        config = {"grain": 256} if len(name) % 2 else pointwise.candidates(group, io, host())[0]
        kernel = pointwise.lower(group, io, host(), config, f"{name}_{i}")
        seen.update(str(n.target) for n in group.nodes)
        inputs = [given[n] for n in group.inputs]
        found.append(Case(kernel, inputs, expected[out], exact.get(out)))
    return found


def _results(function, tensors) -> list[Any]:
    return pytree.tree_leaves(function(*(t.clone() for t in tensors)))


def _returned(module):
    (output,) = module.graph.find_nodes(op="output")
    return pytree.tree_leaves(output.args[0])


def check(cases: list[Case]) -> None:
    """Compiles kernels together, runs each, and compares with torch.

    torch rounds some steps of bfloat16 operators that kernels do not: being as near to the float64
    result as torch ought to be is right as well.
    """
    batch = Batch([case.kernel for case in cases])
    for case in cases:
        (got,) = batch.run(case.kernel.name, case.inputs)
        close = functools.partial(torch.testing.assert_close, got, equal_nan=True)
        try:
            close(case.want, check_stride=False)
        except AssertionError as error:
            if case.exact is None or case.exact.dtype != torch.float64:
                raise AssertionError(f"{case.kernel.name}: {error}") from error
            close(case.exact.to(got.dtype), check_stride=False)


def _wanted() -> list[Any]:
    names = {n.split(".")[1] for n, kind in CATEGORY.items() if kind in ("pointwise", "view")}

    def matches(op) -> bool:
        return bool(
            {op.name, op.aten_name, op.name.split(".")[-1], *(a.name for a in op.aliases)} & names
        )

    return [op for op in op_db if matches(op)]


@pytest.mark.parametrize(
    "op", _wanted(), ids=lambda op: f"{op.name}-{op.variant_test_name}".strip("-")
)
def test_opinfo(op) -> None:
    cases, reasons = [], []
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in DTYPES:
            if dtype not in op.supported_dtypes("cpu"):
                continue
            for i, (function, tensors) in enumerate(sample_calls(op, dtype)):
                name = f"k{len(cases)}_{i}_{str(dtype)[6:]}"
                result = lowered(function, tensors, name)
                if isinstance(result, str):
                    reasons.append(result)
                else:
                    cases.extend(result)
    if not cases:
        pytest.skip("; ".join(sorted(set(reasons))) or "no samples")
    check(cases)


def test_zz_missing():
    t = {k for k, v in CATEGORY.items() if v in ("pointwise", "view")}
    print("MISSING", sorted(t - seen))
    assert 0
