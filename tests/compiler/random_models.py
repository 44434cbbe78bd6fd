"""Models drawn at random: operators of most kinds, views, writes in place, branches on data.

A model is a list of steps; each reads values made before and adds its own. Drawing one runs it, for
steps are chosen by the shapes that there are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPES = ((2, 3, 4), (4, 6), (2, 8, 5, 5), (1, 6, 4, 4), (3, 16, 3), (5,), (2, 4, 7, 6), (2, 1, 5))
MOST = 4000
"""Elements of a value."""
Step = Callable[[list[Tensor]], Tensor | None]


class RandomModel(nn.Module):
    """``steps`` are called with all values so far: ``inputs``, then what earlier steps gave."""

    def __init__(self, steps: Sequence[tuple[str, Step]], results: Sequence[int]) -> None:
        super().__init__()
        self.steps, self.results = list(steps), list(results)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The values that are its results."""
        values = list(inputs)
        for _, step in self.steps:
            made = step(values)
            if made is not None:
                values.append(made)
        return tuple(values[k] for k in self.results)

    def __repr__(self) -> str:
        return "; ".join(name for name, _ in self.steps) + f" -> {self.results}"


def inputs_of(chance: random.Random, dtype: torch.dtype) -> list[Tensor]:
    """Two tensors, some of them turned, cut out of others, or images with channels last."""
    found = []
    for _ in range(2):
        shape = chance.choice(SHAPES)
        x = torch.randn(shape, dtype=torch.float64, generator=generator(chance)).to(dtype)
        kind = chance.randrange(6)
        if kind == 0 and len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        elif kind == 1 and len(shape) > 1:
            dims = chance.sample(range(len(shape)), len(shape))
            x = x.permute(dims).contiguous().permute([dims.index(d) for d in range(len(dims))])
        elif kind == 2:
            x = torch.cat([x, x + 1, x - 1], -1)[..., 1 : 1 + x.shape[-1]]
        found.append(x)
    return found


def generator(chance: random.Random) -> torch.Generator:
    """For torch, of a seed that is drawn."""
    return torch.Generator().manual_seed(chance.randrange(1 << 30))


def random_model(seed: int, dtype: torch.dtype = torch.float64, most: int = 12) -> RandomModel:
    """A model of at most ``most`` steps for inputs as `inputs_of` draws them first."""
    chance = random.Random(seed)
    values = inputs_of(chance, dtype)
    steps: list[tuple[str, Step]] = []
    for _ in range(chance.randint(2, most)):
        for _ in range(20):
            name, draw = chance.choice(KINDS)
            drawn = draw(chance, values)
            if drawn is None:
                continue
            made = drawn(values)
            steps.append((name, drawn))
            if made is not None:
                values.append(made)
            break
    made = range(2, len(values)) or range(len(values))
    results = sorted(chance.sample(list(made), min(len(made), chance.randint(1, 3))))
    if values and results[-1] != len(values) - 1:
        results.append(len(values) - 1)
    return RandomModel(steps, results)


# -- kinds of steps ------------------------------------------------------------------------------


def _pick(
    chance: random.Random, values: list[Tensor], ranks: Sequence[int] = range(1, 6)
) -> int | None:
    fits = [k for k, x in enumerate(values) if x.dim() in ranks and 0 < x.numel() <= MOST]
    return chance.choice(fits[-4:] if chance.random() < 0.7 else fits) if fits else None


def _of_one(function: Callable[[Tensor], Tensor], ranks: Sequence[int] = range(1, 6)) -> Any:
    def draw(chance: random.Random, values: list[Tensor]) -> Step | None:
        k = _pick(chance, values, ranks)
        return None if k is None else lambda v: function(v[k])

    return draw


def _unary(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values)
    function = chance.choice(
        (
            torch.relu, torch.neg, torch.sigmoid, torch.tanh, torch.abs, F.gelu, F.silu,
            lambda x: x * 2 - 1, lambda x: x.clamp(-2, 2), lambda x: x.clone(),
            lambda x: F.dropout(x, 0.5, False), lambda x: x.masked_fill(x > 1, 0.5),
        )
    )  # fmt: skip
    return None if k is None else lambda v: function(v[k])


def _binary(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values)
    if k is None:
        return None
    fits = [n for n, x in enumerate(values) if _broadcasts(x, values[k])]
    other = chance.choice(fits)
    function = chance.choice(
        (torch.add, torch.mul, torch.sub, torch.maximum, lambda x, y: torch.where(x > y, x, y * 2))
    )
    return lambda v: function(v[k], v[other])


