"""Sparse models of transformers, unmodified: compiled whole, routed by kernels, right to 1e-5."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

import plait
from plait.compiler.capture.adapters import adapted
from plait.compiler.capture.tree import flatten
from plait.kernels.ops import category
from plait.runtime.plan import LibraryStep

sys.path.insert(0, str(Path(__file__).parent))
import hf_models  # plain modules beside this file
import hf_models_more  # noqa: F401

pytest.importorskip("transformers")

MODELS = """
    mixtral olmoe qwen2-moe qwen3-moe deepseek-v3 gpt-oss granite-moe phimoe glm4-moe ernie4_5-moe
    jamba llama4 minimax dbrx hunyuan-moe minimax-m2 lfm2-moe exaone-moe jetmoe switch nllb-moe
    longcat-flash
""".split()
FIXED = {
    "jamba": "its recurrence is a loop over time",
    "minimax": "its attention is a loop over blocks of time",
}
"""Models whose graph depends on the length of the input: each has a program of its own."""
SOURCES = ("gemm", "rows")
"""A route begins at the product that gives its logits and ends at the next product or norm."""
Inputs = dict[str, torch.Tensor]


def resized(inputs: Inputs, rows: int, less: int) -> Inputs:
    """``rows`` rows of other tokens, each shorter by ``less``."""
    changed = {}
    for name, value in inputs.items():
        value = torch.cat([value] * rows)[:rows, : value.shape[1] - less]
        changed[name] = value.roll(1, 1) if name.endswith("input_ids") else value
    return changed


def worst(model: nn.Module, compiled: Any, inputs: Inputs) -> float:
    """The largest difference between the results, relative to the largest entry of each."""
    found = 0.0
    with torch.no_grad():
        pairs = zip(tensors(compiled(**inputs)), tensors(model(**inputs)), strict=True)
    for have, want in pairs:
        assert have.shape == want.shape and have.dtype == want.dtype
        if want.is_floating_point() and want.numel():
            found = max(found, float((have - want).abs().max() / want.abs().max()))
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in flatten(value, objects=True)[0] if isinstance(x, torch.Tensor)]


def routing(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes on the way from the routers' logits to the combined results."""
    computed = {n for n in graph.nodes if n.op == "call_function" and category(n) in SOURCES}
    for node in graph.nodes:
        if not computed.isdisjoint(node.all_input_nodes):
            computed.add(node)
    for node in graph.nodes:
        if str(node.target) == "plait.route.default":
            yield from reached(node, lambda n: computed.intersection(n.all_input_nodes))
        if str(node.target) == "plait.routed_linear.default":
            yield from reached(node, lambda n: n.users)


def reached(start: fx.Node, step: Any) -> Iterator[fx.Node]:
    """Nodes from ``start`` on, up to the next product or norm."""
    stack, seen = [start], set()
    while stack:
        node = stack.pop()
        if node not in seen and node.op == "call_function":
            seen.add(node)
            yield node
            stack += [n for n in step(node) if n.op == "output" or category(n) not in SOURCES]


@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_model_compiles_whole_and_routes_in_kernels(name: str) -> None:
    model, inputs = hf_models.MODELS[name]()
    state = {k: (id(v), v._version) for k, v in model.state_dict(keep_vars=True).items()}
    attributes = [(m, set(vars(m))) for m in model.modules()]
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        compiled(**inputs)
    assert {k: (id(v), v._version) for k, v in model.state_dict(keep_vars=True).items()} == state
    assert all("forward" not in set(vars(m)) - before for m, before in attributes)
    assert worst(model, compiled, inputs) < 1e-5
    # The second program leaves the sizes open, where the model's code allows that.
    for rows, less in ((3, 2),) if name in FIXED else ((3, 2), (2, 1), (5, 3)):
        assert worst(model, compiled, resized(inputs, rows, less)) < 1e-5
    assert len(compiled.programs) == 2
    assert not [r for r in compiled.remarks if r.pass_name == "capture" and r.kind == "missed"]
    for program in compiled.programs:
        graph, plan = program.executable.graph.graph, program.executable.plan
        nodes = {n.name for n in routing(graph)}
        assert sum("routed_linear" in n for n in nodes) >= 2
        library = {s.name for s in plan.steps if isinstance(s, LibraryStep)}
        assert not nodes & library


