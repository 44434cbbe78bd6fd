"""normalize, batch normalisation: folded where it can be, and no less accurate."""

import copy

import pytest
import torch
from torch import nn

from plait.passes.normalize import Normalize

from .graphs import Builder, aten, captured, normalized, targets


def trained(module, dtype=torch.float32):
    """The module in inference mode with statistics that are not trivial, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for norm in module.modules():
        if hasattr(norm, "reset_parameters"):
            norm.reset_parameters()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for tensor in (norm.running_mean, norm.weight, norm.bias):
                if tensor is not None:
                    tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.1)
    return module.eval().to(dtype)


CONVOLUTIONS = [
    (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (2, 3, 9, 9)),
    (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)), (2, 4, 9, 9)),
    (nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)), (2, 3, 9, 9)),
    (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8, affine=False)), (2, 3, 9)),
    (nn.Sequential(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8)), (2, 3, 4, 4, 4)),
    (nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8)), (3, 5)),
]


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS)
def test_batch_norm_vanishes_into_what_precedes_it(module, shape, decompose):
    module = trained(copy.deepcopy(module))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = normalized(captured(module, x, decompose))
    assert len(targets(result)) == 1
    exact = module.double()(x.double())
    plain = (module.float()(x) - exact).abs().max()
    assert (result(x) - exact).abs().max() <= 2 * plain


OTHERS = [
    (nn.BatchNorm1d(8), (3, 8)),
    (nn.BatchNorm1d(8), (3, 8, 4)),
    (nn.BatchNorm2d(8), (3, 8, 4, 4)),
    (nn.BatchNorm3d(8, affine=False), (3, 8, 2, 2, 2)),
    (nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8)), (2, 3, 5, 5)),
    (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(8)), (2, 8, 5)),
]


@pytest.mark.parametrize(("module", "shape"), OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_other_batch_norm_becomes_scale_and_shift(module, shape, dtype):
    module = trained(copy.deepcopy(module), dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = normalized(captured(module, x))
    kinds = [t for t in targets(result) if t in (aten.mul.Tensor, aten.add.Tensor)]
    assert kinds == [aten.mul.Tensor, aten.add.Tensor]
    assert result(x).dtype == dtype
    expected = module(x)
    exact = copy.deepcopy(module).double()(x.double())
    plain = (expected.double() - exact).abs().max()
    limit = 2 * plain + 2 * torch.finfo(torch.float64).eps * exact.abs().max()
    assert (result(x).double() - exact).abs().max() <= limit


def test_sixteen_bit_weights_are_not_rounded_again():
    module = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.bfloat16)
    x = torch.randn(1, 3, 5, 5).bfloat16()
    result = normalized(captured(module, x))
    assert targets(result)[:2] == [aten.conv2d.default, aten._to_copy.default]


def test_a_convolution_that_others_read_keeps_its_weight():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y), y

    x = torch.randn(1, 3, 2, 2)
    module = trained(Both())
    result = normalized(captured(module, x))
    assert targets(result) == [aten.conv2d.default, aten.mul.Tensor, aten.add.Tensor]
    torch.testing.assert_close(result(x), module(x))


def test_statistics_that_overflow_or_come_from_outside_are_left_alone():
    b = Builder()
    x, mean, var = b.input(2, 3), b.input(3), b.input(3)
    bn = b.call(aten.batch_norm.default, x, None, None, mean, var, False, 0.1, 1e-5, False)
    outcome = Normalize().run(b.finish(bn))
    assert [r.id for r in outcome.remarks] == ["PLT-NRM-003"]
    b = Builder()
    mean, var = b.constant(torch.zeros(3)), b.constant(torch.full((3,), -1.0))
    x = b.input(2, 3)
    bn = b.call(aten.batch_norm.default, x, None, None, mean, var, False, 0.1, 1e-5, False)
    assert targets(normalized(b.finish(bn))) == [aten.batch_norm.default]


def test_a_weight_that_would_overflow_stays():
    module = trained(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    with torch.no_grad():
        module[0].weight[7] = 1e30
        module[1].weight[7] = 1e20
    graph_module = normalized(captured(module, torch.zeros(1, 3, 4, 4)))
    constants = [t for n, t in graph_module.named_parameters()] + list(graph_module.buffers())
    assert all(t.isfinite().all() for t in constants)
    assert aten.mul.Tensor in targets(graph_module)


def test_steps_can_be_switched_off():
    module = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    graph_module = captured(module, torch.randn(1, 3, 5, 5), decompose=False)
    assert Normalize(fold_batch_norm=False).run(graph_module).graph_module is graph_module
