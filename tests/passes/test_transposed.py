"""normalize, transposed convolutions: convolutions where weights are known, untouched elsewhere."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db

from .graphs import Builder, aten, captured, inputs_for, normalized, targets

TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input}
PLAIN = {aten.conv1d.default, aten.conv2d.default}


def transposed(x, weight, bias, *options):
    """A graph that applies a transposed convolution by constants to an input."""
    b = Builder()
    operands = [None if t is None else b.constant(t) for t in (weight, bias)]
    target = TRANSPOSED[weight.dim() - 2]
    return b.finish(b.call(target, b.input(*x.shape, dtype=x.dtype), *operands, *options))


def stays(graph_module):
    result = normalized(graph_module)
    return not PLAIN & set(targets(result)) and set(targets(result)) & set(TRANSPOSED.values())


def assert_becomes_convolutions(graph_module, special=False):
    result = normalized(graph_module)
    assert PLAIN & set(targets(result)) and not set(targets(result)) & set(TRANSPOSED.values())
    inputs = inputs_for(graph_module, 0, special)
    torch.testing.assert_close(result(*inputs), graph_module(*inputs), equal_nan=True)


GEOMETRIES = [
    (taps, stride, crop, more)
    for taps, stride, crop in itertools.product((2, 3, 4, 5), (1, 2, 3), (0, 1, 3))
    for more in range(min(stride, 2))
    if taps >= stride and 3 * stride - 2 * crop + taps + more > 0
]


@pytest.mark.parametrize(("taps", "stride", "crop", "more"), GEOMETRIES)
def test_transposed_convolutions_become_convolutions(taps, stride, crop, more):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 4, 4), torch.randn(6)
    weight = torch.randn(4, 3, taps)
    assert_becomes_convolutions(transposed(x, weight, bias, [stride], [crop], [more], 2))
    # another geometry in the second dimension
    x, weight = torch.randn(2, 4, 4, 3), torch.randn(4, 3, taps, 4)
    options = [stride, 2], [crop, 1], [more, 1], 2
    assert_becomes_convolutions(transposed(x, weight, None, *options))


@pytest.mark.parametrize("taps", [2, 3])
def test_infinities_and_nan_stay_where_they_are(taps):
    x, weight = torch.empty(1, 2, 5, 5), torch.rand(2, 3, taps, taps) + 0.1
    assert_becomes_convolutions(transposed(x, weight, None, [2, 2]), special=True)


def each(value, rank):
    value = [value] if isinstance(value, int) else list(value)
    return value * rank if len(value) == 1 else value


def test_samples_of_torch():
    """Every sample, unbatched ones and those with dilation included, keeps its answer."""
    rewritten = 0
    names = ("nn.functional.conv_transpose1d", "nn.functional.conv_transpose2d")
    for info in (info for info in op_db if info.name in names):
        rank = 1 + names.index(info.name)
        for sample in info.sample_inputs("cpu", torch.float32):
            given = sample.kwargs
            weight, bias = (*sample.args, given.get("bias"))[:2]
            defaults = (("stride", 1), ("padding", 0), ("output_padding", 0))
            options = [each(given.get(name, default), rank) for name, default in defaults]
            options += [given.get("groups", 1), each(given.get("dilation", 1), rank)]
            graph_module = transposed(sample.input, weight, bias, *options)
            result = normalized(graph_module)
            rewritten += bool(PLAIN & set(targets(result)))
            torch.testing.assert_close(result(sample.input), graph_module(sample.input))
    assert rewritten >= 5


def test_others_are_left_to_the_library():
    x, weight = torch.empty(2, 4, 5), torch.randn(4, 3, 4)
    assert stays(transposed(x, weight, None, [2], [0], [0], 1, [2]))  # dilated
    assert stays(transposed(x, weight, None, [5]))  # some results have no taps
    assert stays(transposed(x[0], weight, None, [2]))  # no batch
    half = torch.empty(2, 4, 5, dtype=torch.bfloat16), weight.bfloat16()
    assert stays(transposed(*half, None, [2]))
    assert stays(transposed(torch.empty(2, 4, 9, 9), torch.randn(4, 3, 5, 5), None, [4, 4]))
    b = Builder()
    computed = b.finish(b.call(TRANSPOSED[1], b.input(2, 4, 5), b.input(4, 3, 4), None, [2]))
    assert stays(computed)


def test_sizes_may_be_open():
    torch.manual_seed(0)
    layers = nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3, 2, 1, 1)
    model = nn.Sequential(*layers).eval()
    sizes = {d: torch.export.Dim(f"s{d}", min=2, max=64) for d in (0, 2, 3)}
    graph_module = captured(model, torch.randn(2, 6, 5, 7), False, (sizes,))
    result = normalized(graph_module)
    assert not set(targets(result)) & set(TRANSPOSED.values())
    for shape in ((2, 6, 5, 7), (3, 6, 4, 9), (5, 6, 8, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(result(x), model(x))
