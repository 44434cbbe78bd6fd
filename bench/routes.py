"""How tokens spread over experts: index tensors ``[tokens, k]`` (int64, k different experts a row).

The first expert of a token follows the named distribution; the others are drawn without replacement
from the same one, so with k > 1 the frequent experts' shares of all slots are a little flatter.
Equal arguments give equal tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(tokens: int, experts: int, k: int = 2, seed: int = 0) -> Tensor:
    """Every expert alike."""
    return draw(torch.ones(experts), tokens, k, seed)


def zipf(tokens: int, experts: int, k: int = 2, s: float = 1.0, seed: int = 0) -> Tensor:
    """Expert e is drawn with a probability proportional to ``(e + 1) ** -s``; s = 0 is uniform.

    Expert 0 is the most frequent one. Its share of the first slots is 1 over the generalised
    harmonic number: 37 % of 8 experts for s = 1, 21 % of 64.
    """
    return draw(zipf_shares(experts, s), tokens, k, seed)


def zipf_shares(experts: int, s: float = 1.0) -> Tensor:
    """The probabilities of `zipf`: ``[experts]`` float64, descending, their sum 1."""
    weight = torch.arange(1, experts + 1, dtype=torch.float64) ** -s
    return weight / weight.sum()


def drift(
    tokens: int, experts: int, k: int = 2, s: float = 1.0, live: float = 0.5, seed: int = 0
) -> Tensor:
    """The worst case for what was specialised on the past: half-way all tokens change sides.

    The first half of the tokens knows only the first ``live`` (a share, at least k experts) of the
    experts, by `zipf`; the second half only the others, dead until then.
    """
    alive = min(max(k, round(experts * live)), experts - k)
    if alive < k:
        raise ValueError(f"{experts} experts are too few for {k} on each side")
    before = zipf(tokens // 2, alive, k, s, seed)
    after = zipf(tokens - tokens // 2, experts - alive, k, s, seed + 1) + alive
    return torch.cat([before, after])


def trained(tokens: int, layer: int = 1, steps: int | None = None) -> Tensor:
    """What a trained router (`trained_moe`, ``layer``) chose on held-out text: 8 experts, k = 2.

    Trains the model first where that was not done before; ``steps`` as there.
    """
    from .trained_moe import trained as train

    model, _, held_out = train(steps)
    chosen: list[Tensor] = []
    gate = model.model.layers[layer].mlp.gate  # type: ignore[index,union-attr]
    hook = gate.register_forward_hook(lambda _module, _args, out: chosen.append(out[2]))
    try:
        with torch.no_grad():
            for batch in held_out:
                model(batch)
                if sum(len(index) for index in chosen) >= tokens:
                    break
    finally:
        hook.remove()
    index = torch.cat(chosen)
    if len(index) < tokens:
        raise ValueError(f"{tokens} tokens are more than the {len(index)} held out")
    return index[:tokens]


def shares(index: Tensor, experts: int) -> Tensor:
    """Each expert's share of all slots: ``[experts]`` float64."""
    return torch.bincount(index.reshape(-1), minlength=experts).double() / max(1, index.numel())


def draw(probabilities: Tensor, tokens: int, k: int, seed: int) -> Tensor:
    """``[tokens, k]`` experts drawn with ``probabilities`` ``[experts]`` (any positive scale)."""
    generator = torch.Generator().manual_seed(seed)
    if not tokens:
        return torch.empty(0, k, dtype=torch.int64)
    rows = probabilities.expand(tokens, -1)
    return torch.multinomial(rows, k, replacement=False, generator=generator)
