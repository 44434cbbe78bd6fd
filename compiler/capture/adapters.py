"""Methods of transformers' modules that cannot be captured, or not well, and what stands for them.

Sparse modules outside the experts interface, sizes computed by tensors, and notes of modules.

Some architectures compute their experts in code of their own: a loop over the experts that were
hit, sizes read from tensors, or all experts for all tokens. `ADAPTERS` names, for each of their
classes, methods with operators that have kernels; `adapted` puts them in place on the modules of
one model while it is captured. Each gives what the method it stands for gives in evaluation mode.
Weights of experts that are tensors of their own are stacked in the graph, where they are constants.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from ...kernels import routing
from ...kernels.routing_experts import slots_of_experts, weighted_sum

Method = Callable[..., Any]
Parts = Callable[[Any], Iterable[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class Adapter:
    """Methods to replace in a class's instances, and the parts whose own forwards they skip.

    ``parts`` gives them with the names of their classes in the model's code: where one is something
    else (quantised, wrapped by an adapter of low rank) or watched by hooks, the module keeps its
    own way. ``router`` is the class of the part ``router`` and what replaces its forward.
    """

    methods: dict[str, Method]
    parts: Parts
    router: tuple[str, Method] | None = None


@contextlib.contextmanager
def adapted(modules: Iterable[nn.Module]) -> Iterator[int]:
    """Within it, modules with an adapter compute by it; yields how many there are."""
    found = [(m, a) for m in modules if (a := _adapter(m)) is not None]
    placed: list[tuple[dict[str, Any], str]] = []

    def place(module: Any, name: str, method: Method) -> None:
        vars(module)[name] = functools.partial(method, module)
        placed.append((vars(module), name))

    try:
        for module, adapter in found:
            for name, method in adapter.methods.items():
                place(module, name, method)
            if adapter.router is not None:
                place(module.router, "forward", adapter.router[1])
        yield len(found)
    finally:
        for attributes, name in placed:
            attributes.pop(name, None)


def _adapter(module: nn.Module) -> Adapter | None:
    """The adapter of a module that is what the table's architecture makes, unchanged."""
    cls = type(module)
    adapter = ADAPTERS.get(cls.__name__)
    if adapter is None or module.training or not cls.__module__.startswith("transformers.models."):
        return None
    if any(name in vars(module) for name in adapter.methods):
        return None  # somebody else replaced it
    if adapter.router is not None:
        router: Any = getattr(module, "router", None)
        if type(router).__name__ != adapter.router[0] or "forward" in vars(router):
            return None
    plain = all(
        type(part).__name__ == kind and not (part._forward_hooks or part._forward_pre_hooks)
        for part, kind in adapter.parts(module)
    )
    return adapter if plain else None


