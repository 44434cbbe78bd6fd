"""What the workloads share: seeding, and weights that behave like a trained network's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SEED = 0


def image(size: int, batch: int = 1) -> Tensor:
    """A random image batch, ``[batch, 3, size, size]`` float32."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(SEED))


def finish(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Gives ``model`` plausible random weights and returns it in eval mode.

    Convolutions and linear layers get He initialisation; batch norms get random affine weights and
    the statistics of one forward pass, so that activations neither vanish into denormals nor
    overflow, and a batch norm that is folded wrongly shows.
    """
    generator = torch.Generator().manual_seed(SEED)
    norms = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2.0 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.1, 0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
            norms.append((module, module.momentum))
    if norms:
        for module, _ in norms:
            module.momentum = 1.0
        with torch.no_grad():
            model.train()(*inputs)
        for module, momentum in norms:
            module.momentum = momentum
            module.num_batches_tracked.zero_()  # type: ignore[union-attr]
    return model.eval()


def select_experts(model: nn.Module, form: str) -> None:
    """Makes transformers compute experts in ``form``: "loop" or "batched"."""
    model.set_experts_implementation({"loop": "eager", "batched": "batched_mm"}[form])  # type: ignore
