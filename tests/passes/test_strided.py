"""Views by strides: elements by number where their memory is known, untouched elsewhere."""

import pytest
import torch

from .graphs import Builder, assert_same_bits, aten, inputs_for, normalized, targets


def strided_views(b: Builder, x: torch.fx.Node) -> list[torch.fx.Node]:
    """Views by strides of a tensor of shape [3, 4, 2] that fills its memory, and of its views."""
    part = b.call(aten.select.int, b.call(aten.permute.default, x, [1, 0, 2]), 0, 2)
    first = b.call(aten.as_strided.default, part, [2, 2], [3, 2])
    return [
        first,
        b.call(aten.as_strided.default, x, [5, 4, 3], [4, 1, 2], 0),
        b.call(aten.as_strided.default, part, [2, 3], [0, 7], 1),
        b.call(aten.as_strided.default, first, [4], [5], 3),
        b.call(aten.as_strided.default, x, [], [], 7),
        b.call(aten.as_strided.default, x, [0, 2], [1, 1]),
    ]


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1], [2, 0, 1], [1, 2, 0]])
def test_views_by_strides_become_elements_by_number(order):
    b = Builder()
    shape = [[3, 4, 2][d] for d in order]
    x = b.call(aten.exp.default, b.input(*shape))
    x = b.call(aten.permute.default, x, [order.index(d) for d in range(3)])
    x = b.call(aten.relu.default, x)  # its memory is in the order of its argument's
    graph_module = b.finish(*(b.call(aten.neg.default, y) for y in strided_views(b, x)))
    result = normalized(graph_module)
    assert aten.as_strided.default not in targets(result)
    inputs = inputs_for(graph_module, 0)
    assert_same_bits(result(*inputs), graph_module(*inputs))


def test_views_by_strides_of_memory_that_is_not_known_stay():
    b = Builder()
    x = b.input(3, 4, 2)
    copied = b.call(aten.reshape.default, b.call(aten.permute.default, x, [2, 1, 0]), [6, 4])
    views = [*strided_views(b, x), b.call(aten.as_strided.default, copied, [2], [5])]
    graph_module = b.finish(*(b.call(aten.neg.default, y) for y in views))
    result = normalized(graph_module)
    assert targets(result).count(aten.as_strided.default) == len(views)
    inputs = inputs_for(graph_module, 0)
    assert_same_bits(result(*inputs), graph_module(*inputs))


def test_no_copy_goes_where_strides_are_seen():
    b = Builder()
    y = b.call(aten.clone.default, b.call(aten.transpose.int, b.input(3, 4), 0, 1))
    y = b.call(aten.clone.default, y, memory_format=torch.contiguous_format)
    graph_module = b.finish(b.call(aten.as_strided.default, y, [12], [1], 0))
    inputs = inputs_for(graph_module, 0)
    assert_same_bits(normalized(graph_module)(*inputs), graph_module(*inputs))