@pytest.mark.parametrize("name", ["mixtral", "switch", "jetmoe", "llama4", "nllb-moe"])
def test_router_logits_are_returned_as_by_the_model(name: str) -> None:
    model, inputs = hf_models.MODELS[name]()
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        want = model(**inputs, output_router_logits=True)
        have = compiled(**inputs, output_router_logits=True)
    keys = [k for k in want if "router_logits" in k]
    assert type(have) is type(want) and keys
    for key in keys:
        torch.testing.assert_close(have[key], want[key], rtol=1e-4, atol=1e-5)
    assert any("routed_linear" in str(n.target) for n in compiled.graph.graph.nodes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mixtral", "MixtralSparseMoeBlock"),
        ("llama4", "Llama4TextMoe"),
        ("jetmoe", "JetMoeMoE"),
        ("longcat-flash", "LongcatFlashMoE"),
    ],
)
def test_no_tokens_are_routed_like_others(name: str, kind: str) -> None:
    model, _ = hf_models.MODELS[name]()
    block = next(m for m in model.modules() if type(m).__name__ == kind)
    compiled = plait.compile(block, tune="off")
    with torch.no_grad():
        for shape in ((2, 5, 32), (2, 0, 32)):
            x = torch.randn(shape)
            for have, want in zip(tensors(compiled(x)), tensors(block(x)), strict=True):
                torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert not [r for r in compiled.remarks if r.pass_name == "capture" and r.kind == "missed"]
    assert all("plait.route.default" in str(p.executable.graph) for p in compiled.programs)


@pytest.mark.parametrize("capacity", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switch_drops_what_exceeds_an_experts_capacity(capacity: int, dtype: torch.dtype) -> None:
    model, inputs = hf_models.MODELS["switch"]()
    mlp = next(m for m in model.modules() if type(m).__name__ == "SwitchTransformersSparseMLP")
    mlp, twin = mlp.to(dtype), copy.deepcopy(mlp.to(dtype))
    for sparse in (mlp, twin):
        sparse.router.expert_capacity = capacity
        for expert in sparse.experts.values():  # type: ignore[operator]
            expert.wo.float()  # as the library loads it
    x = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    compiled = plait.compile(mlp, tune="off")
    with torch.no_grad():
        have, want = compiled(x), twin(x)
    assert mlp.router.classifier.weight.dtype == dtype and not hasattr(mlp.router, "input_dtype")
    assert have.dtype == want.dtype == dtype
    dropped = (want == 0).all(-1)
    assert torch.equal((have == 0).all(-1), dropped)
    if capacity < 5:
        assert dropped.sum() >= 3 * (12 - 4 * capacity)
    torch.testing.assert_close(have, want, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_a_change_of_one_experts_weight_is_followed() -> None:
    model, inputs = hf_models.MODELS["switch"]()
    compiled = plait.compile(model, tune="off")
    with torch.no_grad():
        before = compiled(**inputs)[0].clone()
        for name, weight in model.named_parameters():
            if name.endswith(("expert_1.wi.weight", "expert_2.wo.weight")):
                weight.mul_(-3.0)
        after = compiled(**inputs)[0]
        torch.testing.assert_close(after, model(**inputs)[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)
        assert len(compiled.programs) == 1  # prepared again, not captured again
        weight = nn.Parameter(torch.randn(37, 32))
        model.get_submodule("encoder.block.1.layer.1.mlp.experts.expert_0.wi").weight = weight
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-5)


def test_what_is_not_as_the_architecture_makes_it_keeps_its_own_way() -> None:
    model, _ = hf_models.MODELS["jetmoe"]()
    layers = [m for m in model.modules() if type(m).__name__ in ("JetMoeMoE", "JetMoeMoA")]

    def count() -> int:
        with adapted(model.modules()) as found:
            assert sum("forward" in vars(m.router) for m in layers) == found
            return found

    assert count() == len(layers) == 4
    hook = layers[0].input_linear.register_forward_hook(lambda *_: None)
    assert count() == 3
    hook.remove()
    layers[1].output_linear = nn.Linear(2, 2)
    assert count() == 3
    assert not any("forward" in vars(m) or "map" in vars(m) for m in model.modules())
    model.train()
    assert count() == 0
