"""Every converter gives what torch gives, on torch's own sample inputs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from plait.kernels import routing_rows  # noqa: F401  defines plait's operators
from plait.kernels.abi import Kernel
from plait.kernels.ops import CATEGORY, category, library_reason, registered
from plait.kernels.target import host
from plait.kernels.templates import pointwise

from .harness import Batch
from .traced import group_for, outputs_of, tensor_arg, trace

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
SAMPLES = {torch.float32: 6, torch.bfloat16: 2, torch.int64: 2, torch.bool: 2}
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
        if "empty" in op.name:  # what is in such a tensor is unspecified
            return False
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


aten = torch.ops.aten


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _ints(*shape: int, low: int = -9, high: int = 9) -> torch.Tensor:
    return torch.randint(low, high, shape)


def _truths(*shape: int) -> torch.Tensor:
    return torch.rand(shape) > 0.5


def _direct() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(operator, arguments) for operators that torch's samples do not reach."""
    f, g, i, b = _floats(3, 20), _floats(20), _ints(3, 20), _truths(3, 20)
    image = _floats(2, 3, 5, 7)
    for name in ("__and__", "__or__", "__xor__"):
        yield getattr(aten, name).Tensor, (i, _ints(20))
        yield getattr(aten, name).Tensor, (b, _truths(20))
        yield getattr(aten, name).Scalar, (i, 5)
    for name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
        yield getattr(aten, name).Scalar, (i, 6)
    small = _ints(3, 20, low=0, high=70)
    for name in ("__lshift__", "__rshift__"):
        yield getattr(aten, name).Scalar, (i, 3)
    yield aten.bitwise_left_shift.Tensor_Scalar, (i, 2)
    yield aten.bitwise_right_shift.Tensor_Scalar, (i, 2)
    yield aten.bitwise_right_shift.Tensor, (i, small)
    for name in ("add", "sub", "rsub"):
        yield getattr(aten, name).Scalar, (f, 2.5, 3)
        yield getattr(aten, name).Scalar, (i, 2, 3)
    for name in ("mul", "div", "floor_divide", "remainder", "fmod", "copysign"):
        yield getattr(aten, name).Scalar, (f, -2.5)
        yield getattr(aten, name).Scalar, (i, -3)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -3.5])
    yield aten.mul.Scalar, (special, 0.0)
    yield aten.sub.Tensor, (special, special)
    yield aten.div.Scalar_mode, (f, 0.7), {"rounding_mode": "floor"}
    yield aten.div.Scalar_mode, (i, 4), {"rounding_mode": "trunc"}
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        yield getattr(aten, name).Scalar, (i, 2)
        yield getattr(aten, name).Scalar, (special, 0.0)
        yield getattr(aten, name).Tensor, (special, special)
    yield lambda x: aten.logical_not.default(aten.lt.Scalar(x, 0.0)), (special,)
    for exponent in (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 2.7, 3, 5):
        yield aten.pow.Tensor_Scalar, (f, exponent)
    for exponent in (0, 1, 2, 5, 7):
        yield aten.pow.Tensor_Scalar, (i, exponent)
    yield aten.pow.Scalar, (2.5, f)
    yield aten.float_power.Tensor_Scalar, (f, 3.0)
    yield aten.clamp.default, (f, -0.5, 0.5)
    yield aten.clamp.default, (special, 0.0, None)
    yield aten.clip.default, (i, None, 3)
    yield aten.clamp_min.default, (special, 0.0)
    yield aten.clamp_max.default, (i, 2)
    for name in ("erf", "exp2", "expit", "expm1", "log1p", "sinc"):
        yield getattr(aten, f"special_{name}").default, (f,)
    yield aten.fix.default, (f,)
    yield aten.where.Scalar, (b, 1.0, 2.0)
    yield aten.where.ScalarOther, (b, f, 2.0)
    yield aten.where.ScalarSelf, (b, 1.0, f)
    yield aten.where.self, (b, b, _truths(20))
    yield aten.masked_fill.Scalar, (f, b, -1e9)
    yield aten.masked_fill.Tensor, (f, b, torch.tensor(7.0))
    yield aten._prelu_kernel.default, (f, g)
    mean, var = _floats(3), torch.rand(3) + 0.1
    norm = aten._native_batch_norm_legit_no_training.default
    yield lambda x, m, v: norm(x, m, v, m, v, 0.1, 1e-5)[0], (image, mean, var)
    yield lambda x, m, v: norm(x, None, None, m, v, 0.1, 1e-5)[0], (image, mean, var)
    half = [t.bfloat16() for t in (image, var, mean)]
    yield lambda x, w, m: aten.batch_norm(x, w, m, m, w, False, 0.1, 1e-3, False), half
    for name in ("alias", "detach", "lift", "lift_fresh", "lift_fresh_copy", "conj"):
        yield getattr(aten, name).default, (f,)
    yield aten.contiguous.default, (f.t(),)
    yield aten._to_copy.default, (i,), {"dtype": torch.float32}
    yield aten._to_copy.default, (f * 50,), {"dtype": torch.int8}
    yield aten.to.dtype_layout, (f,), {"dtype": torch.bfloat16}
    yield aten.to.other, (i, f)
    yield aten.type_as.default, (special, i.bool())
    yield aten.feature_dropout.default, (f, 0.5, False)
    yield aten.fill.Tensor, (f, torch.tensor(3))
    yield aten.arange.default, (17,)
    yield aten.arange.start, (3, 17)
    yield aten.arange.start_step, (3.0, 17.0, 0.3)
    yield aten.view.dtype, (f, torch.int32)
    yield aten.view.dtype, (b, torch.uint8)
    yield aten._reshape_alias.default, (f, [6, 10], [10, 1])
    yield aten._unsafe_view.default, (f, [4, 15])
    yield aten.swapaxes.default, (f, 0, 1)
    yield aten.numpy_T.default, (image,)
    yield aten.movedim.int, (image, 1, -1)
    yield aten.split.sizes, (f, [3, 0, 17], 1)
    yield aten.concat.default, ([f, f[:1]],)
    yield aten.one_hot.default, (_ints(2, 5, low=0, high=6), 6)
    yield (
        aten.index.Tensor,
        (image, [None, _ints(4, low=-3, high=3), None, _ints(2, 1, low=0, high=7)]),
    )
    yield aten.index.Tensor, (image, [_ints(4, low=-2, high=2), _ints(2, 1, low=0, high=3)])
    yield aten.index.Tensor, (image.bfloat16(), [None, None, _ints(6, low=-5, high=5)])
    yield aten._unsafe_index.Tensor, (f, [_ints(4, 5, low=-3, high=3)])
    places = torch.stack([torch.randperm(20)[:4] for _ in range(3)])
    yield aten.scatter.value, (f, 1, places, 7.0)
    yield aten.scatter.value, (b, -1, places, True)
    yield aten.scatter.value, (i, 0, _ints(2, 20, low=0, high=3), -1)
    yield aten.scatter.src, (f, 1, places, _floats(3, 4))
    yield aten.scatter.src, (f.bfloat16(), 1, places, _floats(3, 4).bfloat16())
    yield aten.scatter_add.default, (f, 1, _ints(3, 5, low=0, high=20), _floats(3, 5))
    cells, order = _floats(4, 5), torch.randperm(8)
    yield torch.ops.plait.take.default, (cells, order, 2)
    for weight in (None, torch.rand(4, 2)):
        end = torch.tensor([0, 3, 6])  # the last two rows are nobody's
        rows = torch.cat([_floats(6, 5), torch.full((2, 5), float("nan"))])
        yield torch.ops.plait.combine.default, (rows, order, end, weight, 2)
    yield aten.copy.default, (f, g)
    yield aten.copy.default, (i, special[:1])
    for name in ("reflection_pad", "replication_pad"):
        yield getattr(aten, f"{name}1d").default, (f, [3, 2])
        yield getattr(aten, f"{name}2d").default, (image, [3, 2, 1, 4])
    line = image[0]
    yield aten.upsample_nearest1d.default, (line, [11])
    yield aten.upsample_nearest1d.vec, (line, None, [2.0])
    yield aten.upsample_nearest2d.default, (image, [10, 14])
    yield aten.upsample_nearest2d.vec, (image, None, [1.5, 2.5])
    for corners in (False, True):
        yield aten.upsample_bilinear2d.default, (image, [9, 11], corners)
        yield aten.upsample_bilinear2d.vec, (image, None, corners, [2.0, 0.7])
    for odd in (torch.float16, torch.float64, torch.int32, torch.int16, torch.int8, torch.uint8):
        yield aten.add.Tensor, ((f * 20).to(odd), i)
        if odd.is_floating_point:  # integers' divisors may be zero: only numbers become kernels
            yield aten.remainder.Tensor, ((f * 20).to(odd), (f * 9).to(odd) + 20)
        else:
            yield aten.remainder.Scalar, ((f * 20).to(odd), 7)
    for function in (aten.exp, aten.tanh, aten.gelu, aten.log1p, aten.sin, aten.erf, aten.pow):
        for odd in (torch.float16, torch.float64):
            call = function.Tensor_Scalar if function is aten.pow else function.default
            yield call, (f.abs().to(odd), 1.7) if function is aten.pow else (f.to(odd),)


