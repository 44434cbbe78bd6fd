"""Where values lie: what convolutions and poolings read has neighbouring channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.runtime.plan import KernelStep, Plan

C = 24


class Tokens(nn.Module):
    """A depthwise convolution, then a product over channels; their sum goes to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.mix = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + mixed


class Normalised(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(C, C, 1)
        self.norm = nn.GroupNorm(groups, C)
        self.second = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(self.norm(y).sigmoid()) + y


class Heads(nn.Module):
    """Products of matrices become an image of their own, which is copied for the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 12)
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(torch.relu(self.mix(x) + x))


def compiled(model: nn.Module) -> tuple[Plan, list[KernelStep]]:
    """The plan of a model of images, whose answer is right, and its kernels."""
    torch.manual_seed(0)
    x = torch.randn(2, C, 10, 12)
    found = plait.compile(model, tune="off")
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)
    assert found.plan is not None
    return found.plan, [s for s in found.plan.steps if isinstance(s, KernelStep)]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(Tokens(), Tokens()),
        Normalised(1),
        Normalised(4),
        nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(4, C), nn.MaxPool2d(3)),
        Heads(),
    ],
    ids=["tokens", "one group", "groups", "pooled groups", "heads"],
)
def test_convolutions_and_poolings_read_neighbouring_channels(model: nn.Module) -> None:
    plan, steps = compiled(model.eval())
    images = [
        ref
        for step in steps
        if "conv" in step.name or "pool" in step.name
        for ref in step.args[: step.reads]
        if len(ref.shape) == 4 and plan.buffers[ref.buffer].kind in ("arena", "static")
    ]
    assert images and all(ref.strides[1] == 1 for ref in images)


class Block(nn.Module):
    """As in ConvNeXt: a norm and a linear layer over the channels of a convolution's result."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.norm = nn.LayerNorm(C)
        self.linear = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + self.linear(self.norm(y) * y.sigmoid()).permute(0, 3, 1, 2)


def test_what_follows_a_permuted_image_keeps_its_memory() -> None:
    _, steps = compiled(nn.Sequential(Block(), Block()).eval())
    rows = [
        ref
        for step in steps
        if "linear" in step.name
        for ref in step.args
        if ref.shape[-1] == C and len(ref.shape) == 4
    ]
    assert rows and all(ref.strides[-1] == 1 for ref in rows)


class Turned(nn.Module):
    """Weights of heads are multiplied with the heads last, and used with the heads first."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[0]
        product = torch.softmax(x, -1).permute(1, 2, 0) * torch.softmax(-x, 1).permute(1, 2, 0)
        return torch.bmm(product.permute(2, 0, 1), x.transpose(1, 2))


def test_what_is_computed_from_turned_tensors_alone_stays_turned() -> None:
    _, steps = compiled(Turned().eval())
    (step,) = (s for s in steps if s.name.startswith("mul"))
    assert [arg.strides for arg in step.args] == [(12, 1, 120)] * 3


def test_single_elements_have_no_order() -> None:
    model = plait.compile(lambda x: torch.relu(x.sum()) * 2, tune="off")
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), torch.relu(x.sum()) * 2)
    assert model.plan is not None


class Flattens(nn.Module):
    """What has fewer dimensions than an image lies in no order of an image's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(x)
        return y.flatten(2).exp(), y.amax(-1).exp(), y.mean(-1).flip(-1)


def test_orders_are_of_as_many_dimensions() -> None:
    compiled(Flattens().eval())
