"""The pointwise template: loops, tasks, layouts, symbolic sizes, several outputs."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.export import Dim as ExportDim
from torch.export import export

from plait.kernels.abi import Kernel, TensorArg, contiguous_strides
from plait.kernels.group import Group, Unsupported
from plait.kernels.target import host
from plait.kernels.templates import pointwise

from .harness import Batch, run_kernel
from .traced import group_for, outputs_of, tensor_arg, trace


def lower(
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    outputs: dict[int, TensorArg] | None = None,
    grain: int = 32768,
    name: str = "kernel",
    abreast: int = 4,
) -> Kernel:
    """The kernel of a call, all its results in one group; contiguous outputs unless given."""
    module = trace(function, tensors)
    results = outputs_of(module)
    group = group_for(results)
    given = dict(zip(module.graph.find_nodes(op="placeholder"), tensors, strict=True))
    io = {n: tensor_arg(given[n]) for n in group.inputs}
    for i, node in enumerate(results):
        empty = torch.empty(node.meta["val"].shape, dtype=node.meta["val"].dtype)
        io[node] = (outputs or {}).get(i, tensor_arg(empty))
    return pointwise.lower(group, io, host(), {"grain": grain, "abreast": abreast}, name)


def compare(function, tensors, kernel, symbols=None) -> None:
    """Runs a kernel and compares all outputs with torch."""
    got = run_kernel(kernel, tensors, symbols)
    want = function(*tensors)
    for a, b in zip(got, want if isinstance(want, (tuple, list)) else [want], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, check_stride=False)


def test_positions_are_found_once_for_all_channels() -> None:
    """Where the lanes are channels, each tap is a vector of neighbours; in a plain image the rows
    stay rows.
    """

    def enlarged(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.interpolate(x, size=(9, 31), mode="bilinear", align_corners=False)
        return y * 2 + y

    for shape in ((2, 32, 5, 7), (1, 37, 20, 3), (2, 3, 40, 50)):
        x = torch.randn(shape)
        compare(enlarged, [x], plain := lower(enlarged, [x]))
        last = {"memory_format": torch.channels_last}
        out = tensor_arg(torch.empty(shape[:2] + (9, 31)).contiguous(**last))
        x = x.contiguous(**last)
        kernel = lower(enlarged, [x], {0: out})
        compare(enlarged, [x], kernel)
        assert re.search(r"scratch\w*: T\.int64", str(plain.func)), "rows of each lane"
        if shape[1] > 3:
            assert '"int64", annotations' not in str(kernel.func), "places of each lane"


@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 31, 100, 1000, 5001, 70000])
@pytest.mark.parametrize("grain", [64, 4096, 1 << 20])
@pytest.mark.parametrize("abreast", [1, 4])
def test_any_size_and_grain(size: int, grain: int, abreast: int) -> None:
    tensors = [torch.randn(size), torch.randn(size)]
    function = lambda a, b: torch.relu(a) * b + 1  # noqa: E731
    compare(function, tensors, lower(function, tensors, grain=grain, abreast=abreast))


def test_small_work_is_one_task_and_large_work_several() -> None:
    assert lower(torch.relu, [torch.randn(4, 5, 6)]).tasks == 1
    large = lower(torch.relu, [torch.randn(1 << 20)]).tasks
    assert isinstance(large, int) and 64 <= large <= 1024


def test_broadcasting_along_each_dimension() -> None:
    x = torch.randn(4, 6, 40)
    function = lambda x, a, b, c, d: x * a + b - c * d  # noqa: E731
    tensors = [x, torch.randn(40), torch.randn(6, 1), torch.randn(4, 1, 1), torch.randn(())]
    compare(function, tensors, lower(function, tensors))


def test_channels_last_output_and_input_run_over_channels() -> None:
    x = torch.randn(2, 24, 5, 7).to(memory_format=torch.channels_last)
    bias = torch.randn(24, 1, 1)
    function = lambda x, b: torch.relu(x + b)  # noqa: E731
    kernel = lower(function, [x, bias], {0: tensor_arg(x)})
    compare(function, [x, bias], kernel)
    assert "T.vectorized" in str(kernel.func)


def test_layout_change_with_halo_writes_the_interior_only() -> None:
    x = torch.randn(1, 5, 6, 7)
    halo = ((0, 0), (0, 0), (1, 1), (2, 1))
    out = TensorArg(torch.float32, (1, 5, 6, 7), (8 * 10 * 5, 1, 50, 5), halo)
    kernel = lower(torch.neg, [x], {0: out})
    compare(torch.neg, [x], kernel)  # the harness checks that nothing else was written


def test_slice_of_a_larger_buffer_as_output() -> None:
    x = torch.randn(6, 20)
    kernel = lower(torch.exp, [x], {0: TensorArg(torch.float32, (6, 20), (64, 1))})
    compare(torch.exp, [x], kernel)


def test_several_outputs_of_equal_count_and_other_shape() -> None:
    def function(x):
        y = torch.tanh(x)
        return y, (y * 2).reshape(12, 10), (y > 0).flatten()

    x = torch.randn(4, 30)
    compare(function, [x], lower(function, [x], grain=64))


def test_outputs_of_different_counts_are_declined() -> None:
    with pytest.raises(Unsupported) as error:
        lower(lambda x: (x + 1, x[:, :1] * 2), [torch.randn(4, 8)])
    assert error.value.remark == "PLT-PNT-002" and error.value.hint


def test_other_operators_are_declined() -> None:
    with pytest.raises(Unsupported) as error:
        lower(lambda x: x.logcumsumexp(0) + 1, [torch.randn(4, 8)])
    assert error.value.remark == "PLT-PNT-001"


def test_join_is_written_part_by_part() -> None:
    function = lambda a, b, c: torch.cat([a * 2, b.t(), c], 1)  # noqa: E731
    tensors = [torch.randn(6, 20), torch.randn(33, 6), torch.randn(6, 1)]
    kernel = lower(function, tensors, grain=256)
    compare(function, tensors, kernel)
    assert "if_then_else" not in str(kernel.func)


def test_rotary_embedding_needs_no_branch() -> None:
    def function(x, cos, sin):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    tensors = [torch.randn(2, 4, 10, 64), torch.randn(10, 64), torch.randn(10, 64)]
    kernel = lower(function, tensors)
    compare(function, tensors, kernel)
    assert "T.vectorized" in str(kernel.func)


def test_attention_heads_are_split_without_divisions() -> None:
    function = lambda x: x.view(2, 10, 4, 32).transpose(1, 2) * 2  # noqa: E731
    x = torch.randn(2, 10, 128)
    kernel = lower(function, [x])
    compare(function, [x], kernel)
    merge = lambda x: x.transpose(1, 2).reshape(2, 10, 128) * 2  # noqa: E731
    y = torch.randn(2, 4, 10, 32)
    compare(merge, [y], lower(merge, [y]))


def test_transposed_input() -> None:
    function = lambda x, y: x.t() + y  # noqa: E731
    tensors = [torch.randn(70, 50), torch.randn(50, 70)]
    compare(function, tensors, lower(function, tensors, grain=512))


def test_long_chains_compile_in_reasonable_size() -> None:
    def function(x):
        for _ in range(25):
            x = torch.sigmoid(x) * x + torch.tanh(x)
        return x

    x = torch.randn(40)
    kernel = lower(function, [x])
    assert len(str(kernel.func)) < 400_000  # written out per use it would be 2^50 times as long
    compare(function, [x], kernel)


def test_split_of_the_tasks_does_not_matter() -> None:
    x = torch.randn(5001)
    function = lambda x: torch.sin(x) / 3  # noqa: E731
    kernel = lower(function, [x], grain=1024)
    batch = Batch([kernel])
    (whole,), (parts,) = (batch.run(kernel.name, [x], splits=n) for n in (1, 7))
    assert torch.equal(whole, parts)


def _exported(function, tensors, dims):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    program = export(Module(), tuple(tensors), dynamic_shapes=(tuple(dims),), strict=False)
    return program.graph_module


SYMBOLIC = {
    "gelu": (lambda x: torch.nn.functional.gelu(x) * 2, ["n*", 32]),
    "inner": (lambda x: torch.relu(x) + 1, [3, "n*"]),
    "heads": (lambda x: x.view(2, -1, 4, 8).transpose(1, 2) * 2, [2, "n*", 32]),
    "merge": (lambda x: x.transpose(1, 2).reshape(2, -1, 32) + 1, [2, 4, "n*", 8]),
    "mask": (lambda x: torch.tril(torch.ones(x.shape[0], x.shape[0])) * x, ["n*", 1]),
    "shift": (lambda x: torch.cat([x[1:], x[:1] * 2]), ["n*", 5]),
    "joined": (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1) + 1, [3, "n*"]),
    "written": (lambda x: torch.slice_scatter(x + 1, x[:, :1], 1, x.shape[1] - 1), [3, "n*"]),
    "flat": (lambda x: x.flatten() - 1, ["n*", 6]),
    "last": (lambda x: x[-2:] + x.shape[0], ["n*", 6]),
    "half": (lambda x: x.bfloat16() * 3, [2, "n*"]),
    "positions": (lambda x: torch.arange(x.shape[0])[:, None] + x, ["n*", 6]),
}


@pytest.mark.parametrize("name", SYMBOLIC)
@pytest.mark.parametrize("abreast", [1, 4])
def test_sizes_known_at_run_time(name: str, abreast: int) -> None:
    function, dims = SYMBOLIC[name]
    example = torch.randn([7 if d == "n*" else d for d in dims])
    module = _exported(
        function,
        [example],
        [[ExportDim("n", min=3, max=999) if d == "n*" else ExportDim.STATIC for d in dims]],
    )
    (out,) = outputs_of(module)
    group = group_for([out])
    (given,) = group.inputs
    shapes = {n: tuple(_size(s) for s in n.meta["val"].shape) for n in (given, out)}
    io = {n: TensorArg(n.meta["val"].dtype, s, _contiguous(s)) for n, s in shapes.items()}
    kernel = pointwise.lower(group, io, host(), {"grain": 512, "abreast": abreast})
    (symbol,) = kernel.symbols
    batch = Batch([kernel])
    for size in (2, 7, 16, 33, 64, 100, 300):
        x = torch.randn([size if d == "n*" else d for d in dims])
        (got,) = batch.run(kernel.name, [x], {symbol: size})
        torch.testing.assert_close(got, function(x), check_stride=False)


def test_places_of_short_rows_are_not_found_one_by_one() -> None:
    """Channels in two groups are shuffled pair by pair; quotients of sizes known at run time are
    taken once for all pairs of a pixel.
    """
    function = lambda x: x.unflatten(1, (2, 10)).transpose(1, 2).flatten(1, 2) + 1  # noqa: E731
    last = {"memory_format": torch.channels_last}
    dims = [ExportDim.DYNAMIC, ExportDim.STATIC, ExportDim.DYNAMIC, ExportDim.DYNAMIC]
    module = _exported(function, [torch.randn(2, 20, 6, 7).contiguous(**last)], [dims])
    (out,) = outputs_of(module)
    group = group_for([out])
    (given,) = group.inputs
    value = given.meta["val"]
    arg = TensorArg(value.dtype, *(tuple(map(_size, s)) for s in (value.shape, value.stride())))
    kernel = pointwise.lower(group, {given: arg, out: arg}, host(), {"grain": 512, "abreast": 4})
    text = str(kernel.func)
    pairs = text[text.index("range(T.int64(10))") :]
    assert not re.search("//|%", pairs), text
    batch = Batch([kernel])
    for shape in ((1, 20, 1, 1), (2, 20, 5, 3), (3, 20, 8, 16)):
        x = torch.randn(shape).contiguous(**last)
        names = {str(s): d for s, d in zip(arg.shape, shape, strict=True) if str(s) != "20"}
        (got,) = batch.run(kernel.name, [x], names)
        torch.testing.assert_close(got, function(x), check_stride=False)


def test_reshapes_of_dense_memory_need_no_divisions_at_sizes_known_at_run_time() -> None:
    """Boxes that a detector finds at each place, in rows of four, from channels last."""
    function = lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) * 2  # noqa: E731
    dims = [ExportDim.DYNAMIC, ExportDim.STATIC, ExportDim.DYNAMIC, ExportDim.DYNAMIC]
    module = _exported(function, [torch.randn(2, 12, 6, 7)], [dims])
    (out,) = outputs_of(module)
    (turned,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    nodes = tuple(n for n in turned.users) + (out,)
    io = {}
    for node in (turned, out):
        shape = tuple(map(_size, node.meta["val"].shape))
        io[node] = TensorArg(torch.float32, shape, _contiguous(shape))
    group = Group("pointwise", nodes, (turned,), (out,))
    kernel = pointwise.lower(group, io, host(), {"grain": 4096, "abreast": 4})
    loops = str(kernel.func)[str(kernel.func).index("T.vectorized") :]
    assert not re.search(r"% T.int64\(12\)|// T.int64\(12\)", loops), loops
    batch = Batch([kernel])
    for shape in ((1, 1, 1, 12), (2, 9, 5, 12)):
        x = torch.randn(shape)
        sizes = zip(io[turned].shape, shape, strict=True)
        names = {str(s): d for s, d in sizes if str(s) != "12"}
        (got,) = batch.run(kernel.name, [x], names)
        torch.testing.assert_close(got, x.reshape(shape[0], -1, 4) * 2, check_stride=False)


def test_what_lies_across_the_output_is_read_by_cache_lines() -> None:
    """From channels last to windows, or to planes: sixteen channels of some pixels at a time."""
    windows = lambda x: x.unfold(2, 6, 4).unfold(3, 6, 4).reshape(1, 32, 4, 36) + 1  # noqa: E731
    planes = lambda x: x.relu().contiguous(memory_format=torch.contiguous_format)  # noqa: E731
    added = lambda x: x + torch.arange(x.shape[1] * 1.0)[:, None, None]  # noqa: E731
    for function, shape in (
        (windows, (1, 32, 10, 10)),
        (planes, (2, 48, 17, 20)),
        (planes, (1, 40, 17, 20)),  # no whole number of lines
        (added, (2, 16, 3, 100)),
    ):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        out = tensor_arg(torch.empty(function(x).shape))
        for grain in (4096, 32768):
            kernel = lower(function, [x], {0: out}, grain=grain)
            compare(function, [x], kernel)
            lines = re.search(r"(range|grid)\(T.int64\(16\)", str(kernel.func))
            assert bool(lines) == (shape[1] % 16 == 0), str(kernel.func)


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _contiguous(shape: Sequence[Any]) -> tuple[Any, ...]:
    return contiguous_strides(tuple(shape))


def _random_function(rng: random.Random) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A random chain of pointwise and view operators on a (4, 6, 8) and a (6, 1) tensor."""
    steps: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        lambda x, y: torch.sigmoid(x) - y,
        lambda x, y: (x * y).relu() + x,
        lambda x, y: torch.where(x > 0, x, x * 0.1),
        lambda x, y: x.reshape(8, 6, 4).permute(2, 1, 0).contiguous(),
        lambda x, y: x.flip(2) + 1,
        lambda x, y: torch.cat([x[..., 3:], x[..., :3]], 2),
        lambda x, y: torch.nn.functional.pad(x, (1, 0, 0, 0, 2, 0))[2:, :, :8],
        lambda x, y: x.roll(3, 1).clamp(-2, 2),
        lambda x, y: torch.stack([x[0], x[1], y.expand(6, 8), x[3]]),
        lambda x, y: x.reshape(2, 2, 48).transpose(0, 1).reshape(4, 6, 8),
        lambda x, y: x.bfloat16().float(),
        lambda x, y: torch.exp(-x.abs()) * torch.tanh(x),
        lambda x, y: x.tril().masked_fill(x > 1.5, 0.25),
        lambda x, y: x[:, torch.arange(6)].flip(1),
    ]
    chosen = [rng.choice(steps) for _ in range(4)]

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for step in chosen:
            x = step(x, y)
        return x

    return function


def test_random_graphs() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    functions = [_random_function(rng) for _ in range(30)]
    x, y = torch.randn(4, 6, 8), torch.randn(6, 1)
    kernels = []
    for i, function in enumerate(functions):
        kernels.append(lower(function, [x, y], grain=rng.choice([64, 32768]), name=f"k{i}"))
    batch = Batch(kernels)
    for kernel, function in zip(kernels, functions, strict=True):
        inputs = [x, y][: len(kernel.inputs)]
        (got,) = batch.run(kernel.name, inputs)
        torch.testing.assert_close(got, function(x, y), check_stride=False)


def test_joins_of_joins_are_declined_before_they_explode() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        for shift in range(1, 12):
            x = torch.cat([x[shift:] * 2, x[:shift]])
        return x

    with pytest.raises(Unsupported, match="more than 512 times"):
        lower(function, [torch.randn(64)], grain=32768, name="k")
