"""Routed products: the operators against their definition, the kernels against the operators."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import plait
from plait.kernels import packing, routing
from plait.kernels import target as targets
from plait.runtime.plan import KernelStep


def test_slots_are_sorted_by_branch_and_strangers_come_last() -> None:
    index = torch.tensor([[2, 0], [9, 2], [-1, 0]])
    offsets, order = routing.route(index, 3)
    assert offsets.tolist() == [0, 2, 2, 4]
    assert order.tolist() == [1, 5, 0, 3, 2, 4]


def test_operators_keep_torchs_rules() -> None:
    index = torch.randint(0, 4, (5, 2))
    torch.library.opcheck(routing.route, (index, 4))
    offsets, order = routing.route(index, 4)
    x, weight, bias = torch.randn(5, 8), torch.randn(4, 6, 8), torch.randn(4, 6)
    for arguments in (
        (x, offsets, order, weight, bias, False, 2, False),
        (torch.randn(10, 6), offsets, order, weight, None, True, 0, True),
    ):
        torch.library.opcheck(
            routing.routed_linear,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
        )


def test_each_row_meets_the_matrix_of_its_branch() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 8), torch.randn(4, 6, 8), torch.randn(4, 6)
    index = torch.randint(0, 5, (5, 2))  # 4 stands for no branch
    offsets, order = routing.route(index, 4)
    got = routing.routed_linear(x, offsets, order, weight, bias, False, 2, True).view(5, 2, 6)
    for t in range(5):
        for k in range(2):
            b = int(index[t, k])
            want = torch.zeros(6) if b == 4 else weight[b] @ x[t] + bias[b]
            torch.testing.assert_close(got[t, k], want)


class Experts(nn.Module):
    """Two routed products with a gate between them."""

    def __init__(
        self, experts: int, hidden: int, inner: int, transposed: bool, bias: bool,
        alternate: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.experts, self.transposed, self.alternate = experts, transposed, alternate

        def weight(rows: int, columns: int) -> nn.Parameter:
            shape = (columns, rows) if transposed else (rows, columns)
            return nn.Parameter(torch.randn(experts, *shape) / columns**0.5)

        self.up, self.down = weight(2 * inner, hidden), weight(hidden, inner)
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * inner)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(experts, hidden)) if bias else None

    def forward(self, x, index, scale):
        offsets, order = torch.ops.plait.route(index, self.experts)
        tokens, k = index.shape
        inner = torch.ops.plait.routed_linear(
            x, offsets, order, self.up, self.up_bias, self.transposed, k, False
        )
        if self.alternate:  # rows of no branch are not zero behind this one
            inner = torch.sigmoid(inner[..., ::2]) * (inner[..., 1::2].clamp(-1, 1) + 1)
        else:
            gate, value = inner.chunk(2, -1)
            inner = nn.functional.silu(gate) * value
        out = torch.ops.plait.routed_linear(
            inner, offsets, order, self.down, self.down_bias, self.transposed, 0, True
        )
        return (out.view(tokens, k, -1) * scale[..., None]).sum(1)


MODELS = [
    Experts(8, 64, 96, False, False),
    Experts(4, 48, 37, True, True),
    Experts(16, 33, 20, False, True),
    Experts(3, 16, 16, False, False),
    Experts(5, 24, 41, True, True, alternate=True),
    Experts(2, 40, 64, False, False, alternate=True),
]
COMPILED = [plait.compile(m.eval(), tune="off") for m in MODELS]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_routes_give_the_references_result(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(MODELS) - 1))
    model, compiled = MODELS[number], COMPILED[number]
    tokens, k = data.draw(st.sampled_from([1, 2, 3, 7, 16, 33])), data.draw(st.integers(1, 3))
    kind = data.draw(st.sampled_from(["uniform", "one", "last", "skewed", "none", "strangers"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    n = model.experts
    index = {
        "uniform": lambda: torch.randint(0, n, (tokens, k), generator=generator),
        "one": lambda: torch.zeros(tokens, k, dtype=torch.int64),
        "last": lambda: torch.full((tokens, k), n - 1),
        "skewed": lambda: torch.randint(0, n, (tokens, k), generator=generator) ** 2 // n,
        "none": lambda: torch.full((tokens, k), n),
        "strangers": lambda: torch.randint(-2, n + 3, (tokens, k), generator=generator),
    }[kind]()
    hidden = model.up.shape[1 if model.transposed else 2]
    x = torch.randn(tokens, hidden, generator=generator)
    scale = torch.rand(tokens, k, generator=generator)
    with torch.no_grad():
        have, want = compiled(x, index, scale), model(x, index, scale)
        assert torch.equal(have, compiled(x, index, scale))
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


class DeepProduct(nn.Module):
    """One routed product of a long inner dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 3001) / 55)

    def forward(self, x, index):
        route = torch.ops.plait.route(index, 2)
        return torch.ops.plait.routed_linear(x, *route, self.weight, None, False, 1, True)


