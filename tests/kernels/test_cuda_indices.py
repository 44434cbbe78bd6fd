"""What is read where indices say, and arithmetic of integers, in CUDA C."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plait.kernels import cuda

from .cuda_emulator import Emulator, buffers, lowered
from .search_check import Problem, problem

aten = torch.ops.aten
TARGET = cuda.sm90()
PLACES = torch.tensor([[0, -1, 6], [-7, 3, 5]])


def _pointwise(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Problem:
    return problem("pointwise", function, tensors)


def _numbers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(-9, 10, shape).to(dtype)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "embedding": lambda: _pointwise(
        lambda w, i: aten.embedding.default(w, i), torch.randn(7, 8), PLACES.abs() % 7
    ),
    "embedding_of_int32": lambda: _pointwise(
        lambda w, i: aten.embedding.default(w, i), torch.randn(7, 8), (PLACES.abs() % 7).int()
    ),
    "gather": lambda: _pointwise(
        lambda x, i: aten.gather.default(x, 1, i), torch.randn(2, 7), PLACES.abs() % 7
    ),
    "index_select": lambda: _pointwise(
        lambda x, i: aten.index_select.default(x, 1, i), torch.randn(3, 7), torch.tensor([6, 0, 2])
    ),
    "index": lambda: _pointwise(
        lambda x, i: aten.index.Tensor(x, [None, i]), torch.randn(2, 7, 3), PLACES
    ),
    "index_of_two": lambda: _pointwise(
        lambda x, i, j: aten.index.Tensor(x, [i, None, j]),
        torch.randn(7, 2, 7), PLACES, PLACES.flip(1).int(),
    ),
    "take_along_dim": lambda: _pointwise(
        lambda x, i: aten.take_along_dim.default(x, i, 1), torch.randn(2, 7), PLACES.abs() % 7
    ),
    "clamp": lambda: _pointwise(lambda x: aten.clamp.default(x, -3, 4), _numbers(5, 7)),
    "clamp_of_int32": lambda: _pointwise(
        lambda x: aten.clamp.default(x, -3, 4), _numbers(5, 7, dtype=torch.int32)
    ),
    "extremes_of_two_widths": lambda: _pointwise(
        lambda x, y: aten.minimum.default(aten.maximum.default(x, y), 4 * y),
        _numbers(5, 7), _numbers(5, 7, dtype=torch.int32).flip(0),
    ),
    "extremes_of_bytes": lambda: _pointwise(
        lambda x, y: aten.maximum.default(x, aten.minimum.default(y, y * 2)),
        _numbers(5, 7, dtype=torch.int8), _numbers(5, 7, dtype=torch.int8).flip(0),
    ),
    "quotients": lambda: _pointwise(
        lambda x, y: aten.div.Tensor_mode(x, aten.clamp.default(y, 1, 5), rounding_mode="floor"),
        _numbers(5, 7), _numbers(5, 7, dtype=torch.int32).flip(0),
    ),
    "remainders": lambda: _pointwise(
        lambda x, y: aten.remainder.Tensor(aten.abs.default(x) - 5, aten.clamp.default(y, -4, -1)),
        _numbers(5, 7, dtype=torch.int32), _numbers(5, 7).flip(0),
    ),
}  # fmt: skip


@pytest.mark.skipif(not cuda.available(), reason="nvcc is not installed")
def test_code_for_indices_compiles_and_computes_the_right_thing(tmp_path: Path) -> None:
    problems = {name: make() for name, make in PROBLEMS.items()}
    definitions = {n: cuda.lower(p.group, p.io, TARGET) for n, p in problems.items()}
    bundle = cuda.build(lowered(definitions, TARGET), TARGET)
    assert bundle.failed == {}
    emulator = Emulator(bundle.source, bundle.kernels.values(), tmp_path)
    for name, made in problems.items():
        for tensor in made.outputs:
            tensor.fill_(77)
        emulator.run(bundle.kernels[name], buffers(made, definitions[name]))
        for have, want in zip(made.outputs, made.expected, strict=True):
            assert torch.equal(have, want.to(have.dtype)), name
