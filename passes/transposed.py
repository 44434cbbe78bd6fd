"""Transposed convolutions become convolutions (part of `passes.normalize`).

In a transposed convolution of stride s, the results whose places leave the same remainder r when
divided by s read the same taps r, r + s, r + 2s, ... So these results are a convolution of stride 1
by those taps, turned around, and the results of all remainders are interleaved (Shi et al., "Is the
deconvolution layer the same as a convolutional layer?", 2016). Where s divides the size of the
kernel, all remainders have as many taps, and it is one convolution with s times the channels.
Otherwise it is one for each remainder: zeros in place of the taps that some lack would make NaN of
infinities.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from .base import allow
from .batch_norm import Keep, constant
from .ir import Aliases, Rewriter, argument, aten, is_call

_TRANSPOSED = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2}
_MOST = 9
"""Convolutions that one may become: each reads the whole input."""
_END = 2**63 - 1


@dataclass(frozen=True)
class _Side:
    """One dimension of the image: ``taps`` and ``stride``, how many places results are moved to the
    left (``crop``), and how many are left of the last place that is read (``more``).
    """

    taps: int
    stride: int
    crop: int
    more: int

    @property
    def first(self) -> int:
        """The first place, in steps of the stride, at which there are results."""
        return self.crop // self.stride

    @property
    def behind(self) -> int:
        """How many places the results reach behind the last element of the image."""
        return -(-(self.taps + self.more - self.crop) // self.stride) - 1

    @property
    def outside(self) -> tuple[int, int]:
        """Interleaved results before the first and behind the last that is wanted."""
        spare = self.stride * (self.behind + 1) - (self.taps + self.more - self.crop)
        return self.crop - self.stride * self.first, spare

    def padding(self, taps: int) -> int:
        """Zeros on both ends of the image of a convolution by ``taps`` of this side's."""
        return max(self.behind, taps - 1 - self.first, 0)

    def cut(self, taps: int) -> tuple[int, int]:
        """Results of that convolution to drop at both ends; numbers for `aten.slice`."""
        padding = self.padding(taps)
        return self.first - (taps - 1 - padding), self.behind - padding or _END


def convolve_transposed(rewriter: Rewriter, keep: Keep | None = None) -> list[str]:
    """Rewrite those by constants in float32 on the CPU; ``keep`` puts large weights where they are
    to lie. Returns the names of the nodes.
    """
    nodes = [n for n in rewriter.graph.nodes if is_call(n, *_TRANSPOSED)]
    if not nodes:
        return []
    aliases = Aliases(rewriter.graph)
    done: list[str] = []
    for node in nodes:
        sides, weight = _sides(node), constant(rewriter, argument(node, 1, "weight"), aliases)
        bias = argument(node, 2, "bias")
        known = None if bias is None else constant(rewriter, bias, aliases)
        if sides is None or weight is None or (known is None) != (bias is None):
            continue
        if allow("transposed convolution", [node]):
            done.append(node.name)
            _Rewrite(rewriter, node, sides, keep).with_weights(weight, known)
    return done


def _sides(node: fx.Node) -> list[_Side] | None:
    """The dimensions of the image; None where the operator is left as it is."""
    rank = _TRANSPOSED[node.target]
    value, weight = node.meta["val"], argument(node, 1, "weight").meta["val"]
    if value.dtype != torch.float32 or value.device.type != "cpu":
        return None  # products of 16 bits have units of their own that the library knows
    if value.dim() != weight.dim() or 0 in weight.shape:
        return None

    def each(position: int, name: str, default: int) -> list[int]:
        given: Any = argument(node, position, name, default)
        given = [given] if isinstance(given, int) else list(given)
        return given * rank if len(given) == 1 else given

    strides, crops = each(3, "stride", 1), each(4, "padding", 0)
    more, dilations = each(5, "output_padding", 0), each(7, "dilation", 1)
    if not all(type(x) is int for x in (*strides, *crops, *more)):
        return None
    sides = [_Side(*x) for x in zip(weight.shape[2:], strides, crops, more, strict=True)]
    if any(d != 1 for d in dilations) or any(s.taps < s.stride for s in sides):
        return None
    return sides if _convolutions(sides) <= _MOST else None