def linear(
    x: Tensor,
    route: tuple[Tensor, Tensor],
    weight: Tensor,
    share: int,
    scatter: bool,
    transposed: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """`routed_linear` in the weight's type: autocast does not reach into operators of ours."""
    x = x.to(weight.dtype)
    return routing.routed_linear(x, *route, weight, bias, transposed, share, scatter)


# -- Switch Transformers ---------------------------------------------------------------------------


def _switch_router(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Like the original, which also converts the classifier for good and notes a type in itself."""
    dtype, classifier = self.dtype, self.classifier
    bias = None if classifier.bias is None else classifier.bias.to(dtype)
    logits = F.linear(hidden_states.to(dtype), classifier.weight.to(dtype), bias)
    probabilities = F.softmax(logits, dim=-1, dtype=dtype).to(hidden_states.dtype)
    choice = F.one_hot(torch.argmax(probabilities, dim=-1), num_classes=self.num_experts)
    # Tokens beyond an expert's capacity within their sequence go to no expert.
    choice = choice * (torch.cumsum(choice, dim=-2) <= self.expert_capacity)
    return choice, torch.max(probabilities, dim=-1).values.unsqueeze(-1), logits


def _switch_experts(
    self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    """``selected_experts`` is a mask ``[tokens, 1, experts]`` with one True or none in a row."""
    experts = _numbered(self)
    mask = selected_experts.squeeze(1)
    index = torch.where(mask.sum(-1) > 0, mask.argmax(-1), self.num_experts)
    route = routing.route(index, self.num_experts)
    inner = linear(hidden_states, route, torch.stack([e.wi.weight for e in experts]), 1, False)
    weight = torch.stack([e.wo.weight for e in experts])
    out = linear(experts[0].act(inner), route, weight, 0, True)
    return (out * routing_weights).to(hidden_states.dtype)


def _numbered(module: Any) -> list[Any]:
    return [module[f"expert_{i}"] for i in range(module.num_experts)]


def _numbered_parts(kind: str, *linears: str) -> Parts:
    def parts(module: Any) -> Iterator[tuple[nn.Module, str]]:
        experts = _numbered(module)
        for expert in experts:
            yield expert, kind
            yield from ((getattr(expert, name), "Linear") for name in linears)
            yield expert.act, type(experts[0].act).__name__

    return parts


# -- NLLB-MoE --------------------------------------------------------------------------------------


def _nllb_router(
    self: Any, hidden_states: Tensor, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Like the original, which also converts the classifier for good and notes a capacity."""
    dtype, classifier = self.dtype, self.classifier
    bias = None if classifier.bias is None else classifier.bias.to(dtype)
    logits = F.linear(hidden_states.to(dtype), classifier.weight.to(dtype), bias)
    own = copy.copy(self)  # takes the notes
    if own.moe_eval_capacity_token_fraction == 1:  # rounded up from a product with 1.0 below
        own.moe_eval_capacity_token_fraction, own.expert_capacity = 0, logits.shape[0]
    mask, probabilities = own.route_tokens(logits, hidden_states.dtype, padding_mask)
    return mask, probabilities, logits


def _nllb_experts(
    self: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor
) -> Tensor:
    """The original reads the mask's entries, 0 or 1, as numbers of experts; so does this."""
    experts = _numbered(self)
    route = routing.route(router_mask, self.num_experts)

    def layer(x: Tensor, name: str, share: int, scatter: bool) -> Tensor:
        parts = [getattr(e, name) for e in experts]
        weight, bias = (torch.stack([getattr(p, n) for p in parts]) for n in ("weight", "bias"))
        return linear(x, route, weight, share, scatter, bias=bias)

    inner = experts[0].act(layer(hidden_states, "fc1", router_mask.shape[1], False))
    out = layer(inner, "fc2", 0, True)
    if self.moe_token_dropout > 0:
        out = out * (1 - self.moe_token_dropout)
    return weighted_sum(out, router_probs).to(hidden_states.dtype)


# -- JetMoe ----------------------------------------------------------------------------------------


def _jetmoe_gating(self: Any, hidden_states: Tensor) -> tuple[Any, ...]:
    """The route instead of lists of sizes; the logits stay where hooks look for them."""
    logits = self.layer(hidden_states).float()
    values, index = logits.topk(self.top_k, dim=1)
    gates = torch.softmax(values, dim=1).type_as(hidden_states)
    return (*routing.route(index, self.num_experts), gates, None, logits)


def _jetmoe_experts(self: Any, layer_input: Tensor) -> Tensor:
    x = layer_input.reshape(-1, layer_input.shape[-1])
    *route, gates, _, _ = self.router(x)
    gate, up = linear(x, tuple(route), self.input_linear.weight, gates.shape[1], False).chunk(2, -1)
    out = linear(self.activation(gate) * up, tuple(route), self.output_linear.weight, 0, True)
    return weighted_sum(out, gates).view(layer_input.shape) + self.bias


def _jetmoe_map(self: Any, layer_input: Tensor) -> tuple[Tensor, Tensor, Any]:
    batch, length, hidden = layer_input.shape
    x = layer_input.reshape(-1, hidden)
    *route, gates, _, logits = self.router(x)
    out = linear(x, tuple(route), self.input_linear.weight, self.top_k, True)
    return out.view(batch, length, self.top_k, out.shape[-1]), logits, (tuple(route), gates)


def _jetmoe_reduce(self: Any, layer_input: Tensor, topo_info: Any) -> Tensor:
    route, gates = topo_info
    batch, length, _, hidden = layer_input.shape
    out = linear(layer_input.reshape(-1, hidden), route, self.output_linear.weight, 1, True)
    return weighted_sum(out, gates).view(batch, length, self.input_size) + self.bias


def _jetmoe_parts(module: Any) -> list[tuple[nn.Module, str]]:
    return [
        (module.input_linear, "JetMoeParallelExperts"),
        (module.output_linear, "JetMoeParallelExperts"),
    ]


_JETMOE_ROUTER = ("JetMoeTopKGating", _jetmoe_gating)


# -- DBRX ------------------------------------------------------------------------------------------


def _dbrx_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    mlp, x = self.mlp, hidden_states.reshape(-1, self.hidden_size)
    route = routing.route(top_k_index, self.num_experts)
    first = torch.cat([mlp.w1.view(shape), mlp.v1.view(shape)], 1)
    gate, up = linear(x, route, first, top_k_index.shape[1], False).chunk(2, -1)
    out = linear(mlp.activation_fn(gate) * up, route, mlp.w2.view(shape), 0, True, transposed=True)
    out = weighted_sum(out, top_k_weights).to(hidden_states.dtype)
    return out.view(hidden_states.shape[0], -1, self.hidden_size)


# -- Llama 4 ---------------------------------------------------------------------------------------


def _llama4_moe(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The original gives every expert every token, scaled by 0 where the expert is not chosen:
    experts without bias make 0 of that.
    """
    x = hidden_states.reshape(-1, self.hidden_dim)
    _, logits = self.router(x)
    values, index = torch.topk(logits, self.top_k, dim=1)
    scores = torch.sigmoid(values.float()).to(logits.dtype)
    scaled = (x.unsqueeze(1) * scores.unsqueeze(-1)).reshape(-1, self.hidden_dim)
    route, experts = routing.route(index, self.num_experts), self.experts
    gate, up = linear(scaled, route, experts.gate_up_proj, 1, False, transposed=True).chunk(2, -1)
    out = linear(up * experts.act_fn(gate), route, experts.down_proj, 0, True, transposed=True)
    return self.shared_expert(x) + out.view(*index.shape, x.shape[1]).sum(1), logits


# -- LongCat-Flash ---------------------------------------------------------------------------------


def _longcat_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts numbered beyond those that compute give a token as it is."""
    count = self.num_routed_experts
    route = routing.route(top_k_index.clamp(max=count), count)
    first, k = self.gate_up_proj[:count], top_k_index.shape[1]
    gate, up = linear(hidden_states, route, first, k, False).chunk(2, -1)
    out = linear(self.act_fn(gate) * up, route, self.down_proj, 0, True)
    computes = (top_k_index < count).unsqueeze(-1)
    out = out.view(*top_k_index.shape, out.shape[-1])
    out = torch.where(computes, out, hidden_states.unsqueeze(1))
    return weighted_sum(out, top_k_weights).to(hidden_states.dtype)


# -- Step-3.7 --------------------------------------------------------------------------------------


def _step_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    out = slots_of_experts(
        hidden_states, top_k_index, self.num_experts,
        (self.gate_up_proj, None), self._apply_gate, (self.down_proj, None), False,
    )  # fmt: skip
    return weighted_sum(out, top_k_weights).to(hidden_states.dtype)


# -- codecs of sound, whose sizes are computed by tensors ------------------------------------------


def _codec_pad(
    self: Any,
    hidden_states: Tensor,
    paddings: tuple[Any, Any],
    mode: str = "zero",
    value: float = 0.0,
) -> Tensor:
    """Like the original, but from the convolution's own numbers: the module holds them as tensors,
    and sizes made of tensors are open until the program runs.
    """
    stride = self.conv.stride[0]
    total = (self.conv.kernel_size[0] - 1) * self.conv.dilation[0] + 1 - stride
    right = 0 if self.causal else total // 2
    extra = -hidden_states.shape[-1] % stride  # the last stride is filled up
    return type(self)._pad1d(hidden_states, (total - right, right + extra), mode, value)


_CODEC = Adapter(
    {"_get_extra_padding_for_conv1d": lambda self, hidden_states: 0, "_pad1d": _codec_pad},
    lambda m: [(m.conv, "ParametrizedConv1d" if is_parametrized(m.conv) else "Conv1d")],
)


# -- what modules note down at every call ----------------------------------------------------------


def _unnoted(name: str, **notes: Any) -> Method:
    """The method ``name`` on a copy, which starts with ``notes`` and takes those of the call."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = copy.copy(self)
        vars(own).update(notes)
        return getattr(type(self), name)(own, *args, **kwargs)

    return method


_FUNNEL = Adapter(  # the length and how far it was pooled, which nothing reads
    {
        name: _unnoted(name, pooling_mult=1)
        for name in ("init_attention_inputs", "pre_attention_pooling", "post_attention_pooling")
    },
    lambda m: (),
)
_ROTARY = Adapter(  # the table for the last length, which every length needs anew
    {"forward": _unnoted("forward", cached_sequence_length=None)}, lambda m: ()
)


ADAPTERS = {
    "ClvpRotaryPositionalEmbedding": _ROTARY,
    "EncodecConv1d": _CODEC,
    "FunnelAttentionStructure": _FUNNEL,
    "MimiConv1d": _CODEC,
    "SeamlessM4TConformerRotaryPositionalEmbedding": _ROTARY,
    "Wav2Vec2BertRotaryPositionalEmbedding": _ROTARY,
    "Wav2Vec2ConformerRotaryPositionalEmbedding": _ROTARY,
    "SwitchTransformersTop1Router": Adapter(
        {"forward": _switch_router}, lambda m: [(m.classifier, "Linear")]
    ),
    "SwitchTransformersExperts": Adapter(
        {"forward": _switch_experts},
        _numbered_parts("SwitchTransformersDenseActDense", "wi", "wo"),
    ),
    "LongcatFlashExperts": Adapter(
        {"forward": _longcat_experts}, lambda m: [(m.identity_expert, "Identity")]
    ),
    "Step3p7Experts": Adapter({"forward": _step_experts}, lambda m: ()),
    "NllbMoeTop2Router": Adapter({"forward": _nllb_router}, lambda m: [(m.classifier, "Linear")]),
    "NllbMoeExperts": Adapter(
        {"forward": _nllb_experts}, _numbered_parts("NllbMoeDenseActDense", "fc1", "fc2")
    ),
    "JetMoeMoE": Adapter({"forward": _jetmoe_experts}, _jetmoe_parts, _JETMOE_ROUTER),
    "JetMoeMoA": Adapter(
        {"map": _jetmoe_map, "reduce": _jetmoe_reduce}, _jetmoe_parts, _JETMOE_ROUTER
    ),
    "DbrxExperts": Adapter({"forward": _dbrx_experts}, lambda m: [(m.mlp, "DbrxExpertGLU")]),
    "Llama4TextMoe": Adapter(
        {"forward": _llama4_moe}, lambda m: [(m.experts, "Llama4TextExperts")]
    ),
}
"""By the name of a class in ``transformers.models``."""