def test_deep_products_stay_accurate() -> None:
    torch.manual_seed(0)
    model = DeepProduct().eval()
    compiled, exact = plait.compile(model, tune="off"), copy.deepcopy(model).double()
    for tokens in (1, 4, 24):  # tiles of few rows have several sums, others one
        x, index = torch.randn(tokens, 3001), torch.randint(0, 2, (tokens, 1))
        with torch.no_grad():
            want = exact(x.double(), index)
            mine, theirs = ((run(x, index) - want).abs().max() for run in (compiled, model))
        assert mine <= 2 * theirs, (tokens, mine, theirs)


def test_all_of_it_is_kernels(kernels_win: None) -> None:
    model = MODELS[0]
    x, index, scale = torch.randn(9, 64), torch.randint(0, 8, (9, 2)), torch.rand(9, 2)
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x, index, scale))
    assert all(isinstance(s, KernelStep) for s in compiled.plan.steps)


@pytest.mark.parametrize("kind", ["pairs", "bfloat16", "float16"])
def test_sixteen_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With multiplications of pairs and without; odd depths, too."""
    pairs = kind == "pairs"
    if pairs and not targets.host().bf16_pairs:
        pytest.skip("this CPU has no AVX512-BF16")
    machine = dataclasses.replace(targets.host(), bf16_pairs=pairs)
    monkeypatch.setattr(targets, "host", lambda: machine)
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    deep = Experts(3, 515, 600, False, True).eval()  # more steps than are copied at a time
    for number, wide in enumerate((MODELS[0], MODELS[4], deep)):
        model = copy.deepcopy(wide).to(dtype)
        hidden = model.up.shape[1 if model.transposed else 2]
        index = torch.randint(-1, model.experts + 1, (9, 2))
        x, scale = torch.randn(9, hidden).to(dtype), torch.rand(9, 2).to(dtype)
        with torch.no_grad():
            exact = model.double()(x.double(), index, scale.double())
            eager = model.to(dtype)(x, index, scale)
            compiled = plait.compile(model, example_inputs=(x, index, scale), tune="off")
            have = compiled(x, index, scale)
        assert all(isinstance(s, KernelStep) for s in compiled.plan.steps)
        assert have.dtype == dtype
        floor = torch.finfo(dtype).eps * exact.abs().max()
        allowed = 2 * max((eager - exact).abs().max(), floor)
        assert (have - exact).abs().max() <= allowed, number


@pytest.mark.parametrize("alternate", [False, True])
def test_a_gates_operands_share_a_panel(alternate: bool) -> None:
    weight = torch.arange(2 * 10 * 3.0).view(2, 10, 3)
    packed = packing.paired_panels(weight, width=4, transposed=True, alternate=alternate)
    assert packed.shape == (2, 3, 3, 4)
    for j in range(5):
        panel, lane = divmod(j, 2)
        first, second = (2 * j, 2 * j + 1) if alternate else (j, j + 5)
        assert torch.equal(packed[:, panel, :, lane], weight[:, first])
        assert torch.equal(packed[:, panel, :, lane + 2], weight[:, second])
    assert not packed[:, 2, :, [1, 3]].any()
