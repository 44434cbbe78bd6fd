"""The registered workloads.

Each module that is named below has a function ``build(size) -> (model, example_inputs)`` and needs
nothing beyond plait's own dependencies (those of transformers' models need transformers, too). The
model is in eval mode, its weights are random (``trained_moe``'s are trained) and the same on every
call. ``size`` is "cpu" (answers in well under a second on two cores) or "paper" (the size that the
paper reports).

A model with routing can be written in other forms, and PyTorch is faster with one or another:
``build_plain(size)`` gives the same function as a Python loop over branches.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from torch import nn

Size = Literal["cpu", "paper"]
SIZES: tuple[Size, ...] = ("cpu", "paper")
FORMS = {
    "loop": "Python loop over the branches that any cell takes",
    "batched": "weights of every slot's expert gathered, one batched product",
}


@dataclass(frozen=True)
class Workload:
    """A named model with example inputs.

    ``gib`` is roughly how much memory the weights of each size take, where that is a lot: the
    harness refuses what cannot fit instead of letting the machine swap. ``module`` is the one whose
    ``build`` is called, with ``options`` (named like the workload, without any, by default).
    ``forms`` are the other forms that the model can be built in, of `FORMS`.
    """

    name: str
    summary: str
    groups: tuple[str, ...] = ()
    gib: tuple[tuple[Size, float], ...] = ()
    module: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    forms: tuple[str, ...] = ()

    def build(self, size: Size = "cpu") -> tuple[nn.Module, tuple[Any, ...]]:
        """The model in eval mode and its positional example inputs."""
        return self._module(size).build(size, **dict(self.options))

    def build_plain(
        self, size: Size = "cpu", form: str = "loop"
    ) -> tuple[nn.Module, tuple[Any, ...]]:
        """The same function, weights and inputs in another form. Raises ValueError for one that
        the workload does not have."""
        if form not in self.forms:
            raise ValueError(f"{self.name} has no form {form!r}, only {self.forms}")
        chosen = {} if form == "loop" else {"form": form}
        return self._module(size).build_plain(size, **dict(self.options), **chosen)

    def _module(self, size: Size) -> ModuleType:
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}: use one of {', '.join(SIZES)}")
        return importlib.import_module(f"{__name__}.{self.module or self.name}")


@dataclass(frozen=True, kw_only=True)
class Given(Workload):
    """A model that the caller has, with its positional example inputs."""

    model: nn.Module
    inputs: tuple[Any, ...]

    def build(self, size: Size = "cpu") -> tuple[nn.Module, tuple[Any, ...]]:
        """The model in eval mode; it has one size."""
        del size
        return self.model.eval(), self.inputs


_BRAINSTORM = ("switch_layer", "livesr", "msdnet", "dynamic_segmentation", "task_moe")
"""One for each family of models in Brainstorm's evaluation (Cui et al., OSDI 2023)."""


def _routed(name: str, summary: str, module: str = "", **options: Any) -> Workload:
    gib, forms = options.pop("gib", 0.0), options.pop("forms", ("loop",))
    groups = ("routing", "brainstorm") if name in _BRAINSTORM else ("routing",)
    sizes: tuple[tuple[Size, float], ...] = (("paper", gib),) if gib else ()
    given = tuple(options.items())
    return Workload(name, summary, groups, sizes, module, given, forms)


