"""Every converter gives what torch gives, on torch's own sample inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from trace import group_for, outputs_of, tensor_arg, trace
from typing import Any

import pytest
import torch
from harness import Batch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

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


def lowered(function, tensors, name):
    """[(kernel, inputs, expected)] of a call, or the reason why it is not all kernels of ours."""
    module = trace(function, tensors)
    operators = [n for n in module.graph.nodes if n.op == "call_function"]
    for node in operators:
        if category(node) not in ("pointwise", "view"):
            return library_reason(node) or category(node)
    results = pytree.tree_leaves(function(*(t.clone() for t in tensors)))
    expected = dict(zip(_returned(module), results, strict=True))
    found = []
    for i, out in enumerate(outputs_of(module)):
        if out.op != "call_function":
            continue
        group = group_for([out])
        given = dict(zip(module.graph.find_nodes(op="placeholder"), tensors, strict=True))
        given |= {n: getattr(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
        io = {n: tensor_arg(given[n]) for n in group.inputs}
        io[out] = tensor_arg(torch.empty(out.meta["val"].shape, dtype=out.meta["val"].dtype))
        config = {"grain": 256} if len(name) % 2 else pointwise.candidates(group, io, host())[0]
        kernel = pointwise.lower(group, io, host(), config, f"{name}_{i}")
        seen.update(str(n.target) for n in group.nodes)
        found.append((kernel, [given[n] for n in group.inputs], expected[out]))
    return found


def _returned(module):
    (output,) = module.graph.find_nodes(op="output")
    return pytree.tree_leaves(output.args[0])


def check(cases) -> None:
    """Compiles kernels together, runs each, and compares with torch."""
    batch = Batch([kernel for kernel, _, _ in cases])
    for kernel, inputs, want in cases:
        (got,) = batch.run(kernel.name, inputs)
        torch.testing.assert_close(
            got, want, equal_nan=True, check_stride=False, msg=lambda m, k=kernel: f"{k.name}: {m}"
        )


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