def _broadcasts(x: Tensor, y: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(x.shape, y.shape).numel() <= MOST
    except RuntimeError:
        return False


def _turned(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values, (2, 3, 4))
    if k is None:
        return None
    dims = chance.sample(range(values[k].dim()), values[k].dim())
    return lambda v: v[k].permute(dims)


def _view(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values, (1, 2, 3, 4))
    if k is None:
        return None
    x = values[k]
    dim = chance.randrange(x.dim())
    size = x.shape[dim]
    start = chance.randrange(size)
    step, cut = chance.randint(1, 2), chance.randint(start + 1, size)
    at = tuple([slice(None)] * dim + [slice(start, cut, step)])
    into = chance.choice([(d, -1) for d in range(1, size + 1) if size % d == 0])
    return chance.choice(
        (
            lambda v: v[k].flatten(),
            lambda v: v[k].reshape(-1, x.shape[-1]),
            lambda v: v[k].unsqueeze(dim),
            lambda v: v[k][at],
            lambda v: v[k].flip(dim),
            lambda v: v[k].select(dim, start),
            lambda v: v[k].unflatten(dim, into),
            lambda v: v[k].roll(1, dim),
            lambda v: v[k].chunk(2, dim)[-1],
            lambda v: v[k].unsqueeze(0).expand(2, *x.shape),
            lambda v: torch.cat([v[k], v[k][at]], dim),
            lambda v: v[k].contiguous(),
            lambda v: v[k].repeat_interleave(2, dim),
            lambda v: v[k].diagonal(0, 0, dim) if dim else v[k].mT if x.dim() > 1 else v[k],
        )
    )


def _scan(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values)
    if k is None:
        return None
    dim = chance.randrange(-values[k].dim(), values[k].dim())
    return chance.choice(
        (
            lambda v: torch.cumsum(v[k], dim),
            lambda v: torch.cumprod(v[k].tanh(), dim),
            lambda v: torch.cumsum(v[k].flip(dim), dim).flip(dim),
            lambda v: torch.cumsum(v[k], dim) - v[k],
            lambda v: torch.cumsum(v[k] > 0, dim).to(v[k].dtype),
            lambda v: torch.cumsum(torch.softmax(v[k], dim), dim),
            lambda v: torch.cumsum(v[k].mT, dim).mT if v[k].dim() > 1 else v[k].cumsum(0),
            lambda v: v[k].cumsum(dim).cumsum(dim),
            lambda v: v[k].cumsum(dim).amax(dim, keepdim=True),
            lambda v: v[k].clone().cumsum_(dim),
        )
    )


def _rows(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values)
    if k is None:
        return None
    rank = values[k].dim()
    dim, kept = chance.randrange(rank), chance.random() < 0.5
    some = chance.sample(range(rank), chance.randint(1, rank))
    return chance.choice(
        (
            lambda v: torch.softmax(v[k], dim),
            lambda v: torch.log_softmax(v[k], dim),
            lambda v: v[k].mean(some, keepdim=kept),
            lambda v: v[k].sum(some, keepdim=kept),
            lambda v: v[k].amax(some, keepdim=kept),
            lambda v: v[k].argmax(dim, keepdim=kept).to(v[k].dtype),
            lambda v: F.layer_norm(v[k], v[k].shape[dim:]),
            lambda v: torch.linalg.vector_norm(v[k], dim=dim, keepdim=kept),
            lambda v: v[k].sort(dim)[0],
            lambda v: v[k].topk(1, dim)[0],
        )
    )


def _norm(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values, (3, 4))
    if k is None:
        return None
    x = values[k]
    channels = x.shape[1]
    groups = chance.choice([g for g in range(1, channels + 1) if channels % g == 0])
    if x.numel() // groups // x.shape[0] < 2:
        return None
    weight, bias = (_weight(chance, x, channels) for _ in range(2))
    affine = chance.random() < 0.7
    given = (weight, bias) if affine else (None, None)
    last = x.dim() == 4 and chance.random() < 0.6
    after = chance.choice((lambda x: x, F.silu, lambda x: x * 2, lambda x: x + x.mean()))

    def norm(v: list[Tensor]) -> Tensor:
        image = v[k].contiguous(memory_format=torch.channels_last) if last else v[k]
        return after(F.group_norm(image, groups, *given, eps=1e-2))

    return norm


def _image(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values, (4,))
    if k is None or min(values[k].shape[2:]) < 2:
        return None
    x = values[k]
    side = min(3, *x.shape[2:])
    out = chance.choice((1, 4, 8))
    weight = torch.randn(
        out, x.shape[1], side, side, dtype=torch.float64, generator=generator(chance)
    )
    weight = (weight / weight[0].numel() ** 0.5).to(x.dtype)
    return chance.choice(
        (
            lambda v: F.conv2d(v[k], weight, padding=side // 2),
            lambda v: F.conv2d(v[k], weight),
            lambda v: F.relu(F.conv2d(v[k], weight, padding=1)),
            lambda v: F.max_pool2d(v[k], 2, 1),
            lambda v: F.avg_pool2d(v[k], 2, 1),
            lambda v: F.pad(v[k], (1, 0, 0, 2)),
            lambda v: F.interpolate(v[k], scale_factor=2),
            lambda v: F.pixel_unshuffle(F.interpolate(v[k], scale_factor=2), 2),
        )
    )


def _weight(chance: random.Random, like: Tensor, *shape: int) -> Tensor:
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator(chance))
    return (drawn / drawn[0].numel() ** 0.5).to(like.dtype)


def _product(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values, (2, 3, 4))
    if k is None:
        return None
    x = values[k]
    weight, tall = (_weight(chance, x, n, x.shape[d]) for n, d in ((5, -1), (3, -2)))
    scale = 1 / x.shape[-1]
    return chance.choice(
        (
            lambda v: F.linear(v[k], weight),
            lambda v: F.linear(v[k].mT, tall).mT,
            lambda v: tall @ v[k],
            lambda v: (v[k] @ v[k].mT) * scale,
            lambda v: (v[k].mT @ v[k]) / x.shape[-2],
            lambda v: torch.einsum("...ij,kj->k...i", v[k], weight),
            lambda v: F.gelu(F.linear(v[k], weight)).transpose(0, -1),
            lambda v: F.linear(v[k], weight).transpose(-1, -2).relu() * 2,
            lambda v: F.scaled_dot_product_attention(v[k], v[k].tanh(), v[k]),
        )
    )


def _write(chance: random.Random, values: list[Tensor]) -> Step | None:
    """Writes in place, most to a clone of what was there, some to the value itself."""
    k = _pick(chance, values)
    if k is None:
        return None
    x = values[k]
    if chance.random() < 0.3 and not _overlaps(x):
        return chance.choice(
            (
                lambda v: _nothing(v[k].mul_(0.5)),
                lambda v: _nothing(v[k][..., :1].add_(1)),
                lambda v: _nothing(v[k].clamp_(-1, 1)),
                lambda v: _nothing(v[k].copy_(v[k].flip(0))),
                lambda v: v[k].add_(1),
                lambda v: _nothing(v[k].cumsum_(-1)),
            )
        )
    dim = chance.randrange(x.dim())

    def part(v: list[Tensor]) -> Tensor:
        made = v[k].clone()
        made.select(dim, 0).mul_(3)
        return made

    def turned(v: list[Tensor]) -> Tensor:
        made = v[k].clone()
        other = made.transpose(0, dim)
        other += 1
        return made

    def set_(v: list[Tensor]) -> Tensor:
        made = v[k] * 2
        made[..., -1:] = v[k].mean()
        return made

    def seen(v: list[Tensor]) -> Tensor:
        made = v[k] + 1
        before = made.sum(dim, keepdim=True)
        made.relu_()
        return made - before

    def masked(v: list[Tensor]) -> Tensor:
        made = torch.zeros_like(v[k])
        made[v[k] > 0] = 1.5
        return made.add_(v[k])

    return chance.choice((part, turned, set_, seen, masked))


def _overlaps(x: Tensor) -> bool:
    return torch._debug_has_internal_overlap(x) != 0


def _nothing(_: Tensor) -> None:
    return None


def _branch(chance: random.Random, values: list[Tensor]) -> Step | None:
    k = _pick(chance, values)
    if k is None:
        return None
    rank = values[k].dim()
    pairs = (
        (lambda x: x.relu() + 1, lambda x: x * 3),
        (lambda x: torch.cumsum(x, -1), lambda x: torch.softmax(x, 0)),
        (lambda x: x.sum(0, keepdim=True).expand(x.shape) + x, lambda x: x.flip(0)),
        (lambda x: (x * 2).mT.contiguous().mT if rank > 1 else x * 2, lambda x: x.cos()),
    )
    yes, no = (lambda x, side=side: side(x).contiguous() for side in chance.choice(pairs))
    bound = chance.choice((-1e9, 0.3712, 1e9))

    def branch(v: list[Tensor]) -> Tensor:
        chosen = v[k].amax() > bound
        if torch.compiler.is_exporting():
            return torch.cond(chosen, yes, no, (v[k],))
        return yes(v[k]) if chosen else no(v[k])  # torch.cond itself would be compiled by Dynamo

    return branch


KINDS: tuple[tuple[str, Any], ...] = (
    ("unary", _unary), ("binary", _binary), ("turned", _turned), ("turned", _turned),
    ("view", _view), ("view", _view), ("scan", _scan), ("rows", _rows), ("norm", _norm),
    ("norm", _norm), ("image", _image), ("product", _product), ("product", _product),
    ("write", _write), ("branch", _branch),
)  # fmt: skip
