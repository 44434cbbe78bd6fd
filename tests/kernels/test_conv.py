"""Convolution kernels against torch in float64: every tail, layout and epilogue."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from plait.kernels import packing, packing_conv
from plait.kernels.group import Unsupported
from plait.kernels.target import host
from plait.kernels.templates import conv

from .harness import Batch
from .spatial import Case, Layout, case, check, lay

aten = torch.ops.aten


@pytest.mark.parametrize("halo", [True, False])
def test_every_candidate_computes_the_convolution(halo: bool) -> None:
    check(
        [
            case(1, 16, 48, (3, 3), (8, 9), padding=1, halo=halo),
            case(2, 20, 40, (1, 1), (7, 5), halo=halo),
            case(1, 9, 33, (1, 7), (17, 17), padding=(0, 3), halo=halo),
            case(1, 32, 32, (3, 3), (14, 13), padding=1, groups=8, halo=halo),
            case(1, 48, 48, (5, 5), (9, 16), padding=2, groups=48, stride=2, halo=halo),
        ],
        conv,
        every=True,
    )


@pytest.mark.parametrize("halo", [True, False])
def test_kernel_shapes_strides_and_dilations(halo: bool) -> None:
    check(
        [
            case(1, 8, 16, k, (11, 12), stride=s, padding=p, dilation=d, halo=halo)
            for k, s, p, d in [
                ((1, 1), 1, 0, 1), ((1, 1), 2, 0, 1), ((3, 3), 1, 1, 1), ((3, 3), 2, 1, 1),
                ((3, 3), (1, 2), (1, 0), 1), ((3, 3), 1, 2, 2), ((3, 2), 1, (2, 0), (3, 1)),
                ((7, 1), 1, (3, 0), 1), ((1, 7), 1, (0, 3), 1), ((5, 5), 3, 2, 1),
                ((2, 2), 2, 0, 1), ((4, 4), 4, 0, 1), ((11, 12), 1, 0, 1), ((3, 3), 1, 2, 1),
                ((1, 1), 1, 1, 1), ((3, 3), 5, 1, 1),
            ]
        ],
        conv,
    )  # fmt: skip


def test_output_channel_tails_use_overlapping_vectors() -> None:
    check(
        [
            case(1, 5, oc, (3, 3), (6, 6), padding=1)
            for oc in (1, 2, 3, 7, 8, 15, 16, 17, 31, 44, 78, 109, 130)
        ],
        conv,
    )


def test_input_channel_counts() -> None:
    check(
        [case(1, c, 16, k, (6, 7)) for c in (1, 2, 3, 7, 9, 31, 65) for k in ((1, 1), (2, 3))],
        conv,
    )


def test_row_lengths_and_batches() -> None:
    check([case(2, 4, 16, (3, 3), (w, w), padding=1) for w in (1, 2, 3, 5, 17, 35)], conv)


def test_sums_of_many_taps_stay_accurate() -> None:
    check(
        [
            case(1, 96, 96, (1, 128), (1, 49), padding=(0, 64), groups=2),
            case(1, 64, 64, (25, 1), (40, 5), padding=(12, 0), groups=2),
            case(1, 64, 32, (1, 65), (2, 80), padding=(0, 32), halo=False),
        ],
        conv,
    )
    check([case(1, 80, 384, (3,), (600,), padding=1, halo=False)], conv, slack=1.2)


@pytest.mark.parametrize("halo", [True, False])
def test_groups_of_every_width(halo: bool) -> None:
    check(
        [
            case(1, g * cg, g * og, (3, 3), (7, 15), padding=1, stride=s, groups=g, halo=halo)
            for g, cg, og, s in [
                (4, 1, 1, 1), (16, 1, 1, 1), (44, 1, 1, 2), (20, 1, 2, 1), (3, 1, 4, 1),
                (8, 2, 2, 1), (12, 4, 4, 1), (5, 4, 4, 2), (4, 8, 8, 1), (4, 8, 8, 2), (6, 3, 4, 1),
                (8, 4, 2, 1), (2, 16, 16, 1), (2, 24, 24, 1), (3, 5, 3, 1), (2, 6, 40, 1),
                (4, 40, 8, 1),
            ]
        ],
        conv,
    )  # fmt: skip


def test_plain_row_major_input_and_output() -> None:
    plain = Layout(plain=True)
    check(
        [
            case(2, 3, 32, (3, 3), (15, 16), stride=2, layout=plain, label="stem"),
            case(1, 3, 64, (7, 7), (20, 20), stride=2, padding=3, layout=plain, label="stem"),
            case(1, 6, 20, (3, 3), (9, 9), padding=1, layout=plain, out=plain),
            case(1, 8, 8, (3, 3), (9, 9), padding=1, groups=8, layout=plain, label="depthwise"),
        ],
        conv,
        every=True,
    )


def test_channel_slices_of_larger_buffers_with_halos() -> None:
    inner = Layout(((2, 1), (1, 3)), skip=5, extra=21)
    check(
        [
            case(2, 12, 40, (3, 3), (8, 8), padding=1, layout=inner, out=inner),
            case(1, 12, 24, (1, 1), (6, 6), layout=inner, out=inner),
            case(1, 32, 32, (3, 3), (8, 8), padding=1, groups=32, layout=inner, out=inner),
            case(1, 32, 32, (3, 3), (8, 8), padding=1, groups=8, layout=inner, out=inner),
        ],
        conv,
        every=True,
    )


def test_half_a_halo_is_not_enough() -> None:
    check(
        [
            case(1, 8, 32, (5, 5), (9, 20), padding=2, layout=Layout(h), groups=g)
            for h in (((1, 2), (2, 2)), ((2, 2), (2, 1)), ((2, 2), (1, 2)), ((2, 0), (0, 2)))
            for g in (1, 8)
        ],
        conv,
    )


def test_without_bias() -> None:
    check(
        [
            case(1, 8, 24, (3, 3), (6, 6), padding=1, bias=False),
            case(1, 8, 8, (3, 3), (6, 6), padding=1, groups=8, bias=False),
        ],
        conv,
    )


def test_one_dimensional_and_named_padding() -> None:
    x, w, b = torch.randn(2, 6, 19), torch.randn(20, 6, 4), torch.randn(20)
    image, v = torch.randn(1, 6, 9, 10), torch.randn(20, 6, 4, 3)

    def padded(p: str) -> Any:
        return lambda x, w, b: F.conv2d(x, w, b, padding=p)

    check(
        [
            Case("1d", lambda x, w, b: aten.conv1d(x, w, b, [2], [3]), [x, w, b], {}, (1, 2)),
            Case("same", lambda x, w, b: F.conv1d(x, w, b, padding="same"), [x, w, b], {}, (1, 2)),
            *(Case(p, padded(p), [image, v, b], {}, (1, 2)) for p in ("same", "valid")),
            Case(
                "convolution",
                lambda x, w: aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
                [image, v], {}, (1,),
            ),
        ],
        conv,
    )  # fmt: skip


EPILOGUES = {
    "relu": lambda y, r: F.relu(y),
    "relu6": lambda y, r: F.relu6(y),
    "silu": lambda y, r: F.silu(y),
    "hardswish": lambda y, r: F.hardswish(y),
    "gelu": lambda y, r: F.gelu(y),
    "residual": lambda y, r: F.relu(y + r),
    "gate": lambda y, r: y * torch.sigmoid(r),
    "reread": lambda y, r: y * torch.sigmoid(y) + y,
    "two": lambda y, r: (y, F.relu(y)),
    "half": lambda y, r: F.relu(y).to(torch.bfloat16),
}


@pytest.mark.parametrize("groups", [1, 24])
def test_epilogues(groups: int) -> None:
    torch.manual_seed(1)
    x, w, b = torch.randn(1, 24, 7, 9), torch.randn(24, 24 // groups, 3, 3) / 8, torch.randn(24)
    r = torch.randn(1, 24, 7, 9)
    layouts = {0: Layout(((1, 1), (1, 1))), 3: Layout(skip=3, extra=4)}

    def followed_by(f: Any) -> Any:
        return lambda x, w, b, r: f(F.conv2d(x, w, b, padding=1, groups=groups), r)

    check(
        [
            Case(name, followed_by(f), [x, w, b, r], layouts, (1, 2))
            for name, f in EPILOGUES.items()
        ],
        conv,
        slack=2.5,
    )


def test_broadcast_operand_in_the_epilogue() -> None:
    x, w, b = torch.randn(2, 8, 6, 6), torch.randn(40, 8, 1, 1), torch.randn(40)
    scale = torch.randn(2, 40, 1, 1)
    check(
        [Case("scale", lambda x, w, b, s: F.conv2d(x, w, b) * s, [x, w, b, scale], {}, (1, 2))],
        conv,
        every=True,
    )


@pytest.mark.parametrize(("channels", "lines"), [(64, 2), (32, 0)])
def test_long_sums_fetch_the_lines_for_their_results_ahead(channels: int, lines: int) -> None:
    """What is added to a result, and where it is stored: once for each vector of a tile."""
    x, w, r = torch.randn(1, channels, 7, 7), torch.randn(32, channels, 1, 1), torch.randn(1)
    residual = Case(
        "add", lambda x, w, r: F.conv2d(x, w) + r, [x, w, r.expand(1, 32, 7, 7)], {}, (1,)
    )
    _, group, io = residual.trace()
    config = conv.candidates(group, io, host())[0]
    text = conv.lower(group, io, host(), config).func.script()
    vectors = config["ri"] * config["nv"]
    assert text.count('"llvm.prefetch"') == lines * vectors


def test_sizes_known_only_at_run_time() -> None:
    cases = [
        case(2, 6, 20, (3, 3), (9, 11), padding=1, symbolic=True, layout=layout, groups=groups)
        for layout in (Layout(), Layout(((1, 1), (1, 1))), Layout(plain=True))
        for groups in (1, 2)
    ]
    cases.append(
        case(
            3, 8, 8, (3, 3), (9, 11), padding=1, stride=2, groups=8, symbolic=True, layout=Layout()
        )
    )
    kernels = check(cases, conv)
    assert all(k.symbols for k in kernels)


def random_case(rng: random.Random) -> Case:
    groups = rng.choice([1, 1, 1, 2, 4, 8, 16])
    cg, og = rng.choice([1, 2, 3, 4, 8, 17]), rng.choice([1, 2, 4, 6, 8, 16, 33])
    kernel = (rng.randint(1, 5), rng.randint(1, 5))
    dilation = (rng.randint(1, 2), rng.randint(1, 2))
    padding = (rng.randint(0, 3), rng.randint(0, 3))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(
        max(1, r - 2 * p) + rng.randint(0, 14) for r, p in zip(reach, padding, strict=True)
    )
    halo = ((rng.randint(0, 3), rng.randint(0, 3)), (rng.randint(0, 3), rng.randint(0, 3)))
    layout = Layout(halo, skip=rng.randint(0, 3), extra=3)
    return case(
        rng.randint(1, 2), groups * cg, groups * og, kernel, size,  # type: ignore[arg-type]
        stride=(rng.randint(1, 3), rng.randint(1, 3)), padding=padding, dilation=dilation,
        groups=groups, bias=rng.random() < 0.7,
        layout=rng.choice([layout, layout, Layout(plain=True)]),
        out=rng.choice([Layout(), Layout(halo, 1, 2), Layout(plain=True)]),
    )  # fmt: skip


def test_random_convolutions() -> None:
    rng = random.Random(7)
    check([random_case(rng) for _ in range(60)], conv)


def test_candidates_are_deterministic_plain_json() -> None:
    import json

    _, group, io = case(1, 64, 96, (3, 3), (35, 35), padding=1).trace()
    first = conv.candidates(group, io, host())
    assert first == conv.candidates(group, io, host())
    assert json.loads(json.dumps(first)) == first


def test_any_partition_of_the_tasks_gives_the_same_bits() -> None:
    made = case(1, 19, 50, (3, 3), (13, 17), padding=1)
    _, group, io = made.trace()
    kernel = conv.lower(group, io, host(), conv.candidates(group, io, host())[0])
    batch = Batch([kernel])
    held = [lay(made.tensors[0], made.layouts[0]), *made.tensors[1:]]
    results = [
        batch.run("kernel", held, splits=s, packer=packing.apply)[0]
        for s in (1, 2, int(kernel.tasks))  # type: ignore[arg-type]
    ]
    assert kernel.tasks >= 8  # type: ignore[operator]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("groups", [1, 8, 48])
def test_what_lies_around_an_image_without_a_halo_does_not_matter(groups: int) -> None:
    """All around the image memory is NaN, which would show in any sum it entered."""
    made = case(1, 48, 48, (3, 3), (8, 11), padding=1, groups=groups)
    _, group, io = made.trace()
    x = group.inputs[0]
    around = made.layouts[0]
    assert around.halo == ((1, 1), (1, 1))
    io[x] = replace(io[x], halo=())
    buffer = torch.full((1, 10, 13, 48), torch.nan).movedim(-1, 1)
    inner = buffer[:, :, 1:9, 1:12]
    inner.copy_(made.tensors[0])
    configs = conv.candidates(group, io, host())
    kernels = [conv.lower(group, io, host(), c, f"k{i}") for i, c in enumerate(configs)]
    batch = Batch(kernels)
    want = made.function(*made.tensors)
    for kernel in kernels:
        (got,) = batch.run(kernel.name, [inner, *made.tensors[1:]], packer=packing.apply)
        torch.testing.assert_close(got, want, msg=str(kernel.config))


def test_packed_vectors_hold_real_channels_only() -> None:
    assert packing_conv.vector_starts(40, 16, 2) == [0, 16, 24, 24]
    weight = torch.randn(20, 3, 2, 2)
    packed = packing_conv.conv_direct(weight, groups=1, lanes=16, vectors=2)
    assert packed.shape == (1, 2, 2, 3, 32)
    assert torch.equal(packed[0, 1, 0, 2, :16], weight[:16, 2, 1, 0])
    assert torch.equal(packed[0, 1, 0, 2, 16:], weight[4:, 2, 1, 0])


@pytest.mark.parametrize(
    ("function", "remark"),
    [
        (lambda x, w: F.conv2d(x, w).flatten(1), "PLT-CNV-002"),
        (lambda x, w: F.conv2d(F.relu(x), w), "PLT-CNV-006"),
        (lambda x, w: F.conv2d(x, w).amax(1, keepdim=True), "PLT-CNV-002"),
        (lambda x, w: F.conv_transpose2d(x, w.transpose(0, 1)), "PLT-CNV-004"),
    ],
)
def test_what_has_no_template_is_declined(function: Any, remark: str) -> None:
    made = Case("", function, [torch.randn(1, 4, 6, 6), torch.randn(8, 4, 3, 3)], {}, (1,))
    if remark == "PLT-CNV-004":
        made.function = lambda x, w: aten.convolution(
            x, w, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1
        )
        made.tensors[1] = torch.randn(4, 8, 3, 3)
    with pytest.raises(Unsupported) as raised:
        _, group, io = made.trace()
        conv.candidates(group, io, host())
    assert raised.value.remark == remark


def test_weights_that_are_not_constant_and_other_dtypes_are_declined() -> None:
    made = case(1, 8, 8, (3, 3), (6, 6))
    made.const = ()
    made.layouts[1] = Layout(plain=True)
    _, group, io = made.trace()
    with pytest.raises(Unsupported, match="PLT-CNV-003"):
        conv.candidates(group, io, host())
    made = case(1, 8, 8, (3, 3), (6, 6))
    made.tensors = [t.double() for t in made.tensors]
    _, group, io = made.trace()
    with pytest.raises(Unsupported, match="PLT-CNV-008"):
        conv.candidates(group, io, host())
