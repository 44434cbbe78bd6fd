"""Whole models through the pipeline: same results as eager, on kernels and in place where they
should be.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import plait
from plait.compiler.lowering import select
from plait.kernels.database import Database
from plait.runtime.plan import KernelStep, LibraryStep

pytestmark = pytest.mark.usefixtures("kernels_win")


def relative_error(model, compiled, *inputs):
    """(plait's, eager's) largest error against float64, relative to the largest result."""
    with torch.no_grad():
        have, eager = compiled(*inputs), model(*inputs)
        exact = copy.deepcopy(model).double()(*[
            x.double() if x.dtype == torch.float32 else x for x in inputs
        ])  # fmt: skip
    scale = float(exact.abs().max())
    return (
        float((have.double() - exact).abs().max()) / scale,
        float((eager.double() - exact).abs().max()) / scale,
    )


def check(model, *inputs):
    model = model.eval()
    compiled = plait.compile(model, example_inputs=inputs)
    mine, eager = relative_error(model, compiled, *inputs)
    assert mine <= 2 * eager + 1e-6, (mine, eager)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), compiled(*inputs))
    return compiled


def steps(compiled, kind):
    return [s for s in compiled.plan.steps if isinstance(s, kind)]


class Branches(nn.Module):
    """A small Inception-like block: 1x1, 3x3, double 3x3 and pooling branches, concatenated."""

    def __init__(self, c=24):
        super().__init__()

        def unit(i, o, **k):
            return nn.Sequential(nn.Conv2d(i, o, bias=False, **k), nn.BatchNorm2d(o), nn.ReLU())

        self.stem = unit(3, c, kernel_size=3, stride=2)
        self.a = unit(c, 16, kernel_size=1)
        self.b = nn.Sequential(unit(c, 8, kernel_size=1), unit(8, 24, kernel_size=3, padding=1))
        self.c = nn.Sequential(
            unit(c, 8, kernel_size=1),
            unit(8, 16, kernel_size=(1, 7), padding=(0, 3)),
            unit(16, 20, kernel_size=(7, 1), padding=(3, 0)),
        )
        self.d = unit(c, 12, kernel_size=1)
        self.head = nn.Linear(72, 10)

    def forward(self, x):
        x = self.stem(x)
        pooled = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
        y = torch.cat([self.a(x), self.b(x), self.c(x), self.d(pooled)], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


def randomise_norms(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_a_branching_cnn_is_all_kernels_and_concatenates_in_place(batch):
    compiled = check(randomise_norms(Branches()), torch.randn(batch, 3, 39, 39))
    assert not steps(compiled, LibraryStep)
    names = [s.name for s in steps(compiled, KernelStep)]
    assert not any(n.startswith(("cat", "clone")) for n in names), names


def test_a_residual_block_adds_inside_the_convolution():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(16, 16, 3, padding=1)
            self.second = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            y = torch.relu(self.first(x))
            return torch.relu(self.second(y) + y).mean((2, 3))

    compiled = check(Residual(), torch.randn(1, 16, 14, 14))
    assert not steps(compiled, LibraryStep)
    assert len(steps(compiled, KernelStep)) <= 4


class Encoder(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, hidden=64, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x):
        b, s, h = x.shape
        y = self.norm1(x)
        q, k, v = (
            f(y).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(a.transpose(1, 2).reshape(b, s, h))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def test_a_transformer_layer_is_all_kernels():
    compiled = check(Encoder(), torch.randn(2, 19, 64))
    assert not steps(compiled, LibraryStep)


def test_sizes_may_change_between_calls():
    model = Encoder().eval()
    compiled = plait.compile(model)
    with torch.no_grad():
        for shape in [(2, 7), (3, 12), (2, 31), (5, 1), (1, 16)]:
            x = torch.randn(*shape, 64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_unsupported_operator_runs_in_the_library_with_a_remark():
    class Sums(nn.Module):
        def forward(self, x):
            return torch.logcumsumexp(torch.relu(x) * 2, dim=-1) + 1

    model, x = Sums().eval(), torch.randn(5, 33)
    compiled = plait.compile(model, example_inputs=(x,))
    assert torch.equal(compiled(x), model(x))
    assert any("logcumsumexp" in s.target for s in steps(compiled, LibraryStep))
    assert any("logcumsumexp" in " ".join(r.nodes) for r in compiled.remarks)


def test_sparse_tensors_on_the_way_belong_to_the_library():
    def function(x, y):
        sparse = (x * 2).relu().to_sparse()
        return torch.sparse.mm(sparse, y).relu() + 1, sparse

    compiled = plait.compile(function, tune="off")
    for _ in range(2):
        x, y = torch.randn(5, 4), torch.randn(4, 3)
        (product, sparse), (want, wanted) = compiled(x, y), function(x, y)
        torch.testing.assert_close(product, want)
        torch.testing.assert_close(sparse, wanted)
    assert compiled.plan is not None


def test_results_stay_valid_after_the_next_call():
    model = Branches().eval()
    compiled = plait.compile(model, example_inputs=(torch.randn(1, 3, 39, 39),))
    with torch.no_grad():
        first = compiled(torch.randn(1, 3, 39, 39))
        kept = first.clone()
        compiled(torch.randn(1, 3, 39, 39))
    assert torch.equal(first, kept)


def test_known_kernels_need_no_tvm(tmp_path) -> None:
    """Importing TVM takes a second: a model whose kernels are all in the database goes without."""
    code = (
        "import sys, torch, plait\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(),"
        " torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4)).eval()\n"
        "x = torch.randn(1, 3, 12, 12)\n"
        "with torch.no_grad():\n"
        "    compiled = plait.compile(model, example_inputs=x)\n"
        "    torch.testing.assert_close(compiled(x), model(x))\n"
        "assert compiled.plan is not None\n"
        "print('tvm' in sys.modules)\n"
    )
    environment = {**os.environ, "PLAIT_CACHE_DIR": str(tmp_path)}
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert told == [["True"], ["False"]]


class Mixed(nn.Module):
    """A convolution, norms, an embedding and reductions of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.rows, self.table = nn.LayerNorm(16), nn.Embedding(50, 16)

    def forward(self, x, index):
        y = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        z = y.mean((2, 3)) + self.table(index).sum(1)
        z = torch.softmax(self.rows(z) * 2, -1)
        return z, y.amax(1), y.sum(), nn.functional.gelu(y) * torch.sigmoid(y) + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_accurate_as_eager(dtype) -> None:
    torch.manual_seed(0)
    model = Mixed().eval().to(dtype)
    x, index = torch.randn(2, 8, 12, 12).to(dtype), torch.randint(0, 50, (2, 5))
    with torch.no_grad():
        compiled = plait.compile(model, example_inputs=(x, index))
        have, eager = compiled(x, index), model(x, index)
        exact = copy.deepcopy(model).double()(x.double(), index)
    for mine, theirs, true in zip(have, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        scale = true.abs().max()
        allowed = 2 * (theirs.double() - true).abs().max() / scale + torch.finfo(dtype).eps
        assert (mine.double() - true).abs().max() / scale <= allowed
    targets = {s.target for s in compiled.plan.steps if isinstance(s, LibraryStep)}
    assert targets <= {"aten.conv2d.default", "aten.max_pool2d.default"}
    assert any(isinstance(s, KernelStep) for s in compiled.plan.steps)


def test_any_and_all_of_nan() -> None:
    x = torch.tensor([[0.0, float("nan")], [0.0, 0.0], [float("nan"), 1.0]])
    compiled = plait.compile(
        lambda x: (x.any(1), x.all(1), (x * 1).any(), x.all()), example_inputs=(x,)
    )
    for mine, theirs in zip(compiled(x), (x.any(1), x.all(1), x.any(), x.all()), strict=True):
        assert torch.equal(mine, theirs)
    assert all(isinstance(s, KernelStep) for s in compiled.plan.steps)


@pytest.mark.parametrize("passes", ["normalize", "normalize,outline-branches"])
def test_without_fusion_every_operator_is_the_library_s(passes) -> None:
    """Several results, lists of them, and branches, none of which a pass has put in a group."""

    class Sorts(nn.Module):
        def forward(self, x):
            values, order = x.sort(-1)
            first, second = values.split([3, 5], -1)
            return torch.cat([second, first], -1) + order

    model = plait.Router([Sorts(), nn.Linear(8, 8)], lambda x: (x[:, 0] > 0).long(), combine="sum")
    sizes = ({0: torch.export.Dim("n", min=0)},)
    compiled = plait.compile(model.eval(), pipeline=passes, tune="off", dynamic_shapes=sizes)
    with torch.no_grad():
        for cells in (9, 5):
            x = torch.randn(cells, 8)
            torch.testing.assert_close(compiled(x), model(x))
    assert not any(isinstance(s, KernelStep) for s in compiled.plan.every_step())


def test_a_cache_that_cannot_be_used_is_told(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    unusable = Database(tmp_path / "cache")
    monkeypatch.setattr(select, "database", lambda: unusable)
    compiled = plait.compile(nn.ReLU().eval(), tune="off")
    with torch.no_grad():
        compiled(torch.randn(3))
    assert "PLT-CAC-001" in [r.id for r in compiled.remarks]