def _spread(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    flat, spec = pytree.tree_flatten((args, kwargs))
    places = [j for j, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]

    def function(*tensors):
        leaves = list(flat)
        for j, tensor in zip(places, tensors, strict=True):
            leaves[j] = tensor
        given, named = pytree.tree_unflatten(leaves, spec)
        return call(*given, **named)

    return function, [flat[j] for j in places]


def test_direct_calls() -> None:
    torch.manual_seed(0)
    cases = []
    for n, (call, args, *kwargs) in enumerate(_direct()):
        function, tensors = _spread(call, args, kwargs[0] if kwargs else {})
        found = lowered(function, tensors, f"d{n}")
        assert not isinstance(found, str), (call, found)
        cases.extend(found)
    check(cases)


IDLE = {
    "aten.detach_.default",  # in place: only in graphs that were not functionalized
    "aten.lift_fresh.default",  # tracing turns it into lift_fresh_copy
    # What is in these is unspecified.
    *("aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"),
}


def test_every_converter_was_exercised(request) -> None:
    ran = {item.originalname for item in request.session.items if item.module is request.module}
    count = sum(item.originalname == "test_opinfo" for item in request.session.items)
    if count < len(_wanted()) or "test_direct_calls" not in ran:
        pytest.skip("some operator tests were not selected")
    listed = {name for name, kind in CATEGORY.items() if kind in ("pointwise", "view")}
    assert sorted(listed - seen - IDLE) == []
    assert listed <= set(registered())
