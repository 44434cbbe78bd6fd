"""Decomposing again and again gives what torch gives, without its preparations each time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import exported_program

import plait
from plait.compiler.capture import decompose, ops

NAME = "plait_test_decompose"


class Model(nn.Module):
    """Operators that stay whole, that have parts, and that are composite."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.linear = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.norm(self.embed(x)))
        return torch.nn.functional.softplus(x @ x.mT).logsumexp(-1).clone().add_(1)


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(Model().eval(), (torch.arange(6).view(2, 3),))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Gets an item whenever torch prepares a table."""
    seen: list[Any] = []
    split = getattr(exported_program, decompose.SPLIT)

    def noted(table: Any) -> Any:
        seen.append(table)
        return split(table)

    monkeypatch.setattr(exported_program, decompose.SPLIT, noted)
    monkeypatch.setattr(decompose, "_latest", None)
    yield seen


def test_every_time_gives_what_torch_gives(prepared: list[Any]) -> None:
    want = str(exported().run_decompositions(ops.decompositions()).graph)
    prepared.clear()
    for _ in range(3):
        assert str(decompose.decomposed_anew(exported()).graph) == want
    assert len(prepared) == 1


def test_operators_are_left_as_they_were() -> None:
    found = [torch.ops.aten.linear.default, torch.ops.aten.matmul.default]
    kernels = [dict(o.py_kernels) for o in found]
    for _ in range(3):
        decompose.decomposed_anew(exported())
        assert [o.py_kernels for o in found] == kernels
        assert not any(o in decompose.fake_rules for o in found)
    program = exported()
    assert torch.ops.aten.matmul.default in [n.target for n in program.graph.nodes]


def test_an_error_leaves_operators_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported()
    kernels = dict(torch.ops.aten.matmul.default.py_kernels)
    decompose.decomposed_anew(program)

    def fail(*args: Any, **kwargs: Any) -> Any:
        assert torch.ops.aten.matmul.default.py_kernels != kernels
        raise RuntimeError("within")

    table = dict(ops.decompositions())
    table[torch.ops.aten.logsumexp.default] = fail
    monkeypatch.setattr(ops, "decompositions", lambda: table)
    monkeypatch.setattr(decompose, "_latest", None)
    for _ in range(2):  # the first prepares, the second takes what is kept
        with pytest.raises(RuntimeError, match="within"):
            decompose.decomposed_anew(program)
        assert torch.ops.aten.matmul.default.py_kernels == kernels


def test_an_operator_registered_since_counts(prepared: list[Any]) -> None:
    decompose.decomposed_anew(exported())
    library = torch.library.Library(NAME, "DEF")
    try:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
        operator = getattr(torch.ops, NAME).twice.default

        class Twice(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return operator(x)

        program = torch.export.export(Twice(), (torch.ones(3),))
        graph = decompose.decomposed_anew(program).graph
        assert operator not in [n.target for n in graph.nodes]
        assert len(prepared) == 2
    finally:
        library._destroy()


def test_kernels_given_since_are_those_restored(prepared: list[Any]) -> None:
    operator = torch.ops.aten.matmul.default
    decompose.decomposed_anew(exported())
    key = torch._C.DispatchKey.SparseCPU
    operator.py_impl(key)(lambda *args: NotImplemented)
    try:
        given = dict(operator.py_kernels)
        for _ in range(2):
            decompose.decomposed_anew(exported())
            assert operator.py_kernels == given
    finally:
        operator.py_kernels.pop(key)
        operator._dispatch_cache.clear()


def test_another_thread_keeps_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    program, other = exported(), exported()
    table = {torch.ops.aten.embedding.default: lambda w, i, *rest: w[i] * 1}
    want = str(other.run_decompositions(table).graph)
    found: list[str] = []

    def meanwhile() -> None:
        # Once what is kept is in use, on a thread of its own, before the kernels are given.
        found.append(str(other.run_decompositions(table).graph))

    give = decompose._give

    def given(*args: Any) -> None:
        if not found:
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()
        give(*args)

    decompose.decomposed_anew(program)
    monkeypatch.setattr(decompose, "_give", given)
    decompose.decomposed_anew(program)
    assert found == [want]


class Numbers(nn.Module):
    """Sides of a `torch.cond`, one within the other, that make tensors of numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return x * torch.tensor([1.0, 2.0, 3.0, 4.0])

        def positive(x: torch.Tensor) -> torch.Tensor:
            y = x + torch.tensor(2.0)
            return torch.cond(y.sum() > 20, inner, torch.clone, (y,))

        return torch.cond(x.sum() > 0, positive, inner, (x,))


@pytest.mark.parametrize("value", [-1.0, 1.0, 5.0])
def test_sides_of_a_cond_make_tensors_of_numbers(value: float) -> None:
    x = torch.full((2, 4), value)
    with torch.no_grad():
        model = plait.compile(Numbers().eval(), tune="off", example_inputs=torch.ones(2, 4))
        assert torch.equal(model(x), Numbers()(x)) and len(model.programs) == 1
