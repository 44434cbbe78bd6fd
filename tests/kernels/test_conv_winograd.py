"""Winograd convolution against torch in float64: odd sizes, tails, layouts, epilogues."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from plait.kernels import packing, packing_conv
from plait.kernels.minimal_filtering import filters
from plait.kernels.target import host
from plait.kernels.templates import conv, conv_winograd
from plait.kernels.templates.conv_spec import parse

from .spatial import Case, Layout, case, check

HALO = ((1, 1), (1, 1))


def configs(group: Any, io: Any, target: Any) -> list[dict[str, Any]]:
    """Of what the cost model offers some of all sizes of patches, and cut tasks, uneven ones."""
    spec = parse(group, io)
    found = [config for _, config in conv_winograd.estimates(spec, target)]
    chosen = list({(c["high"], c["wide"]): c for c in reversed(found)}.values())[::-1][:4]
    high, wide = (filters(*a)[0].outputs for a in ((spec.kh, spec.sh), (spec.kw, spec.sw)))
    ri = min(6, spec.n * -(-spec.oh // high) * -(-spec.ow // wide))
    small = {"kind": "winograd", "high": high, "wide": wide, "ri": ri, "nv": 1, "tiles": ri}
    chosen += [small | {"parts": parts} for parts in (1, 2)]
    return chosen


WINOGRAD = SimpleNamespace(candidates=configs, lower=conv.lower)


def test_odd_and_even_images_of_several_batches() -> None:
    check(
        [
            case(n, 16, 32, (3, 3), size, padding=1)
            for n, size in [(1, (8, 8)), (1, (7, 9)), (2, (6, 13)), (3, (5, 5)), (1, (2, 2))]
        ],
        WINOGRAD,
        every=True,
    )


def test_no_padding_and_more_of_it() -> None:
    check(
        [case(1, 16, 16, (3, 3), (9, 8), padding=p) for p in (0, (1, 0), (0, 2), 2)],
        WINOGRAD,
        every=True,
    )


def test_channels_that_fill_no_vector() -> None:
    check(
        [
            case(1, c, oc, (3, 3), (7, 6), padding=1)
            for c, oc in [(17, 16), (16, 17), (33, 50), (24, 100), (80, 192)]
        ],
        WINOGRAD,
        every=True,
    )


def test_deep_sums_stay_accurate() -> None:
    check([case(1, 448, 48, (3, 3), (8, 8), padding=1)], WINOGRAD, every=True)
    check([case(1, 1024, 32, (3, 3), (7, 7), padding=1)], WINOGRAD)


def test_slices_of_larger_buffers_and_what_follows() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 20, 9, 9), torch.randn(36, 20, 3, 3) / 13, torch.randn(36)]
    other = torch.randn(1, 36, 9, 9)

    def function(x: Any, w: Any, b: Any, y: Any) -> Any:
        return F.relu(F.conv2d(x, w, b, 1, 1) + y)

    layouts = {0: Layout(HALO, 4, 12), 3: Layout(HALO, 0, 3)}
    out = Layout(HALO, 8, 16)
    check([Case("concat", function, [*tensors, other], layouts, (1, 2), out)], WINOGRAD, every=True)


@pytest.mark.parametrize(
    "other",
    [
        {"stride": 3},
        {"dilation": 2, "padding": 2},
        {"groups": 4},
        {"halo": False},
        {"symbolic": True},
    ],
)
def test_what_it_does_not_cover_goes_elsewhere(other: dict[str, Any]) -> None:
    made = case(1, 32, 32, (3, 3), (9, 9), **{"padding": 1, **other})
    _, group, io = made.trace()
    assert not conv_winograd.covers(parse(group, io), io, host())
    assert all(c["kind"] != "winograd" for c in conv.candidates(group, io, host()))


def test_large_images_are_offered_it_first_and_the_direct_form_too() -> None:
    _, group, io = case(1, 64, 96, (3, 3), (35, 35), padding=1).trace()
    kinds = [c["kind"] for c in conv.candidates(group, io, host())]
    assert kinds[0] == "winograd" and "direct" in kinds[:3]


def test_taps_along_one_axis() -> None:
    check(
        [
            case(1, 16, 32, taps, (h, w), padding=(taps[0] // 2, taps[1] // 2))
            for taps, h, w in [((1, 7), 5, 17), ((7, 1), 13, 4), ((1, 3), 8, 8), ((3, 1), 7, 3)]
        ],
        WINOGRAD,
        every=True,
    )
    check([case(1, 33, 40, (4,), (21,), padding=1)], WINOGRAD, every=True)


def test_many_taps() -> None:
    check(
        [
            case(2, 16, 24, (5, 5), (9, 7), padding=2),
            case(1, 24, 16, (2, 4), (6, 11)),
            case(1, 16, 16, (6, 3), (12, 6), padding=(0, 1)),
        ],
        WINOGRAD,
        every=True,
    )


def test_pairs_that_cost_digits_are_not_used() -> None:
    _, group, io = case(1, 32, 32, (5, 5), (20, 20), padding=2).trace()
    found = conv_winograd.estimates(parse(group, io), host())
    sizes = {(c["high"], c["wide"]) for _, c in found}
    assert (2, 2) in sizes and (4, 4) not in sizes  # nested along both axes


def test_stride_2() -> None:
    check(
        [
            case(1, 16, 32, (3, 3), (11, 12), stride=2, padding=1),
            case(2, 32, 16, (3, 3), (17, 9), stride=2),
            case(1, 16, 16, (5, 7), (16, 21), stride=(2, 1), padding=(2, 3)),
            case(1, 24, 32, (3,), (40,), stride=2, padding=1),
        ],
        WINOGRAD,
        every=True,
    )


def test_groups() -> None:
    check(
        [
            case(1, 64, 64, (3, 3), (7, 7), padding=1, groups=4),
            case(2, 80, 120, (3, 3), (6, 5), padding=1, groups=2),
            case(1, 64, 32, (3, 3), (9, 9), stride=2, padding=1, groups=2),
        ],
        WINOGRAD,
        every=True,
    )


def test_weights_are_transformed_in_blocks() -> None:
    weight = torch.randn(20, 5, 3, 3)
    packed = packing.PACKERS["conv_winograd"](
        weight, groups=1, lanes=16, vectors=2, down=1, across=1, high=2, wide=2
    )
    assert packed.shape == (1, 16, 5, 32) and packed.is_contiguous()
    starts = packing_conv.vector_starts(20, 16, 2)
    assert starts == [0, 4]
    # Position (0, 0) of G w G' is the first tap itself, (3, 3) the last.
    for vector, start in enumerate(starts):
        block = packed[0, :, :, vector * 16 : vector * 16 + 16]
        torch.testing.assert_close(block[0], weight[start : start + 16, :, 0, 0].t())
        torch.testing.assert_close(block[15], weight[start : start + 16, :, 2, 2].t())
