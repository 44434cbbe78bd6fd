"""Switch Transformer: Fedus et al., 2021, the model of the transformers library, random weights.

`layer` is one sparse layer (layer norm, router, experts, residual) whose tokens crowd on few
experts, as they do in trained models: the loads follow Zipf's law. `encoder` is the whole encoder,
skewed likewise.
The paper's Switch-Base has hidden 768, feed-forward 2048 and 12 layers, every other one sparse,
with 8 to 256 experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..routes import zipf, zipf_shares
from .common import SEED

TOKENS = 128
GUMBEL = math.pi / 6**0.5  # the standard deviation of a Gumbel variable
NOISE = 0.1  # of a token around its expert's centre, whose elements are about 1


def layer(size: str, experts: int = 64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """One layer, 128 tokens ``[1, 128, hidden]``; hidden 512 and experts of 1024, or Switch-Base.

    Each expert's row of the router is a random direction, its centre; a token is the centre of an
    expert drawn by Zipf's law (s = 1, expert e is the e-th most frequent) plus a tenth of noise.
    """
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersLayerFF,
    )

    sizes = {} if size == "paper" else {"d_model": 512, "d_ff": 1024}
    settings = SwitchTransformersConfig(num_experts=experts, **sizes)
    model: Any = SwitchTransformersLayerFF(settings, is_sparse=True)
    generator = torch.Generator().manual_seed(SEED)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
    centres = torch.randn(experts, settings.d_model, generator=generator)
    with torch.no_grad():  # logits near 8 for the own centre and within +-1 for the others
        model.mlp.router.classifier.weight.copy_(centres * 8 / settings.d_model)
    chosen = zipf(TOKENS, experts, 1, s=1.0, seed=SEED).squeeze(1)
    noise = torch.randn(TOKENS, settings.d_model, generator=generator)
    return model.eval(), ((centres[chosen] + NOISE * noise).unsqueeze(0),)


def encoder(size: str, experts: int = 16) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """128 tokens of one sequence and their mask; the output is a dataclass: ``[1, 128, hidden]``.

    Without a mask transformers cannot be traced. Routers score an expert by a normal deviate and
    the logarithm of its share by Zipf's law. Deviates are as large as a Gumbel variable's, with
    which loads would follow the shares if tokens were independent; they are alike, so that loads
    are more uneven still.
    """
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersTop1Router,
    )

    small = {
        "vocab_size": 4096,
        "d_model": 256,
        "d_ff": 512,
        "num_heads": 4,
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
    }
    large = {"num_sparse_encoder_layers": 6}
    settings = SwitchTransformersConfig(
        num_experts=experts, router_bias=True, **(large if size == "paper" else small)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = SwitchTransformersEncoderModel(settings)
        for module in model.modules():
            if isinstance(module, SwitchTransformersTop1Router):
                nn.init.normal_(module.classifier.weight, std=GUMBEL * settings.d_model**-0.5)
                module.classifier.bias.data.copy_(zipf_shares(experts).log())
        x = torch.randint(0, settings.vocab_size, (1, TOKENS))
    return model.eval(), (x, torch.ones_like(x))


def build(
    size: str = "cpu", part: str = "layer", experts: int = 64
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """``part`` is "layer" or "encoder"."""
    return {"layer": layer, "encoder": encoder}[part](size, experts)
