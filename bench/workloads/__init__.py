"""The registered workloads.

Each module of this package has a function ``build(size) -> (model, example_inputs)`` and needs
nothing beyond plait's own dependencies (``mixtral`` also needs transformers). The model is in eval
mode, its weights are random and the same on every call. ``size`` is "cpu" (answers in well under a
second on two cores) or "paper" (the size that the paper reports).
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Size = Literal["cpu", "paper"]
SIZES: tuple[Size, ...] = ("cpu", "paper")


@dataclass(frozen=True)
class Workload:
    """A named model with example inputs.

    ``gib`` is roughly how much memory the weights of each size take, where that is a lot: the
    harness refuses what cannot fit instead of letting the machine swap.
    """

    name: str
    summary: str
    groups: tuple[str, ...] = ()
    gib: tuple[tuple[Size, float], ...] = ()

    def build(self, size: Size = "cpu") -> tuple[nn.Module, tuple[Any, ...]]:
        """The model in eval mode and its positional example inputs."""
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}: use one of {', '.join(SIZES)}")
        return importlib.import_module(f"{__name__}.{self.name}").build(size)


_ALL = (
    Workload("inception_v3", "Inception-v3, 299x299: wide branches, asymmetric kernels", ("cnn",)),
    Workload("squeezenet1_1", "SqueezeNet 1.1, 224x224: small and narrow", ("cnn",)),
    Workload("resnext50_32x4d", "ResNeXt-50 32x4d, 224x224: grouped convolutions", ("cnn",)),
    Workload("randwire", "RandWire WS(4, 0.75), 224x224: irregular wiring, depthwise", ("cnn",)),
    Workload("nasnet_a_mobile", "NASNet-A mobile 4@1056, 224x224: many tiny branches", ("cnn",)),
    Workload("bert_base", "BERT-base encoder layers, 128 tokens: dense", ("dense",)),
    Workload(
        "mixtral",
        "Mixtral mixture of experts (transformers), random weights",
        ("moe",),
        (("paper", 94.0),),
    ),
    Workload("chain30", "30 elementwise operators on a tiny tensor: call overhead", ("overhead",)),
    Workload("layers30", "10 x (linear, GELU, layer norm), tiny: kernel overhead", ("overhead",)),
)
WORKLOADS: dict[str, Workload] = {w.name: w for w in _ALL}
GROUPS: tuple[str, ...] = tuple(sorted({g for w in _ALL for g in w.groups}))


def select(names: list[str] | tuple[str, ...]) -> list[Workload]:
    """The workloads with these names; a group's name stands for its members, none for all.

    Raises ValueError naming the closest match when a name is unknown.
    """
    chosen: dict[str, Workload] = {}
    for name in names or list(WORKLOADS):
        members = [w for w in _ALL if name == w.name or name in w.groups]
        if not members:
            known = [*WORKLOADS, *GROUPS]
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
            raise ValueError(f"unknown workload {name!r}: {hint}")
        chosen.update({w.name: w for w in members})
    return list(chosen.values())