_SHORT = ("loop", "batched")  # a batched product, compiled, wins for few tokens
_ROUTED = (
    *(
        _routed(
            f"experts_t{tokens}",
            f"Mixtral's sparse block, 16 experts of 256x512, {tokens} tokens",
            "experts_block",
            tokens=tokens,
            forms=_SHORT if tokens <= 16 else ("loop",),
        )
        for tokens in (1, 16, 128, 512)
    ),
    *(
        _routed(
            f"mixtral_lm_t{tokens}",
            f"Mixtral language model, top 2 of 8, {tokens} tokens",
            "moe_lm",
            family="mixtral",
            tokens=tokens,
            gib=94.0,
            forms=_SHORT if tokens == 1 else ("loop",),
        )
        for tokens in (1, 64)
    ),
    *(
        _routed(
            f"{family}_lm", f"{title} language model, 64 tokens", "moe_lm", family=family, gib=gib
        )
        for family, title, gib in (
            ("olmoe", "OLMoE", 14.0),
            ("qwen3_moe", "Qwen3-MoE", 61.0),
            ("deepseek_v3", "DeepSeek-V3", 1342.0),
            ("gpt_oss", "GPT-OSS", 42.0),
        )
    ),
    _routed("trained_moe", "byte language model with a trained router, 128 tokens"),
    _routed("switch_layer", "Switch layer, 64 experts, Zipf loads, 128 tokens", "switch", forms=()),
    *(
        _routed(
            f"switch_encoder_e{experts}",
            f"Switch encoder, {experts} experts, Zipf loads, 128 tokens",
            "switch",
            part="encoder",
            experts=experts,
            forms=(),
        )
        for experts in (8, 16, 64, 256)
    ),
    _routed("livesr", "LiveSR: ten subnets for 48 crops"),
    _routed("msdnet", "MSDNet: five exits, batch 16"),
    *(
        _routed(f"msdnet_exit{n}", f"MSDNet: one image that leaves at exit {n}", "msdnet", exit=n)
        for n in range(1, 6)
    ),
    _routed("dynamic_segmentation", "Dynamic routing for segmentation: a gate per path and sample"),
    _routed("task_moe", "Task-level experts, hashed by task, 16 sentences", gib=7.0),
    *(
        _routed(
            f"domain_experts_{name}",
            f"Two of 8 experts by domain: {samples} samples of {count}",
            "domain_experts",
            samples=samples,
            domains=domains,
        )
        for name, samples, domains, count in (
            ("one", 1, 1, "one domain"),
            ("batch", 16, 1, "one domain"),
            ("mixed", 32, 4, "four domains"),
        )
    ),
    _routed("mixture_of_depths", "Mixture of depths, capacity 25 %, 256 tokens", forms=()),
    _routed("early_exit_bert", "DeeBERT: six exits, batch 8"),
    _routed("decisions", "Eight torch.conds one after the other, tiny sides", part="conds"),
    _routed("decision_tree", "Two trees of gates, three deep", "decisions", part="tree"),
)
_ALL = (
    Workload("inception_v3", "Inception-v3, 299x299: wide branches, asymmetric kernels", ("cnn",)),
    Workload("squeezenet1_1", "SqueezeNet 1.1, 224x224: small and narrow", ("cnn",)),
    Workload("resnext50_32x4d", "ResNeXt-50 32x4d, 224x224: grouped convolutions", ("cnn",)),
    Workload("randwire", "RandWire WS(4, 0.75), 224x224: irregular wiring, depthwise", ("cnn",)),
    Workload("nasnet_a_mobile", "NASNet-A mobile 4@1056, 224x224: many tiny branches", ("cnn",)),
    Workload(
        "inception_8x8",
        "Inception-v3's last two blocks alone: maps of 8x8",
        ("branches",),
        module="inception_v3",
        options=(("part", "8x8"),),
    ),
    Workload("uneven_gemms", "eight experts with loads from 8 to 200 rows", ("branches",)),
    Workload("bert_base", "BERT-base encoder layers, 128 tokens: dense", ("dense",)),
    Workload(
        "mixtral",
        "Mixtral mixture of experts (transformers), random weights",
        ("moe",),
        (("paper", 94.0),),
        forms=("loop",),
    ),
    Workload("chain30", "30 elementwise operators on a tiny tensor: call overhead", ("overhead",)),
    Workload("layers30", "10 x (linear, GELU, layer norm), tiny: kernel overhead", ("overhead",)),
    *_ROUTED,
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
