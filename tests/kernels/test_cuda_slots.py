"""Routed products whose matrices lie in slots, in CUDA C run on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from plait.kernels import cuda, routing
from plait.kernels.group import Group, Unsupported
from plait.kernels.occupancy import SM90, resident_blocks
from plait.kernels.ops import argument
from plait.kernels.routes import by_branch
from plait.kernels.target import host
from plait.kernels.templates.experts import candidates

from .search_check import Problem, problem
from .test_cuda_routing import TARGET, Built, aten

SLOTS = 3  # fewer than branches


def _product(
    rows: int, k: int, n: int, branches: int, *, transposed: bool = False, gate: bool = False,
    scatter: bool = False,
) -> Problem:  # fmt: skip
    """A routed product with biases, with matrices in slots."""
    torch.manual_seed(0)
    index = torch.randint(0, branches, (rows,))
    matrices = torch.randn(SLOTS, *((k, n) if transposed else (n, k))) * k**-0.5
    table = torch.arange(branches, dtype=torch.int32) % SLOTS
    tensors = [torch.randn(rows, k), *by_branch(index, branches), matrices]
    tensors += [torch.randn(branches, n), table]

    def function(x, offsets, order, weight, bias, slots):
        y = routing.routed_linear(x, offsets, order, weight, bias, transposed, 0, scatter, slots)
        if gate:
            first, second = aten.slice.Tensor(y, 1, 0, n // 2), aten.slice.Tensor(y, 1, n // 2, n)
            y = aten.mul.Tensor(aten.silu.default(first), second)
        return y

    return problem("experts", function, tensors)


CASES: dict[str, Callable[[], Problem]] = {
    "few": lambda: _product(9, 40, 20, 5, scatter=True),
    "few_transposed_gate": lambda: _product(6, 16, 24, 5, transposed=True, gate=True),
    "many": lambda: _product(90, 19, 67, 4, scatter=True),
    "many_gate": lambda: _product(110, 24, 40, 5, gate=True),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built({name: make() for name, make in CASES.items()}, tmp_path_factory.mktemp("slots"))


def _by_waves(built: Built, name: str, every: torch.Tensor, down: bool) -> torch.Tensor:
    """What all waves together have written; slots are given out from the first, or ``down``."""
    *_, weight, _, table = built.problems[name].inputs
    branches = table.shape[0]
    found: torch.Tensor | None = None
    for first in range(0, branches, SLOTS):
        table.fill_(-1)
        weight.fill_(float("nan"))
        for place, branch in enumerate(range(first, min(branches, first + SLOTS))):
            slot = SLOTS - 1 - place if down else place
            table[branch] = slot
            weight[slot] = every[branch]
        (have,) = built.run(name, backwards=down)  # what is not written is NaN
        found = have.clone() if found is None else torch.where(have.isnan(), found, have)
    assert found is not None
    return found


@pytest.mark.parametrize("name", CASES)
def test_waves_of_few_slots_compute_every_row(built: Built, name: str) -> None:
    """With whatever matrices the slots hold meanwhile, and the same bits from any slots."""
    made = built.problems[name]
    _, offsets, order, weight, bias, table = made.inputs
    branches, rows = table.shape[0], order.shape[0]
    every, own = torch.randn(branches, *weight.shape[1:]), torch.arange(branches).int()
    for drawn in (torch.randint(-1, branches, (rows,)), torch.full((rows,), 1)):
        for tensor, part in zip((offsets, order), by_branch(drawn, branches), strict=True):
            tensor.copy_(part)
        want = made.function(*made.inputs[:3], every, bias, own)
        up, down = (_by_waves(built, name, every, d) for d in (False, True))
        torch.testing.assert_close(up, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(up, down)


def test_rows_of_a_branch_without_a_slot_are_not_written(built: Built) -> None:
    for name, made in built.problems.items():
        _, offsets, order, weight, _, table = made.inputs
        rows, branches = order.shape[0], table.shape[0]
        drawn = torch.arange(rows) % (branches + 1)  # the last rows have no branch
        for tensor, part in zip((offsets, order), by_branch(drawn, branches), strict=True):
            tensor.copy_(part)
        table.fill_(-1)
        table[1] = 0
        weight.fill_(1.0)
        (have,) = built.run(name)
        written = ~have.isnan().all(1)
        places = torch.arange(rows) if "gate" in name else order  # which is scattered
        begin, end = offsets[1:3].tolist()
        kept = torch.zeros(rows, dtype=torch.bool)
        kept[places[begin:end]] = True
        kept[places[int(offsets[-1]) :]] = True
        assert torch.equal(written, kept), name


def test_the_reference_leaves_out_what_has_no_slot() -> None:
    made = CASES["few"]()
    x, offsets, order, weight, bias, table = made.inputs
    table.copy_(torch.tensor([2, -1, 0, -1, 1]))
    have = routing.routed_linear(x, offsets, order, weight, bias, False, 0, False, table)
    for branch, slot in enumerate(table.tolist()):
        begin, end = offsets[branch : branch + 2].tolist()
        if slot >= 0:
            want = x[begin:end] @ weight[slot].T + bias[branch]
            torch.testing.assert_close(have[begin:end], want)
    torch.library.opcheck(
        routing.routed_linear, (x, offsets, order, weight, bias, False, 0, False, table)
    )
    weight.requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradients"):
        routing.routed_linear(x, offsets, order, weight, bias, False, 0, False, table)


def test_no_kernel_of_the_cpu_takes_slots() -> None:
    made = CASES["few"]()
    node = next(n for n in made.group.nodes if argument(n, "slots") is not None)
    group = Group("experts", made.group.nodes, made.group.inputs, made.group.outputs, node)
    with pytest.raises(Unsupported, match="on GPUs only"):
        candidates(group, made.io, host())


@pytest.mark.skipif(not cuda.available(), reason="nvcc is not installed")
def test_blocks_leave_room_for_others(built: Built) -> None:
    bundle = cuda.build({name: built.devices[name] for name in CASES}, TARGET)
    assert bundle.failed == {} and len(bundle.usage) == len(CASES)
    for name, used in bundle.usage.items():
        assert used.spilled_bytes == 0 and used.shared_bytes <= SM90.static_bytes, name
        assert resident_blocks(256, used.registers, used.shared_bytes) >= 2, name
