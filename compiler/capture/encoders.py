"""What `torch.nn.TransformerEncoder` gives for padding, as in eager mode.

There it leaves out positions that a padding mask hides at the ends of sequences, and puts zeros in
their place. While it is exported it computes them like all others.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def encoders(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, encoders below ``roots`` give zeros for padding where they do in eager mode."""
    below = {m for root in roots for m in root.modules() if type(m) is nn.TransformerEncoder}
    found = [m for m in below if "forward" not in vars(m)]
    for module in found:
        vars(module)["forward"] = functools.partial(_forward, module)
    try:
        yield
    finally:
        for module in found:
            vars(module).pop("forward", None)


def _forward(
    self: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    padding = src_key_padding_mask
    if mask is not None or padding is None or not _leaves_out(self, src):
        return nn.TransformerEncoder.forward(self, src, mask, padding, is_causal)
    layers = copy.copy(self)
    vars(layers).update(_modules={**self._modules, "norm": None}, mask_check=True)
    out = nn.TransformerEncoder.forward(layers, src, mask, padding, is_causal)
    hidden = padding != 0
    at_ends = (hidden[:, 1:] | ~hidden[:, :-1]).all()
    out = out.masked_fill((hidden & at_ends).unsqueeze(-1), 0)
    return out if self.norm is None else self.norm(out)


def _leaves_out(self: nn.TransformerEncoder, src: Tensor) -> bool:
    """Whether eager mode leaves padding out, as far as that does not depend on the padding."""
    return (
        torch.backends.mha.get_fastpath_enabled()
        and getattr(self, "use_nested_tensor", False)
        and not self.layers[0].training
        and src.dim() == 3
        and not torch.is_autocast_enabled()
    )
