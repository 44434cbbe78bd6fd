"""Convolution: picks a template and its tile sizes for a group around a convolution node.

`conv_direct` covers every 1-d and 2-d convolution; `conv_winograd` saves a third to a half of the
multiplications where there are several taps along an axis; `conv_lanes` covers depthwise ones and
those whose groups are narrower than a vector register, where it is several times as fast.
"""

from __future__ import annotations

from typing import Any

from ..abi import Kernel
from ..group import IO, Group
from ..target import Target
from . import conv_direct, conv_lanes, conv_tiling, conv_winograd
from .conv_common import lane_count
from .conv_spec import CONVOLUTIONS, parse, required_halo
from .half_factors import leave_to_tiles

__all__ = ["CONVOLUTIONS", "candidates", "lower", "required_halo"]

MOST = 6  # candidates worth a measurement


def candidates(group: Group, io: IO, target: Target) -> list[dict[str, Any]]:
    """At most six configurations for `lower`, the best analytic guess first.

    Raises `Unsupported` for groups that no convolution template covers.
    """
    spec = parse(group, io)
    leave_to_tiles(target, io[spec.x].dtype, spec.flops)
    if conv_lanes.covers(spec, io, target):
        found = conv_lanes.configs(spec, io, target)
        if spec.og * 2 >= lane_count(spec.oc, target):  # half-empty vectors may still win,
            direct = conv_tiling.configs(spec, io, target)[:2]
            # and do where a stride leaves few taps to share a permuted input.
            found = direct + found if spec.sw > 1 else found + direct
        return found[:MOST]
    direct = conv_tiling.configs(spec, io, target, conv_direct.in_pairs(spec, io, target))
    if not conv_winograd.covers(spec, io, target):
        return direct[:MOST]
    estimates = conv_winograd.estimates(spec, target)
    found = [config for _, config in estimates]
    if not found or estimates[0][0] < conv_tiling.least_cycles(spec, io, target):
        return [*found[:1], *direct[:1], *found[1:2], *direct[1:], *found[2:]][:MOST]
    return [*direct[:1], *found[:1], *direct[1:]][:MOST]


def lower(
    group: Group, io: IO, target: Target, config: dict[str, Any], name: str = "kernel"
) -> Kernel:
    """Lowers ``group`` with one of the configurations of `candidates`.

    Raises `Unsupported` as `candidates` does, and ValueError for a configuration that does not
    fit the group.
    """
    spec = parse(group, io)
    if config["kind"] == "winograd":
        return conv_winograd.lower(spec, group, io, target, config, name)
    if config["kind"] == "lanes":
        return conv_lanes.lower(spec, group, io, target, config, name)
    return conv_direct.lower(spec, group, io, target, config, name)
