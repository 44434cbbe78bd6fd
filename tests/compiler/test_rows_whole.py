"""Rows and reductions against torch: odd sizes, narrow types, NaN, fused neighbours, symbolic
sizes.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
from plait.runtime.plan import LibraryStep

CASES = {
    "softmax": lambda x: F.softmax(x * 3, -1),
    "log_softmax": lambda x: F.log_softmax(x * 3, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]) + 1,
    "residual_norm": lambda x: F.layer_norm(x + torch.tanh(x), x.shape[-1:]) * 2,
    "own_rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "two_results": lambda x: (x - x.amax(-1, keepdim=True), x.sum(-1)),
    "mean_last": lambda x: x.mean(-1),
    "sum_first": lambda x: torch.relu(x).sum(0),
    "mean_middle_keep": lambda x: x.mean(1, keepdim=True) * 2,
    "amax_all": lambda x: x.amax(),
    "amin_pair": lambda x: x.amin((0, 2)) + 1,
    "mean_all": lambda x: x.mean(),
}
SHAPES = [(2, 3, 5), (1, 4, 16), (3, 2, 131), (2, 7, 1), (5, 1, 300)]


class Case(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.function = CASES[name]

    def forward(self, x):
        return self.function(x)


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def check(name, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    model = Case(name).eval()
    compiled = plait.compile(model, example_inputs=(x,))
    have, want = outputs(compiled(x)), outputs(model(x))
    exact = outputs(model(x.double()))
    if dtype == torch.float32:
        assert not [s for s in compiled.plan.steps if isinstance(s, LibraryStep)], compiled.remarks
    for h, w, e in zip(have, want, exact, strict=True):
        assert h.dtype == w.dtype and h.shape == w.shape
        scale = float(e.abs().max().clamp(min=1.0))
        own = float((w.double() - e).abs().max()) / scale
        assert float((h.double() - e).abs().max()) / scale <= 2 * own + 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float32(name, shape):
    check(name, shape, torch.float32)


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "residual_norm", "sum_first"])
def test_bfloat16(name):
    check(name, (3, 2, 131), torch.bfloat16)


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "mean_last", "amax_all", "amin_pair"])
def test_nan_and_infinity_spread_as_in_torch(name):
    x = torch.randn(3, 4, 37)
    x[0, 1, 5], x[1, 2, 36], x[2, 0, 0] = float("nan"), float("inf"), float("-inf")
    model = Case(name).eval()
    compiled = plait.compile(model, example_inputs=(x,))
    torch.testing.assert_close(compiled(x), model(x), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_sizes_may_be_symbolic():
    model = Case("softmax").eval()
    compiled = plait.compile(model)
    for shape in [(2, 3, 8), (4, 5, 33), (3, 9, 130), (2, 2, 2)]:
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_global_average_pooling_after_a_convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 37, 3)

        def forward(self, x):
            return torch.relu(self.conv(x)).mean((2, 3))

    model, x = Net().eval(), torch.randn(2, 3, 11, 9)
    compiled = plait.compile(model, example_inputs=(x,))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