def _convolutions(sides: list[_Side]) -> int:
    """How many convolutions it takes."""
    even = all(side.taps % side.stride == 0 for side in sides)
    return 1 if even else math.prod(side.stride for side in sides)


@dataclass(frozen=True)
class _Rewrite:
    """Convolutions in the place of ``node``."""

    rewriter: Rewriter
    node: fx.Node
    sides: list[_Side]
    keep: Keep | None

    def with_weights(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """``weight`` [input channels, output channels of a group, taps...]."""
        node, rank, strides = self.node, len(self.sides), [side.stride for side in self.sides]
        groups = argument(node, 6, "groups", 1)
        channels, times = weight.shape[1] * groups, math.prod(strides)
        w = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # [group, output, input, taps...]
        if _convolutions(self.sides) == 1:
            for k, stride in enumerate(strides):
                w = w.unflatten(3 + 2 * k, (-1, stride))
            taps, remainders = ([3 + 2 * k + j for k in range(rank)] for j in (0, 1))
            w = w.flip(taps).permute(0, 1, *remainders, 2, *taps).flatten(0, 1 + rank)
            bias = None if bias is None else bias.repeat_interleave(times)
            y = self._convolution(w, weight, bias)
            if times > 1:
                y = self._interleaved(self._call(aten.unflatten.int, y, 1, [channels, *strides]))
        else:
            parts = []
            for start in itertools.product(*map(range, strides)):
                at = (slice(r, None, s) for r, s in zip(start, strides, strict=True))
                part = w[(slice(None),) * 3 + tuple(at)]
                part = part.flip(list(range(3, 3 + rank))).flatten(0, 1)
                parts.append(self._convolution(part, weight, bias))
            y = self._call(aten.stack.default, parts, 2)
            y = self._interleaved(self._call(aten.unflatten.int, y, 2, strides))
        self.rewriter.replace(node, self._cropped(y))

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.rewriter.call(target, args, like=self.node)

    def _constant(self, tensor: torch.Tensor, name: str) -> fx.Node:
        return self.rewriter.constant(tensor, f"{self.node.name}_{name}", self.node)

    def _convolution(
        self, weight: torch.Tensor, source: torch.Tensor, bias: torch.Tensor | None
    ) -> fx.Node:
        """The results at one remainder, or at all of them as channels, at the places that are read;
        ``weight`` was made of ``source``.
        """
        taps, ones = weight.shape[2:], [1] * len(self.sides)
        padding = [side.padding(n) for side, n in zip(self.sides, taps, strict=True)]
        weight = weight.contiguous()
        constants = (
            self._constant(weight if self.keep is None else self.keep(weight, source), "weight"),
            None if bias is None else self._constant(bias, "bias"),
        )
        x, groups = argument(self.node, 0, "input"), argument(self.node, 6, "groups", 1)
        target = aten.conv1d.default if len(self.sides) == 1 else aten.conv2d.default
        y = self._call(target, x, *constants, ones, padding, ones, groups)
        for k, (side, n) in enumerate(zip(self.sides, taps, strict=True)):
            low, high = side.cut(n)
            if (low, high) != (0, _END):
                y = self._call(aten.slice.Tensor, y, 2 + k, low, high)
        return y

    def _interleaved(self, y: fx.Node) -> fx.Node:
        """[n, channel, remainders..., places...] -> [n, channel, places and remainders...]."""
        rank = len(self.sides)
        order = [0, 1, *(d for k in range(rank) for d in (2 + rank + k, 2 + k))]
        y = self._call(aten.permute.default, y, order)
        for k in range(rank):
            y = self._call(aten.flatten.using_ints, y, 2 + k, 3 + k)
        return y

    def _cropped(self, y: fx.Node) -> fx.Node:
        """Without what lies outside. A padding that takes away is part of a kernel; of what is
        sliced all is computed, but torch has no such padding of sizes that are open.
        """
        if all(type(size) is int for size in y.meta["val"].shape):
            crops = [-n for side in reversed(self.sides) for n in side.outside]
            return self._call(aten.constant_pad_nd.default, y, crops) if any(crops) else y
        for k, side in enumerate(self.sides):
            low, high = side.outside
            if low or high:
                y = self._call(aten.slice.Tensor, y, 2 + k, low, -high or _END)
        return y
